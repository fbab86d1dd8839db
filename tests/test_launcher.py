"""The launcher: starting, following, listing and stopping networks; the demo; the environment it makes."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from common import manage

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "grafting_cifar" / "grafting.sh"
HERE = socket.gethostname()
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
    return result


# What is known of the networks, and stopping them: processes that do nothing but hold a network's lock


def write_status(directory, network, **fields):
    status = {
        "network": network, "num": 2, "state": "training", "detail": "",
        "epoch": 6, "epochs": 200, "accuracy": 91.5, "best": 92.25,
        "host": HERE, "pid": 2**30, "time": time.time(), "beat": 1, "command": [],
    } | fields  # fmt: skip
    path = directory / f"network{network}.json"
    path.with_suffix(".new").write_text(json.dumps(status))
    path.with_suffix(".new").replace(path)


@pytest.fixture
def living(tmp_path):
    """living(i, ...): a process that is network i of the run in tmp_path, with these fields in its status."""
    program = (
        "import fcntl, signal, sys, time\n"
        "lock = open(sys.argv[1], 'w')\n"
        "fcntl.lockf(lock, fcntl.LOCK_EX)\n"
        "if sys.argv[2:]: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print(flush=True)\n"
        "time.sleep(60)\n"
    )
    processes = []

    def start(network, deaf=False, **fields):
        command = [
            sys.executable,
            "-c",
            program,
            tmp_path / f"network{network}.lock",
            *(["deaf"] if deaf else []),
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        processes.append(process)
        process.stdout.readline()
        write_status(tmp_path, network, **{"pid": process.pid, **fields})
        return process

    yield start
    for process in processes:
        process.kill()
        process.wait()


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["manage.py", *map(str, arguments)])
    return manage.main()


def test_living_and_dead_are_told_apart_by_the_lock(tmp_path, living):
    living(1)
    write_status(tmp_path, 2)  # killed: its last words are that it trains
    write_status(tmp_path, 3, state="stopped", detail="by SIGTERM")
    living(4, pid=1)  # just started again: the status file is still that of an earlier process
    write_status(tmp_path, 6, state="failed", detail="the loss became nan")
    networks = manage.observe(tmp_path, manage.networks_of(tmp_path))
    states = [
        "training",
        "died",
        "stopped by SIGTERM",
        "starting",
        "not started",
        "failed: the loss became nan",
    ]
    assert list(map(str, networks)) == states
    assert [network.alive for network in networks] == [True, False, False, True, False, False]


def test_another_users_networks_are_named_and_the_rest_is_stopped(tmp_path, living, monkeypatch, capsys):
    theirs, ours = living(1), living(2)
    kill = os.kill

    def kill_ours(pid, number):
        if pid == theirs.pid:
            raise PermissionError(1, "Operation not permitted")
        kill(pid, number)

    monkeypatch.setattr(os, "kill", kill_ours)
    assert call(monkeypatch, "stop", tmp_path) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"network 1 (process {theirs.pid}) is another user's, who alone can stop it",
        f"network 2 (process {ours.pid}) is asked to stop",
    ]


def test_a_network_on_another_host_lives_if_its_status_moves(tmp_path, monkeypatch):
    monkeypatch.setattr(manage, "BEAT_SECONDS", 0.5)
    write_status(tmp_path, 1, host="elsewhere", time=0)
    write_status(tmp_path, 2, host="elsewhere", time=time.time() + 1e6)  # by a clock that disagrees
    threading.Timer(0.2, write_status, [tmp_path, 1], {"host": "elsewhere", "beat": 2, "time": 5}).start()
    first, second = manage.observe(tmp_path, range(1, 3))
    assert (first.state, first.alive, first.pid, first.seen) == ("training", True, None, 0)
    assert (second.state, second.alive) == ("died", False)


def test_status_is_a_short_line_per_network_whatever_the_file_holds(tmp_path, living, monkeypatch, capsys):
    (tmp_path / "run.json").write_text('{"run": "x", "settings": {"num": 3}}')
    living(
        1,
        state="\x1b[2J" + "long " * 100,
        epoch="\x07",
        accuracy=None,
        best=[1],
        time="x",
        detail="\r\n|" * 99,
    )
    write_status(tmp_path, 2, state="failed", detail="\x1b]0;title\x07" + "reason " * 100, epoch=10**400)
    assert call(monkeypatch, "status", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["network", "1", "2", "3"]
    assert lines[4].startswith("network 2 failed: ]0;title reason")
    assert all(len(line) <= 80 and line.isprintable() for line in lines)


def test_status_of_no_run_fails(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, "status", tmp_path) == 1
    assert "nothing has started there" in capsys.readouterr().err


def test_stop_ends_those_that_hold_the_locks_and_no_others(tmp_path, living, monkeypatch, capsys):
    first, second = living(1), living(2)
    bystander = subprocess.Popen(["sleep", "60"])
    write_status(tmp_path, 3, pid=bystander.pid, state="done")  # ended long ago; its process id is another's now
    try:
        assert call(monkeypatch, "stop", tmp_path) == 0
        assert (first.wait(), second.wait()) == (-signal.SIGTERM, -signal.SIGTERM)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert "no network of this run is alive" in capsys.readouterr().out
    assert call(monkeypatch, "stop", tmp_path) == 0, "a second time there is nothing to do, which is fine"


def test_stop_says_what_it_could_not_end(tmp_path, living, monkeypatch, capsys):
    monkeypatch.setattr(manage, "BEAT_SECONDS", 0.5)
    deaf = living(1, deaf=True)
    write_status(tmp_path, 2, host="elsewhere", pid=7)
    threading.Timer(0.2, write_status, [tmp_path, 2], {"host": "elsewhere", "pid": 7, "beat": 2}).start()
    assert call(monkeypatch, "stop", tmp_path, "--timeout", 0.3) == 1
    output = capsys.readouterr().out
    assert f"network 1 (process {deaf.pid}) is still there after 0.3 s" in output
    assert "network 2 is process 7 on elsewhere, out of reach from here" in output


def test_pending_are_those_neither_alive_nor_done(tmp_path, living, monkeypatch, capsys):
    living(1)
    write_status(tmp_path, 2, state="done")
    write_status(tmp_path, 3)
    write_status(tmp_path, 4, state="failed")
    assert call(monkeypatch, "pending", tmp_path, 5) == 0
    assert call(monkeypatch, "alive", tmp_path) == 0
    assert capsys.readouterr().out.splitlines() == ["3 4 5", "1"]


def test_status_needs_no_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed')")
    write_status(tmp_path, 1, state="done")
    command = [LAUNCHER, "status", tmp_path]
    result = subprocess.run(command, env={**ENVIRONMENT, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "done" in result.stdout


# Starting and following: a stand-in for grafting.py, in a copy of the project whose path holds a space


STAND_IN = """
import os, sys, time
def value(flag, default): return sys.argv[sys.argv.index(flag) + 1] if flag in sys.argv else default
directory, num = value("--s", "runs/default"), value("--num", "2")
if "--wrong" in sys.argv: sys.exit("grafting.py: error: --wrong") if "--plan" not in sys.argv else os._exit(2)
if "--plan" in sys.argv:
    print(directory, num, os.environ.get("GPUS", "0"), sep="\\n")
else:
    variables = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
    print(*(f"{name}={os.environ.get(name)}" for name in variables), sys.argv[1:])
    print(sys.stdin.read() == "", flush=True)
    time.sleep(float(value("--sleep", "0")))
    print("the end", flush=True)
    sys.exit(int(value("--status", "0")))
"""


@pytest.fixture
def project(tmp_path):
    """A copy of what the launcher needs, with the stand-in; runs its grafting.sh."""
    root = tmp_path / "a project"
    for name in ("common", "filter_grafting"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "requirements.txt").write_text("numpy\n")
    folder = root / "grafting_cifar"
    folder.mkdir()
    shutil.copy(LAUNCHER, folder)
    (folder / "grafting.py").write_text(STAND_IN)
    return root


def launch(project, *arguments, **variables):
    command = [project / "grafting_cifar" / "grafting.sh", *arguments]
    return run(command, project.parent, {**ENVIRONMENT, **variables})


def run(command, directory, environment):
    return subprocess.run(
        command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )


def logs(directory, count):
    """The lines of each network's log, once it has come to its end."""
    paths = [directory / f"{i}.log" for i in range(1, count + 1)]
    return wait_until(
        lambda: (texts := [path.read_text() for path in paths]) and all("the end" in t for t in texts) and texts
    )


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        ({}, ["0", "1", "2", "0", "1"]),
        ({"CUDA_VISIBLE_DEVICES": "5,GPU-ab,7"}, ["5", "GPU-ab", "7", "5", "GPU-ab"]),
    ],
)
def test_networks_are_spread_over_the_gpus(project, variables, devices):
    result = launch(project, "--num", "5", GPUS="3", **variables)
    assert result.returncode == 0, result.stderr
    found = [re.match("CUDA_VISIBLE_DEVICES=(.*) OMP", text)[1] for text in logs(project.parent / "runs/default", 5)]
    assert found == devices


def test_networks_on_the_cpu_share_the_cores(project):
    launch(project, "--num", "1", "--s", "one", OMP_NUM_THREADS="")
    launch(project, "--num", "64", "--s", "many", OMP_NUM_THREADS="")
    launch(project, "--num", "1", "--s", "mine", OMP_NUM_THREADS="7")
    threads = [logs(project.parent / name, 1)[0].split()[1] for name in ("one", "many", "mine")]
    assert threads == [f"OMP_NUM_THREADS={n}" for n in (len(os.sched_getaffinity(0)), 1, 7)]


def test_the_command_lines_can_be_pasted(project):
    result = launch(project, "--s", "it's a dir", "--num", "1", "--model", "résumé $HOME")
    lines = [line for line in result.stderr.splitlines() if "nohup " in line]
    (text,) = logs(project.parent / "it's a dir", 1)
    (project.parent / "it's a dir" / "1.log").unlink()
    subprocess.run(["bash", "-c", lines[0] + " wait"], cwd=project.parent, env=ENVIRONMENT, check=True)
    assert logs(project.parent / "it's a dir", 1) == [text]
    assert "'--model', 'résumé $HOME', '--i', '1'" in text
    assert text.splitlines()[1] == "True", "standard input is empty"


def test_a_wrong_flag_ends_before_anything_is_started(project):
    assert launch(project, "--wrong").returncode == 2
    result = launch(project, "--i", "2")
    assert (result.returncode, "--i is for grafting.py alone" in result.stderr) == (2, True)
    assert not (project.parent / "runs").exists()


def test_a_directory_that_was_run_in_is_refused_and_left_alone(project):
    directory = project.parent / "old"
    directory.mkdir()
    (directory / "metrics2.csv").write_text("epoch\n")
    (directory / "1.log").write_text("precious")
    result = launch(project, "--s", "old")
    assert (result.returncode, "--resume" in result.stderr) == (1, True)
    assert (directory / "1.log").read_text() == "precious"


def test_resume_starts_those_that_are_neither_alive_nor_done(project, tmp_path, living):
    living(1)
    write_status(tmp_path, 2, state="done")
    write_status(tmp_path, 3)
    (tmp_path / "3.log").write_text("before\n")
    result = launch(project, "--resume", "--num", "3", "--s", tmp_path)
    assert result.returncode == 0, result.stderr
    assert wait_until(lambda: "the end" in (tmp_path / "3.log").read_text())
    assert (tmp_path / "3.log").read_text().startswith("before\nCUDA")
    assert not (tmp_path / "1.log").exists() and not (tmp_path / "2.log").exists()
    write_status(tmp_path, 3, state="done")
    assert "nothing to start" in launch(project, "--resume", "--num", "3", "--s", tmp_path).stderr


def test_a_network_that_dies_at_once_is_said(project):
    result = launch(project, "--status", "1")
    assert result.returncode == 1
    assert "network 1 has failed:" in result.stderr and "the end" in result.stderr


def on_terminal(project, *arguments):
    """Starts the launcher on a terminal of its own: (its process id, a function that reads up to a text)."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(project.parent)
        os.execve(project / "grafting_cifar" / "grafting.sh", ["grafting.sh", *arguments], ENVIRONMENT)
    seen = bytearray()

    def read(text):
        deadline = time.monotonic() + 60
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode()
            try:
                seen.extend(os.read(terminal, 4096))
            except OSError:  # the terminal's other end is closed
                break
        assert text in seen.decode(), seen.decode()
        return seen.decode()

    return pid, terminal, read


def test_on_a_terminal_the_logs_are_followed_to_the_end(project):
    pid, _, read = on_terminal(project, "--sleep", "1", "--status", "3")
    text = read("the end")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert "Ctrl-C ends that, not the training" in text


def test_ctrl_c_ends_the_following_and_not_the_training(project):
    pid, terminal, read = on_terminal(project, "--sleep", "5")
    read("OMP_NUM_THREADS=1 [")
    os.write(terminal, b"\x03")
    read("no longer following; the training goes on")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    os.close(terminal)
    assert all("the end" not in (project.parent / f"runs/default/{i}.log").read_text() for i in (1, 2))
    logs(project.parent / "runs/default", 2)


# The real thing, on a few images


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "few images"
    for split, count in (("train", 24), ("test", 8)):
        for name in ("dark", "light"):
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                colour = (k, 2 * k, 3 * k) if name == "dark" else (255 - k, 255 - 2 * k, 200)
                Image.new("RGB", (32, 32), colour).save(folder / split / name / f"{k}.png")
    return folder


def run_launcher(*arguments, cwd):
    return run([LAUNCHER, *map(str, arguments)], cwd, ENVIRONMENT)


def status(directory, network):
    return json.loads((directory / f"network{network}.json").read_text())


def test_a_ring_is_started_killed_resumed_and_stopped(tmp_path, images):
    directory = tmp_path / "a run"
    flags = ["--data", images, "--model", "resnet20", "--epochs", "5000", "--num", "2", "--s", directory]
    result = run_launcher(*flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    try:
        wait_until(
            lambda: (directory / "metrics2.csv").exists() and (directory / "metrics2.csv").read_text().count("\n") > 2
        )
        assert run_launcher(*flags, cwd=tmp_path).returncode == 1, "it runs already"
        survivor, victim = status(directory, 1)["pid"], status(directory, 2)["pid"]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: re.search(r"^2 +died", run_launcher("status", directory, cwd=tmp_path).stdout, re.MULTILINE))
        assert run_launcher("--resume", *flags, cwd=tmp_path).returncode == 0
        wait_until(lambda: status(directory, 2)["pid"] != victim and status(directory, 2)["state"] == "training")
        assert status(directory, 1)["pid"] == survivor
    finally:
        stopped = run_launcher("stop", directory, cwd=tmp_path)
    assert (stopped.returncode, stopped.stderr) == (0, "")
    assert [status(directory, i)["state"] for i in (1, 2)] == ["stopped", "stopped"]
    assert "stopped by SIGTERM" in run_launcher("status", directory, cwd=tmp_path).stdout
    assert run_launcher("stop", directory, cwd=tmp_path).returncode == 0


def test_the_demo_ends_with_the_table_and_the_plots(tmp_path, images):
    earlier = tmp_path / "checkpoint/demo"
    (earlier / "grafted").mkdir(parents=True)
    (earlier / "made by grafting.sh demo, which replaces this folder").touch()
    write_status(earlier / "grafted", 1)  # killed
    result = run_launcher("demo", "--epochs", "2", "--data", images, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    rows = [line.split("|")[1:3] for line in result.stdout.splitlines() if line.startswith("| ")]
    runs = [(run.strip(), network.strip()) for run, network in rows[1:]]
    assert runs == [
        ("baseline", "1"),
        ("baseline", "mean of 1"),
        ("grafted", "1"),
        ("grafted", "2"),
        ("grafted", "mean of 2"),
    ]
    lines = re.findall(r"^(baseline|grafted [12]) +Network:[12] +epoch:[01] ", result.stdout, re.MULTILINE)
    assert len(lines) == 6
    plots = [tmp_path / line[2:] for line in result.stdout.splitlines() if line.startswith("- ")]
    assert {path.name for path in plots} >= {"accuracy.png", "comparison.png", "coefficients_grafted.png"}
    assert all(path.stat().st_size > 0 for path in plots)


def test_the_demo_replaces_no_folder_but_its_own(tmp_path):
    (tmp_path / "checkpoint/demo").mkdir(parents=True)
    result = run_launcher("demo", cwd=tmp_path)
    assert result.returncode == 1
    assert "was not made by the demo" in result.stderr


def test_the_demo_fails_with_the_reason_and_leaves_no_network_behind(tmp_path):
    result = run_launcher("demo", "--data", tmp_path / "nothing", "--epochs", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "has failed" in result.stderr
    assert str(tmp_path / "nothing") in result.stderr
    for name, count in (("baseline", 1), ("grafted", 2)):
        assert not any(
            network.alive for network in manage.observe(tmp_path / "checkpoint/demo" / name, range(1, count + 1))
        )


def test_ctrl_c_ends_the_demo_and_its_networks(tmp_path, images):
    command = [LAUNCHER, "demo", "--epochs", "5000", "--data", images]
    demo = subprocess.Popen(
        command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert wait_until(lambda: "epoch:1 " in demo.stdout.readline())
    os.killpg(demo.pid, signal.SIGINT)
    assert demo.wait(60) == 130
    states = [
        status(tmp_path / "checkpoint/demo" / name, i)["state"]
        for name, i in (("baseline", 1), ("grafted", 1), ("grafted", 2))
    ]
    assert states == ["stopped"] * 3


@pytest.mark.slow
def test_the_demo_as_the_readme_has_it(tmp_path):
    began = time.monotonic()
    result = run_launcher("demo", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - began < 300
    accuracies = re.findall(r"epoch:4 +accuracy:([\d.]+)", result.stdout)
    assert len(accuracies) == 3 and all(80 <= float(accuracy) <= 98 for accuracy in accuracies)


# The environment, made from packages that the test itself makes


def make_package(folder, name, version="2.0"):
    """A wheel that installs one empty module."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", "")
        information = f"{name}-{version}.dist-info"
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


def make_environment(root, *files, **variables):
    """What `environment FILES` prints in the project copied to root: (exit status, $python, messages)."""
    program = 'source "$0/common/environment.sh"; environment "$@"; echo "$python"'
    environment = {
        **ENVIRONMENT,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": (root.parent / "wheels").as_uri(),
        **variables,
    }
    command = ["bash", "-euo", "pipefail", "-c", program, root, *files]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    return result.returncode, result.stdout.strip(), result.stderr


def test_the_environment_is_made_reused_completed_and_mended(tmp_path):
    root = tmp_path / "a project"
    (root / "common").mkdir(parents=True)
    shutil.copy(ROOT / "common/environment.sh", root / "common")
    (root / "first.txt").write_text("graftingone>=1.9\n")
    (root / "second.txt").write_text("graftingtwo\n")
    own = str(root / ".venv/bin/python")

    status, _, messages = make_environment(root, "first.txt")
    assert status == 1 and "the installation failed" in messages, "there is no such package yet"
    make_package(tmp_path / "wheels", "graftingone")
    status, python, messages = make_environment(root, "first.txt")
    assert (status, python) == (0, own), messages
    assert "half-made: beginning anew" in messages and "installing graftingone" in messages
    assert make_environment(root, "first.txt") == (0, own, ""), "the second time there is nothing to do"

    make_package(tmp_path / "wheels", "graftingtwo")
    status, python, messages = make_environment(root, "first.txt", "second.txt")
    assert (status, python) == (0, own)
    assert "making" not in messages and "installing graftingtwo" in messages
    subprocess.run([own, "-c", "import graftingone, graftingtwo"], check=True)

    (root / ".venv/state").unlink()  # as if the user had made it
    (root / "third.txt").write_text("graftingthree\n")
    assert make_environment(root, "first.txt") == (0, own, "")
    status, _, messages = make_environment(root, "third.txt")
    assert status == 1 and "was not made by this script" in messages


def test_the_users_own_python_is_used_where_it_has_everything(tmp_path):
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "common/environment.sh", tmp_path / "common")
    (tmp_path / "needs.txt").write_text("numpy>=1.0\n")
    assert make_environment(tmp_path, "needs.txt") == (0, sys.executable, "")
    assert not (tmp_path / ".venv").exists()


def test_a_python_that_will_not_do_is_one_sentence(tmp_path):
    (tmp_path / "common").mkdir()
    shutil.copy(ROOT / "common/environment.sh", tmp_path / "common")
    old = tmp_path / "old python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1\nexit 1\n')
    old.chmod(0o755)
    status, _, message = make_environment(tmp_path, PYTHON=str(old))
    assert status == 1 and "Python 3.8.1, but 3.10 or newer is needed" in message and message.count("\n") == 1
    status, _, message = make_environment(tmp_path, PYTHON="no-such-python")
    assert status == 1 and "no-such-python is not installed" in message and message.count("\n") == 1
