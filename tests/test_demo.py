"""The demo: a baseline and two grafted networks, one bar, a table at the end, and nothing left running."""

import os
import re
import signal
import subprocess

import launching
import pytest
from launching import ENVIRONMENT, LAUNCHER, write_status
from processes import until

from filter_grafting.membership import observe
from training.view import living

MARKER = "made by grafting.sh demo, which replaces this folder"
NETWORKS = (("baseline", 1), ("grafted", 1), ("grafted", 2))


def flags_of(images):
    return ["demo", "--data", str(images), "--device", "cpu", "--batch_size", "16"]


@pytest.fixture
def terminal():
    yield from launching.terminals()


@pytest.fixture
def folder(tmp_path):
    """Where the demo is called from; what it started does not outlive the test."""
    yield tmp_path
    for name in ("baseline", "grafted"):
        for status in living(tmp_path / "checkpoint/demo" / name):
            os.kill(status.pid, signal.SIGKILL)


def call(*words, cwd):
    return subprocess.run([LAUNCHER, *words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)


def states(folder):
    return [str(observe(folder / "checkpoint/demo" / name, [i])[0]) for name, i in NETWORKS]


@pytest.mark.slow
def test_on_a_terminal_the_demo_shows_a_bar_its_epochs_and_a_table(folder, images, terminal):
    earlier = folder / "checkpoint/demo"
    write_status(earlier / "grafted", 1)  # killed
    (earlier / MARKER).touch()
    shown = terminal([LAUNCHER, *flags_of(images), "--epochs", "2"], folder)
    assert shown.end() == 0, shown.text
    text = re.sub(r"\x1b\[\d*\w", "", shown.text).replace("\r", "\n")
    lines = re.findall(r"^(baseline|grafted 1|grafted 2) +Network:[12] +epoch:([01]) ", text, re.MULTILINE)
    assert sorted(lines) == [(name, epoch) for name in ("baseline", "grafted 1", "grafted 2") for epoch in "01"]
    assert re.search(r"\d+%  \S+ left", text), "the bar"
    table = shown.text.split("comparing them")[-1]
    assert re.search(r"\| *gain *\|", table) and re.search(r"checkpoint/demo/\S+/best[12]\.t7", table)
    plots = re.findall(r"checkpoint/demo/plots/\S+\.png", table)
    assert plots and all((folder / path).stat().st_size > 0 for path in plots)
    assert states(folder) == ["done"] * 3


def test_the_demo_replaces_no_folder_but_its_own(folder):
    (folder / "checkpoint/demo").mkdir(parents=True)
    result = call("demo", "--device", "cpu", cwd=folder)
    assert (result.returncode, "was not made by the demo" in result.stderr) == (1, True)
    assert not list((folder / "checkpoint/demo").iterdir())


@pytest.mark.slow
def test_the_demo_fails_with_the_reason_and_leaves_no_network_behind(folder, images):
    result = call(*flags_of(images), "--images", "1000", cwd=folder)
    assert result.returncode == 1
    assert re.search(r"^(baseline|grafted [12]) has failed: .*--images 1000.* but there are 32", result.stderr)
    assert not [status for name in ("baseline", "grafted") for status in living(folder / "checkpoint/demo" / name)]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, "stopped\n"), (signal.SIGTERM, "")])
def test_a_signal_ends_the_demo_and_its_networks(folder, images, number, expected):
    command = [LAUNCHER, *flags_of(images), "--epochs", "1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, **pipes) as demo:
        try:
            until(lambda: all(list((folder / "checkpoint/demo" / name).glob(f"best{i}.t7")) for name, i in NETWORKS))
            second = call("demo", "--device", "cpu", cwd=folder)
            assert (second.returncode, "a demo is at work" in second.stderr) == (1, True)
            os.killpg(demo.pid, number)
            _, errors = demo.communicate()
        finally:
            demo.kill()
    assert (demo.returncode, errors) == (128 + number, expected)
    assert states(folder) == ["stopped: by SIGTERM"] * 3


@pytest.mark.slow
def test_the_demo_as_the_readme_has_it(folder):
    result = call("demo", cwd=folder)
    assert result.returncode == 0, result.stderr
    accuracies = re.findall(r"epoch:4 +accuracy:([\d.]+)", result.stdout)
    assert len(accuracies) == 3 and all(30 <= float(accuracy) <= 98 for accuracy in accuracies)
