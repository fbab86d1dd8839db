import os
import re
import socket
import time

import pytest
import torch
from ring_tools import Clock, write_status

from filter_grafting import membership, rings
from filter_grafting.checkpoint import save
from filter_grafting.errors import NeighbourTimeout
from filter_grafting.rings import FileRing

STATE = {"weight": torch.zeros(2)}
HERE = socket.gethostname()


class Enough(Exception):
    pass


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rings, "time", clock)
    return clock


@pytest.fixture
def make(tmp_path):
    """Makes network 1 of a ring, whose weights of round 6 are published."""
    made = []

    def ring(networks=2, **options) -> FileRing:
        made.append(FileRing(tmp_path, 1, networks, **options))
        made[-1].publish(6, STATE)
        return made[-1]

    yield ring
    for ring in made:
        ring.leave("stopped")


@pytest.fixture
def tell(make, tmp_path, clock, caplog):
    """What network 1 says while it waits for round 6, and when."""

    def lines(lines=1, **options) -> list[str]:
        def check() -> None:
            if len(caplog.messages) >= lines:
                raise Enough

        ring = make(check=check, **options)
        with pytest.raises(Enough):
            ring.wait(6)
        ring.leave("stopped")
        said = list(caplog.messages)
        caplog.clear()
        return said

    return lines


def gives_up(ring: FileRing, clock: Clock, words: str) -> float:
    """How long it waits."""
    began = clock.now
    with pytest.raises(NeighbourTimeout, match=words):
        ring.wait(6)
    return clock.now - began


# What is said


def test_it_says_whom_it_waits_for_after_10_seconds_and_then_every_minute(make, tmp_path, clock, caplog):
    ring, times = make(check=lambda: clock.now < began + 131 or (_ for _ in ()).throw(Enough)), []
    write_status(tmp_path, 2, step=40, run=ring.run)
    clock.every(5, lambda: write_status(tmp_path, 2, beat=clock.now, step=40, run=ring.run), 64)
    clock.every(1, lambda: times.append((round(clock.now - began), len(caplog.messages))), 131)
    began = clock.now
    with pytest.raises(Enough):
        ring.wait(6)
    assert [next(time for time, count in times if count == number) for number in (1, 2, 3)] == pytest.approx(
        [10, 70, 130], abs=1.5
    )
    now = "network 1 waits for network 2 (round 6) for 10 s: network 2 is training at epoch 6, step 40 (heartbeat "
    assert caplog.messages[0].startswith(now)
    assert caplog.messages[2].endswith("(heartbeat 70 s ago, progress 2 min ago)")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ({}, r"network 2 is training at epoch 6 \(heartbeat \d+ s ago, progress \d+ s ago\)"),
        ({"state": "starting", "epoch": None}, r"network 2 is starting before its first epoch \(heartbeat"),
        ({"state": "waiting", "detail": "for network 1"}, r"network 2 is waiting for network 1 at epoch 6 \(heartbeat"),
        ({"state": "stopped", "detail": "by SIGTERM"}, "network 2 stopped at epoch 6: by SIGTERM$"),
        (
            {"state": "failed", "detail": "no images", "epoch": None},
            "network 2 failed before its first epoch: no images$",
        ),
        ({"state": "done", "epoch": 9}, "network 2 is done at epoch 9$"),
        ({"host": HERE}, r"network 2 died at epoch 6 \(killed\?\); continue it with: start 2$"),
        (
            {"host": HERE, "pid": os.getpid(), "state": "starting"},
            "that network is of this same process: publish the weights of all networks before you wait for any",
        ),
        (None, "network 2 has not started; start it with: start 2$"),
    ],
)
def test_it_says_what_is_known_of_the_neighbour(tmp_path, tell, status, sentence):
    if status is not None:
        write_status(tmp_path, 2, **status)
    (line,) = tell(start_command=lambda network: f"start {network}")
    assert re.search(sentence, line)


def test_it_says_what_is_known_of_a_neighbour_without_a_status_file(tell, tmp_path, clock):
    clock.after(1, lambda: torch.save({"net": {}}, tmp_path / "ckpt0_5.t7"))
    assert tell()[0].endswith("network 2 keeps no status file; its newest checkpoint is of round 5")


def test_what_files_say_is_made_printable(tell, tmp_path):
    nasty = "\x1b[2J\x07\r\nNetwork:1    epoch:9    accuracy:99\u202e\ud800" + "x" * 5000
    for fields in (
        {"state": "failed", "detail": nasty}, {"state": nasty}, {"epoch": nasty}, {"epoch": [nasty]}, {"step": nasty},
        {"detail": {nasty: nasty}, "state": "waiting"}, {"host": nasty}, {"host": [nasty]}, {"round": [nasty]},
    ):  # fmt: skip
        write_status(tmp_path, 2, **fields)
        (line,) = tell(resume=True)
        assert line.isprintable() and len(line) < 2500


def test_the_status_says_whom_it_waits_for_and_afterwards_what_it_said_before(make, tmp_path, clock):
    ring, seen = make(), []
    ring.update("testing", "of the best")
    clock.after(5, lambda: seen.append(membership.observe(tmp_path, [1])[0]))
    clock.after(6, lambda: save(tmp_path / "ckpt0_6.t7", {"net": STATE}))
    ring.wait(6)
    assert str(seen[0]) == "waiting for network 2"
    assert str(membership.observe(tmp_path, [1])[0]) == "testing: of the best"


# Which file is taken


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        ({"run": "another"}, "is out of place: it is of run, network and round ['another', 2, 6], not "),
        ({"epoch": 5}, "is out of place"),
        ({"network": 1}, "is out of place"),
        ({"net": None}, "has no state dict under 'net'"),
    ],
)
def test_a_file_that_is_not_the_neighbours_of_this_round_is_waited_out(make, tmp_path, clock, caplog, stamp, reason):
    ring, path = make(), tmp_path / "ckpt0_6.t7"
    good = {"net": {"weight": torch.ones(1)}, "run": ring.run, "network": 2, "epoch": 6}
    save(path, good | stamp)
    clock.after(600, lambda: save(path, good))
    found = ring.wait(6)
    assert found["weight"] == 1 and found.source == str(path)
    assert reason in caplog.messages[0]


def test_a_file_that_is_written_in_place_is_read_when_it_is_whole(make, tmp_path, clock):
    """As the published script writes it: bare, and torn for a while."""
    ring, path = make(), tmp_path / "ckpt0_6.t7"
    torch.save({"net": {"weight": torch.ones(3)}, "acc": 50.0, "epoch": 6}, path)
    data, reads = path.read_bytes(), []
    path.write_bytes(data[:100])
    clock.after(20, lambda: path.write_bytes(data[:500]))
    clock.after(25, lambda: reads.append(path.write_bytes(data)))
    began = clock.now
    assert ring.wait(6)["weight"].tolist() == [1, 1, 1]
    assert reads and clock.now - began < 27


# How it ends


def beats(clock: Clock, directory, until: float, **fields) -> None:
    write_status(directory, 2, **fields)
    clock.every(5, lambda: write_status(directory, 2, beat=clock.now, **fields), until)


@pytest.mark.parametrize(
    "fields",
    [{"state": "starting", "epoch": None}, {"state": "training"}, {"state": "waiting", "step": 9, "round": 5}],
)
def test_a_heartbeat_is_enough_of_one_that_starts_or_waits_or_never_reports_steps(make, tmp_path, clock, fields):
    ring = make(timeout=300)
    beats(clock, tmp_path, 1_000, run=ring.run, **fields)
    clock.after(1_000, lambda: save(tmp_path / "ckpt0_6.t7", {"net": STATE}))
    ring.wait(6)


def test_one_that_reports_steps_must_go_on_doing_so(make, tmp_path, clock):
    """A process that hangs, while the thread of its heartbeat goes on, ends the wait."""
    ring = make(timeout=600)
    began = clock.now
    clock.every(
        5, lambda: write_status(tmp_path, 2, beat=clock.now, step=min(int(clock.now - began), 1200)), until=1_900
    )
    words = r"gave up after 30 min of waiting for network 2 \(round 6\): network 2 is training at epoch 6, step 1200 "
    words += r"\(heartbeat \d s ago, progress 10 min ago\)\. Resume network 2, then this one"
    assert gives_up(ring, clock, words) == pytest.approx(1800, abs=6)


@pytest.mark.parametrize(
    ("timeout", "beating", "seconds", "words"),
    [
        (600, 600, 1200, "heartbeat 10 min ago"),
        (1, 100, 115, "network 2"),  # of one that lives, three heartbeats are awaited
        (60, 0, 60, "network 2 has not started; start it with"),
    ],
)
def test_it_gives_up_one_that_has_been_silent_for_the_timeout(make, tmp_path, clock, timeout, beating, seconds, words):
    if beating:
        beats(clock, tmp_path, beating)
    assert gives_up(make(timeout=timeout), clock, words) == pytest.approx(seconds, abs=3)


def test_one_without_a_status_file_lives_as_long_as_it_publishes(make, tmp_path, clock):
    ring = make(3, timeout=600)
    for count in range(6):
        clock.after(500 * count, lambda count=count: torch.save({}, tmp_path / f"ckpt0_{count}.t7"))
    clock.after(3000, lambda: save(tmp_path / "ckpt0_6.t7", {"net": STATE}))
    ring.wait(6)


def test_a_file_that_stays_damaged_ends_the_wait_though_the_neighbour_lives(make, tmp_path, clock):
    ring = make(timeout=600)
    (tmp_path / "ckpt0_6.t7").write_bytes(b"torn")
    beats(clock, tmp_path, 1_000)
    assert gives_up(ring, clock, r"ckpt0_6\.t7 is no file of torch\.save") < 602


@pytest.mark.parametrize("reached", [6, 90])
def test_one_that_waits_far_ahead_for_what_we_have_lost_does_not_keep_us_for_ever(make, tmp_path, clock, reached):
    ring = make(timeout=600)
    beats(clock, tmp_path, 1_000, run=ring.run, round=reached, state="waiting", detail="for network 1")
    words = "network 2 is waiting for network 1 at epoch 6 .*; it is past round 6, of which there is no checkpoint any"
    assert gives_up(ring, clock, words) == pytest.approx(600, abs=2)


def test_two_rings_of_one_process_that_wait_for_each_other_come_to_an_end(make, tmp_path, clock):
    ring = make(timeout=600)
    second = FileRing(tmp_path, 2, 2)
    words = "network 2 is starting .*; that network is of this same process: publish the weights of all networks before"
    assert gives_up(ring, clock, words) == pytest.approx(600, abs=2)
    second.leave("stopped")


def test_a_check_that_raises_ends_the_wait(make):
    calls = []

    def check() -> None:
        calls.append(time.monotonic())
        if len(calls) > 3:
            raise Enough

    with pytest.raises(Enough):
        make(check=check).wait(6)


def test_a_baseline_gets_its_own_weights(make):
    ring = make(1)
    assert torch.equal(ring.wait(6)["weight"], STATE["weight"])
