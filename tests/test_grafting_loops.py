"""Rings of networks: all in one process at once, and round by round in a training loop."""

import copy
import itertools
import logging
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import Mock

import pytest
import torch
from naive import (
    assert_blended,
    assert_untouched,
    chain,
    coefficients_of,
    looped_graft,
    mixture,
    pair,
    randomised,
    same,
    snapshot,
)
from torch import nn

from filter_grafting import FileRing, Grafting, GraftingError, MismatchError, graft, graft_ring

# graft_ring


@pytest.mark.parametrize("networks", [2, 3])
def test_a_ring_is_blended_all_at_once_and_two_networks_become_equal(networks):
    models = [randomised(chain(), seed) for seed in range(networks)]
    before = [snapshot(model) for model in models]
    expected = [looped_graft(model, before[k - 1]) for k, model in enumerate(models)]
    assert [coefficients_of(found) for found in graft_ring(models)] == [shares for shares, _ in expected]
    for model, (_, blended) in zip(models, expected, strict=True):
        assert_blended(model, blended)
    for one, other in itertools.combinations(models, 2):
        alike = [torch.allclose(a, b, atol=1e-6) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
        assert all(alike) == (networks == 2)
    models[1][0].bias.data[0] = torch.nan
    before = [snapshot(model) for model in models]
    with pytest.raises(MismatchError, match=r"^0\.bias: .* not finite"):
        graft_ring(models)
    for model, state in zip(models, before, strict=True):
        assert_untouched(model, state)


def test_a_ring_needs_networks_of_their_own():
    model = chain()
    for models in [model], [model, chain(), model]:
        with pytest.raises(ValueError, match=r"models: got \d, expected at least two, each a model of its own"):
            graft_ring(models)


# Grafting


def train(model, epoch):
    """A stand-in for an epoch of training: every weight changes, in each epoch another way."""
    with torch.no_grad():
        for entry in model.parameters():
            entry.add_(torch.sin(entry * (7 + epoch)))


@pytest.mark.parametrize(
    ("options", "rounds"),
    [({}, [0, 1, 2, 3, 4]), ({"warmup": 3}, [3, 4]), ({"every": 2, "warmup": 2}, [3])],
)
def test_a_loop_grafts_every_so_many_rounds_after_a_warm_up(options, rounds):
    (model, state), how = pair(mixture), {"a": 0.6, "c": 3, "exclude": ("10.*",)}
    expected, exchange = copy.deepcopy(model), Mock(swap=Mock(return_value=state))  # a neighbour that never changes
    grafting = Grafting(model, exchange, **how, **options)
    for epoch in range(5):
        train(model, epoch)
        found = grafting.step()
        train(expected, epoch)
        assert found == (graft(expected, state, **how) if epoch in rounds else None)
        later = Grafting(model, exchange, **how, **options)  # continued from a checkpoint of the caller's own
        later.load_state_dict(grafting.state_dict())
        grafting = later
    assert [call.args[1] for call in exchange.swap.mock_calls] == rounds
    assert same(model, expected)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (chain, {"every": 0}, "every: got 0, expected at least 1"),
        (chain, {"a": 2}, "a: got 2"),
        (chain, {"checkpoint": {"model": mixture()}}, "checkpoint: a Mock keeps none"),
        (lambda: nn.Linear(2, 2), {}, "Linear has no convolution"),
    ],
)
def test_what_could_not_be_grafted_is_refused_before_training(make, options, message):
    with pytest.raises(ValueError, match=message):
        Grafting(make(), Mock(), **options)


# Grafting through files


def run_network(directory, network, until):
    """Trains with momentum for four epochs, or until it is killed within one."""
    model = randomised(chain(), network)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    with FileRing(directory, network, 2, resume=True) as ring:
        grafting = Grafting(model, ring, checkpoint={"optimizer": optimizer, "schedule": schedule})
        for epoch in range(grafting.round, until):
            optimizer.zero_grad()
            sum((parameter**2).sum() * (epoch + 2) for parameter in model.parameters()).backward()
            optimizer.step()
            schedule.step()
            if epoch < 3:
                grafting.step()
    return model, optimizer


def test_a_resumed_network_says_so_first_grafts_and_ends_with_the_same_weights(tmp_path, caplog):
    def run(name, until=4):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda network: run_network(tmp_path / name, network, until), (1, 2)))

    undisturbed = run("undisturbed")
    run("broken", until=2)
    with caplog.at_level(logging.INFO, "filter_grafting"):
        resumed = run("broken")
    for network in 1, 2:
        path = tmp_path / "broken" / f"ckpt{network % 2}_1.t7"
        assert f"network {network} continues after round 1, from {path}" in caplog.messages
    for (model, optimizer), (expected, other) in zip(resumed, undisturbed, strict=True):
        assert same(model, expected)
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"] == 0.01 * 0.5**4
        momenta, expected = ([x["momentum_buffer"] for x in o.state.values()] for o in (optimizer, other))
        assert momenta and all(map(torch.equal, momenta, expected))


def test_a_checkpoint_without_the_state_that_is_asked_for_is_named(make_ring):
    ring, model = make_ring(1, 1), chain()
    ring.publish(0, randomised(chain(), 1).state_dict(), {"optimizer": {}})
    before, optimizer = snapshot(model), torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(GraftingError, match=r"^checkpoint: .*ckpt0_0\.t7 holds no state of 'ema'"):
        Grafting(model, ring, checkpoint={"optimizer": optimizer, "ema": optimizer})
    assert_untouched(model, before)
