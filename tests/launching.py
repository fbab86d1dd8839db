"""Launching without training: a copy of the project in which a stand-in takes the place of both scripts."""

import fcntl
import importlib
import json
import os
import pty
import shutil
import signal
import struct
import sys
import termios
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from processes import ROOT, until

from training import launch, view

LAUNCHER = ROOT / "grafting_cifar" / "grafting.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# It reads its flags and holds its place as the real one does. It starts once the file HOLD is there, and trains until
# ENDS is there (without those variables: at once), or ends at once with the sentence FAILS. It never lives for long.
STAND_IN = """
import fcntl, json, os, signal, socket, sys, time
from pathlib import Path

signal.alarm(600)
sys.path.insert(0, os.environ["REAL_ROOT"])
from importlib import import_module
from training.flags import command

def wait_for(name):
    while name in os.environ and not Path(os.environ[name]).exists():
        time.sleep(0.02)

args = import_module(Path(__file__).resolve().parent.name + ".flags").parse()
path, rank = args.s / f"network{args.i}.json", os.environ.get("RANK", "0")
wait_for("HOLD")
if "FAILS" in os.environ:
    sys.exit(os.environ["FAILS"])
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")}
seen |= {"argv": sys.argv[1:], "cwd": os.getcwd(), "pid": os.getpid()}
seen["nohup"] = [signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, os.getsid(0) == os.getpid(), sys.stdin.read() == ""]
(args.s / f"seen{args.i}.{rank}").write_text(json.dumps(seen))
said = {"network": args.i, "num": args.num, "host": socket.gethostname(), "pid": os.getpid(), "time": time.time()}
said |= {"beat": 1, "epoch": 0, "epochs": args.epochs, "command": command(), "cwd": os.getcwd()}

def say(state):
    path.with_suffix(".new").write_text(json.dumps(said | {"state": state}))
    path.with_suffix(".new").replace(path)

def stopped(*_):
    say("stopped")
    sys.exit("network stopped by SIGTERM")

if rank == "0":
    lock = open(args.s / f"network{args.i}.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    signal.signal(signal.SIGTERM, stopped)
    say("training")
print(f"Network:{args.i}    epoch:0    accuracy:50.000    best:50.000", flush=True)
wait_for("ENDS")
if rank == "0":
    say("done")
"""


class Project:
    """The copy, in a folder whose name has a space; `cwd` is where the launcher is called from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.root, self.cwd, self.go, self.ends = (folder / name for name in ("a project", "here", "go", "ends"))
        self.patch, self.capsys = monkeypatch, capsys
        self.cwd.mkdir()
        for name in ("training", "filter_grafting", "grafting_cifar", "grafting_imagenet"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("grafting_cifar", "grafting_imagenet"):
            (self.root / name / "grafting.py").write_text(STAND_IN)
        (self.root / "requirements.txt").write_text("pytest\n")
        for name, value in {"REAL_ROOT": str(ROOT), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.chdir(self.cwd)
        monkeypatch.setattr(launch, "ROOT", self.root)
        monkeypatch.setattr(launch, "set_up", lambda: None)
        monkeypatch.setattr(launch, "view", view, raising=False)
        monkeypatch.setattr(view, "LOOK_SECONDS", 0.02)
        monkeypatch.setattr(sys, "argv", ["launch.py"])

    def __call__(self, *words: object, folder: str = "grafting_cifar") -> tuple[int, str, str]:
        """What grafting.sh does, in this process: (exit status, standard output, standard error)."""
        self.capsys.readouterr()
        try:
            status = launch.main([folder, *map(str, words)])
        except SystemExit as end:
            status = end.code
        return status, *self.capsys.readouterr()

    def hold(self) -> None:
        """From now on, stand-ins that are started wait for `go`, and nobody waits for them."""
        self.patch.setenv("HOLD", str(self.go))
        self.patch.setattr(view, "START_SECONDS", 0.0)

    def trains_on(self) -> None:
        """From now on, stand-ins that are started train until `end`."""
        self.patch.setenv("ENDS", str(self.ends))

    def end(self) -> None:
        self.ends.touch()
        self.go.touch()

    def records(self) -> list:
        """From now on, nothing is started: the jobs that would be, instead."""
        jobs = []
        self.patch.setattr(launch, "launch", lambda folder, args, some, own: jobs.extend(some) or 0)
        return jobs

    def seen(self, directory: str, network: int, rank: int = 0) -> dict:
        """What a stand-in has found when it was started."""
        path = self.cwd / directory / f"seen{network}.{rank}"
        return json.loads(until(lambda: path.exists() and path.read_text(), what=lambda: str(path)))

    def status(self, directory: str, network: int) -> dict:
        return json.loads((self.cwd / directory / f"network{network}.json").read_text())


def project(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Project]:
    """A fixture: a project whose processes end with the test."""
    made = Project(folder, monkeypatch, capsys)
    yield made
    made.end()


def terminals():
    """A fixture: terminal(command, cwd, environment) -> Terminal; none outlives the test."""
    made = []

    def start(command, cwd, environment=ENVIRONMENT):
        made.append(Terminal(command, cwd, environment))
        return made[-1]

    yield start
    for one in made:
        one.kill()


def flags_of(words: list[str], folder: str = "grafting_cifar") -> dict:
    return vars(importlib.import_module(f"{folder}.flags").parse(words))


def write_status(directory: Path, network: int, **fields: object) -> None:
    """network{i}.json, of a process that is no more."""
    said = {
        "network": network,
        "num": 2,
        "state": "training",
        "epoch": 6,
        "epochs": 200,
        "accuracy": 91.5,
        "best": 92.25,
    }
    said |= {"host": os.uname().nodename, "pid": 2**30, "time": 0, "beat": 1, "command": []} | fields
    path = directory / f"network{network}.json"
    directory.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".new").write_text(json.dumps(said))
    path.with_suffix(".new").replace(path)


class Terminal:
    """A command on a terminal of 80 columns; `text` is all that it has shown."""

    def __init__(self, command, cwd, environment):
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            os.execve(command[0], [str(word) for word in command], {**environment, "TERM": "xterm"})
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.set_blocking(self.terminal, False)
        self.text, self.status = "", None

    def read(self) -> str:
        with suppress(OSError):  # nothing new, or the other end is closed
            self.text += os.read(self.terminal, 65536).decode(errors="replace")
        return self.text

    def shows(self, text: str) -> None:
        until(lambda: text in self.read(), what=lambda: f"{text!r} on the terminal, which shows\n{self.text}")

    def press_ctrl_c(self) -> None:
        os.write(self.terminal, b"\x03")

    def end(self) -> int:
        """Its exit status."""

        def ended() -> bool:
            self.read()
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
            return bool(pid)

        if self.status is None:
            until(ended, what=lambda: f"the end of what shows\n{self.text}")
            self.read()
        return self.status

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.end()
        os.close(self.terminal)
