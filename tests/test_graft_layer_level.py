"""Coefficients and the blend, against a recomputation entry by entry; and whatever cannot be blended."""

import copy
import inspect
import math
import warnings

import pytest
import torch
from naive import (
    TOLERANCE,
    assert_blended,
    assert_untouched,
    chain,
    coefficients_of,
    looped_entropy,
    looped_graft,
    mixture,
    pair,
    randomised,
    snapshot,
)
from torch import nn

from filter_grafting import Layer, MismatchError, State, coefficient, graft
from grafting_cifar import models

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cpu", pytest.param("cuda", marks=needs_cuda))

# The coefficient


@pytest.mark.parametrize("seed", range(5))
def test_coefficient_follows_the_formula(seed):
    own, neighbour, a, c = torch.rand(4, generator=torch.Generator().manual_seed(seed)).double().tolist()
    own, neighbour, c = own * 2.3, neighbour * 2.3, c * 10
    angle = math.atan2(c * (own - neighbour), 1)
    assert coefficient(own, neighbour, a, c) == float(f"{0.5 + a * angle / math.pi:.2f}")
    assert coefficient(own, neighbour, a, c) + coefficient(neighbour, own, a, c) == pytest.approx(1)


def test_coefficient_at_its_limits():
    assert coefficient(2, 1) == 0.7 and coefficient(1, 2) == 0.3
    assert coefficient(1.5, 1.5) == coefficient(2, 1, a=0) == coefficient(2, 1, c=0) == 0.5
    assert coefficient(2, 1, a=1, c=1e6) == 1 and coefficient(1, 2, a=1, c=1e6) == 0
    assert coefficient(1e308, 0, c=1e308) == 0.7


BAD = [
    ({"a": -0.1}, "a: got -0.1, expected a value from 0 to 1"),
    ({"a": 1.01}, "a: got 1.01"),
    ({"a": math.nan}, "a: got nan"),
    ({"c": -1}, "c: got -1, expected a finite value of at least 0"),
    ({"c": math.inf}, "c: got inf"),
    ({"c": math.nan}, "c: got nan"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [*BAD, ({"own_entropy": math.nan}, "entropies: got nan and 1, expected finite values")]
)
def test_a_value_out_of_its_range_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        coefficient(**{"own_entropy": 1, "neighbour_entropy": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *BAD,
        ({"level": "network"}, "level: got 'network'"),
        ({"layers": 3}, "layers: got 3, expected a type"),
        ({"layers": nn.Linear, "level": "filter"}, "layers: at level 'filter'"),
        ({"exclude": ("heads.*",)}, "exclude: 'heads.*' fits no entry; expected patterns such as '0.weight'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_changes(arguments, message):
    model, neighbour = pair(chain)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        graft(model, neighbour, **arguments)
    assert_untouched(model, before)


# The blend


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("a", "c"), [(0.4, 500), (1, 3), (0.2, 2)])
def test_every_entry_is_blended_with_the_coefficient_of_its_convolution(a, c, dtype, device):
    model, neighbour = pair(mixture, device=device, dtype=dtype)
    coefficients, blended = looped_graft(model, neighbour, a, c)
    assert len(set(coefficients.values())) > 1
    assert coefficients_of(graft(model, neighbour, a, c)) == coefficients
    assert_blended(model, blended)


@pytest.mark.parametrize("name", ["resnet20", "resnet32_leaky", "mobilenetv2_w025"])
def test_graft_of_the_cifar_models(name):
    model, neighbour = pair(lambda: models.build(name, 10))
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert_blended(model, blended)


def test_both_entropies_are_told():
    model, neighbour = pair(mixture)
    own = snapshot(model)
    for name, layer in graft(model, neighbour, 0.3, 2).items():
        assert isinstance(layer, Layer)
        assert layer.own_entropy == pytest.approx(looped_entropy(own[f"{name}.weight"]))
        assert layer.neighbour_entropy == pytest.approx(looped_entropy(neighbour[f"{name}.weight"]))
        assert layer.coefficient == coefficient(layer.own_entropy, layer.neighbour_entropy, 0.3, 2)


def test_at_a_of_1_the_poorer_layer_is_replaced_and_the_richer_one_kept():
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)))
    nn.init.constant_(model[0].weight, 0.25)
    neighbour["1.weight"].fill_(0.25)
    before = snapshot(model)
    assert coefficients_of(graft(model, neighbour, a=1, c=1e9)) == {"0": 0, "1": 1}
    state = model.state_dict()
    assert all(torch.equal(state[f"0.{key}"], neighbour[f"0.{key}"]) for key in ("weight", "bias"))
    assert all(torch.equal(state[f"1.{key}"], before[f"1.{key}"]) for key in ("weight", "bias"))


def test_grafting_a_network_onto_itself_changes_nothing():
    model, _ = pair(mixture)
    before = snapshot(model)
    assert set(coefficients_of(graft(model, model.state_dict())).values()) == {0.5}
    assert_blended(model, before)


def test_entries_before_the_first_convolution_take_its_coefficient():
    first = nn.Linear(2, 2), nn.BatchNorm1d(2)
    model, neighbour = pair(lambda: nn.Sequential(*copy.deepcopy(first), nn.Conv1d(1, 8, 3), nn.Conv1d(8, 8, 3)))
    neighbour["2.weight"].fill_(0.5)
    own = snapshot(model)
    assert graft(model, neighbour)["2"].coefficient == 0.7
    for key in ("0.weight", "0.bias", "1.weight", "1.running_mean", "2.weight"):
        torch.testing.assert_close(model.state_dict()[key], 0.7 * own[key] + 0.3 * neighbour[key])


def test_a_parameter_of_the_network_itself_comes_before_its_layers():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.last = nn.Conv2d(4, 4, 3)
            self.token = nn.Parameter(torch.zeros(5))

    model, neighbour = pair(Network)
    coefficients, blended = looped_graft(model, neighbour)
    assert next(iter(model.state_dict())) == "token"
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert_blended(model, blended)


def test_a_network_that_is_one_convolution():
    model, neighbour = pair(lambda: nn.Conv2d(3, 4, 3))
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients and list(coefficients) == [""]
    assert_blended(model, blended)


def test_integer_and_boolean_buffers_are_left_alone():
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    model[1].num_batches_tracked.fill_(7)
    model.register_buffer("mask", torch.tensor([True, False]))
    graft(model, {"mask": torch.tensor([False, False]), **neighbour})
    assert model[1].num_batches_tracked == 7 and model.mask.tolist() == [True, False]


@pytest.mark.parametrize("formats", [(True, True), (True, False), (False, True)])
def test_channels_last_weights_are_blended_in_place(formats):
    own_format, other_format = (torch.channels_last if last else torch.contiguous_format for last in formats)
    model, neighbour = pair(lambda: models.build("resnet20", 10))
    model.to(memory_format=own_format)
    neighbour = {
        key: entry.contiguous(memory_format=other_format) if entry.dim() == 4 else entry
        for key, entry in neighbour.items()
    }
    places = {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()}
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert_blended(model, blended)
    assert {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()} == places


def test_the_neighbour_is_left_as_it_is_and_so_are_the_parameters_themselves():
    model, neighbour = pair(mixture)
    before, parameters = {key: entry.clone() for key, entry in neighbour.items()}, list(model.parameters())
    graft(model, neighbour)
    assert all(torch.equal(neighbour[key], before[key]) for key in before)
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters, strict=True))


def test_layers_without_information_and_of_one_element():
    last = nn.Conv2d(2, 1, 1, bias=False)
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 3), copy.deepcopy(last)))
    nn.init.zeros_(model[1].weight)
    neighbour["1.weight"].fill_(1e-42)
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert coefficients["0"] == coefficients["1"] == 0.5
    assert_blended(model, blended)


# What cannot be blended: the first offending entry is named, with both sides, and nothing has changed


def renamed(state, old, new):
    return {new if key == old else key: entry for key, entry in state.items()}


def filled(state, key, value):
    entry = state[key].clone()
    entry.view(-1)[-1] = value
    return {**state, key: entry}


HERE, THERE, OF_FOUR = "in the network", "in its neighbour", "(4,) float32"


def not_finite(key):
    return f"{key}: its neighbour holds a value that is not finite; exclude=('{key}',) keeps the network's own"


@pytest.mark.parametrize("level", ["layer", "filter"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: renamed(s, "0.bias", "0.beta"), f"0.bias: {HERE} {OF_FOUR}, {THERE} missing"),
        (lambda s: {**s, "head": torch.ones(2, 3)}, f"head: {HERE} missing, {THERE} (2, 3) float32"),
        (lambda s: {**s, 7: 1}, f"7: {HERE} missing, {THERE} a int"),
        (lambda s: {**s, "1.bias": torch.ones(3)}, f"1.bias: {HERE} {OF_FOUR}, {THERE} (3,) float32"),
        (lambda s: {**s, "1.bias": s["1.bias"].long()}, f"1.bias: {HERE} {OF_FOUR}, {THERE} (4,) int64"),
        (lambda s: {**s, "1.bias": s["1.bias"].cfloat()}, f"1.bias: {HERE} {OF_FOUR}, {THERE} (4,) complex64"),
        (
            lambda s: {**s, "1.num_batches_tracked": torch.tensor(1.0)},
            f"1.num_batches_tracked: {HERE} () int64, {THERE} () float32",
        ),
        (
            lambda s: {**s, "0.weight": torch.ones(4, 2, 1, 1), "1.bias": None},
            f"0.weight: {HERE} (4, 2, 3, 3) float32, {THERE} (4, 2, 1, 1) float32",
        ),
        (lambda s: {**s, "1.weight": [1.0]}, f"1.weight: {HERE} {OF_FOUR}, {THERE} a list"),
        (lambda s: {}, f"0.weight: {HERE} (4, 2, 3, 3) float32, {THERE} missing"),
        (
            lambda s: State({**s, "1.bias": torch.ones(3)}, "ckpt0_7.t7"),
            f"ckpt0_7.t7: 1.bias: {HERE} {OF_FOUR}, there (3,) float32",
        ),
        (lambda s: list(s.values()), "the neighbour is a list: expected its state dict"),
        (lambda s: mixture(), "the neighbour is a Sequential: expected its state dict"),
        (lambda s: filled(s, "0.weight", math.nan), not_finite("0.weight")),
        (lambda s: filled(s, "0.bias", math.inf), not_finite("0.bias")),
        (lambda s: filled(s, "1.running_var", -math.inf), not_finite("1.running_var")),
        (lambda s: filled(filled(s, "5.weight", math.nan), "1.bias", math.nan), not_finite("1.bias")),
    ],
)
def test_a_neighbour_that_cannot_be_blended_is_refused(damage, message, level):
    model, neighbour = pair(chain)
    before = snapshot(model)
    with pytest.raises(MismatchError) as error:
        graft(model, damage(neighbour), level=level)
    assert str(error.value) == message
    assert_untouched(model, before)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_network_that_is_not_finite_is_named_and_a_neighbour_with_its_file(value, dtype):
    model, neighbour = pair(chain, dtype=dtype)
    model[1].running_mean[2] = value
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"^1\.running_mean: the network holds a value that is not finite; exclude"):
        graft(model, filled(neighbour, "3.weight", value))
    assert_untouched(model, before)
    with pytest.raises(MismatchError, match=r"^3\.weight: its neighbour \(ckpt1_2\.t7\) holds a value"):
        graft(model, State(filled(neighbour, "3.weight", value), "ckpt1_2.t7"), exclude="1.running_mean")


def test_an_empty_convolution_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising an empty tensor has no effect
        model = nn.Sequential(nn.Conv2d(2, 0, 3))
    with pytest.raises(MismatchError, match=r"^0\.weight: weight: got torch\.float32 of shape \(0, 2, 3, 3\)"):
        graft(model, copy.deepcopy(model).state_dict())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_criterion_that_gives_no_number_is_named(bad):
    model, neighbour = pair(chain)
    before = snapshot(model)
    with pytest.raises(MismatchError, match=rf"^3\.weight: entropies: got {bad} and"):
        graft(model, neighbour, criterion=lambda weight: bad if len(weight) == 6 else 1.0)
    assert_untouched(model, before)


def test_the_docstring_says_what_a_loop_over_networks_does():
    assert "graft_ring" in inspect.getdoc(graft) and "not the method" in " ".join(inspect.getdoc(graft).split())


# CUDA


@needs_cuda
@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("level", ["layer", "filter"])
def test_network_and_neighbour_on_either_device(here, there, level):
    model, neighbour = pair(chain)
    expected = copy.deepcopy(model)
    layers = graft(expected, neighbour, level=level)
    model.to(here)
    found = graft(model, {key: entry.to(there) for key, entry in neighbour.items()}, level=level)
    assert_blended(model, expected.state_dict())
    for name, layer in found.items():
        share = torch.as_tensor(layer.coefficient).cpu()
        torch.testing.assert_close(share, torch.as_tensor(layers[name].coefficient))


@needs_cuda
def test_the_device_is_not_waited_for_per_bin():
    model, neighbour = pair(lambda: randomised(models.build("vgg16", 10)), device="cuda")
    graft(copy.deepcopy(model), neighbour)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            graft(model, neighbour)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
    assert waits <= 2 * (len(neighbour) + 13)  # each entry and each entropy, of both sides
