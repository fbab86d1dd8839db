import math
import os
import random
import resource
import threading
import time
from pathlib import Path

import pytest
import torch

from filter_grafting import rings
from filter_grafting.checkpoint import load
from filter_grafting.errors import CheckpointError, UnreadableError, WriteError
from filter_grafting.grafting import graft
from filter_grafting.rings import FileRing

STATE = {"weight": torch.zeros(2)}


@pytest.fixture
def make(tmp_path):
    """Makes rings, which leave at the end of the test."""
    made = []

    def ring(network=1, networks=2, **options) -> FileRing:
        made.append(FileRing(tmp_path, network, networks, **options))
        return made[-1]

    yield ring
    for ring in made:
        ring.leave("stopped")


def rounds_of(ring: FileRing) -> list[int]:
    pattern = f"ckpt{ring.network % ring.networks}_*.t7"
    return sorted(int(path.name.split("_")[1].removesuffix(".t7")) for path in ring.directory.glob(pattern))


# Publishing


def test_the_file_is_what_the_published_script_reads(make):
    ring = make(2)
    ring.publish(3, {"module._orig_mod.conv.weight": torch.ones(2)}, {"best": 60.5})
    assert ring.path(3).name == "ckpt0_3.t7" and ring.file("best").name == "best2.t7"
    contents = torch.load(ring.path(3), weights_only=True)
    assert contents["net"].keys() == {"conv.weight"} and torch.equal(contents["net"]["conv.weight"], torch.ones(2))
    assert {key: value for key, value in contents.items() if key != "net"} == {
        "run": ring.run, "network": 2, "epoch": 3, "extra": {"best": 60.5}
    }  # fmt: skip


def test_weights_may_change_as_soon_as_they_are_published(make):
    """Grafted in place right after, and 300 times: no file holds a mixture of old and new weights."""
    models = [torch.nn.Conv2d(8, 8, 3) for _ in range(2)]
    rings = [make(network, keep=math.inf) for network in (1, 2)]
    expected = {}
    for round in range(150):
        for ring, model in zip(rings, models, strict=True):
            model.weight.data += torch.randn_like(model.weight)
            expected[ring.path(round)] = {name: entry.clone() for name, entry in model.state_dict().items()}
            ring.publish(round, model.state_dict())
        for ring, model in zip(rings, models, strict=True):
            graft(model, ring.wait(round))
    assert len(expected) == 300
    for path, state in expected.items():
        found = load(path)["net"]
        assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_full_disk_is_one_sentence_and_does_not_poison_what_follows(make):
    ring = make()
    ring.publish(0, STATE)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WriteError, match=r"cannot write .*ckpt1_1\.t7: File too large; .* MB are free there; mend"):
            ring.publish(1, {"weight": torch.zeros(100_000)})
        assert {path.suffix for path in ring.directory.iterdir()} == {".t7", ".json", ".lock"}
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert rounds_of(ring) == [0]
    ring.publish(2, STATE)
    assert ring.newest().round == 2


def test_what_cannot_be_handed_back_is_not_taken(make):
    ring = make()
    with pytest.raises(
        CheckpointError, match=r"ckpt1_0\.t7 was not saved: it could not be loaded \(pathlib\.PosixPath"
    ):
        ring.publish(0, STATE, {"data": Path("images")})
    with pytest.raises(ValueError, match="round: got -1, expected 0 or more"):
        ring.publish(-1, STATE)
    assert rounds_of(ring) == []


# Pruning


@pytest.mark.parametrize("networks", [2, 3, 5])
@pytest.mark.parametrize("stride", [1, 500])
def test_a_network_keeps_at_most_n_plus_1_files_and_all_that_anyone_may_need(make, networks, stride):
    """In any order of events, and whoever is killed with its newest checkpoint damaged; rounds are any numbers."""
    ring = {network: make(network, networks) for network in range(1, networks + 1)}
    schedule = random.Random(networks)
    published, grafted = dict.fromkeys(ring, -1), dict.fromkeys(ring, -1)
    has_two = dict.fromkeys(ring, False)  # whether the checkpoint before the newest is there to go back to
    most = 0
    for _ in range(40 * networks):
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
            ring[network] = make(network, networks, resume=True)
            assert ring[network].newest().round == stride * (at - 1)
            published[network], grafted[network], has_two[network] = at - 1, at - 2, False
        else:
            ring[network].wait(stride * at)
            grafted[network] = at
        for one in ring.values():
            files = [round // stride for round in rounds_of(one)]
            most = max(most, len(files))
            assert len(files) <= networks + 1
            for back in 0, has_two[one.network]:  # resumed from its newest checkpoint, or the one before
                needed = published[one.network] - back
                if needed >= 0:
                    assert needed in files
                    neighbours = [round // stride for round in rounds_of(ring[one.neighbour])]
                    assert needed in neighbours or published[one.neighbour] < needed
    assert most == networks + 1
    assert min(published.values()) >= 3


def test_a_baseline_keeps_two_and_others_as_many_as_they_were_told_to(make):
    for network, options, kept in (1, {}, [3, 4]), (1, {"keep": 4}, [1, 2, 3, 4]), (1, {"keep": math.inf}, [*range(5)]):
        ring = make(network, 1, resume=True, **options)
        for round in range(5):
            ring.publish(round, STATE)
        ring.leave()
        assert rounds_of(ring) == kept


def test_stray_checkpoints_make_nobody_delete_what_is_needed(make, tmp_path):
    ring = make(1, 4)
    strays = "ckpt1_900.t7", "ckpt2_900.t7", "ckpt1_04.t7", "ckpt11_4.t7", "ckpt1_4.t7.bak", "ckpt1_-4.t7"
    for stray in strays:  # its own, its reader's, and some whose names are only alike
        (tmp_path / stray).write_bytes(b"of another run")
    for round in range(4):
        ring.publish(round, STATE)
    assert all(ring.path(round).exists() for round in range(4))
    assert all((tmp_path / stray).exists() for stray in strays)


# The newest checkpoint


def test_whatever_was_published_is_handed_back(make):
    extra = {"my own": [1, (2, {3})], "optimizer": torch.optim.SGD([torch.ones(1)], 0.1).state_dict(), 5: torch.ones(2)}
    ring = make()
    ring.publish(0, STATE, extra)
    ring.publish(7, STATE)
    ring.leave("stopped")
    again = make(resume=True)
    round, state, found, path = again.newest()
    assert (round, found, path, state.source) == (7, None, again.path(7), str(again.path(7)))
    path.unlink()
    found = again.newest().extra
    assert found.keys() == extra.keys() and torch.equal(found.pop(5), extra.pop(5)) and found == extra


@pytest.mark.parametrize("how", [b"", b"PK", {"net": None}, {"run": "another"}, {"epoch": 1}, {"network": 2}], ids=str)
def test_a_bad_newest_checkpoint_is_set_aside_and_the_one_before_is_taken(make, caplog, how):
    ring = make()
    for round in range(3):
        ring.publish(round, STATE)
    path = ring.path(2)
    path.write_bytes(how) if isinstance(how, bytes) else torch.save(load(path) | how, path)
    before = path.read_bytes()
    assert ring.newest().round == 1
    assert path.with_name("ckpt1_2.t7.damaged").read_bytes() == before and not path.exists()
    (line,) = caplog.messages
    assert line.startswith(f"network 1: {path} ") and line.endswith("; set aside as ckpt1_2.t7.damaged")
    ring.path(1).write_bytes(b"")
    ring.path(0).unlink(missing_ok=True)
    assert ring.newest() is None


def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_a_damaged_one(make, monkeypatch):
    ring = make()
    for round in range(2):
        ring.publish(round, STATE)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("can't allocate memory: x")))
        with pytest.raises(UnreadableError, match=r"ckpt1_1\.t7 cannot be read: it is too large for the memory"):
            ring.newest()
    assert ring.newest().round == 1


# Speed


def test_a_checkpoint_of_2_mb_is_in_use_60_ms_after_it_is_in_its_place(make, monkeypatch):
    renamed, used, replace = [], [], os.replace

    def replace_and_tell(source, target):
        replace(source, target)
        if Path(target).name.startswith("ckpt0"):
            renamed.append(time.monotonic())

    monkeypatch.setattr(os, "replace", replace_and_tell)
    reader, writer = make(1), make(2)
    state = {f"layer{index}": torch.randn(5000) for index in range(100)}
    for round in range(30):
        reader.publish(round, state)
        late = threading.Timer(0.03, writer.publish, (round, state))
        late.start()
        reader.wait(round)
        used.append(time.monotonic())
        late.join()
    assert rings.POLL_SECONDS <= 0.02
    assert min(after - before for before, after in zip(renamed, used, strict=True)) < 0.06  # the machine may be busy
