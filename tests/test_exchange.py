import errno
import heapq
import json
import os
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Process, until

from filter_grafting import checkpoint, exchange
from filter_grafting.errors import (
    CheckpointError,
    GraftingError,
    NeighbourTimeout,
    RefusedError,
    UnreadableError,
    WriteError,
)
from filter_grafting.exchange import Ring, holder, printable, read_status

HOLD = Path(__file__).with_name("hold.py")
CONTENTS = {"net": {"weight": torch.zeros(2)}, "optimizer": {}}
SETTINGS = {"model": "resnet20", "classes": 10, "num": 2, "epochs": 8, "a": 0.4, "c": 500.0, "level": "layer"}


class Clock:
    """Stands in for the module `time`: a wait of hours takes no time, and things happen at chosen moments of it."""

    def __init__(self):
        self.now, self.plan, self.asleep = 5000.0, [], 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return 1e9 - self.now  # a clock that goes wrong, as clocks of other hosts do

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.asleep
        self.asleep = 0.0
        while self.plan and self.plan[0][0] <= self.now:
            heapq.heappop(self.plan)[2]()

    def after(self, seconds: float, action: Callable[[], object]) -> None:
        heapq.heappush(self.plan, (self.now + seconds, len(self.plan), action))

    def every(self, seconds: float, action: Callable[[], object], until: float) -> None:
        for count in range(1, int(until / seconds) + 1):
            self.after(count * seconds, action)


class Enough(Exception):
    pass


class Fails:
    def __init__(self, error: Exception):
        self.error = error

    def __call__(self, *_: object, **__: object) -> None:
        raise self.error


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(exchange, "time", clock)
    monkeypatch.setattr(exchange, "POLL_SECONDS", 0.5)
    return clock


@pytest.fixture
def member(tmp_path):
    """Makes rings that have joined, and leave at the end of the test."""
    rings = []

    def join(network: int, networks: int = 2, directory: Path = tmp_path, resume: bool = False, **options) -> Ring:
        rings.append(Ring(directory, network, networks, **options))
        rings[-1].join(resume)
        return rings[-1]

    yield join
    for ring in rings:
        ring.leave("stopped")


@pytest.fixture
def hold(tmp_path):
    """Starts processes that hold a network's place."""
    processes = []

    def start(directory: Path, network: int, networks: int = 2, settings: dict = SETTINGS) -> Process:
        arguments = [str(directory), str(network), str(networks), json.dumps(settings)]
        processes.append(Process(HOLD, arguments, tmp_path / f"hold{len(processes)}.log"))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()


def publish(ring: Ring, epoch: int) -> None:
    ring.publish(epoch, CONTENTS)
    ring.flush()


def epochs_of(directory: Path, network: int, networks: int) -> list[int]:
    names = (path.name for path in directory.glob(f"ckpt{network % networks}_*.t7"))
    return sorted(int(name.split("_")[1].removesuffix(".t7")) for name in names)


def write_status(directory: Path, network: int, **fields) -> None:
    status = {
        "network": network, "num": 2, "state": "training", "detail": "", "epoch": 6, "host": socket.gethostname(),
        "pid": 1, "time": 0, "beat": 0,
    }  # fmt: skip
    (directory / f"network{network}.json").write_text(json.dumps(status | fields))


def waiting(directory: Path, lines: int = 1, **options) -> list[str]:
    """What network 1 of 2 says while it waits for epoch 6 of network 2."""
    said = []

    def check() -> None:
        if len(said) >= lines:
            raise Enough

    ring = Ring(directory, 1, 2, say=said.append, check=check, **options)
    ring._status["command"] = ["python", "grafting.py", "--s", "a run", "--i", "1", "--num", "2"]
    publish(ring, 6)
    with pytest.raises(Enough):
        ring.wait(6)
    return said


# Files


@pytest.mark.parametrize("networks", [2, 3, 4, 5])
def test_a_network_keeps_at_most_n_plus_1_files_and_all_that_anyone_may_need(tmp_path, networks):
    rings = {network: Ring(tmp_path, network, networks) for network in range(1, networks + 1)}
    schedule = random.Random(networks)
    published, grafted = dict.fromkeys(rings, -1), dict.fromkeys(rings, -1)
    has_two = dict.fromkeys(rings, False)  # whether the checkpoint before the newest is there to go back to
    most = 0
    for _ in range(60 * networks):
        able = [
            network for network, ring in rings.items()
            if published[network] == grafted[network] or published[ring.neighbour] >= published[network]
        ]  # fmt: skip
        assert able, "deadlock"
        slow = 1 if schedule.random() < 0.9 else 0  # network 1 is late, so that the others run as far ahead as they can
        network = schedule.choice([network for network in able if network > slow] or able)
        ring, epoch = rings[network], published[network]
        if epoch == grafted[network]:
            publish(ring, epoch + 1)
            published[network], has_two[network] = epoch + 1, epoch >= 0
        elif has_two[network] and schedule.random() < 0.1:
            # Killed, with its newest checkpoint damaged: it goes on from the one before.
            path = ring.path(epoch)
            path.write_bytes(path.read_bytes()[:100])
            rings[network] = Ring(tmp_path, network, networks, say=lambda line: None)
            assert rings[network].newest()[0] == epoch - 1
            published[network], grafted[network], has_two[network] = epoch - 1, epoch - 2, False
        else:
            ring.wait(epoch)
            grafted[network] = epoch
        for one, ring in rings.items():
            files = epochs_of(tmp_path, one, networks)
            most = max(most, len(files))
            assert len(files) <= networks + 1
            for back in 0, has_two[one]:  # continued from its newest checkpoint, or the one before
                epoch = published[one] - back
                if epoch >= 0:
                    assert epoch in files
                    assert epoch in epochs_of(tmp_path, ring.neighbour, networks) or published[ring.neighbour] < epoch
    assert most == networks + 1
    assert min(published.values()) >= 4


def test_a_ring_of_two_in_step_keeps_two_or_three(tmp_path):
    rings = [Ring(tmp_path, network, 2) for network in (1, 2)]
    for epoch in range(6):
        for ring in rings:
            publish(ring, epoch)
        for ring in rings:
            ring.wait(epoch)
            assert len(epochs_of(tmp_path, ring.network, 2)) in ((2, 3) if epoch else (1,))


def test_a_baseline_keeps_two(tmp_path):
    ring = Ring(tmp_path, 1, 1)
    for epoch in range(5):
        publish(ring, epoch)
    assert epochs_of(tmp_path, 1, 1) == [3, 4]


def test_keep_all_keeps_all(tmp_path):
    rings = [Ring(tmp_path, network, 2, keep_all=True) for network in (1, 2)]
    for epoch in range(5):
        for ring in rings:
            publish(ring, epoch)
    assert epochs_of(tmp_path, 1, 2) == epochs_of(tmp_path, 2, 2) == [0, 1, 2, 3, 4]


def test_stray_checkpoints_of_high_epochs_make_nobody_delete_what_is_needed(tmp_path):
    ring = Ring(tmp_path, 1, 4)
    for stray in "ckpt1_900.t7", "ckpt2_900.t7":  # its own, and its reader's
        (tmp_path / stray).write_bytes(b"of another run")
    for epoch in range(4):
        publish(ring, epoch)
    assert epochs_of(tmp_path, 1, 4) == [0, 1, 2, 3, 900]


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path):
    own = [".ckpt1_3.t7.0a.tmp", ".network1.json.0a.tmp", ".metrics1.csv.0a.tmp", ".coefficients1.csv.0a.tmp",
           ".best1.t7.0a.tmp", ".final1.t7.0a.tmp"]  # fmt: skip
    others = [".ckpt0_3.t7.0a.tmp", ".metrics11.csv.0a.tmp", ".best12.t7.0a.tmp", "notes.tmp"]
    for name in own + others:
        (tmp_path / name).touch()
    (tmp_path / ".run.json.0a.tmp").touch()
    ring = Ring(tmp_path, 1, 2)
    ring.join(resume=False)
    assert (tmp_path / ".run.json.0a.tmp").exists()  # of a network that is agreeing just now
    ring.agree(SETTINGS)
    assert not (tmp_path / ".run.json.0a.tmp").exists()
    ring.leave("stopped")
    assert not [name for name in own if (tmp_path / name).exists()]
    assert all((tmp_path / name).exists() for name in others)


def test_a_checkpoint_is_picked_up_within_a_tenth_of_a_second(tmp_path, monkeypatch):
    renamed, seen, replace, load = [], [], os.replace, exchange.load

    def replace_and_tell(source, target):
        replace(source, target)
        if Path(target).name.startswith("ckpt0"):
            renamed.append(time.monotonic())

    def tell_and_load(path):
        seen.append(time.monotonic())
        return load(path)

    monkeypatch.setattr(os, "replace", replace_and_tell)
    monkeypatch.setattr(exchange, "load", tell_and_load)
    reader, writer = Ring(tmp_path, 1, 2), Ring(tmp_path, 2, 2)
    for epoch in range(5):
        publish(reader, epoch)
        late = threading.Timer(0.1, publish, (writer, epoch))
        late.start()
        reader.wait(epoch)
        late.join()
    assert min(after - before for before, after in zip(renamed, seen, strict=True)) < 0.1  # the machine may be busy


def test_the_next_epoch_does_not_begin_before_the_disk_has_the_last_but_one(tmp_path, monkeypatch):
    ring, gate, save = Ring(tmp_path, 1, 1), threading.Event(), exchange.save
    monkeypatch.setattr(exchange, "save", lambda *arguments: gate.wait(30) and save(*arguments))
    ring.publish(0, CONTENTS)  # returns at once
    assert not epochs_of(tmp_path, 1, 1)
    threading.Timer(0.1, gate.set).start()
    ring.publish(1, CONTENTS)
    assert epochs_of(tmp_path, 1, 1)[0] == 0
    ring.flush()
    assert epochs_of(tmp_path, 1, 1) == [0, 1]


def test_a_failure_in_the_background_is_raised_at_the_next_call_and_while_waiting(tmp_path):
    for call in (lambda ring: ring.publish(1, CONTENTS), lambda ring: ring.flush(), lambda ring: ring.wait(0)):
        ring = Ring(tmp_path, 1, 2)
        ring.path(0).mkdir()
        ring.publish(0, CONTENTS)
        with pytest.raises(WriteError, match=r"cannot write .*ckpt1_0\.t7: .*MB are free there"):
            call(ring)
        ring.path(0).rmdir()


# The newest checkpoint of one's own


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "empty":
        data = b""
    elif how == "truncated":
        data = data[:-1]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    elif how == "no training state":
        torch.save({"net": {}}, path)
        return
    path.write_bytes(data)


@pytest.mark.parametrize("how", ["empty", "truncated", "flipped", "no training state"])
def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, how):
    said = []
    ring = Ring(tmp_path, 1, 2, say=said.append)
    for epoch in range(3):
        publish(ring, epoch)
    damage(ring.path(2), how)
    data = ring.path(2).read_bytes()
    assert ring.newest()[0] == 1
    assert (tmp_path / "ckpt1_2.t7.damaged").read_bytes() == data
    assert not ring.path(2).exists()
    assert len(said) == 1 and "ckpt1_2.t7" in said[0] and "set aside as ckpt1_2.t7.damaged" in said[0]


def test_without_any_good_checkpoint_a_network_begins_anew_only_if_its_neighbour_still_has_the_first(tmp_path):
    ring, neighbour = Ring(tmp_path, 1, 2, say=str), Ring(tmp_path, 2, 2)
    assert ring.newest() is None
    publish(neighbour, 0)
    publish(ring, 0)
    damage(ring.path(0), "truncated")
    assert ring.newest() is None
    publish(ring, 0)
    damage(ring.path(0), "truncated")
    publish(neighbour, 1)
    neighbour.path(0).unlink()
    for _ in range(2):  # and leaves everything as it is, so that it does not begin the next time
        with pytest.raises(RefusedError, match=r"no good checkpoint .*ckpt1_0\.t7 damaged.* gone on to epoch 1"):
            ring.newest()
    assert ring.path(0).exists()


def test_a_network_that_has_lost_its_checkpoints_does_not_begin_beside_a_neighbour_that_has_gone_on(tmp_path):
    ring, neighbour = Ring(tmp_path, 1, 2), Ring(tmp_path, 2, 2)
    for epoch in (7, 8):
        publish(neighbour, epoch)
    with pytest.raises(RefusedError, match=r"no good checkpoint in [^(]*, and cannot begin .* gone on to epoch 8"):
        ring.newest()
    assert ring.newest(first=7) is None  # the run began there: it is only late


@pytest.mark.parametrize("how", ["disk", "memory"])
def test_a_checkpoint_that_cannot_be_read_just_now_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch, how):
    ring = Ring(tmp_path, 1, 1, say=str)
    for epoch in range(2):
        publish(ring, epoch)
    with monkeypatch.context() as patch:
        if how == "disk":
            patch.setattr(checkpoint, "_read", Fails(OSError(errno.EIO, "Input/output error")))
        else:
            patch.setattr(torch, "load", Fails(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")))
        for _ in range(2):
            with pytest.raises(UnreadableError, match=r"ckpt0_1\.t7 cannot be read: .*; mend that, then continue with"):
                ring.newest()
    assert ring.newest()[0] == 1


def test_files_whose_names_are_only_alike_are_left_alone(tmp_path):
    ring = Ring(tmp_path, 1, 2)
    publish(ring, 3)
    names = "ckpt1_04.t7", "ckpt1_\u0664.t7", "ckpt11_4.t7", "ckpt1_4.t7.bak", "xckpt1_4.t7", "ckpt1_-4.t7"
    for name in names:
        (tmp_path / name).touch()
    assert ring.newest()[0] == 3
    assert all((tmp_path / name).exists() for name in names)


def test_a_baseline_without_any_good_checkpoint_begins_anew(tmp_path):
    ring = Ring(tmp_path, 1, 1, say=str)
    for epoch in range(4):
        publish(ring, epoch)
    for epoch in (2, 3):
        damage(ring.path(epoch), "empty")
    assert ring.newest() is None


# Whose file it is


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("stamp", "reason"),
    [
        ({"run": "another", "network": 2, "epoch": 6}, "belongs to another run"),
        ({"run": "this", "network": 2, "epoch": 5}, "out of place: it holds network 2, epoch 5"),
        ({"run": "this", "network": 1, "epoch": 6}, "out of place: it holds network 1, epoch 6"),
        ({"run": "this", "network": 2, "epoch": 6, "net": None}, "has no state dict under 'net'"),
        ({"run": "this", "network": 2, "epoch": 6, "net": {"w": torch.eye(2).to_sparse()}}, "w is not a dense tensor"),
    ],
)
def test_a_checkpoint_that_is_not_the_neighbours_of_this_epoch_is_waited_out(tmp_path, clock, stamp, reason):
    ring = Ring(tmp_path, 1, 2)
    ring.run = "this"
    (tmp_path / "run.json").write_text('{"run": "this"}')
    publish(ring, 6)
    path = tmp_path / "ckpt0_6.t7"
    checkpoint.save(path, CONTENTS | stamp)
    with pytest.raises(CheckpointError, match=reason):
        ring._verify(checkpoint.load(path), path, 2, 6)
    good = CONTENTS | {"run": "this", "network": 2, "epoch": 6, "net": {"weight": torch.ones(1)}}
    clock.after(600, lambda: checkpoint.save(path, good))
    found, state = ring.wait(6)
    assert (found, state) == (path, good["net"])


def test_a_checkpoint_of_the_authors_own_script_is_taken_as_it_is(tmp_path):
    ring = Ring(tmp_path, 1, 2)
    publish(ring, 3)
    torch.save({"net": CONTENTS["net"], "acc": 50.0}, tmp_path / "ckpt0_3.t7")
    assert ring.wait(3)[1].keys() == {"weight"}


# Waiting: what is said


def test_it_says_whom_it_waits_for_after_10_seconds_and_then_every_minute(tmp_path, clock):
    write_status(tmp_path, 2, host="elsewhere")
    times, said = [], []

    def say(line: str) -> None:
        times.append(round(clock.now - began))
        said.append(line)

    def check() -> None:
        if len(said) == 3:
            raise Enough

    ring = Ring(tmp_path, 1, 2, say=say, check=check)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now), 64)
    began = clock.now
    with pytest.raises(Enough):
        ring.wait(6)
    assert times == [10, 70, 130]
    assert said[0].startswith("Network:1    waiting for network 2 (epoch 6) for 10 s: network 2")
    assert said[1].endswith("for 70 s: network 2 is at epoch 6, last seen 10 s ago")
    assert said[2].endswith("for 2 min: network 2 is at epoch 6, last seen 70 s ago")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ({"state": "training", "host": "elsewhere"}, "network 2 is at epoch 6, last seen 10 s ago"),
        ({"state": "starting", "epoch": None, "host": "elsewhere"}, "network 2 is before its first epoch, last seen"),
        ({"state": "waiting", "detail": "for network 1", "host": "elsewhere"}, "at epoch 6, waiting for network 1,"),
        ({"state": "stopped", "detail": "by SIGTERM"}, "network 2 stopped at epoch 6: by SIGTERM"),
        ({"state": "failed", "detail": "the loss is nan", "epoch": None}, "failed before its first epoch: the loss is"),
        ({"state": "done", "epoch": 9}, "network 2 is done at epoch 9"),
        ({"state": "training"}, "network 2 died at epoch 6 (killed?); continue it with: python grafting.py --s 'a run' "
                                "--i 2 --num 2 --resume"),
    ],
)  # fmt: skip
def test_it_says_what_is_known_of_the_neighbour(tmp_path, clock, status, sentence):
    write_status(tmp_path, 2, **status)
    assert sentence in waiting(tmp_path)[0]


def test_it_says_how_to_start_a_neighbour_that_has_not_started(tmp_path, clock):
    line = waiting(tmp_path)[0]
    assert line.endswith("network 2 has not started; start it with: python grafting.py --s 'a run' --i 2 --num 2")


@pytest.mark.parametrize(
    ("command", "other"),
    [
        (["python", "g.py"], "python g.py --i 2"),  # --i 1 is the default
        (["python", "g.py", "--i=1"], "python g.py --i=2"),
        (["python", "g.py", "--resume", "--i", "1"], "python g.py --i 2"),
        (["python", "g.py", "--i", "1", "--resume"], "python g.py --i 2"),
        (["python", "g.py", "--resume", "auto", "--i", "1"], "python g.py --i 2"),
        (["python", "g.py", "--resume", "a file.tar", "--i", "1"], "python g.py --resume 'a file.tar' --i 2"),
    ],
)
def test_the_command_for_another_network(tmp_path, command, other):
    ring = Ring(tmp_path, 1, 2)
    ring._status["command"] = command
    assert ring._start_command(2) == other


def test_it_says_what_is_known_of_a_neighbour_without_a_status_file(tmp_path, clock):
    torch.save({"net": {}}, tmp_path / "ckpt0_5.t7")
    assert waiting(tmp_path)[0].endswith("network 2 keeps no status file; its newest checkpoint is of epoch 5")


def test_a_living_neighbour_of_this_host_is_not_called_dead(tmp_path, clock, hold):
    process = hold(tmp_path, 2)
    until(lambda: "agreed" in process.output())
    write_status(tmp_path, 2)
    assert "network 2 is at epoch 6, last seen" in waiting(tmp_path)[0]
    process.kill()
    (tmp_path / "ckpt1_6.t7").unlink()
    assert "network 2 died at epoch 6" in waiting(tmp_path)[0]


def test_a_damaged_checkpoint_of_the_neighbour_is_reported_and_waited_out(tmp_path, clock):
    write_status(tmp_path, 2, host="elsewhere")
    path = tmp_path / "ckpt0_6.t7"
    path.write_bytes(b"torn")
    said = []
    ring = Ring(tmp_path, 1, 2, say=said.append)
    publish(ring, 6)
    clock.after(100, lambda: checkpoint.save(path, CONTENTS))
    ring.wait(6)
    assert len(said) == 2
    assert "ckpt0_6.t7 is truncated or damaged" in said[0] and "network 2 is at epoch 6" in said[0]


def test_the_status_says_whom_it_waits_for(tmp_path, clock):
    ring = Ring(tmp_path, 1, 2)
    publish(ring, 6)
    seen = []
    clock.after(2, lambda: seen.append(read_status(tmp_path, 1)))
    clock.after(3, lambda: checkpoint.save(tmp_path / "ckpt0_6.t7", CONTENTS))
    ring.wait(6)
    assert (seen[0]["state"], seen[0]["detail"]) == ("waiting", "for network 2")


def test_what_status_files_say_is_made_printable(tmp_path, clock):
    nasty = "\x1b[2J\x07\r\nNetwork:1    epoch:9    accuracy:99\u202e\ud800" + "x" * 5000
    for fields in ({"state": "failed", "detail": nasty}, {"state": nasty}, {"epoch": nasty}, {"epoch": [nasty]},
                   {"detail": {nasty: nasty}, "state": "waiting"}, {"host": nasty}, {"host": [nasty]}):  # fmt: skip
        write_status(tmp_path, 2, **fields)
        line = waiting(tmp_path)[0]
        assert line.isprintable() and len(line) < 2000
        (tmp_path / "ckpt1_6.t7").unlink()
    assert printable("a\tb\x00c") == "a b c"


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[]", b"1", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"beat": ' + b"9" * 5000 + b"}"]
)
def test_an_unreadable_status_is_none(tmp_path, data):
    (tmp_path / "network2.json").write_bytes(data)
    assert read_status(tmp_path, 2) is None


def test_odd_values_in_ones_own_old_status_are_survived(tmp_path):
    for value in 10**300, -1, "x", [1], None, True, 1e400:
        write_status(tmp_path, 1, beat=value, epoch=value, best=value, state="done")
        ring = Ring(tmp_path, 1, 2)
        ring.join(resume=True)
        ring.leave("stopped")
        assert isinstance(read_status(tmp_path, 1)["beat"], int)


def test_no_pipe_is_waited_for(tmp_path):
    for name in "network2.json", "network2.lock", "run.json":
        os.mkfifo(tmp_path / name)
    assert read_status(tmp_path, 2) is None
    holder(tmp_path, 2)
    ring = Ring(tmp_path, 1, 2)
    with pytest.raises(RefusedError, match=r"run\.json is damaged"):
        ring.agree(SETTINGS)


# Waiting: how it ends


def test_it_never_gives_up_a_neighbour_that_is_alive(tmp_path, clock):
    write_status(tmp_path, 2, host="elsewhere")
    ring = Ring(tmp_path, 1, 2, timeout=300, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now), 2_000)
    clock.after(2_000, lambda: checkpoint.save(tmp_path / "ckpt0_6.t7", CONTENTS))
    ring.wait(6)


def test_a_timeout_shorter_than_a_heartbeat_does_not_give_up_a_living_neighbour(tmp_path, clock):
    ring = Ring(tmp_path, 1, 2, timeout=1, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now), 100)
    began = clock.now
    with pytest.raises(NeighbourTimeout):
        ring.wait(6)
    assert clock.now - began == pytest.approx(115, abs=2)


def test_it_gives_up_when_the_neighbour_has_been_silent_for_the_timeout(tmp_path, clock):
    write_status(tmp_path, 2, host="elsewhere")
    ring = Ring(tmp_path, 1, 2, timeout=600, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now), 600)
    began = clock.now
    with pytest.raises(NeighbourTimeout) as failure:
        ring.wait(6)
    assert clock.now - began == pytest.approx(1200, abs=2)
    assert failure.value.exit_status == 3
    assert str(failure.value) == (
        "network 1 gave up after 20 min of waiting for network 2 (epoch 6): network 2 is at epoch 6, last seen "
        "10 min ago. Start network 2 again with --resume, then this one"
    )


def test_it_gives_up_a_neighbour_that_never_started(tmp_path, clock):
    ring = Ring(tmp_path, 1, 2, timeout=60, say=str)
    publish(ring, 0)
    with pytest.raises(NeighbourTimeout, match=r"network 2 has not started; start it with: .* --i 2"):
        ring.wait(0)


def test_without_a_timeout_it_waits_for_ever(tmp_path, clock):
    ring = Ring(tmp_path, 1, 2, timeout=0, say=str)
    publish(ring, 6)
    clock.after(5_000, lambda: checkpoint.save(tmp_path / "ckpt0_6.t7", CONTENTS))
    ring.wait(6)


def test_a_neighbour_without_a_status_file_lives_as_long_as_it_publishes(tmp_path, clock):
    ring = Ring(tmp_path, 1, 3, timeout=600, say=str)
    publish(ring, 6)
    for count in range(6):
        clock.after(500 * count, lambda count=count: torch.save({}, tmp_path / f"ckpt0_{count}.t7"))
    clock.after(3000, lambda: checkpoint.save(tmp_path / "ckpt0_6.t7", CONTENTS))
    ring.wait(6)


def test_a_file_that_stays_damaged_ends_the_wait_though_the_neighbour_lives(tmp_path, clock):
    (tmp_path / "ckpt0_6.t7").write_bytes(b"torn")
    ring = Ring(tmp_path, 1, 2, timeout=600, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now), 2000)
    with pytest.raises(NeighbourTimeout, match=r"ckpt0_6\.t7 is truncated or damaged"):
        ring.wait(6)


def test_a_neighbour_that_has_lost_the_file_does_not_keep_it_waiting_for_ever(tmp_path, clock):
    torch.save({}, tmp_path / "ckpt0_7.t7")
    ring = Ring(tmp_path, 1, 2, timeout=600, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now), 2000)
    with pytest.raises(NeighbourTimeout, match=r"ckpt0_6\.t7 was deleted, there is that of epoch 7"):
        ring.wait(6)


def test_two_networks_do_not_wait_for_each_other_for_ever(tmp_path, clock):
    """The neighbour waits, far ahead, for what this network has lost: it lives, and will never make this epoch."""
    torch.save({}, tmp_path / "ckpt0_90.t7")
    ring = Ring(tmp_path, 1, 2, timeout=600, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now, run=None, epoch=91), 2000)
    with pytest.raises(NeighbourTimeout, match=r"ckpt0_6\.t7 was deleted, there is that of epoch 90"):
        ring.wait(6)


def test_a_stray_file_of_a_high_epoch_says_nothing_of_a_slow_neighbour(tmp_path, clock):
    torch.save({}, tmp_path / "ckpt0_90.t7")
    ring = Ring(tmp_path, 1, 2, timeout=600, say=str)
    publish(ring, 6)
    clock.every(5, lambda: write_status(tmp_path, 2, host="elsewhere", beat=clock.now, run=None, epoch=6), 2000)
    clock.after(1900, lambda: checkpoint.save(tmp_path / "ckpt0_6.t7", CONTENTS))
    ring.wait(6)


def test_the_time_that_it_was_suspended_itself_is_not_the_neighbours_silence(tmp_path, clock):
    write_status(tmp_path, 2, host="elsewhere")
    ring = Ring(tmp_path, 1, 2, timeout=600, say=str)
    publish(ring, 6)

    def suspend() -> None:
        clock.asleep = 10_000

    clock.after(100, suspend)
    clock.after(10_400, lambda: checkpoint.save(tmp_path / "ckpt0_6.t7", CONTENTS))
    ring.wait(6)


def test_a_check_that_raises_ends_the_wait(tmp_path):
    def check() -> None:
        raise Enough

    ring = Ring(tmp_path, 1, 2, check=check)
    publish(ring, 0)
    with pytest.raises(Enough):
        ring.wait(0)


# A directory that goes away


def test_a_deleted_directory_is_noticed_by_whoever_writes_or_waits(tmp_path):
    directory = tmp_path / "run"
    ring = Ring(directory, 1, 2)
    ring.join(resume=False)
    ring.agree(SETTINGS)
    publish(ring, 0)
    shutil.rmtree(directory)
    for call in (lambda: publish(ring, 1), lambda: ring.wait(0), lambda: ring.update("training"),
                 lambda: ring.write(ring.file("best"), CONTENTS)):  # fmt: skip
        with pytest.raises(WriteError, match=r"the save directory .*/run of network 1 is gone: there is no run\.json"):
            call()
    ring.leave("failed")
    assert not directory.exists()


def test_nothing_is_written_into_a_directory_that_another_run_has_made_anew(tmp_path):
    directory = tmp_path / "run"
    old, new = Ring(directory, 1, 2), Ring(directory, 1, 2)
    old.join(resume=False)
    old.agree(SETTINGS)
    shutil.rmtree(directory)
    new.join(resume=False)
    new.agree(SETTINGS)
    before = {path: path.read_bytes() for path in directory.iterdir()}
    for call in (lambda: publish(old, 0), lambda: old.update("training")):
        with pytest.raises(WriteError, match="it is now that of another run"):
            call()
    old.leave("failed")
    assert {path: path.read_bytes() for path in directory.iterdir()} == before
    new.leave("stopped")


def test_ones_own_checkpoint_that_is_deleted_while_waiting_is_noticed(tmp_path, clock):
    ring = Ring(tmp_path, 1, 2)
    publish(ring, 0)
    clock.after(3, ring.path(0).unlink)
    with pytest.raises(WriteError, match=r"ckpt1_0\.t7 of network 1 was deleted"):
        ring.wait(0)


# Status and locks


def test_a_living_network_keeps_its_status_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 0.02)
    ring = Ring(tmp_path, 1, 2)
    ring.join(resume=False, command=["python", "x.py"])
    ring.update("training", epoch=3, accuracy=50.0)
    beat = read_status(tmp_path, 1)["beat"]
    until(lambda: read_status(tmp_path, 1)["beat"] > beat + 2)
    ring.leave("failed", "of a reason")
    status = read_status(tmp_path, 1)
    assert status == read_status(tmp_path, 1) | {
        "network": 1, "num": 2, "state": "failed", "detail": "of a reason", "epoch": 3, "accuracy": 50.0,
        "host": socket.gethostname(), "pid": os.getpid(), "command": ["python", "x.py"],
    }  # fmt: skip
    time.sleep(0.1)
    assert read_status(tmp_path, 1) == status


def test_the_beat_goes_on_from_that_of_an_earlier_process(tmp_path):
    write_status(tmp_path, 1, beat=77, state="stopped", epoch=5, best=60.5)
    ring = Ring(tmp_path, 1, 2)
    ring.join(resume=True)
    status = read_status(tmp_path, 1)
    assert (status["beat"], status["epoch"], status["best"]) == (78, 5, 60.5)
    ring.leave("stopped")


def test_a_status_that_no_new_file_can_be_made_for_is_written_over(tmp_path, monkeypatch):
    ring = Ring(tmp_path, 1, 2)
    ring.join(resume=False)
    ring.update("training", detail="a long detail that is gone afterwards")

    def fail(path, data, durable=True):
        raise WriteError("the disk is full")

    monkeypatch.setattr(exchange, "write_atomically", fail)
    ring.update("failed", "full")
    assert read_status(tmp_path, 1)["detail"] == "full"
    # Unless it has another name, which may be elsewhere.
    os.link(tmp_path / "network1.json", tmp_path / "outside")
    with pytest.raises(WriteError, match="the disk is full"):
        ring.update("failed", "again")
    ring.leave("failed", "again")
    assert read_status(tmp_path, 1)["detail"] == "full"


def test_a_second_process_with_the_same_number_is_refused_while_the_first_lives(tmp_path, hold):
    process = hold(tmp_path, 1)
    until(lambda: "agreed" in process.output())
    before = (tmp_path / "network1.json").read_bytes()
    assert holder(tmp_path, 1) == process.pid
    where = f"process {process.pid} on {socket.gethostname()}"
    with pytest.raises(RefusedError, match=rf"network 1 is already running in .* \({where}\)"):
        Ring(tmp_path, 1, 2).join(resume=True)
    assert json.loads((tmp_path / "network1.json").read_bytes())["pid"] == json.loads(before)["pid"]
    process.kill()
    assert holder(tmp_path, 1) is None
    ring = Ring(tmp_path, 1, 2)
    ring.join(resume=False)
    assert ring._lock is not None
    ring.leave("stopped")


def test_a_network_that_lives_on_another_host_is_found_by_its_beat(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 1.0)
    write_status(tmp_path, 1, host="elsewhere", beat=1)
    threading.Timer(0.1, write_status, (tmp_path, 1), {"host": "elsewhere", "beat": 2}).start()
    with pytest.raises(RefusedError, match=r"already running .*process 1 on elsewhere"):
        Ring(tmp_path, 1, 2).join(resume=True)
    ring = Ring(tmp_path, 1, 2)  # it has died since
    ring.join(resume=True)
    ring.leave("stopped")


def test_where_there_are_no_locks_the_beat_decides(tmp_path, monkeypatch):
    def no_locks(descriptor, operation):
        raise OSError(exchange.NO_LOCKS[0], "no locks")

    monkeypatch.setattr(exchange.fcntl, "lockf", no_locks)
    monkeypatch.setattr(exchange, "BEAT_SECONDS", 1.0)  # long enough for a busy machine
    first = Ring(tmp_path, 1, 2)
    first.join(resume=False)
    with pytest.raises(RefusedError, match="already running"):
        Ring(tmp_path, 1, 2).join(resume=True)
    first.agree(SETTINGS)
    with pytest.raises(RefusedError, match="network 1 is at work with the recorded value"):
        other = Ring(tmp_path, 2, 2)
        other.join(resume=True)
        other.agree(SETTINGS | {"epochs": 9}, may_raise=["epochs"])
    first.leave("stopped")


# Agreement


@pytest.mark.parametrize(("key", "value"), [("model", "vgg16"), ("classes", 100), ("num", 3), ("epochs", 7), ("a", 0.5),
                                            ("c", 400.0), ("level", "filter")])  # fmt: skip
def test_each_setting_that_differs_is_named_with_both_values(tmp_path, member, key, value):
    first, second = member(1), member(2)
    first.agree(SETTINGS)
    publish(first, 0)
    with pytest.raises(RefusedError) as failure:
        second.agree(SETTINGS | {key: value}, may_raise=["epochs"])
    assert f"{key} is {value!r} here and {SETTINGS[key]!r} in the run" in str(failure.value)
    others = SETTINGS.keys() - {key}
    assert not any(f"{other} is " in str(failure.value) for other in others)
    second.agree(SETTINGS)
    assert second.run == first.run


def test_all_settings_that_differ_are_named(tmp_path, member):
    first, second = member(1), member(2)
    first.agree(SETTINGS)
    publish(first, 0)
    with pytest.raises(RefusedError, match=r"a is 0\.5 here and 0\.4 in the run, model is 'vgg16' here and 'resnet20'"):
        second.agree(SETTINGS | {"model": "vgg16", "a": 0.5})


def test_epochs_may_be_raised_while_nobody_is_at_work(tmp_path, member, hold):
    first = member(1)
    first.agree(SETTINGS)
    publish(first, 0)
    more = SETTINGS | {"epochs": 9}
    second = member(2, resume=True)
    with pytest.raises(RefusedError, match="not with a cosine"):
        second.agree(more, why_not="not with a cosine")
    second.leave("failed")
    process = hold(tmp_path, 2)
    until(lambda: "agreed" in process.output())
    with pytest.raises(RefusedError, match="network 2 is at work with the recorded value"):
        member(1, resume=True).agree(more, may_raise=["epochs"])
    process.kill()
    again = member(1, resume=True)
    again.agree(more, may_raise=["epochs"])
    assert again.run == first.run
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["epochs"] == 9
    with pytest.raises(RefusedError, match="epochs is 8 here and 9 in the run"):
        member(2, resume=True).agree(SETTINGS, may_raise=["epochs"])


def test_silent_networks_of_other_hosts_are_watched_all_at_once(tmp_path, clock):
    ring = Ring(tmp_path, 1, 16)
    ring._record(SETTINGS)
    for network in range(2, 17):
        write_status(tmp_path, network, host="elsewhere", run=ring.run)
    began = clock.now
    assert ring._at_work() == []
    assert clock.now - began < 3 * exchange.BEAT_SECONDS
    clock.after(1, lambda: write_status(tmp_path, 9, host="elsewhere", run=ring.run, beat=1))
    assert ring._at_work() == [9]


def test_a_start_that_came_to_nothing_binds_nobody(tmp_path, member):
    first, second = member(1), member(2)
    first.agree(SETTINGS)
    first.leave("failed")
    second.agree(SETTINGS | {"model": "vgg16"})
    assert second.run != first.run


def test_a_network_that_has_agreed_and_still_starts_binds_the_others(tmp_path, member, hold):
    process = hold(tmp_path, 1)  # it has published nothing, and says that it is starting
    until(lambda: "agreed" in process.output())
    assert read_status(tmp_path, 1)["state"] == "starting"
    with pytest.raises(RefusedError, match="model is 'vgg16' here and 'resnet20' in the run"):
        member(2, resume=True).agree(SETTINGS | {"model": "vgg16"})


def test_of_networks_that_start_at_the_same_moment_one_records_and_the_others_follow(tmp_path, hold):
    processes = [hold(tmp_path, i, 4, SETTINGS | {"model": f"resnet{20 + i % 2}"}) for i in (1, 2, 3, 4)]
    until(lambda: all(process.output() for process in processes))
    agreed = {i: "agreed" in process.output() for i, process in enumerate(processes, 1)}
    assert sorted(agreed.values()) == [False, False, True, True]
    assert agreed[1] == agreed[3]
    for i, process in enumerate(processes, 1):
        if not agreed[i]:
            assert "model is 'resnet2" in process.output()
            assert read_status(tmp_path, i)["state"] == "failed"


def test_where_there_are_no_locks_one_of_many_records_all_the_same(tmp_path):
    # Locks do not part the threads of a process.
    rings = [Ring(tmp_path, network, 8) for network in range(1, 9)]
    for ring in rings:
        ring._has_locks = False
    barrier = threading.Barrier(8)

    def agree(ring: Ring) -> None:
        barrier.wait()
        ring.agree(SETTINGS)

    threads = [threading.Thread(target=agree, args=(ring,)) for ring in rings]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {ring.run for ring in rings} == {json.loads((tmp_path / "run.json").read_text())["run"]}


@pytest.mark.parametrize(
    "data",
    ["", "{", "[]", "{}", '{"run": 1, "settings": {}}', '{"run": "x"}', '{"run": "x", "settings": []}'],
)
def test_a_damaged_record_is_refused(tmp_path, member, data):
    (tmp_path / "run.json").write_text(data)
    with pytest.raises(RefusedError, match=r"run\.json is damaged"):
        member(1, resume=True).agree(SETTINGS)


def test_odd_values_in_the_record_are_differences(tmp_path, member):
    settings = SETTINGS | {"epochs": "many\x1b", "c": None, "more": [1]}
    (tmp_path / "run.json").write_text(json.dumps({"run": "x", "settings": settings}))
    publish(member(2), 0)
    with pytest.raises(RefusedError) as failure:
        member(1, resume=True).agree(SETTINGS, may_raise=["epochs"])
    assert str(failure.value).isprintable()
    for key in "epochs", "c", "more":
        assert f"{key} is " in str(failure.value)


def test_checkpoints_of_an_earlier_run_are_refused(tmp_path, member):
    torch.save({"net": {}}, tmp_path / "ckpt0_2.t7")
    with pytest.raises(RefusedError, match=r"checkpoints of an earlier run \(ckpt0_2\.t7\)"):
        member(1, resume=True).agree(SETTINGS)


def test_the_authors_script_may_have_started_first(tmp_path, member):
    for epoch in range(2):
        torch.save({"net": {}}, tmp_path / f"ckpt0_{epoch}.t7")
    member(1, resume=True).agree(SETTINGS)


@pytest.mark.parametrize("name", ["ckpt1_7.t7", "metrics1.csv", "best1.t7", "final1.t7"])
def test_a_directory_in_which_the_network_has_run_is_refused(tmp_path, name):
    write_status(tmp_path, 1, state="stopped")
    (tmp_path / name).write_bytes(b"precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RefusedError) as failure:
        Ring(tmp_path, 1, 2).join(resume=False)
    assert str(failure.value) == (
        f"network 1 has already run in {tmp_path} (state stopped, epoch 6): there is {name}. Continue it with "
        "--resume, or start anew in another directory (--s)"
    )
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after == before | {"network1.lock": b""}
    other = Ring(tmp_path, 2, 2)
    other.join(resume=False)  # network 2 has not
    other.leave("stopped")


def test_a_stuck_start_of_another_network_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange, "TURN_SECONDS", 0.1)
    monkeypatch.setattr(exchange, "_try_to_lock", lambda descriptor, path: False)
    with pytest.raises(RefusedError, match=r"run\.lock has been held for 0 s by another network"):
        Ring(tmp_path, 1, 2).agree(SETTINGS)


# Nothing outside the directory


def test_links_in_the_directory_are_not_followed(tmp_path):
    directory, outside = tmp_path / "run", tmp_path / "outside"
    directory.mkdir()
    outside.write_text("precious")
    names = ["network1.json", "ckpt1_0.t7", "best1.t7"]
    for name in names:
        (directory / name).symlink_to(outside)
    ring = Ring(directory, 1, 2)
    ring.join(resume=True)
    ring.update("training")
    ring.write(ring.file("best"), CONTENTS)
    publish(ring, 0)
    publish(ring, 1)
    ring.leave("stopped")
    assert not any((directory / name).is_symlink() for name in names)
    for name in "run.lock", "run.json", "network2.lock":
        (directory / name).unlink(missing_ok=True)
        (directory / name).symlink_to(outside)
        with pytest.raises(GraftingError):
            ring = Ring(directory, 2, 2)
            ring.join(resume=True)
            ring.agree(SETTINGS)
        ring.leave("failed")
        (directory / name).unlink()
    assert outside.read_text() == "precious"


def test_a_directory_that_cannot_be_made_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*/file/run: Not a directory"):
        Ring(tmp_path / "file" / "run", 1, 2).join(resume=False)
