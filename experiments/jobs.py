"""One run of the queue: the processes that train its networks, and what it leaves for the report."""

import fcntl
import json
import os
import platform
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO

import torch

from common.machine import processor, project
from common.manage import Network, observe
from experiments.summary import Damage, read_result
from experiments.tables import Run
from filter_grafting.checkpoint import write_atomically
from filter_grafting.errors import GraftingError
from filter_grafting.exchange import NO_LOCKS
from grafting_cifar.runs import THRESHOLDS, count_invalid, read_checkpoint


@dataclass
class Job:
    """A run, its folders, and the processes that this queue has started for it."""

    run: Run
    preset: str
    directory: Path  # its save directory
    results: Path  # its folder of results
    command: list[str]
    processes: dict[int, subprocess.Popen] = field(default_factory=dict)
    gpus: list[str] = field(default_factory=list)  # those of the processes
    failure: str = ""
    lock: IO | None = None

    def __str__(self) -> str:
        return f"{self.run.name}/seed{self.run.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its results are there, and such as a report takes."""
        with suppress(Damage):
            return read_result(self.results, self.run.name, self.run.seed).command == self.run.recipe
        return False

    @property
    def is_ensemble(self) -> bool:
        return bool(self.run.members)

    def final(self, i: int) -> Path:
        return self.directory / f"final{i}.{'tar' if self.run.script == 'grafting_imagenet' else 't7'}"

    @property
    def has_weights(self) -> bool:
        """Whether an ensemble finds its networks."""
        return all(self.final(i).exists() for i in range(1, self.run.networks + 1))

    def observe(self) -> list[Network]:
        return [] if self.is_ensemble else observe(self.directory, range(1, self.run.networks + 1))

    def claim(self) -> None:
        """Keeps other queues away from the run until this one ends; raises BlockingIOError if one is at work on it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.directory / "queue.lock", "a")  # noqa: SIM115 (it is the lock)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def begin(self, threads: int, gpus: Sequence[str]) -> None:
        """Claims the run and starts its networks, or says in `failure` why it cannot."""
        if (other := recorded_command(self.results)) not in (None, self.run.recipe):
            self.failure = f"{self.results} holds results of {other}; move it and {self.directory} elsewhere"
            return
        try:
            self.claim()
        except BlockingIOError:
            self.failure = "another queue is at work on it"
        except OSError as error:
            self.failure = f"it cannot be started: {error}"
        else:
            try:
                self.start(threads, gpus)
            except OSError as error:
                self.fail(f"it cannot be started: {error}")

    def start(self, threads: int, gpus: Sequence[str]) -> None:
        """Starts the networks that neither are done nor live on from an interrupted queue, GPU by GPU."""
        pending = [
            network.number for network in self.observe()
            if not network.alive and (network.state != "done" or not self.final(network.number).exists())
        ]  # fmt: skip
        for k, i in enumerate([1] if self.is_ensemble else pending):
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[k % len(gpus)]
                self.gpus.append(gpus[k % len(gpus)])
            with open(self.directory / f"{i}.log", "ab") as log:
                self.processes[i] = subprocess.Popen(
                    [*self.command, *([] if self.is_ensemble else ["--i", str(i)])],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                    start_new_session=True,  # Ctrl-C is for the queue, which passes it on
                )  # fmt: skip

    def has_ended(self) -> bool:
        """Whether nothing of it runs any more; `failure` then says what went wrong, if anything did."""
        for i, process in list(self.processes.items()):
            if process.poll() in (None, 0) or self.failure:
                continue
            if any(network.alive and network.number == i for network in self.observe()):
                del self.processes[i]  # an earlier queue had just started it, too, and that process goes on
            else:
                self.fail(f"network {i} {self._last_words(i, process.returncode)}")
        earlier = []  # networks of an earlier queue
        if len(self.processes) < self.run.networks and not self.failure:
            earlier = [network for network in self.observe() if network.number not in self.processes]
            if lost := [network for network in earlier if not network.alive and network.state != "done"]:
                self.fail(f"network {lost[0].number}: {lost[0]}")
        if any(process.poll() is None for process in self.processes.values()):
            return False
        return bool(self.failure) or not any(network.alive for network in earlier)

    def fail(self, reason: str) -> None:
        self.failure = reason
        self.stop()  # its networks would wait for one another

    def stop(self) -> None:
        """Asks the networks to end; they do after their current batch."""
        for process in self.processes.values():
            process.terminate()
        for network in self.observe():
            if network.alive and network.pid and network.number not in self.processes:
                with suppress(ProcessLookupError):
                    os.kill(network.pid, signal.SIGTERM)

    def _last_words(self, i: int, status: int) -> str:
        how = f"ended with exit status {status}"
        if status < 0:
            how = f"was ended by signal {-status}" + " (out of memory?)" * (status == -signal.SIGKILL)
        lines = []
        with suppress(OSError):
            lines = (self.directory / f"{i}.log").read_text(errors="replace").strip().splitlines()
        return f"{how}: {lines[-1]}" if lines else f"{how}, without a word"

    def progress(self) -> tuple[int, str]:
        """Epochs that its networks have ended, in sum, and a line about it."""
        if self.is_ensemble:
            return 0, f"{self}: testing"
        networks = self.observe()
        ended = [self.run.epochs if network.state == "done" else network.epoch or 0 for network in networks]
        line = f"{self}: epoch {min(ended)} of {self.run.epochs}"
        accuracies = [network.accuracy for network in networks if network.accuracy is not None]
        if accuracies:
            line += f", {sum(accuracies) / len(accuracies):.2f} %"
        return sum(ended), line

    def epochs_left(self) -> float:
        return 0 if self.is_ensemble else self.run.epochs - self.progress()[0] / self.run.networks

    def collect(self) -> None:
        """Leaves what a report needs in the folder of results, or says in `failure` why it cannot."""
        try:
            self._collect()
        except (GraftingError, Damage, OSError, ValueError, KeyError) as error:
            self.failure = f"its results cannot be collected: {error}"

    def _collect(self) -> None:
        """Writes result.json last: it says that all is there."""
        record = {
            "name": self.run.name,
            "preset": self.preset,
            "seed": self.run.seed,
            "command": self.run.recipe,
            "networks": self.run.networks,
            "hardware": hardware(),
            "versions": versions(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        self.results.mkdir(parents=True, exist_ok=True)
        if self.is_ensemble:
            figures = json.loads((self.directory / "ensemble.json").read_text())
            record["ensemble"] = figures | {"members": self.run.member_names}
        else:
            record |= self._figures()
        write_atomically(self.results / "result.json", (json.dumps(record, indent=1) + "\n").encode())

    def _figures(self) -> dict[str, object]:
        """Settings, images and filters of the trained networks; copies their metrics."""
        filters = []
        for i in range(1, self.run.networks + 1):
            state, contents = read_checkpoint(self.final(i))
            counts = {}
            for which, pairs in zip(("", "shortcut_"), count_invalid(state, THRESHOLDS), strict=True):
                counts[f"{which}total"] = pairs[0][1]
                counts[f"{which}invalid"] = {f"{t:g}": count for t, (count, _) in zip(THRESHOLDS, pairs, strict=True)}
            filters.append(counts)
            # Coefficients are the most of it, and a heat map needs those of one seed.
            names = [f"metrics{i}.csv"] + [f"coefficients{i}.csv"] * (self.run.networks > 1 and self.run.seed == 0)
            for name in names:
                write_atomically(self.results / name, (self.directory / name).read_bytes())
        return {"settings": contents["settings"], "data": contents.get("data", ""), "filters": filters}


def recorded_command(results: Path) -> str | None:
    """The command that results are of, be they ever so damaged otherwise."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return json.loads((results / "result.json").read_bytes())["command"]
    return None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "torchvision"):
        with suppress(metadata.PackageNotFoundError):  # a torch that was built from source, or no torchvision
            found[name] = metadata.version(name)
    return found | ({"project": commit} if (commit := project()) else {})


def hardware() -> str:
    """Processor, and GPU where there is one."""
    words = [processor()]
    if torch.cuda.is_available():
        words.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")
    return ", ".join(words)
