"""Coefficients and the blend, against a recomputation entry by entry; and whatever cannot be blended."""

import copy
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
    snapshot,
)
from torch import nn

from filter_grafting import Layer, MismatchError, State, coefficient, graft
from grafting_cifar import models

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

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
    with pytest.raises(ValueError, match="entropies: got nan and 1, expected finite values"):
        coefficient(math.nan, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": -0.1}, "a: got -0.1, expected a value from 0 to 1"),
        ({"a": 1.01}, "a: got 1.01"),
        ({"a": math.nan}, "a: got nan"),
        ({"c": -1}, "c: got -1, expected a finite value of at least 0"),
        ({"c": math.inf}, "c: got inf"),
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


class Token(nn.Module):
    """A parameter of the network itself comes before its layers in the state dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.token = nn.Parameter(torch.zeros(5))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("a", "c"), [(0.4, 500), (1, 3), (0.2, 2)])
def test_every_entry_is_blended_with_the_coefficient_of_its_convolution(a, c, dtype, device):
    model, neighbour = pair(mixture, device=device, dtype=dtype)
    own, other, parameters = snapshot(model), {k: x.clone() for k, x in neighbour.items()}, list(model.parameters())
    coefficients, blended = looped_graft(model, neighbour, a, c)
    assert len(set(coefficients.values())) > 1
    found = graft(model, neighbour, a, c)
    assert coefficients_of(found) == coefficients
    assert_blended(model, blended)
    for name, layer in found.items():
        assert isinstance(layer, Layer)
        assert layer.own_entropy == pytest.approx(looped_entropy(own[f"{name}.weight"]))
        assert layer.neighbour_entropy == pytest.approx(looped_entropy(neighbour[f"{name}.weight"]))
    # The neighbour is left as it is, and the parameters themselves are the same.
    assert all(torch.equal(neighbour[key], other[key]) for key in other)
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize(
    "make",
    [
        lambda: models.build("resnet20", 10),
        lambda: models.build("mobilenetv2_w025", 10),
        lambda: nn.Conv2d(3, 4, 3),
        lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 2, 1, bias=False)),
        Token,
    ],
)
def test_networks_of_every_build(make):
    model, neighbour = pair(make)
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert_blended(model, blended)


def test_at_a_of_1_the_poorer_layer_is_replaced_and_the_richer_one_kept():
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.Conv2d(3, 4, 3)))
    nn.init.constant_(model[0].weight, 0.25)
    neighbour["1.weight"].fill_(0.25)
    before = snapshot(model)
    assert coefficients_of(graft(model, neighbour, a=1, c=1e9)) == {"0": 0, "1": 1}
    state = model.state_dict()
    assert all(torch.equal(state[f"0.{key}"], neighbour[f"0.{key}"]) for key in ("weight", "bias"))
    assert all(torch.equal(state[f"1.{key}"], before[f"1.{key}"]) for key in ("weight", "bias"))


def test_what_both_networks_hold_stays_exactly_as_it_is():
    model, neighbour = pair(mixture)
    before = snapshot(model)
    assert set(coefficients_of(graft(model, before)).values()) == {0.5}
    assert_untouched(model, before)
    model[2].weight.data.fill_(1.0)
    neighbour["2.weight"].fill_(1.0)
    assert graft(model, neighbour)["1"].coefficient != 0.5
    assert (model[2].weight == 1.0).all()


def test_integer_and_boolean_buffers_are_left_alone():
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    model[1].num_batches_tracked.fill_(7)
    model.register_buffer("mask", torch.tensor([True, False]))
    graft(model, {"mask": torch.tensor([False, False]), **neighbour})
    assert model[1].num_batches_tracked == 7 and model.mask.tolist() == [True, False]


@pytest.mark.parametrize("formats", [(True, False), (False, True)])
def test_channels_last_weights_are_blended_in_place(formats):
    own_format, other_format = (torch.channels_last if last else torch.contiguous_format for last in formats)
    model, neighbour = pair(lambda: models.build("resnet20", 10))
    model.to(memory_format=own_format)
    neighbour = {k: x.contiguous(memory_format=other_format) if x.dim() == 4 else x for k, x in neighbour.items()}
    places = {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()}
    coefficients, blended = looped_graft(model, neighbour)
    assert coefficients_of(graft(model, neighbour)) == coefficients
    assert_blended(model, blended)
    assert {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()} == places


@needs_cuda
@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
@pytest.mark.parametrize("level", ["layer", "filter"])
def test_network_and_neighbour_on_either_device(here, there, level):
    model, neighbour = pair(chain)
    expected = copy.deepcopy(model)
    layers = graft(expected, neighbour, level=level)
    found = graft(model.to(here), {key: entry.to(there) for key, entry in neighbour.items()}, level=level)
    assert_blended(model, expected.state_dict())
    for name, layer in found.items():
        share = torch.as_tensor(layer.coefficient).cpu()
        torch.testing.assert_close(share, torch.as_tensor(layers[name].coefficient))


# What cannot be blended: the first offending entry is named, with both sides, and nothing has changed


def filled(state, key, value):
    entry = state[key].clone()
    entry.view(-1)[-1] = value
    return {**state, key: entry}


HERE, THERE, OF_FOUR = "in the network", "in its neighbour", "(4,) float32"
NOT_FINITE = "its neighbour holds a value that is not finite; exclude=('{0}',) keeps the network's own"


@pytest.mark.parametrize("level", ["layer", "filter"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: {key.replace("0.bias", "0.beta"): entry for key, entry in s.items()},
            f"0.bias: {HERE} {OF_FOUR}, {THERE} missing",
        ),
        (lambda s: {**s, "head": torch.ones(2, 3)}, f"head: {HERE} missing, {THERE} (2, 3) float32"),
        (lambda s: {**s, 7: 1}, f"7: {HERE} missing, {THERE} a int"),
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
        (
            lambda s: State({**s, "1.bias": torch.ones(3)}, "ckpt0_7.t7"),
            f"ckpt0_7.t7: 1.bias: {HERE} {OF_FOUR}, there (3,) float32",
        ),
        (lambda s: list(s.values()), "the neighbour is a list: expected its state dict"),
        (lambda s: mixture(), "the neighbour is a Sequential: expected its state dict"),
        (lambda s: filled(s, "0.weight", math.nan), f"0.weight: {NOT_FINITE.format('0.weight')}"),
        (lambda s: filled(s, "1.running_var", -math.inf), f"1.running_var: {NOT_FINITE.format('1.running_var')}"),
        (
            lambda s: filled(filled(s, "3.weight", math.nan), "1.bias", math.inf),
            f"1.bias: {NOT_FINITE.format('1.bias')}",
        ),
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
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_network_that_is_not_finite_is_named_and_a_neighbour_with_its_file(value, dtype):
    model, neighbour = pair(chain, dtype=dtype)
    model[1].running_mean[2] = value
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"^1\.running_mean: the network holds a value that is not finite; exclude"):
        graft(model, filled(neighbour, "3.weight", value))
    with pytest.raises(MismatchError, match=r"^3\.weight: its neighbour \(ckpt1_2\.t7\) holds a value"):
        graft(model, State(filled(neighbour, "3.weight", value), "ckpt1_2.t7"), exclude="1.running_mean")
    assert_untouched(model, before)


def test_a_layer_without_information_is_named():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: initialising an empty tensor has no effect
        model = nn.Sequential(nn.Conv2d(2, 0, 3))
    with pytest.raises(MismatchError, match=r"^0\.weight: weight: got torch\.float32 of shape \(0, 2, 3, 3\)"):
        graft(model, copy.deepcopy(model).state_dict())
    model, neighbour = pair(chain)
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"^3\.weight: entropies: got nan and"):
        graft(model, neighbour, criterion=lambda weight: math.nan if len(weight) == 6 else 1.0)
    assert_untouched(model, before)
