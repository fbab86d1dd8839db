"""Entropy, L1 norms and invalid filters, against a recomputation in exact fractions and plain loops."""

import math
from fractions import Fraction

import pytest
import torch
from naive import looped_entropy
from torch import nn
from torch.nn.utils import parametrizations, prune

from filter_grafting import MismatchError, entropy, invalid_filters, l1_norm
from filter_grafting.information import convolutions, filter_norms, norms_by_layer
from grafting_cifar import models

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")))


def seeded(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def exact_entropy(weight, bins=10):
    """The definition in fractions: rounded in the logarithm alone."""
    values = [Fraction(value) for value in weight.detach().cpu().double().flatten().tolist()]
    low, high = min(values), max(values)
    width = (high - low) / bins
    total = 0.0
    for k in range(bins):
        count = sum(low + k * width <= value < low + (k + 1) * width for value in values)
        total -= count / len(values) * math.log(count / len(values)) if count else 0.0
    return total


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (7,), (8, 4, 3), (4, 2, 3, 3, 3), (2, 1)])
def test_entropy_is_that_of_the_definition(shape, dtype, device):
    weight = seeded(shape).to(device, dtype)
    before = weight.clone()
    assert entropy(weight) == pytest.approx(exact_entropy(weight), abs=1e-12)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bins", [1, 2, 10, 100])
def test_entropy_of_any_distribution_in_any_number_of_bins(bins):
    x, row = seeded(501, seed=bins), torch.arange(-50, 51).double()
    shapes = x, x**3, x.exp(), x.abs(), x * 1e-6 + 1, x.round(), x.sign(), (x > 2).float(), x * 1e20, x / 1e20
    extremes = (row * 2**-149).float(), (row * 1e-42).float(), (row * 6e36).float()
    for weight in (*shapes, *extremes, *(seeded(n) for n in (8191, 8192, 8193, 20_001))):
        assert entropy(weight, bins) == pytest.approx(looped_entropy(weight, bins), abs=1e-12)
        assert 0 <= entropy(weight, bins) <= math.log(bins) + 1 / math.e


def test_the_maximum_is_in_no_bin():
    # 0...10: one value on every edge; each belongs to the bin above it, and the last to none.
    assert entropy(torch.arange(11.0)) == pytest.approx(10 * -(1 / 11) * math.log(1 / 11))
    assert entropy(torch.tensor([0.0, 1.0, 1.0, 1.0])) == pytest.approx(-math.log(1 / 4) / 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, -3.0, 0.0078125, 96.0])
def test_values_on_an_edge_belong_to_the_bin_above_and_equal_ones_hold_no_information(dtype, scale):
    weight = (torch.arange(-5.0, 6.0).repeat_interleave(torch.arange(1, 12)) * scale).to(dtype)
    assert entropy(weight) == pytest.approx(exact_entropy(weight), abs=1e-12)
    assert entropy(weight[:1].expand(4, 3)) == entropy(weight[0]) == entropy(torch.zeros_like(weight)) == 0


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1)[:, ::2],
        lambda x: x[:1].expand(4, -1, -1, -1),
        nn.Parameter,
    ],
)
def test_the_layout_in_memory_does_not_matter(view):
    weight = view(seeded(6, 4, 3, 3))
    assert entropy(weight) == pytest.approx(looped_entropy(weight), abs=1e-12)
    assert l1_norm(weight) == pytest.approx(sum(abs(value) for value in weight.flatten().tolist()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_that_is_not_finite_is_an_error(value, dtype):
    weight = torch.randn(4, 3, 3, 3).to(dtype)
    weight[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match=r"\(4, 3, 3, 3\) holds NaN or infinity"):
        entropy(weight)


@pytest.mark.parametrize("weight", [torch.empty(4, 0, 3), torch.arange(9), torch.ones(3).cfloat()], ids=repr)
def test_what_has_no_entropy_is_refused(weight):
    with pytest.raises(ValueError, match=rf"weight: got {weight.dtype} of shape"):
        entropy(weight)
    with pytest.raises(ValueError, match="bins: got 0, expected at least 1"):
        entropy(torch.ones(3), 0)


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
    nn.Conv2d(6, 12, 1, groups=6),
    nn.Conv1d(6, 4, 5),
    nn.Conv3d(6, 4, (1, 3, 2)),
    nn.ConvTranspose2d(6, 12, 3, groups=6),
    nn.ConvTranspose1d(6, 3, 2, groups=3),
    nn.ConvTranspose3d(4, 6, 2),
)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_filter_norms_of_every_kind_of_convolution(layer):
    norms = norms_by_layer(nn.Sequential(layer))["0"]
    assert norms.shape == (layer.out_channels,) and not norms.requires_grad
    assert norms.tolist() == pytest.approx(looped_norms(layer), rel=1e-5)
    assert invalid_filters(layer, math.inf) == (layer.out_channels, layer.out_channels)


def test_norms_of_half_precision_weights_are_summed_in_single_precision():
    weight = torch.full((3, 100, 3, 3), 1 / 3, dtype=torch.bfloat16)
    assert filter_norms(weight).dtype == torch.float32
    assert filter_norms(weight).tolist() == pytest.approx([900 * weight[0, 0, 0, 0].item()] * 3)


def test_a_filter_is_invalid_below_the_threshold_not_at_it_and_without_a_number():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]).view(4, 1, 1, 1))
        model[1].weight.copy_(torch.tensor([[0.0625, -0.0625, 0, 0], [1, 0, 0, 0]]).view(2, 4, 1, 1))
    for source in (model, model.state_dict()):
        assert [invalid_filters(source, x) for x in (0.0, 0.125, 0.126, 10)] == [(0, 6), (1, 6), (3, 6), (6, 6)]
    nn.init.constant_(model[1].weight, math.nan)
    assert invalid_filters(model, 0.125) == (3, 6)


@pytest.mark.parametrize(
    ("name", "main", "shortcuts"), [("resnet20", 688, 0), ("mobilenetv2", 17_088, 456), ("vgg16", 4224, 0)]
)
def test_every_filter_of_the_models_is_counted(name, main, shortcuts):
    model = models.build(name, 10)
    for source in (model, model.state_dict(), nn.DataParallel(model), nn.DataParallel(model).state_dict()):
        assert invalid_filters(source, 0.0) == (0, main + shortcuts)
        assert invalid_filters(source, 0.0, shortcuts=False) == (0, main)
        assert invalid_filters(source, math.inf, shortcuts=True) == (shortcuts, shortcuts)


def test_shortcut_convolutions_are_known_by_a_part_of_their_name():
    names = {"conv": nn.Conv2d(1, 2, 1), "shortcuts": nn.Conv2d(1, 5, 1)}
    model = nn.ModuleDict({**names, "downsample": nn.Sequential(nn.Conv2d(1, 3, 1))})
    assert list(norms_by_layer(model, shortcuts=True)) == ["downsample.0"]
    assert list(norms_by_layer(model, shortcuts=False)) == ["conv", "shortcuts"]


def test_a_shared_convolution_is_counted_once():
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(3, 2, 1))
    assert list(convolutions(model)) == ["0", "2", "3"]
    for source in (model, model.state_dict()):
        assert list(norms_by_layer(source)) == ["0", "3"]
        assert invalid_filters(source, math.inf) == (5, 5)


def test_in_a_state_dict_linear_and_normalisation_weights_are_no_convolutions():
    others = nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Embedding(7, 8), nn.PReLU(), nn.LayerNorm((4, 4))
    model = nn.Sequential(nn.Conv1d(3, 4, 2), *others)
    assert invalid_filters(model.state_dict(), math.inf) == invalid_filters(model, math.inf) == (4, 4)
    for source in (nn.Linear(3, 4), nn.Linear(3, 4).state_dict(), {}):
        with pytest.raises(MismatchError, match="no convolution found"):
            invalid_filters(source, 0.1)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, lambda m: prune.l1_unstructured(m, "weight", 0.5)])
def test_computed_weights_are_counted_on_the_model_and_refused_in_a_state_dict(wrap):
    layer = wrap(nn.Conv2d(2, 3, 3))
    norms = norms_by_layer(nn.Sequential(layer))["0"]
    assert norms.tolist() == pytest.approx(layer.weight.abs().sum((1, 2, 3)).tolist())
    with pytest.raises(MismatchError, match=r"^0\..*: a weight is computed from it; count the filters of the model"):
        invalid_filters(nn.Sequential(layer).state_dict(), 0.1)
