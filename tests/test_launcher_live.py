"""The launcher as it is called: from a terminal, from a file, and with networks that train."""

import json
import os
import re
import signal
import subprocess

import launching
import pytest
from launching import ENVIRONMENT, LAUNCHER
from processes import until

from filter_grafting.membership import observe


@pytest.fixture
def project(tmp_path, monkeypatch, capsys):
    yield from launching.project(tmp_path, monkeypatch, capsys)


@pytest.fixture
def terminal():
    yield from launching.terminals()


def test_a_terminal_shows_a_table_and_neither_its_end_nor_ctrl_c_ends_the_training(project, terminal):
    project.trains_on()
    script = project.root / "grafting_cifar/grafting.sh"
    command = [script, "--data", "glyphs", "--device", "cpu", "--s"]
    watched, left, closed = (terminal([*command, name], project.cwd, os.environ) for name in ("x", "y", "z"))
    for shown in (watched, left, closed):
        shown.shows("training")
    left.press_ctrl_c()
    assert left.end() == 130
    assert "no longer watching; the training goes on" in left.text and f"end them:   '{script}' stop y" in left.text
    os.kill(closed.pid, signal.SIGHUP)
    assert closed.end() == -signal.SIGHUP
    os.kill(project.status("z", 1)["pid"], signal.SIGHUP)
    until(lambda: [project.status(name, i)["state"] for name in "yz" for i in (1, 2)] == ["training"] * 4)
    stopped = subprocess.run([script, "stop", "y"], cwd=project.cwd, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert [project.status("y", i)["state"] for i in (1, 2)] == ["stopped"] * 2
    project.end()
    assert watched.end() == 0
    last = watched.text.split("\x1b[J")[-1].splitlines()
    assert last[0].split() == ["network", "epoch", "accuracy", "best", "rate", "left", "state"]
    assert [line.split()[-1] for line in last[1:3]] == ["done", "done"]
    assert all(len(re.sub(r"\x1b\[\d*\w", "", line)) <= 80 for line in watched.text.splitlines())
    until(lambda: [project.status("z", i)["state"] for i in (1, 2)] == ["done"] * 2)


# Networks that train


def call(*words, cwd):
    return subprocess.run([LAUNCHER, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_ring_is_started_killed_resumed_and_stopped(tmp_path, images):
    flags = ["--data", images, "--model", "resnet20", "--batch_size", "16", "--device", "cpu", "--epochs", "1000"]
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
        assert re.search(r"^ +2 .* died$", call("status", "a run", cwd=tmp_path).stdout, re.MULTILINE)
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


def test_a_network_that_is_refused_is_said_with_its_sentence(tmp_path, images):
    flags = ["--data", images, "--images", "1000", "--model", "resnet20", "--device", "cpu", "--num", "1", "--s", "x"]
    ended = call(*flags, cwd=tmp_path)
    assert ended.returncode == 1
    assert re.search(r"^network 1 has failed: .*--images 1000.* but there are 32", ended.stdout, re.MULTILINE)
