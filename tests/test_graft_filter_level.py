"""Grafting filter by filter, against a recomputation weight by weight."""

import pytest
from naive import assert_blended, assert_refused, chain, looped_entropy, pair, snapshot
from torch import nn

from filter_grafting import graft
from grafting_cifar import models
from grafting_cifar.models import vgg


def looped_filter_level(own, neighbour, layers, classifier):
    """(coefficients, blended state dict), weight by weight. layers: (convolution, batch norm) names."""
    blended = {key: entry.clone() for key, entry in own.items()}
    coefficients, before = {}, [1.0] * own[f"{layers[0][0]}.weight"].shape[1]
    for convolution, norm in layers:
        scales = zip(own[f"{norm}.weight"].tolist(), neighbour[f"{norm}.weight"].tolist(), strict=True)
        shares = [abs(mine) / (abs(mine) + abs(other)) if mine or other else 0.5 for mine, other in scales]
        for j, share in enumerate(shares):
            of_norm = (f"{norm}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var"))
            for key in (f"{convolution}.bias", *of_norm):
                if key in own:
                    blended[key][j] = share * own[key][j] + (1 - share) * neighbour[key][j]
            for i, factor in enumerate(before):
                key, both = f"{convolution}.weight", share * factor
                blended[key][j, i] = both * own[key][j, i] + (1 - both) * neighbour[key][j, i]
        coefficients[convolution], before = shares, shares
    if classifier:
        key = f"{classifier}.weight"
        positions = own[key].shape[1] // len(before)
        for column in range(own[key].shape[1]):
            share = before[column // positions]
            blended[key][:, column] = share * own[key][:, column] + (1 - share) * neighbour[key][:, column]
    return coefficients, blended


PAIRS = [("0", "1"), ("3", "4")]
VGG = [(f"features.{k}", f"features.{k + 1}") for k in (0, 3, 7, 11, 14)]


@pytest.mark.parametrize(
    ("make", "layers", "classifier"),
    [
        (lambda: chain(positions=6), PAIRS, "5"),
        (lambda: chain(bias=False, filters=(5,)), PAIRS[:1], "2"),
        (lambda: chain(convolution=nn.Conv3d, norm=nn.BatchNorm3d)[:-1], PAIRS, None),
        (lambda: vgg.VGG(((4, 4), (6,), (8, 8)), 10), VGG, "classifier"),
    ],
)
def test_filter_level_blends_weight_by_weight(make, layers, classifier):
    model, neighbour = pair(make)
    neighbour[f"{layers[0][1]}.weight"][:2] = model.state_dict()[f"{layers[0][1]}.weight"][1:3] = 0
    own = snapshot(model)
    expected, blended = looped_filter_level(own, neighbour, layers, classifier)
    found = graft(model, neighbour, level="filter")
    assert list(found) == list(expected) and expected[layers[0][0]][:3] == [1, 0.5, 0]
    for name, layer in found.items():
        assert layer.coefficient.tolist() == pytest.approx(expected[name], abs=1e-6)
        assert layer.own_entropy == pytest.approx(looped_entropy(own[f"{name}.weight"]))
    assert_blended(model, blended)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.build("resnet20", 10), "ResNet: level 'filter' needs all convolutions in one"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)), "^0: level 'filter' needs a"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), "^0: level 'filter'"),
        # Channels that are not the filters of the convolution before.
        (lambda: nn.Sequential(*chain()[:2], nn.PixelShuffle(2), *chain(1)[:2]), "^3: level 'filter'"),
        (lambda: nn.Sequential(*chain()[:-1], nn.Linear(16, 3)), "^5: 16 inputs do not divide by the 6 filters before"),
    ],
)
def test_what_is_no_chain_is_refused_at_filter_level(make, message):
    assert_refused(*pair(make), message, level="filter")


def test_what_is_excluded_stays_own_at_filter_level():
    model, neighbour = pair(chain)
    own = snapshot(model)
    _, blended = looped_filter_level(own, neighbour, PAIRS, None)
    del neighbour["5.weight"], neighbour["0.bias"]
    graft(model, neighbour, level="filter", exclude=("5.*", "0.bias"))
    assert_blended(model, {**blended, "0.bias": own["0.bias"]})
    why = r"^1\.weight is excluded or parametrized: level 'filter' needs it"
    assert_refused(model, neighbour, why, level="filter", exclude=("5.*", "0.bias", "1.weight"))
