"""Noise and a layer's own filters as scions, against a recomputation filter by filter."""

import pytest
import torch
from torch import nn

from filter_grafting import MismatchError
from filter_grafting.scions import internal, noise


def make_model():
    """Filters 1 and 3 of the first layer are invalid; of the second, all but filter 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[[1, 3]] *= 1e-4
        model[1].weight[1:] *= 1e-4
    return model


def looped_norms(weight):
    return [sum(map(abs, filters.flatten().tolist())) for filters in weight]


def test_noise_is_added_to_invalid_filters_alone():
    model, before = make_model(), make_model().state_dict()
    assert noise(model, 0.5, generator=torch.Generator().manual_seed(7)) == 5
    generator = torch.Generator().manual_seed(7)
    for key, entry in before.items():
        invalid = (
            [j for j, norm in enumerate(looped_norms(entry)) if norm < 0.1] if key in ("0.weight", "1.weight") else []
        )
        drawn = torch.randn(len(invalid), *entry.shape[1:], generator=generator) if invalid else 0
        entry[invalid] += 0.5 * drawn
        torch.testing.assert_close(model.state_dict()[key], entry)


@pytest.mark.parametrize(("threshold", "count"), [(0.1, 5), (1e9, 9)])
def test_the_i_th_largest_filter_is_added_to_the_i_th_smallest(threshold, count):
    model, before = make_model(), make_model().state_dict()
    assert internal(model, threshold) == count
    for key in "0.weight", "1.weight":
        norms, expected = looped_norms(before[key]), before[key].clone()
        ranked = sorted(range(len(norms)), key=norms.__getitem__)
        for i, j in enumerate(ranked):
            if norms[j] < threshold:
                expected[j] = before[key][j] + before[key][ranked[-1 - i]]
        torch.testing.assert_close(model.state_dict()[key], expected)


def test_a_layer_that_no_scion_can_be_grafted_onto_is_named():
    for scion in internal, lambda model: noise(model, 1.0):
        with pytest.raises(MismatchError, match=r"^0"):
            scion(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)))
