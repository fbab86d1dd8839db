"""What a network says while it waits for its neighbour, which file it takes, and when it gives up."""

import errno
import os
import re
import socket

import pytest
import torch
from ring_tools import Clock, write_status

from filter_grafting import NeighbourTimeout, membership, rings
from filter_grafting.checkpoint import save
from filter_grafting.membership import PROCESS, observe

STATE = {"weight": torch.zeros(2)}
HERE = socket.gethostname()


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rings, "time", clock)
    return clock


@pytest.fixture
def make(make_ring):
    """Makes network 1 of a ring, whose weights of round 6 are published."""

    def make(networks=2, **options):
        ring = make_ring(1, networks, start_command=lambda network: f"start {network}", **options)
        ring.publish(6, STATE)
        return ring

    return make


@pytest.fixture
def arrives(tmp_path, clock):
    """The neighbour's checkpoint of round 6 is there after some seconds."""
    return lambda seconds: clock.after(seconds, lambda: save(tmp_path / "ckpt0_6.t7", {"net": STATE}))


def beats(clock: Clock, directory, until: float, **fields) -> None:
    """Network 2 lives for some seconds; a field may be a function of them."""
    began = clock.now

    def beat() -> None:
        said = {key: value(clock.now - began) if callable(value) else value for key, value in fields.items()}
        write_status(directory, 2, beat=clock.now, **said)

    beat()
    clock.every(5, beat, until)


# What is said


def test_it_says_whom_it_waits_for_after_10_seconds_and_then_every_minute(make, tmp_path, clock, caplog, arrives):
    def check() -> None:
        if len(times) < len(caplog.messages):
            times.append(clock.now - began)

    ring, times, began = make(check=check), [], clock.now
    beats(clock, tmp_path, 64, step=40, run=ring.run)
    arrives(135)
    ring.wait(6)
    assert times == pytest.approx([10, 70, 130], abs=2)
    now = "network 1 waits for network 2 (round 6) for 10 s: network 2 is training at epoch 6, step 40 (heartbeat "
    assert caplog.messages[0].startswith(now)
    assert caplog.messages[2].endswith("(heartbeat 70 s ago, progress 2 min ago)")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ({"state": "starting", "epoch": None}, r"network 2 is starting before its first epoch \(heartbeat"),
        ({"state": "waiting", "detail": "for network 1"}, r"network 2 is waiting for network 1 at epoch 6 \(heartbeat"),
        ({"state": "failed", "detail": "no images"}, r"network 2 failed at epoch 6: no images$"),
        ({"state": "done", "epoch": 9}, r"network 2 is done at epoch 9$"),
        ({"host": HERE}, r"network 2 died at epoch 6 \(killed\?\); continue it with: start 2$"),
        (None, r"network 2 has not started; start it with: start 2$"),
    ],
)
def test_it_says_what_is_known_of_the_neighbour(make, tmp_path, arrives, caplog, status, sentence):
    if status is not None:
        write_status(tmp_path, 2, **status)
    arrives(12)
    make().wait(6)
    assert re.search(sentence, caplog.messages[0])


def test_its_status_says_whom_it_waits_for_and_afterwards_what_it_said_before(make, tmp_path, clock, arrives):
    ring, seen = make(), []
    ring.update("testing", "of the best")
    clock.after(5, lambda: seen.append(str(observe(tmp_path, [1])[0])))
    arrives(6)
    ring.wait(6)
    assert [*seen, str(observe(tmp_path, [1])[0])] == ["waiting for network 2", "testing: of the best"]


# Which file is taken


def test_a_file_that_is_not_the_neighbours_of_this_round_is_waited_out(make, tmp_path, clock, caplog):
    ring, path = make(), tmp_path / "ckpt0_6.t7"
    good = {"net": {"weight": torch.ones(1)}, "run": ring.run, "network": 2, "epoch": 6}
    save(path, good | {"epoch": 5})
    clock.after(60, lambda: save(path, good))
    found = ring.wait(6)
    assert found["weight"] == 1 and found.source == str(path)
    assert f"{path} is " in caplog.messages[0]


def test_a_file_that_is_written_in_place_is_read_when_it_is_whole(make, tmp_path, clock):
    """As the published script writes it: bare, and torn for a while."""
    ring, path, began = make(), tmp_path / "ckpt0_6.t7", clock.now
    torch.save({"net": {"weight": torch.ones(3)}, "acc": 50.0, "epoch": 6}, path)
    data = path.read_bytes()
    path.write_bytes(data[:100])
    clock.after(20, lambda: path.write_bytes(data[:500]))
    clock.after(25, lambda: path.write_bytes(data))
    assert ring.wait(6)["weight"].tolist() == [1, 1, 1]
    assert clock.now - began < 27


def test_a_baseline_gets_its_own_weights(make):
    assert torch.equal(make(1).wait(6)["weight"], STATE["weight"])


# How it ends


@pytest.mark.parametrize(
    "fields",
    [
        {"state": "starting", "epoch": None},
        {"state": "training"},
        {"state": "waiting", "step": 9, "round": 5},
        {"host": HERE, "pid": os.getpid()},
    ],
    ids=["starts", "reports no steps", "waits", "has the same number in another container"],
)
def test_a_heartbeat_is_enough_of_one_that(make, tmp_path, clock, arrives, fields):
    ring = make(timeout=100)
    beats(clock, tmp_path, 300, run=ring.run, **fields)
    arrives(300)
    ring.wait(6)


def test_time_in_which_the_waiting_process_stood_still_is_not_the_neighbours(make, clock, arrives):
    def stand_still() -> None:
        clock.now += 7200
        arrives(60)

    clock.after(30, stand_still)
    make(timeout=100).wait(6)


def test_a_file_system_that_is_away_for_a_while_ends_nothing(make, clock, arrives, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    ring = make()
    with monkeypatch.context() as away:
        clock.after(5, lambda: away.setattr(os, "listdir", fail))
        clock.after(5, lambda: away.setattr(membership, "open", fail, raising=False))  # of locks
        arrives(60)
        ring.wait(6)
        ring.publish(7, STATE)  # what it cannot delete just now stays


def test_one_without_a_status_file_lives_as_long_as_it_publishes(make, tmp_path, clock, caplog, arrives):
    ring = make(3, timeout=100)
    for count in range(6):
        clock.after(80 * count, lambda count=count: torch.save({}, tmp_path / f"ckpt0_{count}.t7"))
    arrives(480)
    ring.wait(6)
    assert caplog.messages[-1].endswith("keeps no status file; its newest checkpoint is of round 5")


PAST = r"network 2 is waiting for network 1 .*; it is past round 6, of which there is no checkpoint any more"


@pytest.mark.parametrize(
    ("timeout", "beating", "fields", "seconds", "words"),
    [
        (60, 0, {}, 60, "network 2 has not started; start it with"),
        (100, 100, {}, 200, "heartbeat 2 min ago"),
        (1, 100, {}, 115, "network 2"),  # of one that lives, three heartbeats are awaited
        # A process that hangs, while the thread of its heartbeat goes on.
        (60, 300, {"step": lambda second: min(int(second), 100)}, 160, r"step 100 \(heartbeat \d s ago, progress 60 s"),
        # It waits far ahead for what we have lost.
        (60, 300, {"round": 90, "state": "waiting", "detail": "for network 1"}, 60, PAST),
        # Two rings of one process that wait for each other.
        (
            60,
            300,
            {"process": PROCESS, "pid": os.getpid(), "state": "waiting"},
            60,
            "that network is of this same process",
        ),
        # Its file stays damaged, though it lives.
        (60, 300, {"damaged": True}, 60, r"ckpt0_6\.t7 is .*; it was not loaded"),
    ],
    ids=["not started", "silent", "timeout below three heartbeats", "hangs", "past this round", "same process", "torn"],
)
def test_it_gives_up_one_without_progress(make, tmp_path, clock, timeout, beating, fields, seconds, words):
    ring, began = make(timeout=timeout), clock.now
    if beating:
        beats(clock, tmp_path, beating, run=ring.run, **fields)
    if "damaged" in fields:
        (tmp_path / "ckpt0_6.t7").write_bytes(b"torn")
    todo = r".*\. Stop network 2 if it lives, resume it, then this one$"
    with pytest.raises(NeighbourTimeout, match=r"of waiting for network 2 \(round 6\): .*" + words + todo):
        ring.wait(6)
    assert clock.now - began == pytest.approx(seconds, abs=7)
