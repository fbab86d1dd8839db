"""Coefficients and the blend, against a recomputation entry by entry; and whatever must not be blended."""

import copy
import math
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torchvision import models as zoo

from filter_grafting.errors import MismatchError
from filter_grafting.grafting import blend, check_alike, coefficient, compare, graft
from filter_grafting.information import convolutions, invalid_filters
from grafting_cifar import models
from grafting_cifar.models import vgg

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def looped_entropy(weight, bins=10):
    values = weight.detach().cpu().double().flatten()
    low, high = values.min(), values.max()
    total = 0.0
    for k in range(bins):
        upper = high if k == bins - 1 else low + (k + 1) * (high - low) / bins
        share = ((values >= low + k * (high - low) / bins) & (values < upper)).sum().item() / len(values)
        total -= share * math.log(share) if share else 0.0
    return total


def looped_coefficient(own, neighbour, a, c):
    return round(a / math.pi * math.atan(c * (looped_entropy(own) - looped_entropy(neighbour))) + 0.5, 2)


def looped_graft(network, neighbour, a=0.4, c=500):
    """(coefficients, blended state dict): one pass over the entries, in double precision."""
    own = network.state_dict()
    names = [name for name, module in network.named_modules(remove_duplicate=False) if isinstance(module, KINDS)]
    weights = [f"{name}.weight" if name else "weight" for name in names]
    share, coefficients, blended = None, {}, {}
    for key in [weights[0], *own]:
        if key in weights:
            share = looped_coefficient(own[key], neighbour[key], a, c)
            coefficients[names[weights.index(key)]] = share
        entry, other = own[key].cpu(), neighbour[key].cpu()
        mixed = share * entry.double() + (1 - share) * other.double()
        blended[key] = mixed.to(entry.dtype) if entry.is_floating_point() else entry
    return coefficients, blended


def assert_blended(network, expected):
    for key, entry in network.state_dict().items():
        tolerance = TOLERANCE.get(entry.dtype, 0)
        torch.testing.assert_close(entry.cpu(), expected[key], rtol=tolerance, atol=tolerance, msg=key)


def randomised(network, seed=0):
    """Every floating-point entry random (batch norms start out all alike), running variances positive."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, entry in network.state_dict().items():
            if entry.is_floating_point():
                values = torch.randn(entry.shape, generator=generator) * torch.rand(1, generator=generator)
                entry.copy_(values.abs() if key.endswith("running_var") else values)
            else:
                entry.random_(100, generator=generator)
    return network


def pair(make, **options):
    """A network, and its neighbour's state dict."""
    return randomised(make(), 1).to(**options), randomised(make(), 2).to(**options).state_dict()


def snapshot(network):
    return {key: entry.clone() for key, entry in network.state_dict().items()}


def assert_untouched(network, before):
    for key, entry in network.state_dict().items():
        assert torch.equal(entry.nan_to_num(1e9), before[key].nan_to_num(1e9)), key


def mixture():
    """Convolutions of every kind, and entries of every kind between them."""
    return nn.Sequential(
        nn.Linear(3, 4),
        nn.Conv2d(4, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8, bias=False),
        nn.PReLU(8),
        nn.Sequential(nn.Conv2d(8, 4, 1, groups=2), nn.GroupNorm(2, 4)),
        nn.ConvTranspose2d(4, 6, 2, groups=2),
        nn.BatchNorm2d(6, affine=False),
        nn.Conv1d(6, 5, 3),
        nn.BatchNorm1d(5, track_running_stats=False),
        nn.Conv3d(5, 4, 2),
        nn.ConvTranspose1d(4, 3, 2),
        nn.ConvTranspose3d(3, 2, 2, bias=False),
        nn.LayerNorm(5),
        nn.Linear(5, 3),
    )


# The coefficient


@pytest.mark.parametrize("seed", range(5))
def test_coefficient_follows_the_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    own, neighbour, a, c = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    own, neighbour, c = own * 2.3, neighbour * 2.3, c * 10
    angle = math.atan2(c * (own - neighbour), 1)
    assert coefficient(own, neighbour, a, c) == float(f"{0.5 + a * angle / math.pi:.2f}")
    assert coefficient(own, neighbour, a, c) + coefficient(neighbour, own, a, c) == pytest.approx(1)


def test_coefficient_at_its_limits():
    assert coefficient(2, 1) == 0.7 and coefficient(1, 2) == 0.3
    assert coefficient(1.5, 1.5) == 0.5
    assert coefficient(2, 1, a=0) == coefficient(2, 1, c=0) == 0.5
    assert coefficient(2, 1, a=1, c=1e6) == 1 and coefficient(1, 2, a=1, c=1e6) == 0
    assert coefficient(2, 1, a=0.2) == 0.6
    assert coefficient(1e308, 0, c=1e308) == 0.7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": -0.1}, "a: got -0.1, expected a value from 0 to 1"),
        ({"a": 1.01}, "a: got 1.01"),
        ({"a": math.nan}, "a: got nan"),
        ({"c": -1}, "c: got -1, expected a finite value of at least 0"),
        ({"c": math.inf}, "c: got inf"),
        ({"c": math.nan}, "c: got nan"),
        ({"own_entropy": math.nan}, "entropies: got nan and 1"),
        ({"neighbour_entropy": math.inf}, "entropies: got 1 and inf"),
    ],
)
def test_a_value_out_of_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        coefficient(**{"own_entropy": 1, "neighbour_entropy": 1, **arguments})


# Layer level


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("a", "c"), [(0.4, 500), (1, 3), (0.2, 2)])
def test_graft_blends_every_entry_with_the_coefficient_of_its_convolution(a, c, dtype, device):
    network, neighbour = pair(mixture, device=device, dtype=dtype)
    coefficients, blended = looped_graft(network, neighbour, a, c)
    assert len(set(coefficients.values())) > 1
    assert graft(network, neighbour, a, c) == coefficients
    assert_blended(network, blended)


@pytest.mark.parametrize("name", ["resnet20", "resnet32_leaky", "mobilenetv2"])
def test_graft_of_the_cifar_models(name):
    network, neighbour = pair(lambda: models.build(name, 10))
    coefficients, blended = looped_graft(network, neighbour)
    assert graft(network, neighbour) == coefficients
    assert_blended(network, blended)


def test_compare_and_blend_are_the_halves_of_graft():
    network, neighbour = pair(mixture)
    other = copy.deepcopy(network)
    before = snapshot(other)
    layers = compare(other, neighbour, 0.3, 2)
    assert_untouched(other, before)
    for name, (own_entropy, neighbour_entropy, share) in layers.items():
        assert own_entropy == pytest.approx(looped_entropy(before[f"{name}.weight"]))
        assert neighbour_entropy == pytest.approx(looped_entropy(neighbour[f"{name}.weight"]))
        assert share == coefficient(own_entropy, neighbour_entropy, 0.3, 2)
    blend(other, neighbour, {name: layer.coefficient for name, layer in layers.items()})
    assert graft(network, neighbour, 0.3, 2) == {name: layer.coefficient for name, layer in layers.items()}
    assert_blended(other, network.state_dict())


@pytest.mark.parametrize("a", [0, 0.4])
def test_without_a_difference_the_two_are_averaged(a):
    network, neighbour = pair(mixture)
    expected = {key: (own + neighbour[key]) / 2 for key, own in snapshot(network).items()}
    assert set(graft(network, neighbour, a, c=0 if a else 500).values()) == {0.5}
    for key, entry in network.state_dict().items():
        if entry.is_floating_point():
            torch.testing.assert_close(entry, expected[key])


def test_at_a_of_1_the_poorer_layer_is_replaced_and_the_richer_one_kept():
    network, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)))
    with torch.no_grad():
        network[0].weight.fill_(0.25)
        neighbour["1.weight"].fill_(0.25)
    before = snapshot(network)
    assert graft(network, neighbour, a=1, c=1e9) == {"0": 0, "1": 1}
    state = network.state_dict()
    assert all(torch.equal(state[f"0.{key}"], neighbour[f"0.{key}"]) for key in ("weight", "bias"))
    assert all(torch.equal(state[f"1.{key}"], before[f"1.{key}"]) for key in ("weight", "bias"))


def test_grafting_a_network_onto_itself_changes_nothing():
    network, _ = pair(mixture)
    before = snapshot(network)
    assert set(graft(network, network.state_dict()).values()) == {0.5}
    assert_blended(network, before)


def test_entries_before_the_first_convolution_take_its_coefficient():
    first = nn.Linear(2, 2), nn.BatchNorm1d(2)
    network, neighbour = pair(lambda: nn.Sequential(*copy.deepcopy(first), nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3)))
    neighbour["2.weight"].fill_(0.5)
    own = snapshot(network)
    assert graft(network, neighbour)["2"] == 0.7
    for key in ("0.weight", "0.bias", "1.weight", "1.running_mean", "2.weight"):
        torch.testing.assert_close(network.state_dict()[key], 0.7 * own[key] + 0.3 * neighbour[key])


def test_a_parameter_of_the_network_itself_comes_before_its_layers():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.last = nn.Conv2d(4, 4, 3)
            self.token = nn.Parameter(torch.zeros(5))

    network, neighbour = pair(Network)
    coefficients, blended = looped_graft(network, neighbour)
    assert next(iter(network.state_dict())) == "token"
    assert graft(network, neighbour) == coefficients
    assert_blended(network, blended)


def test_a_network_that_is_one_convolution():
    network, neighbour = pair(lambda: nn.Conv2d(3, 4, 3))
    coefficients, blended = looped_graft(network, neighbour)
    assert graft(network, neighbour) == coefficients and list(coefficients) == [""]
    assert_blended(network, blended)


def test_integer_and_boolean_buffers_are_left_alone():
    network, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    for state in (network.state_dict(), neighbour):
        state["1.num_batches_tracked"].fill_(3 if state is neighbour else 7)
    network.register_buffer("mask", torch.tensor([True, False]))
    graft(network, {"mask": torch.tensor([False, False]), **neighbour})
    assert network[1].num_batches_tracked == 7
    assert network.mask.tolist() == [True, False]


def test_a_convolution_under_two_names_is_blended_once():
    def make():
        shared, norm = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)
        return nn.Sequential(shared, norm, nn.Sequential(shared, norm), nn.Conv2d(3, 2, 1))

    network, neighbour = pair(make)
    coefficients, blended = looped_graft(network, neighbour)
    assert graft(network, neighbour) == coefficients and list(coefficients) == ["0", "2.0", "3"]
    assert_blended(network, blended)
    assert network[0] is network[2][0]


@pytest.mark.parametrize("formats", [(True, True), (True, False), (False, True)])
def test_channels_last_weights_are_blended_in_place(formats):
    own_format, other_format = (torch.channels_last if last else torch.contiguous_format for last in formats)
    network, neighbour = pair(lambda: models.build("resnet20", 10))
    network.to(memory_format=own_format)
    neighbour = {
        key: entry.contiguous(memory_format=other_format) if entry.dim() == 4 else entry
        for key, entry in neighbour.items()
    }
    places = {key: (entry.data_ptr(), entry.stride()) for key, entry in network.state_dict().items()}
    coefficients, blended = looped_graft(network, neighbour)
    assert graft(network, neighbour) == coefficients
    assert_blended(network, blended)
    assert {key: (entry.data_ptr(), entry.stride()) for key, entry in network.state_dict().items()} == places


def test_the_neighbour_is_left_as_it_is_and_so_are_the_parameters_themselves():
    network, neighbour = pair(mixture)
    before, parameters = {key: entry.clone() for key, entry in neighbour.items()}, list(network.parameters())
    graft(network, neighbour)
    assert all(torch.equal(neighbour[key], before[key]) for key in before)
    assert all(new is old and new.requires_grad for new, old in zip(network.parameters(), parameters, strict=True))


def test_types_may_be_mixed_within_a_network():
    def make():
        network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        network[0].half()
        network[2].double()
        network[3].bfloat16()
        return network

    network, neighbour = pair(make)
    coefficients, blended = looped_graft(network, neighbour)
    assert graft(network, neighbour) == coefficients
    assert_blended(network, blended)


def test_layers_without_information_and_of_one_element():
    last = nn.Conv2d(2, 1, 1, bias=False)
    network, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 3), copy.deepcopy(last)))
    with torch.no_grad():
        network[1].weight.zero_()
        neighbour["1.weight"].fill_(1e-42)
    coefficients, blended = looped_graft(network, neighbour)
    assert graft(network, neighbour) == coefficients
    assert coefficients["0"] == coefficients["1"] == 0.5
    assert_blended(network, blended)


def test_what_modules_keep_beside_tensors_is_left_alone():
    class Remembering(nn.Conv2d):
        def get_extra_state(self):
            return {"note": self.note}

        def set_extra_state(self, state):
            self.note = state["note"]

    network, neighbour = nn.Sequential(Remembering(1, 2, 3)), nn.Sequential(Remembering(1, 2, 3))
    network[0].note, neighbour[0].note = "mine", "yours"
    graft(network, neighbour.state_dict())
    assert network[0].note == "mine"
    with pytest.raises(MismatchError, match=r"0\._extra_state: in the network a dict, in its neighbour \(2,\)"):
        graft(network, {**neighbour.state_dict(), "0._extra_state": torch.zeros(2)})


# What cannot be blended: the first offending entry is named, with both sides, and nothing has changed


def renamed(state, old, new):
    return {new if key == old else key: entry for key, entry in state.items()}


def filled(state, key, value):
    entry = state[key].clone()
    entry.view(-1)[-1] = value
    return {**state, key: entry}


HERE, THERE = "in the network", "in its neighbour"
OF_FOUR = "(4,) torch.float32"
NOT_FINITE = "its neighbour holds a value that is not finite"


@pytest.mark.parametrize("level", ["layer", "filter"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: renamed(s, "0.bias", "0.beta"), f"0.bias: {HERE} {OF_FOUR}, {THERE} missing"),
        (lambda s: {**s, "head": torch.ones(2, 3)}, f"head: {HERE} missing, {THERE} (2, 3) torch.float32"),
        (lambda s: {**s, 7: 1}, f"7: {HERE} missing, {THERE} a int"),
        (lambda s: {**s, "1.bias": torch.ones(3)}, f"1.bias: {HERE} {OF_FOUR}, {THERE} (3,) torch.float32"),
        (
            lambda s: {**s, "1.bias": s["1.bias"].double()},
            f"1.bias: {HERE} {OF_FOUR}, {THERE} (4,) torch.float64",
        ),
        (
            lambda s: {**s, "1.num_batches_tracked": torch.tensor(1.0)},
            f"1.num_batches_tracked: {HERE} () torch.int64, {THERE} () torch.float32",
        ),
        (
            lambda s: {**s, "0.weight": torch.ones(4, 2, 1, 1), "1.bias": None},
            f"0.weight: {HERE} (4, 2, 3, 3) torch.float32, {THERE} (4, 2, 1, 1) torch.float32",
        ),
        (lambda s: {**s, "1.weight": None}, f"1.weight: {HERE} {OF_FOUR}, {THERE} a NoneType"),
        (lambda s: {**s, "1.weight": [1.0]}, f"1.weight: {HERE} {OF_FOUR}, {THERE} a list"),
        (lambda s: {}, f"0.weight: {HERE} (4, 2, 3, 3) torch.float32, {THERE} missing"),
        (lambda s: list(s.values()), "the neighbour is a list: expected its state dict"),
        (lambda s: mixture(), "the neighbour is a Sequential: expected its state dict"),
        (lambda s: filled(s, "0.weight", math.nan), f"0.weight: {NOT_FINITE}"),
        (lambda s: filled(s, "0.bias", math.inf), f"0.bias: {NOT_FINITE}"),
        (lambda s: filled(s, "1.running_var", -math.inf), f"1.running_var: {NOT_FINITE}"),
        (lambda s: filled(filled(s, "5.weight", math.nan), "1.bias", math.nan), f"1.bias: {NOT_FINITE}"),
    ],
)
def test_a_neighbour_that_cannot_be_blended_is_refused(damage, message, level):
    network, neighbour = pair(chain)
    before = snapshot(network)
    with pytest.raises(MismatchError) as error:
        graft(network, damage(neighbour), level=level)
    assert str(error.value) == message
    assert_untouched(network, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_network_that_is_not_finite_is_named(value, dtype):
    network, neighbour = pair(chain, dtype=dtype)
    with torch.no_grad():
        network[1].running_mean[2] = value
    before = snapshot(network)
    with pytest.raises(MismatchError, match=r"^1\.running_mean: the network holds a value that is not finite$"):
        graft(network, filled(neighbour, "3.weight", value))
    assert_untouched(network, before)


@pytest.mark.parametrize("bad", [{"a": 2}, {"a": math.nan}, {"c": -1}, {"level": "network"}])
def test_bad_settings_leave_the_network_untouched(bad):
    network, neighbour = pair(chain)
    before = snapshot(network)
    with pytest.raises(ValueError, match=f"{next(iter(bad))}: got"):
        graft(network, neighbour, **bad)
    with pytest.raises(ValueError, match="level: got"):
        blend(network, neighbour, {"0": 0.5}, level="networks")
    assert_untouched(network, before)


def test_a_network_without_a_convolution_is_refused():
    network = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    before = snapshot(network)
    for level in ("layer", "filter"):
        with pytest.raises(MismatchError, match="Sequential has no convolution"):
            graft(network, copy.deepcopy(network).state_dict(), level=level)
    assert_untouched(network, before)


def test_a_parametrized_or_an_empty_convolution_is_named():
    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 3)))
    before = snapshot(network)
    with pytest.raises(MismatchError, match=r"1\.weight is in no state dict \(is it parametrized\?\)"):
        graft(network, copy.deepcopy(network).state_dict())
    assert_untouched(network, before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising an empty tensor has no effect
        network = nn.Sequential(nn.Conv2d(2, 0, 3))
    with pytest.raises(MismatchError, match=r"0\.weight is \(0, 2, 3, 3\) torch\.float32: expected"):
        graft(network, copy.deepcopy(network).state_dict())


def test_check_alike_accepts_any_order_of_the_entries():
    state = mixture().state_dict()
    check_alike(state, dict(reversed(state.items())))


# Filter level


def chain(inputs=2, filters=(4, 6), positions=1, bias=True, convolution=nn.Conv2d, norm=nn.BatchNorm2d):
    """0 convolution, 1 batch norm, 2 ReLU, 3 convolution, 4 batch norm ..., then pooling and a classifier."""
    layers = []
    for outputs in filters:
        layers += [convolution(inputs, outputs, 3, padding=1, bias=bias), norm(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers[:-1], nn.Linear(inputs * positions, 3))


def looped_filter_level(own, neighbour, layers, classifier):
    """(coefficients, blended state dict), weight by weight. layers: (convolution, batch norm) names."""
    blended = {key: entry.clone() for key, entry in own.items()}
    coefficients, before = {}, [1.0] * own[f"{layers[0][0]}.weight"].shape[1]
    for convolution, norm in layers:
        shares = []
        for mine, other in zip(own[f"{norm}.weight"].tolist(), neighbour[f"{norm}.weight"].tolist(), strict=True):
            shares.append(abs(mine) / (abs(mine) + abs(other)) if mine or other else 0.5)
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "layers", "classifier"),
    [
        (chain, [("0", "1"), ("3", "4")], "5"),
        (lambda: chain(positions=6), [("0", "1"), ("3", "4")], "5"),
        (lambda: chain(bias=False, filters=(5,)), [("0", "1")], "2"),
        (lambda: chain(convolution=nn.Conv1d, norm=nn.BatchNorm1d), [("0", "1"), ("3", "4")], "5"),
        (lambda: chain(convolution=nn.Conv3d, norm=nn.BatchNorm3d), [("0", "1"), ("3", "4")], "5"),
        (lambda: chain()[:-1], [("0", "1"), ("3", "4")], None),
        (
            lambda: nn.ModuleDict({"stem": nn.Linear(2, 2), "body": chain()[:-1], "head": nn.Linear(12, 3)}),
            [("body.0", "body.1"), ("body.3", "body.4")],
            "head",
        ),
    ],
)
def test_filter_level_blends_weight_by_weight(make, layers, classifier, device):
    network, neighbour = pair(make)
    neighbour[f"{layers[0][1]}.weight"][0] = 0
    expected, blended = looped_filter_level(snapshot(network), neighbour, layers, classifier)
    network.to(device)
    coefficients = graft(network, neighbour, level="filter")
    assert list(coefficients) == list(expected)
    for name, shares in coefficients.items():
        assert shares.tolist() == pytest.approx(expected[name], abs=1e-6)
    assert_blended(network, blended)


def test_filter_level_on_vgg():
    network, neighbour = pair(lambda: vgg.VGG(((4, 4), (6,), (8, 8)), 10))
    convs = [name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    layers = [(name, f"features.{int(name.removeprefix('features.')) + 1}") for name in convs]
    expected, blended = looped_filter_level(snapshot(network), neighbour, layers, "classifier")
    coefficients = graft(network, neighbour, level="filter")
    assert {name: pytest.approx(shares.tolist(), abs=1e-6) for name, shares in coefficients.items()} == expected
    assert_blended(network, blended)


def test_filters_without_a_scale_are_averaged():
    network, neighbour = pair(chain)
    with torch.no_grad():
        network[1].weight[:2] = 0
        neighbour["1.weight"][1:3] = 0
    shares = graft(network, neighbour, level="filter")["0"].tolist()
    assert shares[:3] == [0, 0.5, 1]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_filter_level_in_every_precision(dtype):
    network, neighbour = pair(chain, dtype=dtype)
    layers = [("0", "1"), ("3", "4")]
    own, other = ({key: entry.double() for key, entry in s.items()} for s in (network.state_dict(), neighbour))
    _, blended = looped_filter_level(own, other, layers, "5")
    coefficients = graft(network, neighbour, level="filter")
    assert {shares.dtype for shares in coefficients.values()} == {torch.promote_types(dtype, torch.float32)}
    assert_blended(network, {key: entry.to(network.state_dict()[key].dtype) for key, entry in blended.items()})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: models.build("resnet20", 10), "ResNet: level 'filter' needs all convolutions in one"),
        (lambda: nn.Conv2d(3, 4, 3), "Conv2d: level 'filter' needs"),
        (lambda: nn.ModuleList([nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)]), "ModuleList: level 'filter' needs"),
        (
            lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
            "^0: level 'filter' needs a",
        ),
        (lambda: chain()[:4], "^3: level 'filter'"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), "^0: level 'filter'"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4)), "^0: level 'filter'"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)), "^0: level 'filter'"),
        (lambda: shuffled(), "^3: level 'filter'"),
        (lambda: repeated(), "^2: level 'filter'"),
        (
            lambda: nn.Sequential(*chain()[:-1], nn.Linear(16, 3)),
            "^5: 16 inputs do not divide by the 6 filters",
        ),
    ],
)
def test_what_is_no_chain_is_refused_at_filter_level(make, message):
    network, neighbour = pair(make)
    before = snapshot(network)
    with pytest.raises(MismatchError, match=message):
        graft(network, neighbour, level="filter")
    assert_untouched(network, before)


def shuffled():
    """A chain in which the next convolution's channels are not the filters of the one before."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.PixelShuffle(2), nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
    )


def repeated():
    convolution = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(4), convolution, nn.BatchNorm2d(4))


# The classification models of torchvision

QUICK = {
    "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "mnasnet0_5", "mobilenet_v2",
    "mobilenet_v3_small", "regnet_x_400mf", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5",
    "squeezenet1_0", "squeezenet1_1",
}  # fmt: skip


HUGE = {
    "convnext_large",
    "regnet_y_128gf",
    "vit_h_14",
    "vit_l_16",
    "vit_l_32",
}  # in bfloat16, to need less memory


def without_initialisation(make):
    """What make() returns, with weights drawn uniformly: torchvision's own initialisation takes minutes."""
    initialisers = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in initialisers:
            patch.setattr(nn.init, name, lambda tensor, *arguments, **options: tensor)
        network = make()
    with torch.no_grad():
        for entry in network.state_dict().values():
            if entry.is_floating_point():
                entry.uniform_(-0.1, 0.1)
    return network


def assert_grafts(network):
    neighbour = {
        key: entry.flip(0) ** 3 * 20 if entry.is_floating_point() and entry.dim() else entry.clone()
        for key, entry in network.state_dict().items()
    }
    coefficients, blended = looped_graft(network, neighbour)
    found = convolutions(network)
    assert list(found) == [name for name, module in network.named_modules() if isinstance(module, KINDS)]
    filters = sum(module.out_channels for module in found.values())
    for source in (network, network.state_dict()):
        invalid, total = invalid_filters(source, 0.1)
        assert 0 <= invalid <= total == filters
    assert graft(network, neighbour) == coefficients
    assert_blended(network, blended)


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in torchvision.models.list_models(module=zoo)
    ],
)
def test_graft_of_every_classification_model(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    torch.set_default_dtype(torch.bfloat16 if name in HUGE else torch.float32)
    try:
        network = without_initialisation(lambda: zoo.get_model(name, weights=None, **options))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_grafts(network)


@pytest.mark.parametrize(
    "make",
    [
        lambda: zoo.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24),
        lambda: zoo.SwinTransformer([4, 4], 12, depths=[1, 1], num_heads=[1, 2], window_size=[2, 2]),
        lambda: zoo.ConvNeXt([zoo.convnext.CNBlockConfig(8, 16, 1), zoo.convnext.CNBlockConfig(16, None, 1)]),
        lambda: zoo.MaxVit((64, 64), 8, 2, [8, 16], [1, 1], head_dim=4, stochastic_depth_prob=0.1),
    ],
    ids=["vision transformer", "swin", "convnext", "maxvit"],
)
def test_graft_of_small_relatives_of_the_big_ones(make):
    assert_grafts(without_initialisation(make))


@pytest.mark.slow
def test_filter_level_on_the_vgg_of_torchvision():
    network = without_initialisation(lambda: zoo.vgg11_bn(weights=None))
    neighbour = {key: entry.flip(0) / 2 for key, entry in network.state_dict().items() if entry.dim()}
    neighbour |= {key: entry for key, entry in network.state_dict().items() if not entry.dim()}
    own = snapshot(network)
    last = graft(network, neighbour, level="filter")["features.25"]
    share = last.repeat_interleave(49)
    key = "classifier.0.weight"
    torch.testing.assert_close(network.state_dict()[key], share * own[key] + (1 - share) * neighbour[key])
    assert torch.equal(network.state_dict()["classifier.3.weight"], own["classifier.3.weight"])


# CUDA


@needs_cuda
@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("level", ["layer", "filter"])
def test_network_and_neighbour_on_either_device(here, there, level):
    network, neighbour = pair(chain)
    expected = copy.deepcopy(network)
    coefficients = graft(expected, neighbour, level=level)
    network.to(here)
    found = graft(network, {key: entry.to(there) for key, entry in neighbour.items()}, level=level)
    assert_blended(network, expected.state_dict())
    for name, share in found.items():
        torch.testing.assert_close(torch.as_tensor(share).cpu(), torch.as_tensor(coefficients[name]))


@needs_cuda
@pytest.mark.parametrize("there", ["cuda", "cpu"])
@pytest.mark.parametrize("level", ["layer", "filter"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_device_is_waited_for_once(there, level, dtype):
    network, neighbour = pair(lambda: models.build("vgg16", 10), dtype=dtype)
    network.to("cuda", memory_format=torch.channels_last)
    neighbour = {key: entry.to(there) for key, entry in neighbour.items()}
    graft(copy.deepcopy(network), neighbour, level=level)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graft(network, neighbour, level=level)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchronizing CUDA operation" in str(warning.message) for warning in caught) == 1


@needs_cuda
def test_grafting_on_cuda_is_deterministic():
    network, neighbour = pair(lambda: models.build("resnet20", 10), device="cuda")
    other = copy.deepcopy(network)
    torch.use_deterministic_algorithms(True)
    try:
        assert graft(network, neighbour) == graft(other, neighbour)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(entry, other.state_dict()[key]) for key, entry in network.state_dict().items())
