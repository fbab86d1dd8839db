"""Coefficients and the blend, against a recomputation entry by entry; and neighbours that cannot be blended."""

import math

import pytest
import torch
from naive import (
    DEVICES,
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

from filter_grafting import MismatchError, State, coefficient, graft

# The coefficient


def test_coefficient_follows_the_formula():
    numbers = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([2.3, 2.3, 1, 10])
    for own, neighbour, a, c in numbers.tolist():
        angle = math.atan2(c * (own - neighbour), 1)
        assert coefficient(own, neighbour, a, c) == float(f"{0.5 + a * angle / math.pi:.2f}")
        assert coefficient(own, neighbour, a, c) + coefficient(neighbour, own, a, c) == pytest.approx(1)
    assert coefficient(2, 1) == 0.7 and coefficient(1, 2) == 0.3
    assert coefficient(2, 1, a=1, c=1e6) == 1 and coefficient(1, 2, a=1, c=1e6) == 0
    with pytest.raises(ValueError, match="entropies: got nan and 1, expected finite values"):
        coefficient(math.nan, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": 1.01}, "a: got 1.01, expected a value from 0 to 1"),
        ({"c": -1}, "c: got -1, expected a finite value of at least 0"),
        ({"level": "network"}, "level: got 'network'"),
        ({"layers": nn.Linear, "level": "filter"}, "layers: at level 'filter'"),
        ({"exclude": ("heads.*",)}, "exclude: 'heads.*' fits no entry"),
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
@pytest.mark.parametrize(("a", "c"), [(0.4, 500), (1, 3)])
def test_every_entry_is_blended_with_the_coefficient_of_its_convolution(a, c, dtype, device):
    model, neighbour = pair(mixture, device=device, dtype=dtype)
    own, other, parameters = snapshot(model), {k: x.clone() for k, x in neighbour.items()}, list(model.parameters())
    coefficients, blended = looped_graft(model, neighbour, a, c)
    assert len(set(coefficients.values())) > 1
    found = graft(model, neighbour, a, c)
    assert coefficients_of(found) == coefficients
    assert_blended(model, blended)
    for name, layer in found.items():
        assert layer.own_entropy == pytest.approx(looped_entropy(own[f"{name}.weight"]))
        assert layer.neighbour_entropy == pytest.approx(looped_entropy(other[f"{name}.weight"]))
    # The neighbour is left as it is, and the parameters themselves are the same.
    assert all(torch.equal(neighbour[key], other[key]) for key in other)
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters, strict=True))


def test_what_both_networks_hold_stays_exactly_as_it_is():
    model, neighbour = pair(mixture)
    before = snapshot(model)
    assert set(coefficients_of(graft(model, before)).values()) == {0.5}
    assert_untouched(model, before)
    neighbour["2.weight"].copy_(model[2].weight)
    assert graft(model, neighbour)["1"].coefficient != 0.5
    assert torch.equal(model[2].weight, before["2.weight"])


def test_channels_last_weights_are_blended_in_place():
    model, neighbour = pair(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)))
    model = model.to(memory_format=torch.channels_last)
    places = {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()}
    _, blended = looped_graft(model, neighbour)
    graft(model, neighbour)
    assert_blended(model, blended)
    assert {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()} == places


@pytest.mark.cuda
@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda")])
@pytest.mark.parametrize("level", ["layer", "filter"])
def test_network_and_neighbour_on_either_device(here, there, level):
    (model, neighbour), expected = pair(chain), randomised(chain(), 1)
    graft(expected, neighbour, level=level)
    graft(model.to(here), {key: entry.to(there) for key, entry in neighbour.items()}, level=level)
    assert_blended(model, expected.state_dict())


# What cannot be blended: the first offending entry is named, with both sides, and nothing has changed


def filled(state, key, value):
    entry = state[key].clone()
    entry.view(-1)[-1] = value
    return {**state, key: entry}


HERE, THERE, OF_FOUR = "in the network", "in its neighbour", "(4,) float32"
NOT_FINITE = "1.running_var: its neighbour holds a value that is not finite"


@pytest.mark.parametrize("level", ["layer", "filter"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: {key.replace("0.bias", "0.beta"): entry for key, entry in s.items()},
            f"0.bias: {HERE} {OF_FOUR}, {THERE} missing",
        ),
        (lambda s: {**s, "head": torch.ones(2, 3)}, f"head: {HERE} missing, {THERE} (2, 3) float32"),
        (lambda s: {**s, "1.bias": s["1.bias"].long()}, f"1.bias: {HERE} {OF_FOUR}, {THERE} (4,) int64"),
        (
            lambda s: State({**s, "1.bias": torch.ones(3), "3.bias": torch.ones(3)}, "ckpt0_7.t7"),
            f"ckpt0_7.t7: 1.bias: {HERE} {OF_FOUR}, there (3,) float32",
        ),
        (lambda s: filled(filled(s, "3.weight", math.nan), "1.running_var", -math.inf), NOT_FINITE),
    ],
)
def test_a_neighbour_that_cannot_be_blended_is_refused(damage, message, level):
    model, neighbour = pair(chain)
    before = snapshot(model)
    with pytest.raises(MismatchError) as error:
        graft(model, damage(neighbour), level=level)
    assert str(error.value).startswith(message)
    assert_untouched(model, before)


def test_a_network_that_is_not_finite_is_named_and_a_neighbour_with_its_file():
    model, neighbour = pair(chain)
    model[1].running_mean[2] = math.nan
    before = snapshot(model)
    with pytest.raises(MismatchError, match=r"^1\.running_mean: the network holds a value that is not finite; exclude"):
        graft(model, filled(neighbour, "3.weight", math.inf))
    with pytest.raises(MismatchError, match=r"^3\.weight: its neighbour .*ckpt1_2\.t7.* holds a value"):
        graft(model, State(filled(neighbour, "3.weight", math.inf), "ckpt1_2.t7"), exclude="1.running_mean")
    assert_untouched(model, before)
