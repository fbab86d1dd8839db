"""Entropy, L1 norms, invalid filters and scions on them, against plain loops and numbers by hand."""

import math

import pytest
import torch
from naive import DEVICES, TOLERANCE, looped_entropy
from torch import nn
from torch.nn.utils import parametrizations

from filter_grafting import MismatchError, entropy, invalid_filters, l1_norm
from filter_grafting.information import norms_by_layer
from filter_grafting.scions import internal, noise
from grafting_cifar import models


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_entropy_is_that_of_the_definition_for_any_distribution(dtype, device):
    x, subnormal = torch.randn(501, generator=torch.Generator().manual_seed(10)), torch.arange(-50, 51) * 2**-149
    for weight in x, x[:6].view(1, 2, 3), x**3, x * 1e-6 + 1, x.round(), (x > 2).float(), x / 1e20, subnormal:
        weight = weight.to(device, dtype)
        assert entropy(weight) == pytest.approx(looped_entropy(weight), abs=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scale", [1.0, 0.0078125, 96.0])
def test_a_value_on_an_edge_belongs_to_the_bin_above_and_the_maximum_to_none(dtype, scale):
    # Eleven values, each on an edge of the ten bins; the k-th smallest is there k times.
    weight = (torch.arange(-5.0, 6.0).repeat_interleave(torch.arange(1, 12)) * scale).to(dtype)
    assert entropy(weight) == pytest.approx(-sum(k / 66 * math.log(k / 66) for k in range(1, 11)), abs=1e-12)
    assert entropy(torch.full((4, 3), 0.1)) == 0, "equal values hold no information"


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.tensor([[1.0, math.nan]]), r"\(1, 2\) holds NaN or infinity"),
        (torch.empty(4, 0, 3), r"weight: got torch\.float32 of shape \(4, 0, 3\)"),
        (torch.arange(9), r"weight: got torch\.int64 of shape"),
    ],
)
def test_what_has_no_entropy_is_refused(weight, message):
    with pytest.raises(ValueError, match=message):
        entropy(weight)


class OnMps(torch.Tensor):
    """A tensor that says it is on an Apple GPU, and refuses fp64 as one does, until it is moved to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        if function is torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        if any(value is torch.float64 for value in (*args, *(kwargs or {}).values())):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return super().__torch_function__(function, types, args, kwargs)


@pytest.mark.parametrize("criterion", [entropy, l1_norm])
def test_a_weight_on_a_device_without_fp64_is_judged_as_elsewhere(criterion):
    weight = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert criterion(weight.as_subclass(OnMps)) == criterion(weight)


# L1 norms and invalid filters


def looped_norms(layer):
    """The L1 norm of each filter, filter by filter and channel by channel."""
    weight = layer.weight.detach().double()
    per_group, inputs = layer.out_channels // layer.groups, layer.in_channels // layer.groups
    norms = []
    for j in range(layer.out_channels):
        first = j // per_group * inputs
        filters = [weight[i, j % per_group] for i in range(first, first + inputs)] if layer.transposed else [weight[j]]
        norms.append(sum(abs(value) for part in filters for value in part.flatten().tolist()))
    return norms


LAYERS = (
    nn.Conv2d(6, 4, 3, groups=2, bias=False),
    nn.Conv3d(6, 4, (1, 3, 2)),
    nn.ConvTranspose2d(6, 12, 3, groups=6),
    nn.ConvTranspose3d(4, 6, 2),
    parametrizations.weight_norm(nn.Conv2d(2, 3, 3)),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_filter_norms_of_every_kind_of_convolution(layer):
    norms = norms_by_layer(nn.Sequential(layer))["0"]
    assert norms.shape == (layer.out_channels,) and not norms.requires_grad
    assert norms.tolist() == pytest.approx(looped_norms(layer), rel=1e-5)


def test_a_filter_is_invalid_below_the_threshold_not_at_it_and_without_a_number():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]).view(4, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([[0.0625, -0.0625, 0, 0], [1, 0, 0, 0]]).view(2, 4, 1, 1))
    for source in model, model.state_dict():
        assert [invalid_filters(source, x) for x in (0.0, 0.125, 0.126, 10)] == [(0, 6), (1, 6), (3, 6), (6, 6)]
    nn.init.constant_(model[1].weight, math.nan)
    assert invalid_filters(model, 0.125) == (3, 6)


def test_shortcut_convolutions_are_known_by_their_names_and_counted_apart():
    torchvisions = nn.ModuleDict({"conv": nn.Conv2d(1, 5, 1), "downsample": nn.Sequential(nn.Conv2d(1, 3, 1))})
    for model, main, shortcuts in (models.build("mobilenetv2", 10), 17_088, 456), (torchvisions, 5, 3):
        for source in model, nn.DataParallel(model).state_dict():
            assert invalid_filters(source, 0.0) == (0, main + shortcuts)
            assert invalid_filters(source, 0.0, shortcuts=False) == (0, main)
            assert invalid_filters(source, math.inf, shortcuts=True) == (shortcuts, shortcuts)


def test_convolutions_alone_are_counted_and_a_shared_one_once():
    shared = nn.Conv2d(3, 3, 1)
    others = nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Embedding(7, 8), nn.PReLU(), nn.LayerNorm((4, 4))
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv1d(3, 2, 1), *others)
    for source in model, model.state_dict():
        assert invalid_filters(source, 0.0) == (0, 5)
    with pytest.raises(MismatchError, match="no convolution found"):
        invalid_filters(nn.Linear(3, 4), 0.1)
    with pytest.raises(MismatchError, match=r"^0\..*: a weight is computed from it; count the filters of the model"):
        invalid_filters(nn.Sequential(LAYERS[-1]).state_dict(), 0.1)


# Noise and a layer's own filters as scions


def with_invalid_filters():
    """Filters 1 and 3 of the first layer are invalid; of the second, all but filter 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[[1, 3]] *= 1e-4
        model[1].weight[1:] *= 1e-4
    return model


def test_noise_is_added_to_invalid_filters_alone():
    model, before = with_invalid_filters(), with_invalid_filters().state_dict()
    with torch.device("meta"):  # whatever torch.set_default_device says
        assert noise(model, 0.5, generator=torch.Generator("cpu").manual_seed(7)) == 5
    generator = torch.Generator().manual_seed(7)
    for key, invalid in ("0.weight", [1, 3]), ("1.weight", [1, 2, 3]):
        before[key][invalid] += 0.5 * torch.randn(len(invalid), *before[key].shape[1:], generator=generator)
    torch.testing.assert_close(dict(model.state_dict()), dict(before))


@pytest.mark.parametrize(("threshold", "count"), [(0.1, 5), (1e9, 9)])
def test_the_i_th_largest_filter_is_added_to_the_i_th_smallest(threshold, count):
    model, before = with_invalid_filters(), with_invalid_filters().state_dict()
    assert internal(model, threshold) == count
    for layer, key in zip(with_invalid_filters()[:2], ("0.weight", "1.weight"), strict=True):
        norms, expected = looped_norms(layer), before[key].clone()
        ranked = sorted(range(len(norms)), key=norms.__getitem__)
        for i, j in enumerate(ranked):
            if norms[j] < threshold:
                expected[j] = before[key][j] + before[key][ranked[-1 - i]]
        torch.testing.assert_close(model.state_dict()[key], expected)


def test_a_layer_that_no_scion_can_be_grafted_onto_is_named():
    for scion in internal, lambda model: noise(model, 1.0):
        with pytest.raises(MismatchError, match=r"^0"):
            scion(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)))
