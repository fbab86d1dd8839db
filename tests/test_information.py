"""Entropy, L1 norms and invalid filters, against a recomputation in exact fractions and plain loops."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from filter_grafting import information
from filter_grafting.errors import MismatchError
from filter_grafting.information import entropies, entropy, filter_norms, invalid_filters, norms_by_layer
from grafting_cifar import models

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(params=["cpu", "as on cuda", pytest.param("cuda", marks=needs_cuda)])
def device(request, monkeypatch):
    """The device to compute on; "as on cuda" runs the code for CUDA on the CPU."""
    if request.param == "as on cuda":
        monkeypatch.setattr(information, "_count_on_cpu", information._count)
        return "cpu"
    return request.param


def exact_entropy(weight, bins=10):
    """The definition, bin by bin with explicit edges, in fractions: rounded in the logarithm alone."""
    values = [Fraction(value) for value in weight.detach().cpu().double().flatten().tolist()]
    low, high = min(values), max(values)
    width = (high - low) / bins
    total = 0.0
    for k in range(bins):
        count = sum(low + k * width <= value < low + (k + 1) * width for value in values)
        if count:
            total -= count / len(values) * math.log(count / len(values))
    return total


def entropy_in_double(weight, bins=10):
    """The same for many values."""
    values = weight.detach().cpu().double().flatten()
    low, high = values.min(), values.max()
    total = 0.0
    for k in range(bins):
        upper = high if k == bins - 1 else low + (k + 1) * (high - low) / bins
        share = ((values >= low + k * (high - low) / bins) & (values < upper)).sum().item() / len(values)
        total -= share * math.log(share) if share else 0.0
    return total


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (7,), (5, 1, 3, 3), (8, 4, 3), (4, 2, 3, 3, 3), (2, 1)])
def test_entropy_is_that_of_the_definition(shape, dtype, device):
    torch.manual_seed(len(shape))
    weight = torch.randn(shape).to(device, dtype)
    assert entropy(weight) == pytest.approx(exact_entropy(weight), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_entropy_of_any_distribution(seed, device):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(501, generator=generator)
    weights = [
        x,
        x**3,
        x.exp(),
        x.abs(),
        x * 1e-6 + 1,
        x.round(),
        x.sign(),
        (x > 2).float(),
        x * 1e20,
        x / 1e20,
    ]
    expected = [exact_entropy(weight) for weight in weights]
    assert entropies([weight.to(device) for weight in weights]).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537, 200_001])
def test_entropy_of_layers_larger_than_a_chunk(count, device):
    weight = torch.randn(count, generator=torch.Generator().manual_seed(count)).to(device)
    assert entropy(weight) == pytest.approx(entropy_in_double(weight), abs=1e-12)


@pytest.mark.parametrize("bins", [1, 2, 3, 16, 100, 127])
def test_any_number_of_bins(bins, device):
    weight = torch.randn(401, generator=torch.Generator().manual_seed(bins)).to(device)
    assert entropy(weight, bins) == pytest.approx(exact_entropy(weight, bins), abs=1e-12)


@pytest.mark.parametrize("bins", [0, -1, 128])
def test_a_bad_number_of_bins_is_refused(bins):
    with pytest.raises(ValueError, match=rf"bins: got {bins}, expected 1 to 127"):
        entropy(torch.randn(5), bins)


def test_the_maximum_is_in_no_bin(device):
    # 0...10: one value on every edge; each belongs to the bin above it, and the last to none.
    weight = torch.arange(11.0, device=device)
    assert entropy(weight) == pytest.approx(10 * -(1 / 11) * math.log(1 / 11))
    assert entropy(torch.tensor([0.0, 1.0, 1.0, 1.0], device=device)) == pytest.approx(-math.log(1 / 4) / 4)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scale", [1.0, -3.0, 0.0078125, 96.0])
def test_values_on_an_edge_belong_to_the_bin_above(dtype, scale, device):
    weight = (torch.arange(-5.0, 6.0).repeat_interleave(torch.arange(1, 12)) * scale).to(device, dtype)
    assert entropy(weight) == pytest.approx(exact_entropy(weight), abs=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [0.0, -1.5, 3e-7])
def test_equal_values_hold_no_information(dtype, value, device):
    assert entropy(torch.full((4, 3, 3, 3), value, dtype=dtype, device=device)) == 0
    assert entropy(torch.full((), value, dtype=dtype, device=device)) == 0
    assert entropy(torch.full((1, 1, 1, 1), value, dtype=dtype, device=device)) == 0


@pytest.mark.parametrize("scale", [1e-40, 2**-149, 1e-45 * 1000, 3e38])
def test_the_smallest_and_the_largest_numbers(scale, device):
    weight = (torch.linspace(-1, 1, 301) ** 3).double().mul(scale).float()
    if scale == 2**-149:  # the smallest denormal number itself
        weight = torch.arange(-50, 51).float() * scale
    assert 0 < entropy(weight.to(device)) == pytest.approx(exact_entropy(weight), abs=1e-12)


def test_a_denormal_range_in_double_precision(device):
    if device == "cuda":
        pytest.skip("any number will do: no weights are like that")
    assert 0 <= entropy(torch.arange(11).double() * 5e-324) <= math.log(10)


def test_entropy_lies_between_0_and_the_logarithm_of_the_bins():
    for seed in range(20):
        weight = torch.randn(300, generator=torch.Generator().manual_seed(seed)) ** (seed % 5 + 1)
        assert 0 <= entropy(weight) <= math.log(10)
    uniform = torch.arange(10.0).repeat(100)
    assert entropy(torch.cat([uniform, torch.tensor([10.0])])) == pytest.approx(math.log(10), abs=0.01)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[:, :, :1, :1],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: nn.Parameter(x),
    ],
)
def test_the_layout_in_memory_does_not_matter(view, device):
    weight = view(torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1)).to(device))
    assert entropy(weight) == pytest.approx(exact_entropy(weight), abs=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_entropy_changes_nothing(dtype, device):
    weight = torch.randn(5, 4, 3, 3).to(device, dtype)
    before = weight.clone()
    entropy(weight)
    assert torch.equal(weight, before)


def test_entropies_are_those_of_the_layers_one_by_one(device):
    torch.manual_seed(0)
    weights = [torch.randn(n, 3, 3, 3, device=device).to(dtype) for n in (1, 8, 3000) for dtype in FLOATS]
    one_by_one = [entropy(weight) for weight in weights]
    assert entropies(weights).tolist() == pytest.approx(one_by_one, abs=1e-12)
    assert entropies(weights).dtype == torch.float64
    assert entropies([]).tolist() == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_value_that_is_not_finite_is_an_error(value, dtype, device):
    weight = torch.randn(4, 3, 3, 3).to(device, dtype)
    weight[1, 2, 0, 1] = value
    with pytest.raises(ValueError, match=r"\(4, 3, 3, 3\) holds NaN or infinity"):
        entropy(weight)
    good = torch.randn(5, 3, device=device)
    result = entropies([good, weight, good]).tolist()
    assert math.isnan(result[1])
    assert result[0] == result[2] == pytest.approx(entropy(good), abs=1e-12)


@pytest.mark.parametrize(
    "weight", [torch.empty(0), torch.empty(4, 0, 3, 3), torch.arange(9), torch.ones(3).cfloat()], ids=repr
)
def test_what_has_no_entropy_is_refused(weight):
    with pytest.raises(ValueError, match=rf"weight: got {weight.dtype} of shape"):
        entropy(weight)


@needs_cuda
def test_entropies_do_not_wait_for_the_device():
    weights = [torch.randn(n, 3, 3, 3, device="cuda", dtype=dtype) for n in (4, 5000) for dtype in FLOATS]
    entropies(weights)
    torch.cuda.set_sync_debug_mode("error")
    try:
        entropies(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# L1 norms and invalid filters


def looped_norms(convolution):
    """The L1 norm of each filter, filter by filter and channel by channel."""
    weight = convolution.weight.detach().double()
    norms = [0.0] * convolution.out_channels
    per_group = convolution.out_channels // convolution.groups
    for j in range(convolution.out_channels):
        if convolution.transposed:
            inputs = convolution.in_channels // convolution.groups
            group = j // per_group
            for i in range(group * inputs, (group + 1) * inputs):
                norms[j] += sum(abs(value) for value in weight[i, j % per_group].flatten().tolist())
        else:
            norms[j] = sum(abs(value) for value in weight[j].flatten().tolist())
    return norms


CONVOLUTIONS = (
    nn.Conv2d(6, 4, 3),
    nn.Conv2d(6, 4, 3, groups=2, bias=False),
    nn.Conv2d(6, 6, 3, groups=6),
    nn.Conv2d(6, 12, 1, groups=6),
    nn.Conv1d(6, 4, 5),
    nn.Conv3d(6, 4, (1, 3, 2)),
    nn.ConvTranspose2d(6, 4, 3),
    nn.ConvTranspose2d(6, 4, 3, groups=2),
    nn.ConvTranspose2d(6, 12, 3, groups=6),
    nn.ConvTranspose1d(6, 3, 2, groups=3),
    nn.ConvTranspose3d(4, 6, 2, groups=2),
)


@pytest.mark.parametrize("convolution", CONVOLUTIONS, ids=str)
def test_filter_norms_of_every_kind_of_convolution(convolution):
    norms = filter_norms(convolution.weight, convolution.transposed, convolution.groups)
    assert norms.shape == (convolution.out_channels,) and not norms.requires_grad
    assert norms.tolist() == pytest.approx(looped_norms(convolution), rel=1e-5)
    assert norms_by_layer(nn.Sequential(convolution))["0"].tolist() == norms.tolist()
    assert norms_by_layer(convolution)[""].tolist() == norms.tolist()
    assert invalid_filters(convolution, math.inf) == (convolution.out_channels, convolution.out_channels)


@pytest.mark.parametrize("dtype", FLOATS)
def test_norms_of_half_precision_weights_are_summed_in_single_precision(dtype):
    weight = torch.full((3, 100, 3, 3), 1 / 3, dtype=dtype)
    weight[1] = 0
    norms, norm = filter_norms(weight), 900 * weight[0, 0, 0, 0].item()
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms.tolist() == pytest.approx([norm, 0, norm])


def test_a_filter_is_invalid_below_the_threshold_not_at_it():
    network = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([0.5, -0.25, 0.0, 0.125]).view(4, 1, 1, 1))
        network[1].weight.copy_(torch.tensor([[0.0625, -0.0625, 0, 0], [1, 0, 0, 0]]).view(2, 4, 1, 1))
    for source in (network, network.state_dict()):
        assert invalid_filters(source, 0.125) == (1, 6)
        assert invalid_filters(source, 0.126) == (3, 6)
        assert invalid_filters(source, 0.0) == (0, 6)
        assert invalid_filters(source, 10) == (6, 6)


@pytest.mark.parametrize(
    ("name", "main", "shortcuts"),
    [("resnet20", 688, 0), ("resnet32", 1136, 0), ("mobilenetv2", 17_088, 456), ("vgg16", 4224, 0)],
)
def test_every_filter_of_the_models_is_counted(name, main, shortcuts):
    network = models.build(name, 10)
    for source in (network, network.state_dict()):
        assert invalid_filters(source, 0.0) == (0, main + shortcuts)
        assert invalid_filters(source, 0.0, shortcuts=False) == (0, main)
        assert invalid_filters(source, math.inf, shortcuts=True) == (shortcuts, shortcuts)


def test_shortcut_convolutions_are_known_by_a_part_of_their_name():
    names = {"conv": nn.Conv2d(1, 2, 1), "shortcuts": nn.Conv2d(1, 5, 1)}
    network = nn.ModuleDict({**names, "downsample": nn.Sequential(nn.Conv2d(1, 3, 1))})
    assert list(norms_by_layer(network, shortcuts=True)) == ["downsample.0"]
    assert list(norms_by_layer(network, shortcuts=False)) == ["conv", "shortcuts"]


def test_a_shared_convolution_is_counted_once():
    shared = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(shared, nn.ReLU(), shared, nn.Conv2d(3, 2, 1))
    for source in (network, network.state_dict()):
        assert list(norms_by_layer(source)) == ["0", "3"]
        assert invalid_filters(source, math.inf) == (5, 5)


def test_in_a_state_dict_linear_and_normalisation_weights_are_no_convolutions():
    others = nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Embedding(7, 8), nn.PReLU(), nn.LayerNorm((4, 4))
    network = nn.Sequential(nn.Conv1d(3, 4, 2), *others)
    assert invalid_filters(network.state_dict(), math.inf) == invalid_filters(network, math.inf) == (4, 4)


def test_without_a_convolution_there_is_nothing_to_count():
    for source in (nn.Linear(3, 4), nn.Linear(3, 4).state_dict(), {}):
        with pytest.raises(MismatchError, match="no convolution found"):
            invalid_filters(source, 0.1)


@needs_cuda
def test_norms_on_cuda():
    network = models.build("mobilenetv2", 10)
    expected = norms_by_layer(network)
    for name, norms in norms_by_layer(network.cuda()).items():
        torch.testing.assert_close(norms.cpu(), expected[name])
