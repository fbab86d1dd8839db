"""Who is in a run: places, settings that all share, heartbeats, and starts that are refused and leave no trace."""

import copy
import errno
import fcntl
import multiprocessing
import os
import pickle
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from processes import until
from ring_tools import snapshot, write_status

from filter_grafting import (
    AliveError,
    AlreadyRunError,
    GraftingError,
    RefusedError,
    SettingsError,
    WriteError,
    membership,
)
from filter_grafting.membership import observe, read_run, read_status

SETTINGS = {"model": "resnet20", "epochs": 8, "a": 0.4}
MORE = {"settings": SETTINGS | {"epochs": 9}, "may_raise": ["epochs"], "resume": True}
STATE = {"weight": torch.zeros(2)}


@pytest.fixture
def ring(make_ring):
    return lambda *arguments, **options: make_ring(*arguments, **{"settings": SETTINGS, **options})


def has_run(ring, network=1, detail=""):
    """A network that has published once, and ended."""
    before = ring(network)
    before.publish(0, STATE)
    before.leave("stopped", detail)
    return before


# Starts that are refused, or fail


@pytest.mark.parametrize(
    ("network", "networks", "options", "error", "words"),
    [
        (3, 3, {"resume": True, "settings": {"a": 9}}, SettingsError, "num is 3 here and 2 in the run; give the same"),
        (2, 2, {"settings": SETTINGS | {"a": 0.5}}, SettingsError, r"a is 0\.5 here and 0\.4 in the run; give the"),
        (2, 2, {"settings": SETTINGS | {"b": 1}}, SettingsError, r"b is 1 here and '\(not given\)' in the run"),
        (1, 2, {**MORE, "may_raise": ()}, SettingsError, "epochs is 9 here and 8 in the run"),
        (1, 2, {**MORE, "settings": SETTINGS | {"epochs": 7}}, SettingsError, "epochs is 7 here and 8 in the run"),
        (1, 2, {}, AlreadyRunError, r"network 1 has already run in .* \(stopped\): there is ckpt1_0\.t7; resume it \("),
        (2, 2, {"settings": {"a": object()}}, TypeError, r"settings\.a is <object .* give plain values"),
        (3, 2, {}, ValueError, "network: got 3, expected 1 to 2"),
        (
            2,
            2,
            {"name": "ckpt_{round}.t7"},
            ValueError,
            r"name: got 'ckpt_{round}\.t7', expected .* {index} and {round}",
        ),
    ],
)
def test_a_refused_start_changes_nothing(tmp_path, ring, network, networks, options, error, words):
    has_run(ring)
    before = snapshot(tmp_path)
    with pytest.raises(error, match=words):
        ring(network, networks, **options)
    assert snapshot(tmp_path) == before


def test_a_failed_start_takes_back_what_it_did_and_leaves_what_others_build_on(tmp_path, ring):
    with pytest.raises(KeyError), ring(directory=tmp_path / "checkpoint" / "run") as failing:
        failing.update("starting", "reading images")
        raise KeyError
    assert not (tmp_path / "checkpoint").exists()

    first, second = ring(1), ring(2)
    first.leave("failed", "no images")
    assert snapshot(tmp_path).keys() == {"run.json", "run.lock", "network2.json", "network2.lock"}
    second.leave("failed", "no images")
    assert not snapshot(tmp_path), "nor is there a run if all have failed to start"

    has_run(ring, detail="by hand")
    before = snapshot(tmp_path)
    ring(resume=True).leave("failed", "no images")
    assert snapshot(tmp_path) == before


def test_once_it_trains_a_failure_is_told(tmp_path, ring):
    with pytest.raises(KeyboardInterrupt), ring() as first:
        first.update("training", epoch=0)
        raise KeyboardInterrupt
    with pytest.raises(ValueError), ring(2) as second:
        second.publish(0, STATE)
        raise ValueError("the loss became nan\x1b")
    said = [str(status) for status in observe(tmp_path)]
    assert said == ["stopped: KeyboardInterrupt", "failed: the loss became nan "]


@pytest.mark.parametrize("data", ["", '{"run": 1, "settings": {}}'])
def test_a_damaged_record_is_refused(tmp_path, ring, data):
    (tmp_path / "run.json").write_text(data)
    with pytest.raises(RefusedError, match=r"run\.json is damaged"):
        ring(resume=True)
    assert snapshot(tmp_path) == {"run.json": data.encode()}


def test_a_new_run_does_not_start_among_the_checkpoints_of_an_old_one(tmp_path, ring):
    for round in range(3):
        torch.save({"net": {}}, tmp_path / f"ckpt0_{round}.t7")
        if round == 1:  # by a process of the published script that started first
            ring(1).leave("failed")
            (tmp_path / "run.json").unlink()
    with pytest.raises(RefusedError, match=r"checkpoints of an earlier run \(of round 2\) without its run\.json"):
        ring(1, resume=True)


# One owner for each network


def test_a_network_has_one_owner_in_a_process_and_among_processes(tmp_path, ring):
    ring(1).publish(0, STATE)
    with FileLock(tmp_path / "network2.lock"):  # as of a process that lives
        write_status(tmp_path, 2, pid=77, host=socket.gethostname())
        for network, pid, resume in (1, os.getpid(), True), (1, os.getpid(), False), (2, 77, True):
            words = rf"network {network} is already running in .* \(process {pid} on .*\); wait"
            with pytest.raises(AliveError, match=words):
                ring(network, resume=resume)
    assert [status.state for status in observe(tmp_path)] == ["training", "died"]
    ring(2, resume=True)


def test_a_former_owner_writes_nothing_more(tmp_path, ring):
    first = ring()
    first.publish(0, STATE)
    write_status(tmp_path, 1, pid=77)
    before = snapshot(tmp_path)
    for call in (lambda: first.publish(1, STATE), lambda: first.wait(0), lambda: first.update("testing")):
        with pytest.raises(AliveError, match=r"network 1 in .* is now process 77 on elsewhere: this process ends"):
            call()
    first.leave("failed")
    assert snapshot(tmp_path) == before


def test_a_network_of_another_host_is_known_by_its_heartbeat(tmp_path, ring, monkeypatch):
    monkeypatch.setattr(membership, "BEAT_SECONDS", 0.3)
    ended = threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(0.02):
            write_status(tmp_path, 1, beat=(count := count + 1))

    other = threading.Thread(target=beat, daemon=True)
    other.start()
    until((tmp_path / "network1.json").exists)
    assert observe(tmp_path, [1])[0].alive
    with pytest.raises(AliveError, match="process 1 on elsewhere"):
        ring(1)
    ended.set()
    other.join()
    assert observe(tmp_path, [1])[0].state == "died"
    ring(1)


def test_where_there_are_no_locks_a_network_is_known_by_its_heartbeat(tmp_path, ring, monkeypatch):
    def without_locks(*arguments):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(membership, "BEAT_SECONDS", 0.3)
    ring(1).update("training")
    has_run(ring, 2)
    write_status(tmp_path, 2, host=socket.gethostname())  # as of one that was killed
    monkeypatch.setattr(fcntl, "flock", without_locks)
    assert [status.state for status in observe(tmp_path)] == ["training", "died"]
    (tmp_path / "run.lock").unlink()
    # As filelock does without them: it leaves a marker, or in older versions it refuses.
    with pytest.raises(RefusedError, match=r"start it again \(if it is dead, delete network1\.lock\)|knows no flock"):
        ring(1, resume=True)


def test_of_networks_that_start_at_the_same_moment_those_with_other_settings_are_refused(tmp_path, ring):
    barrier = threading.Barrier(6)

    def start(network: int) -> str | None:
        barrier.wait()
        with suppress(SettingsError):
            return ring(network, 6, settings=SETTINGS | {"a": network % 2}).run

    with ThreadPoolExecutor(6) as pool:
        runs = {network: run for network, run in enumerate(pool.map(start, range(1, 7)), 1) if run}
    assert set(runs) in ({1, 3, 5}, {2, 4, 6}) and set(runs.values()) == {read_run(tmp_path)[0]}
    statuses = {path.name for path in tmp_path.glob("network*.json")}
    assert statuses == {f"network{network}.json" for network in runs}


# Settings


def test_settings_are_compared_by_value_and_more_may_be_agreed_on_later(tmp_path, ring):
    odd = {"betas": (0.9, 0.999), "dtype": torch.bfloat16, "data": Path("images"), "nested": {"c": (1,)}, "none": None}
    first, second = ring(1, settings=odd), ring(2, settings=odd | {"betas": [0.9, 0.999], "data": "images"})
    first.publish(0, STATE)
    first.agree({"images": "abc"})
    second.agree({"images": "abc"})
    with pytest.raises(SettingsError, match="images is 'xyz' here and 'abc' in the run"):
        second.agree({"images": "xyz"})
    second.leave("stopped")
    with pytest.raises(SettingsError, match=r"dtype is 'torch\.float16' here and 'torch\.bfloat16' in the run"):
        ring(2, settings=odd | {"dtype": torch.float16})
    ring(2, settings=None, resume=True)  # who gives none takes what there is
    assert read_run(tmp_path)[1]["images"] == "abc"


def test_epochs_may_be_raised_by_a_resume_while_no_other_network_is_at_work(tmp_path, ring):
    before = has_run(ring)
    at_work = r"9 here .* \(network 2 is at work with the recorded"
    with FileLock(tmp_path / "network2.lock"), pytest.raises(SettingsError, match=at_work):
        ring(1, **MORE)
    again = ring(1, **MORE)
    assert again.run == before.run and read_run(tmp_path)[1]["epochs"] == 9
    ring(2, **MORE)
    again.leave("stopped")  # before it trained: but network 2 builds on it
    assert read_run(tmp_path)[1]["epochs"] == 9


def test_networks_that_start_at_once_may_both_raise_the_epochs(ring, monkeypatch):
    has_run(ring, 1), has_run(ring, 2)
    read, started = membership.read_run, []

    def another_starts_just_after(directory):
        found = read(directory)
        if not started:
            started.append(1)
            ring(1, **MORE)
        return found

    monkeypatch.setattr(membership, "read_run", another_starts_just_after)
    ring(2, **MORE)
    assert started


# Status


def test_a_living_network_keeps_its_status_fresh(tmp_path, ring, monkeypatch):
    monkeypatch.setattr(membership, "BEAT_SECONDS", 0.02)
    first = ring(details={"command": ["python", "x.py"], "cwd": "/somewhere"})
    first.update("training", epoch=3, epochs=9, accuracy=50.0, lr=0.1)
    first.progress(17)
    beat = read_status(tmp_path, 1)["beat"]
    until(lambda: read_status(tmp_path, 1)["beat"] > beat + 2)
    (status,) = observe(tmp_path, [1])
    assert (str(status), status.alive) == ("training", True)
    first.leave("failed", "of a reason")
    first.leave("done")
    (status,) = observe(tmp_path, [1])
    assert (str(status), status.alive) == ("failed: of a reason", False)
    assert (status.epoch, status.epochs, status.step, status.accuracy, status.best) == (3, 9, 17, 50.0, None)
    assert (status.pid, status.host, status.cwd) == (os.getpid(), socket.gethostname(), "/somewhere")


def test_done_is_not_said_of_a_network_whose_last_checkpoint_could_not_be_written(tmp_path, ring):
    first, second = ring(1), ring(2)
    for made in first, second:
        made.publish(0, STATE)
        made.path(1).mkdir()
        with pytest.raises(WriteError, match=r"cannot write .*_1\.t7: Is a directory; .* MB are free there"):
            made.publish(1, STATE)
        made.path(1).rmdir()
    second.publish(1, STATE)  # a failed write does not poison the next one
    for made in first, second:
        made.leave("done")
    assert [status.state for status in observe(tmp_path)] == ["failed", "done"]
    assert "cannot write" in observe(tmp_path)[0].detail


def test_a_status_that_cannot_be_written_ends_a_start_alone(tmp_path, ring, monkeypatch):
    def fail(*arguments, **options):
        raise WriteError("the disk is full")

    first = ring()
    with monkeypatch.context() as full:
        full.setattr(membership, "write_atomically", fail)
        with pytest.raises(WriteError):
            first.update("starting")
        first.update("training")
        first.update("testing")
    first.update("waiting")
    assert read_status(tmp_path, 1)["state"] == "waiting"


def test_a_status_that_cannot_be_read_says_nothing(tmp_path):
    for data in b"", b"[]":
        (tmp_path / "network2.json").write_bytes(data)
        assert [status.state for status in observe(tmp_path, [1, 2])] == ["not started"] * 2


# Files and processes


def test_a_deleted_directory_is_noticed_by_whoever_writes_or_waits(tmp_path, ring):
    directory = tmp_path / "run"
    first = ring(directory=directory)
    first.publish(0, STATE)
    shutil.rmtree(directory)
    for call in (lambda: first.publish(1, STATE), lambda: first.wait(0), lambda: first.update("testing")):
        with pytest.raises(WriteError, match=r"directory .*/run of network 1 is gone: there is no run\.json any more"):
            call()
    assert not directory.exists()
    ring(directory=directory).leave("done")
    with pytest.raises(WriteError, match="it is now that of another run"), first:
        first.publish(1, STATE)
    assert not (directory / "ckpt1_1.t7").exists() and observe(directory)[0].state == "done"


def test_what_a_killed_process_left_half_written_is_removed_and_nothing_else(tmp_path, ring):
    own, others = ["ckpt1_3.t7", "network1.json", "best1.t7"], ["ckpt0_3.t7", "best12.t7", "network2.json"]
    for name in own + others:
        (tmp_path / f".{name}.0a.tmp").touch()
    ring(1).publish(0, STATE)
    left = {name for name in snapshot(tmp_path) if name.endswith(".tmp")}
    assert left == {f".{name}.0a.tmp" for name in others}


def test_without_the_locks_of_the_platform_a_ring_says_what_is_missing(tmp_path, ring, monkeypatch):
    monkeypatch.setattr(membership, "fcntl", None)
    with pytest.raises(GraftingError, match="FileRing needs the file locks of Linux and macOS"):
        ring()
    assert not list(tmp_path.iterdir())


def test_a_ring_can_neither_be_pickled_nor_copied_nor_ended_by_a_forked_child(tmp_path, ring):
    first = ring()
    for call in pickle.dumps, copy.deepcopy:
        with pytest.raises(GraftingError, match="a FileRing cannot be pickled or copied: it holds the place of"):
            call(first)
    first.update("training")
    child = multiprocessing.get_context("fork").Process(target=first.leave)
    child.start()
    child.join()
    assert (child.exitcode, [(one.state, one.alive) for one in observe(tmp_path, [1])]) == (0, [("training", True)])
    first.publish(0, STATE)
