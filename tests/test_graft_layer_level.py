"""Coefficients and the blend, against a recomputation entry by entry; and neighbours that cannot be blended."""

import math

import pytest
import torch
from naive import (
    DEVICES,
    TOLERANCE,
    assert_blended,
    assert_grafts,
    assert_refused,
    assert_untouched,
    chain,
    looped_entropy,
    mixture,
    pair,
    randomised,
    snapshot,
)
from torch import nn

from filter_grafting import State, coefficient, graft


def test_coefficient_follows_the_formula():
    numbers = torch.rand(50, 4, generator=torch.Generator().manual_seed(0)).double() * torch.tensor([2.3, 2.3, 1, 10])
    for own, neighbour, a, c in numbers.tolist():
        angle = math.atan2(c * (own - neighbour), 1)
        assert coefficient(own, neighbour, a, c) == float(f"{0.5 + a * angle / math.pi:.2f}")
    assert (coefficient(2, 1), coefficient(1, 2)) == (0.7, 0.3)
    assert (coefficient(2, 1, a=1, c=1e6), coefficient(1, 2, a=1, c=1e6)) == (1, 0)
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
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        graft(*pair(chain), **arguments)


# The blend


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("a", "c"), [(0.4, 500), (1, 3)])
def test_every_entry_is_blended_with_the_coefficient_of_its_convolution(a, c, dtype, device):
    model, neighbour = pair(mixture, device=device, dtype=dtype)
    own, other, parameters = snapshot(model), {k: x.clone() for k, x in neighbour.items()}, list(model.parameters())
    for name, layer in assert_grafts(model, neighbour, a=a, c=c).items():
        assert layer.own_entropy == pytest.approx(looped_entropy(own[f"{name}.weight"]))
        assert layer.neighbour_entropy == pytest.approx(looped_entropy(other[f"{name}.weight"]))
    # The neighbour is left as it is, and the parameters themselves are the same.
    assert all(torch.equal(neighbour[key], other[key]) for key in other)
    assert all(new is old and new.requires_grad for new, old in zip(model.parameters(), parameters, strict=True))


def test_what_both_networks_hold_stays_exactly_as_it_is():
    model, neighbour = pair(mixture)
    before = snapshot(model)
    graft(model, before)
    assert_untouched(model, before)
    neighbour["2.weight"].copy_(model[2].weight)
    assert graft(model, neighbour)["1"].coefficient != 0.5
    assert torch.equal(model[2].weight, before["2.weight"])


def test_channels_last_weights_are_blended_in_place():
    model, neighbour = pair(chain, memory_format=torch.channels_last)
    places = {key: (entry.data_ptr(), entry.stride()) for key, entry in model.state_dict().items()}
    assert_grafts(model, {key: entry.contiguous() for key, entry in neighbour.items()})
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


@pytest.mark.parametrize("level", ["layer", "filter"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda s: {key.replace("0.bias", "0.beta"): entry for key, entry in s.items()},
            r"^0\.bias: in the network \(4,\) float32, in its neighbour missing",
        ),
        (
            lambda s: {**s, "head": torch.ones(2, 3)},
            r"^head: in the network missing, in its neighbour \(2, 3\) float32",
        ),
        (
            lambda s: State({**s, "1.bias": torch.ones(3), "3.bias": torch.ones(3)}, "ckpt0_7.t7"),
            r"^ckpt0_7\.t7: 1\.bias: in the network \(4,\) float32, there \(3,\) float32",
        ),
        (
            lambda s: State({**s, "1.running_var": torch.tensor([1, 1, 1, -math.inf])}, "ckpt0_7.t7"),
            r"^1\.running_var: its neighbour .*ckpt0_7\.t7.* holds a value",
        ),
    ],
)
def test_a_neighbour_that_cannot_be_blended_is_refused(damage, message, level):
    model, neighbour = pair(chain)
    assert_refused(model, damage(neighbour), message, level=level)
    model[1].running_mean[2] = math.nan
    assert_refused(model, neighbour, r"^1\.running_mean: the network holds a value that is not finite; exclude")
