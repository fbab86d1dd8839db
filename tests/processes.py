"""Networks as real processes: started, watched, killed, and compared by what they leave behind."""

import atexit
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CIFAR = ROOT / "grafting_cifar" / "grafting.py"
DEADLINE = 120.0  # seconds that a test waits for anything; a busy machine may need many times what is usual


def make_images(
    folder: Path,
    seed: int = 0,
    size: tuple[int, int] = (32, 32),
    test: str = "test",
    classes: tuple[str, ...] = ("one", "two"),
    counts: tuple[int, int] = (16, 4),
) -> Path:
    """Random images in class folders; `counts` are those of a class to train on and to test."""
    random = np.random.default_rng(seed)
    for split, count in zip(("train", test), counts, strict=True):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for k in range(count):
                pixels = random.integers(0, 256, (*size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{k}.png")
    return folder


class _Nursery:
    """The server of nursery.py, which forks processes; one for all tests of a process, started by the first."""

    def __init__(self):
        self.server, self.lock = None, threading.Lock()

    def ask(self, request: dict[str, Any]) -> Any:
        with self.lock:
            if self.server is None:
                command = [sys.executable, Path(__file__).with_name("nursery.py")]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                self.server = subprocess.Popen(command, env=environment(), **pipes)
                atexit.register(self.server.communicate)  # its end: it reads nothing more
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            return json.loads(self.server.stdout.readline())


def environment() -> dict[str, str]:
    here = str(Path(__file__).parent)  # for the models in ranks.py
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": here}


NURSERY = _Nursery()


class Process:
    """A script, started as a shell would; `status` is its exit status at its end (negative: the signal that ended it).

    Args:
        log: where its standard output goes, unless `output` names another file; standard error goes beside it.
        plan: the faults that are to strike it, see faults.py.
    """

    def __init__(self, script: Path, arguments: list[str], log: Path, output: str = "", plan: list[list] | None = None):
        self.log, self.errors, self.status = log, log.with_name(f"{log.name}.errors"), None
        files = {"log": output or str(log), "errors": str(self.errors)}
        start = {"script": str(script), "arguments": arguments, **files, "plan": plan or []}
        self.pid = NURSERY.ask({"start": start})

    def poll(self) -> int | None:
        if self.status is None:
            self.status = NURSERY.ask({"poll": self.pid})
        return self.status

    def wait(self, deadline: float = DEADLINE) -> int:
        until(lambda: self.poll() is not None, deadline, lambda: f"the end of process {self.pid}\n{self.output()}")
        return self.status

    def signal(self, number: int) -> None:
        if self.poll() is None:  # the server has not reaped it: the process id is still its own
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def sentence(self) -> str:
        """What it said to standard error."""
        return _text(self.errors)

    def output(self) -> str:
        return _text(self.log) + self.sentence()


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def until(condition: Callable[[], Any], deadline: float = DEADLINE, what: Callable[[], str] = str) -> Any:
    """The first true value of a condition."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline:g} s in vain for {what()}"
        time.sleep(0.01)
    return value


class Run:
    """A ring in one save directory: starts its networks with the same flags."""

    checkpoint_name, suffix = "ckpt{}_{}", ".t7"

    def __init__(
        self,
        directory: Path,
        data: Path,
        networks: int = 2,
        epochs: int = 3,
        flags: tuple[str, ...] = (),
        logs: Path | None = None,
    ):
        self.directory, self.networks, self.epochs = directory, networks, epochs
        self.flags = ["--data", str(data), "--model", "ranks:tiny", "--batch_size", "16", "--device", "cpu", *flags]
        self.logs = logs or directory.parent / f"{directory.name}-logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.started: list[Process] = []

    def arguments(self, network: int, *flags: str) -> list[str]:
        ring = ["--s", str(self.directory), "--num", str(self.networks), "--epochs", str(self.epochs)]
        return [*ring, "--i", str(network), *self.flags, *flags]

    def start(self, network: int, *flags: str, **options: Any) -> Process:
        """Starts one network; for the options see Process."""
        self.started.append(Process(CIFAR, self.arguments(network, *flags), self.logs / f"{network}.log", **options))
        return self.started[-1]

    def finish(self, *flags: str) -> "Run":
        """Starts all networks and waits until all are done."""
        for process in [self.start(network, *flags) for network in range(1, self.networks + 1)]:
            assert process.wait() == 0, process.output()
        return self

    def killed(self, network: int, event: str, *flags: str) -> None:
        process = self.start(network, *flags, plan=[["at", event, 1, "kill"]])
        assert process.wait() == -signal.SIGKILL, (event, process.output())

    def refused(self, network: int, *flags: str) -> str:
        """The sentence in which a start ends."""
        process = self.start(network, *flags)
        assert (process.wait(), process.sentence().count("\n")) == (1, 1), process.output()
        return process.sentence()

    def end(self) -> None:
        for process in self.started:
            process.kill()

    def status(self, network: int) -> dict[str, Any]:
        try:
            return json.loads((self.directory / f"network{network}.json").read_text())
        except FileNotFoundError:
            return {}

    def reaches(self, network: int, state: str, epoch: int = 0) -> None:
        """Waits until a network says that it is in a state, at an epoch or a later one."""

        def reached() -> bool:
            status = self.status(network)
            return status.get("state") == state and (status["epoch"] or 0) >= epoch

        until(reached, what=lambda: f"network {network} {state} at epoch {epoch}, but {self.status(network)}")

    def checkpoint(self, network: int, epoch: int) -> Path:
        return self.directory / (self.checkpoint_name.format(network % self.networks, epoch) + self.suffix)

    def log(self, network: int) -> str:
        return _text(self.logs / f"{network}.log")

    def outcome(self, network: int) -> dict[str, Any]:
        """All that a network has left which must not depend on what it went through."""
        last = torch.load(self.checkpoint(network, self.epochs - 1), weights_only=True)
        contents = {"last": last | last["extra"]}
        for kind in ("best", "final"):
            contents[kind] = torch.load(self.directory / f"{kind}{network}{self.suffix}", weights_only=True)
        for each in contents.values():
            for key in ("run", "extra", "command"):  # of these, the first is random, and the last says how it resumed
                each.pop(key, None)
            each["settings"].pop("epochs")  # may have been raised since it was written
            each["row"] = _timeless(each.get("row", {}))
        paths = {name: self.directory / f"{name}{network}.csv" for name in ("metrics", "coefficients")}
        tables = {name: [_timeless(row) for row in read_table(path)] for name, path in paths.items() if path.exists()}
        lines = [line for line in self.log(network).splitlines() if line.startswith(f"Network:{network}    epoch:")]
        # A line may come twice, if its network was killed after it had printed it.
        log = list(dict.fromkeys(re.sub(r"(train|test|wait|graft):[\d.]+s", "", line) for line in lines))
        return {"checkpoints": contents, "tables": tables, "log": log}


def read_table(path: Path) -> list[dict[str, str]]:
    text = path.read_text()
    assert text.endswith("\n"), f"{path} ends within a row"
    return list(csv.DictReader(text.splitlines(), strict=True))


def _timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith("_seconds")}


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Two outcomes are equal: tensors bit for bit, all else by value."""
    assert type(one) is type(other), where
    if isinstance(one, list):
        one, other = (dict(enumerate(each)) for each in (one, other))
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape, where
        bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
        assert torch.equal(*bits), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    else:
        assert one == other, where


def assert_same_runs(run: Run, undisturbed: Run) -> None:
    """Every network has ended as in a run that nothing disturbed; logs have no gap, tables no repeated row either."""
    for network in range(1, run.networks + 1):
        outcome = run.outcome(network)
        epochs = [str(epoch) for epoch in range(run.epochs)]
        assert [row["epoch"] for row in outcome["tables"]["metrics"]] == epochs
        assert re.findall(r"epoch:(\d+)", "\n".join(outcome["log"])) == epochs, run.log(network)
        assert_same(outcome, undisturbed.outcome(network), f"network {network}")
        assert not list(run.directory.glob(".*.tmp"))
