"""The launcher as it is called: from a terminal, from a file, and with networks that train."""

import json
import os
import re
import signal
import subprocess
from functools import partial

import pytest
from launching import ENVIRONMENT, LAUNCHER, write_status
from processes import until

from filter_grafting.membership import observe


def call(*words, cwd):
    return subprocess.run([LAUNCHER, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_terminal_shows_a_table_and_neither_its_end_nor_ctrl_c_ends_the_training(project, terminal):
    project.trains_on()
    flags = ("--data", "glyphs", "--device", "cpu", "--s")
    calls = [partial(project.run, *flags, name) for name in ("x", "y", "z")]
    watched, left, closed = (terminal(call, project.cwd) for call in calls)
    for shown in (watched, left, closed):
        shown.shows("training")
    left.press_ctrl_c()
    assert left.end() == 130
    assert "no longer watching; the training goes on" in left.text
    os.kill(closed.pid, signal.SIGHUP)
    assert closed.end() == -signal.SIGHUP
    until(lambda: project.states("y") == project.states("z") == ["training"] * 2)
    assert project("stop", "y")[0] == 0 and project.states("y") == ["stopped"] * 2
    project.ends.touch()
    assert watched.end() == 0
    last = watched.text.split("\x1b[J")[-1].splitlines()
    assert last[0].split() == ["network", "epoch", "accuracy", "best", "rate", "left", "state"]
    assert [line.split()[-1] for line in last[1:3]] == ["done", "done"]
    assert all(len(re.sub(r"\x1b\[\d*\w", "", line)) <= 80 for line in watched.text.splitlines())
    until(lambda: project.states("z") == ["done"] * 2)


@pytest.mark.slow
def test_a_ring_is_started_killed_resumed_and_stopped(tmp_path, images):
    flags = ["--data", images, "--model", "ranks:tiny", "--batch_size", "16", "--device", "cpu", "--epochs", "100000"]
    run = tmp_path / "a run"

    def status(network):
        return json.loads((run / f"network{network}.json").read_text())

    def epochs():
        return [path.read_text().count("\n") for path in sorted(run.glob("metrics?.csv"))]

    started = call(*flags, "--s", run, cwd=tmp_path)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        until(lambda: len(epochs()) == 2 and min(epochs()) > 2)
        survivor, victim = status(1)["pid"], status(2)["pid"]
        os.kill(victim, signal.SIGKILL)
        until(lambda: observe(run)[1].state == "died")
        before = epochs()[1]
        resumed = call("resume", run, cwd="/")
        assert resumed.returncode == 0, resumed.stdout + resumed.stderr
        until(lambda: status(2)["pid"] != victim and epochs()[1] > before)
        assert status(1)["pid"] == survivor
        stopped = call("stop", run, cwd=tmp_path)
    finally:
        for one in observe(run):
            if one.alive:
                os.kill(one.pid, signal.SIGKILL)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert [status(i)["state"] for i in (1, 2)] == ["stopped"] * 2


def test_grafting_sh_runs_from_any_folder_and_its_reader_may_have_seen_enough(tmp_path):
    write_status(tmp_path / "a run", 1, state="failed", detail="the disk is full")
    command = ["sh", "-c", f"'{LAUNCHER}' status 'a run' | head -n 1"]
    ended = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "a run:\n", "")
