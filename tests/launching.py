"""Launching without training: a copy of the project in which a stand-in takes the place of both scripts."""

import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import sys
import termios
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from processes import ROOT, environment, until

from training import commands, launch, view

LAUNCHER = ROOT / "grafting_cifar" / "grafting.sh"
ENVIRONMENT = environment() | {"PYTHON": sys.executable}  # of the launcher, where networks train

# It reads its flags, holds its place, and says how it was started, as the real one does. It trains until ENDS is there
# (without that variable: not at all), or ends at once with the sentence FAILS. It never lives for long.
STAND_IN = """
import fcntl, json, os, signal, socket, sys, time
from pathlib import Path

signal.alarm(600)
sys.path.insert(0, os.environ["REAL_ROOT"])
from importlib import import_module
from training.flags import command

args = import_module(Path(__file__).resolve().parent.name + ".flags").parse()
if "FAILS" in os.environ:
    os.write(2, (os.environ["FAILS"] + os.linesep).encode())  # at once: two ranks may do so at the same moment
    sys.exit(1)
args.s.mkdir(parents=True, exist_ok=True)
lock = open(args.s / f"network{args.i}.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
said = {"network": args.i, "num": args.num, "host": socket.gethostname(), "pid": os.getpid(), "beat": 1, "epoch": 0}
said |= {"epochs": args.epochs, "command": command(), "cwd": os.getcwd(), "session": os.getsid(0)}
said |= {"threads": os.environ.get("OMP_NUM_THREADS"), "stdin": sys.stdin.read()}

def say(state):
    run = {"run": "x", "settings": {"num": args.num}}
    for name, contents in (f"network{args.i}", said | {"state": state}), ("run", run):
        new = args.s / f"{name}{args.i}.new"
        new.write_text(json.dumps(contents))
        new.replace(args.s / f"{name}.json")

def stopped(*_):
    say("stopped")
    sys.exit(143)

signal.signal(signal.SIGTERM, stopped)
say("training")
print(f"Network:{args.i}    epoch:0    accuracy:50.000    best:50.000", flush=True)
while "ENDS" in os.environ and not Path(os.environ["ENDS"]).exists():
    time.sleep(0.02)
say("done")
"""


class Project:
    """The copy, in a folder whose name has a space; `cwd` is where the launcher is called from."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
        self.root, self.cwd, self.ends = (folder / name for name in ("a project", "here", "ends"))
        self.patch, self.capsys, self.locks = monkeypatch, capsys, []
        self.cwd.mkdir()
        for name in ("training", "grafting_cifar", "grafting_imagenet"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("grafting_cifar", "grafting_imagenet"):
            (self.root / name / "grafting.py").write_text(STAND_IN)
        (self.root / "requirements.txt").write_text("pytest\n")
        (self.root / "analysis").mkdir()
        (self.root / "analysis/report.py").write_text("import sys\nopen('report', 'w').write(' '.join(sys.argv[1:]))\n")
        for name, value in {"REAL_ROOT": str(ROOT), "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.chdir(self.cwd)
        monkeypatch.setattr(launch, "ROOT", self.root)
        monkeypatch.setattr(view, "LOOK_SECONDS", 0.02)
        monkeypatch.setattr(sys, "argv", ["launch.py"])

    def run(self, *words: object, folder: str = "grafting_cifar") -> int:
        """What grafting.sh does, in this process: the exit status."""
        try:
            return launch.main(commands.parse(folder, *map(str, words)))
        except SystemExit as end:
            if isinstance(end.code, int):
                return end.code
            print(end.code, file=sys.stderr)
            return 1
        finally:
            sys.stdout.flush()

    def __call__(self, *words: object, folder: str = "grafting_cifar") -> tuple[int, str, str]:
        """(exit status, standard output, standard error)."""
        self.capsys.readouterr()
        return self.run(*words, folder=folder), *self.capsys.readouterr()

    def is_alive(self, directory: str, network: int, **fields: object) -> None:
        """From now on, this process is a network: it holds its lock."""
        write_status(self.cwd / directory, network, **fields)
        self.locks.append(os.open(self.cwd / directory / f"network{network}.lock", os.O_CREAT | os.O_RDWR))
        fcntl.flock(self.locks[-1], fcntl.LOCK_EX)

    def trains_on(self) -> None:
        """From now on, stand-ins that are started train until the test ends."""
        self.patch.setenv("ENDS", str(self.ends))

    def records(self) -> list:
        """From now on, nothing is started: (job, variables, ranks) of the networks that would be, instead."""
        jobs = []

        def start(network, variables, ranks):
            jobs.append((network, variables, ranks))
            network.process, network.log = Namespace(poll=lambda: 0), self.cwd / "log"

        self.patch.setattr(launch.Network, "start", start)
        self.patch.setattr(view, "watch", lambda *run: 0)
        return jobs

    def status(self, directory: str, network: int) -> dict:
        return json.loads((self.cwd / directory / f"network{network}.json").read_text())

    def states(self, directory: str) -> list[str]:
        return [json.loads(path.read_text())["state"] for path in sorted((self.cwd / directory).glob("network*.json"))]


@pytest.fixture
def project(tmp_path, monkeypatch, capsys) -> Iterator[Project]:
    """A project whose processes end with the test."""
    made = Project(tmp_path, monkeypatch, capsys)
    yield made
    made.ends.touch()
    for lock in made.locks:
        os.close(lock)


@pytest.fixture
def terminal():
    """terminal(call, cwd) -> Terminal; it hangs up at the end of the test."""
    made = []
    yield lambda call, cwd: made.append(Terminal(call, cwd)) or made[-1]
    for one in made:
        os.close(one.terminal)


def write_status(directory: Path, network: int, **fields: object) -> None:
    """network{i}.json and run.json, of a process that is no more."""
    said = {"network": network, "num": 2, "host": socket.gethostname(), "pid": 2**30, "beat": 1, "command": []}
    said |= {"state": "training", "epoch": 6, "epochs": 200, "accuracy": 91.5, "best": 92.25} | fields
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"network{network}.json").write_text(json.dumps(said))
    (directory / "run.json").write_text(json.dumps({"run": "x", "settings": {"num": said["num"]}}))


class Terminal:
    """A call on a terminal of 80 columns, in a process of its own; `text` is all that it has shown."""

    def __init__(self, call: Callable[[], int], cwd: Path):
        self.text = ""
        self.pid, self.terminal = pty.fork()
        if self.pid:
            os.set_blocking(self.terminal, False)
            return
        try:
            os.chdir(cwd)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has the tests ignore it
            fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
            sys.stdout = sys.stderr = os.fdopen(1, "w")
            os._exit(call())
        finally:
            traceback.print_exc()
            os._exit(99)

    def read(self) -> str:
        with suppress(BlockingIOError):  # nothing new
            self.text += os.read(self.terminal, 65536).decode(errors="replace")
        return self.text

    def shows(self, text: str, count: int = 1) -> None:
        until(lambda: self.read().count(text) >= count, what=lambda: f"{text!r}, but there is\n{self.text}")

    def press_ctrl_c(self) -> None:
        os.write(self.terminal, b"\x03")

    def end(self) -> int:
        """Its exit status."""
        with suppress(OSError):  # which the closed terminal gives
            while True:
                self.read()
                time.sleep(0.01)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
