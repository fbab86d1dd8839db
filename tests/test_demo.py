"""The demo: a baseline and two grafted networks, one bar, a table at the end, and nothing left running."""

import os
import re
import signal

import pytest
from launching import ENVIRONMENT, LAUNCHER

WORDS = ("demo", "--device", "cpu", "--epochs")


def test_the_demo_trains_three_networks_compares_them_and_replaces_no_other(project):
    for name in ("demo", "demo2"):
        status, output, _ = project(*WORDS, "1")
        assert status == 0, output
        lines = re.findall(r"^(baseline|grafted 1|grafted 2) +Network:([12]) +epoch:0 ", output, re.MULTILINE)
        assert sorted(lines) == [("baseline", "1"), ("grafted 1", "1"), ("grafted 2", "2")]
        runs = [f"checkpoint/{name}/{kind}" for kind in ("baseline", "grafted")]
        assert (project.cwd / "report").read_text() == f"{' '.join(runs)} --plots checkpoint/{name}/plots"
        assert [project.states(run) for run in runs] == [["done"], ["done"] * 2]
        commands = [project.status(runs[kind], i)["command"] for kind, i in ((0, 1), (1, 1), (1, 2))]
        assert [words[words.index("--num") + 1] for words in commands] == ["1", "2", "2"]


def test_the_demo_fails_with_the_reason(project, monkeypatch):
    monkeypatch.setenv("FAILS", "the disk is full: make room")
    status, _, errors = project(*WORDS, "1")
    assert (status, errors.count("\n")) == (1, 1)
    assert re.match(r"(baseline|grafted [12]) ended with status 1: the disk is full: make room", errors)


def test_a_signal_ends_the_demo_and_its_networks(project, terminal):
    project.trains_on()
    folders = [project.cwd / name for name in ("interrupted", "terminated")]
    for folder in folders:
        folder.mkdir()
    interrupted, terminated = (terminal(lambda: project.run(*WORDS, "1000"), folder) for folder in folders)
    for shown in (interrupted, terminated):
        shown.shows("Network:", 3)
    interrupted.press_ctrl_c()
    os.kill(terminated.pid, signal.SIGTERM)
    assert (interrupted.end(), terminated.end()) == (130, 143)
    assert re.search(r" +\d+%  \S+ left", interrupted.text) and interrupted.text.endswith("stopped\r\n")
    for folder in folders:
        states = [project.states(folder / "checkpoint/demo" / kind) for kind in ("baseline", "grafted")]
        assert states == [["stopped"], ["stopped"] * 2]


@pytest.mark.slow
def test_the_demo_as_the_readme_has_it(tmp_path, terminal):
    shown = terminal(lambda: os.execve(LAUNCHER, [LAUNCHER, "demo"], ENVIRONMENT), tmp_path)
    assert shown.end() == 0, shown.text
    text = re.sub(r"\x1b\[\d*\w", "", shown.text).replace("\r", "\n")
    accuracies = re.findall(r"epoch:4 +accuracy:([\d.]+)", text)
    assert len(accuracies) == 3 and all(30 <= float(accuracy) <= 98 for accuracy in accuracies)
    table = text.split("comparing them")[-1]
    assert re.search(r"\| *gain *\|", table) and re.search(r"checkpoint/demo/\S+/best[12]\.t7", table)
    plots = re.findall(r"checkpoint/demo/plots/\S+\.png", table)
    assert plots and all((tmp_path / path).stat().st_size > 0 for path in plots)
