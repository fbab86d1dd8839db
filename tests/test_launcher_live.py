"""The launcher as it is called: from a terminal, from a file, and with networks that train."""

import json
import os
import re
import signal
import subprocess

import launching
import pytest
from launching import ENVIRONMENT, LAUNCHER, Terminal
from processes import until

from filter_grafting.membership import observe


@pytest.fixture
def terminal():
    """terminal(command, cwd, environment) -> Terminal; none outlives the test."""
    made = []

    def start(command, cwd, environment=ENVIRONMENT):
        made.append(Terminal(command, cwd, environment))
        return made[-1]

    yield start
    for one in made:
        one.kill()


@pytest.fixture
def project(tmp_path, monkeypatch):
    with launching.project(tmp_path, monkeypatch) as made:
        yield made


def test_on_a_terminal_a_table_is_drawn_until_all_have_ended(project, terminal):
    project.trains_on()
    command = [project.root / "grafting_cifar/grafting.sh", "--data", "glyphs", "--device", "cpu", "--s", "x"]
    shown = terminal(command, project.cwd, os.environ)
    shown.shows("training")
    again = terminal(command, project.cwd, os.environ)
    assert again.end() == 1 and "network 1 runs in x" in again.text
    project.end()
    assert shown.end() == 0
    last = shown.text.split("\x1b[J")[-1].splitlines()
    assert [line.split() for line in last[:1]] == [["network", "epoch", "accuracy", "best", "rate", "left", "state"]]
    assert [line.split()[-1] for line in last[1:3]] == ["done", "done"]
    assert all(len(re.sub(r"\x1b\[\d*\w", "", line)) <= 80 for line in shown.text.splitlines())


def test_ctrl_c_ends_the_view_and_not_the_training(project, terminal):
    project.trains_on()
    script = project.root / "grafting_cifar/grafting.sh"
    shown = terminal([script, "--data", "glyphs", "--device", "cpu", "--s", "x"], project.cwd, os.environ)
    shown.shows("training")
    shown.press_ctrl_c()
    assert shown.end() == 130
    assert "no longer watching; the training goes on" in shown.text
    assert f"end them:   '{script}' stop x" in shown.text
    assert [project.status("x", i)["state"] for i in (1, 2)] == ["training"] * 2
    stopped = subprocess.run([script, "stop", "x"], cwd=project.cwd, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert [project.status("x", i)["state"] for i in (1, 2)] == ["stopped"] * 2


def test_the_terminal_may_close_without_harm_to_the_networks(project, terminal):
    project.trains_on()
    command = [project.root / "grafting_cifar/grafting.sh", "--data", "glyphs", "--device", "cpu", "--s", "x"]
    shown = terminal(command, project.cwd, os.environ)
    shown.shows("training")
    os.kill(shown.pid, signal.SIGHUP)
    assert shown.end() == -signal.SIGHUP
    for i in (1, 2):
        os.kill(project.status("x", i)["pid"], signal.SIGHUP)
    project.end()
    until(lambda: [project.status("x", i)["state"] for i in (1, 2)] == ["done"] * 2)


# Networks that train


def call(*words, cwd):
    return subprocess.run([LAUNCHER, *map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_ring_is_started_killed_resumed_and_stopped(tmp_path, images):
    flags = ["--data", images, "--model", "resnet20", "--batch_size", "16", "--device", "cpu", "--epochs", "100000"]
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
    assert "network 2" in (run / "2.log").read_text()


def test_a_network_that_is_refused_is_said_with_its_sentence(tmp_path, images):
    flags = ["--data", images, "--images", "1000", "--model", "resnet20", "--device", "cpu", "--num", "1", "--s", "x"]
    ended = call(*flags, cwd=tmp_path)
    assert ended.returncode == 1
    assert re.search(r"^network 1 has failed: .*--images 1000.* but there are 32", ended.stdout, re.MULTILINE)
