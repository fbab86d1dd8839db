"""Publishing, pruning, and finding the newest good checkpoint again."""

import math
import random

import pytest
import torch

from filter_grafting import GraftingError, UnreadableError
from filter_grafting.checkpoint import load

STATE = {"weight": torch.zeros(2)}


def rounds_of(ring) -> list[int]:
    pattern = f"ckpt{ring.network % ring.networks}_*.t7"
    return sorted(int(path.name.split("_")[1].removesuffix(".t7")) for path in ring.directory.glob(pattern))


def test_the_file_is_what_the_published_script_reads(make_ring):
    ring, model = make_ring(2), torch.nn.DataParallel(torch.nn.Linear(2, 1))
    before = {name: entry.clone() for name, entry in model.module.state_dict().items()}
    ring.publish(3, model.state_dict(), {"best": 60.5})
    torch.nn.init.zeros_(model.module.weight)  # as soon as they are published, weights may change
    assert ring.path(3).name == "ckpt0_3.t7" and ring.file("best").name == "best2.t7"
    contents = torch.load(ring.path(3), weights_only=True)
    state = contents.pop("net")
    assert list(state) == ["weight", "bias"] and all(torch.equal(state[name], before[name]) for name in state)
    assert contents == {"run": ring.run, "network": 2, "epoch": 3, "extra": {"best": 60.5}}


def test_who_has_left_publishes_no_more(make_ring):
    with make_ring() as ring:
        ring.publish(0, STATE)
    with pytest.raises(GraftingError, match=r"network 1 has left .*: train within `with FileRing"):
        ring.publish(1, STATE)
    assert rounds_of(ring) == [0]


# Pruning


@pytest.mark.parametrize(("networks", "stride"), [(2, 1), (5, 500)])
def test_a_network_keeps_at_most_n_plus_1_files_and_all_that_anyone_may_need(make_ring, networks, stride):
    """In any order of events, and whoever is killed with its newest checkpoint damaged; rounds are any numbers."""
    ring = {network: make_ring(network, networks) for network in range(1, networks + 1)}
    schedule, most = random.Random(networks), 0
    published, grafted = dict.fromkeys(ring, -1), dict.fromkeys(ring, -1)
    has_two = dict.fromkeys(ring, False)  # whether the checkpoint before the newest is there to go back to
    for _ in range(30 * networks):
        able = [k for k in ring if published[k] == grafted[k] or published[ring[k].neighbour] >= published[k]]
        assert able, "deadlock"
        slow = 1 if schedule.random() < 0.9 else 0  # network 1 is late, so that the others run as far ahead as they can
        network = schedule.choice([k for k in able if k > slow] or able)
        at = published[network]
        if at == grafted[network]:
            ring[network].publish(stride * (at + 1), STATE)
            published[network], has_two[network] = at + 1, at >= 0
        elif has_two[network] and schedule.random() < 0.1:
            path = ring[network].path(stride * at)
            path.write_bytes(path.read_bytes()[:100])
            ring[network].leave("stopped")
            ring[network] = make_ring(network, networks, resume=True)
            assert ring[network].newest().round == stride * (at - 1)
            published[network], grafted[network], has_two[network] = at - 1, at - 2, False
        else:
            ring[network].wait(stride * at)
            grafted[network] = at
        for k, one in ring.items():
            files, neighbours = ([r // stride for r in rounds_of(each)] for each in (one, ring[one.neighbour]))
            most = max(most, len(files))
            for needed in range(max(0, published[k] - has_two[k]), published[k] + 1):  # to resume from, or go back to
                assert needed in files
                assert needed in neighbours or published[one.neighbour] < needed
    assert most == networks + 1 and min(published.values()) >= 3


def test_a_baseline_keeps_two_and_others_as_many_as_they_were_told_to(make_ring):
    for options, kept in ({}, [3, 4]), ({"keep": 4}, [1, 2, 3, 4]), ({"keep": math.inf}, [*range(5)]):
        with make_ring(1, 1, resume=True, **options) as ring:
            for round in range(5):
                ring.publish(round, STATE)
        assert rounds_of(ring) == kept


def test_stray_checkpoints_make_nobody_delete_what_is_needed(make_ring, tmp_path):
    ring = make_ring(1, 4)
    strays = "ckpt1_900.t7", "ckpt2_900.t7", "ckpt11_4.t7", "ckpt1_4.t7.bak"  # some of names that are only alike
    for stray in strays:
        (tmp_path / stray).write_bytes(b"of another run")
    for round in range(4):
        ring.publish(round, STATE)
    assert all(path.exists() for path in [*map(ring.path, range(4)), *(tmp_path / stray for stray in strays)])


# The newest checkpoint


def test_whatever_was_published_is_handed_back(make_ring):
    extra = {"my own": [1, (2, {3})], "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}, 5: torch.ones(2)}
    with make_ring() as ring:
        ring.publish(0, STATE)
        ring.publish(7, STATE, extra)
    round, state, found, path = make_ring(resume=True).newest()
    assert (round, path, state.source) == (7, ring.path(7), str(ring.path(7)))
    assert found.keys() == extra.keys() and torch.equal(found.pop(5), extra.pop(5)) and found == extra


@pytest.mark.parametrize("how", [b"", {"net": None}, {"run": "another"}, {"epoch": 1}, {"network": 2}], ids=str)
def test_a_bad_newest_checkpoint_is_set_aside_and_the_one_before_is_taken(make_ring, caplog, how):
    ring = make_ring()
    for round in range(3):
        ring.publish(round, STATE)
    path = ring.path(2)
    path.write_bytes(how) if isinstance(how, bytes) else torch.save(load(path) | how, path)
    before = path.read_bytes()
    assert ring.newest().round == 1
    assert path.with_name("ckpt1_2.t7.damaged").read_bytes() == before and not path.exists()
    (line,) = caplog.messages
    assert line.startswith(f"network 1: {path} ") and line.endswith("; set aside as ckpt1_2.t7.damaged")


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_a_damaged_one(make_ring, monkeypatch):
    ring = make_ring()
    for round in range(2):
        ring.publish(round, STATE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "I/O error")))
        with pytest.raises(UnreadableError, match=r"ckpt1_1\.t7 cannot be read: I/O error"):
            ring.newest()
    assert ring.newest().round == 1
