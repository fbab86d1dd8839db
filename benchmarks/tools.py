"""What the benchmarks share: flags, turns, programs that they start, and tables whose rows are kept at once."""

import argparse
import json
import multiprocessing
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from training.flags import Parser, number
from training.launch import detached
from training.machine import hardware, versions
from training.process import UsageError, pick_device

Key = TypeVar("Key", bound=Hashable)
count = number(int, 1)


def parser(description: str, repetitions: int | None = None) -> Parser:
    """A parser with the flags that every benchmark has."""
    # Whoever ends a benchmark ends the processes that it has started as well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    flags = Parser(description=description)
    if repetitions:
        flags.add_argument("--repetitions", metavar="N", type=count, default=repetitions, help="of each measurement")
    flags.add_argument("--device", choices=("cuda", "cpu"), help="where to compute (default: cuda where there is one)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="append each row to FILE as a line of JSON")
    return flags


def parse(flags: Parser, arguments: list[str] | None) -> argparse.Namespace:
    args = flags.parse_args(arguments)
    try:
        args.device = pick_device(args.device)
    except UsageError as error:
        flags.error(str(error))
    return args


class Sample(NamedTuple):
    wall: list[float]  # seconds of each repetition
    processor: list[float]  # those of this process and its workers


def in_turns(ways: Mapping[Key, Callable[[int], object]], repetitions: int, device: torch.device) -> dict[Key, Sample]:
    """Times every way by turns, given the number of the round; the first, in which workers start, does not count."""
    samples = {key: Sample([], []) for key in ways}
    for turn in range(repetitions + 1):
        for key, way in ways.items():
            wait_for(device)
            used, began = processor_seconds(), time.perf_counter()
            way(turn)
            wait_for(device)
            if turn:
                samples[key].wall.append(time.perf_counter() - began)
                samples[key].processor.append(processor_seconds() - used)
    return samples


def wait_for(device: torch.device) -> None:
    """A GPU works on while the host goes on: before the clock is read, it has to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def processor_seconds() -> float:
    """User and system time of this process and its workers; of this one alone where there is no /proc."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    total = usage.ru_utime + usage.ru_stime
    for worker in multiprocessing.active_children():
        with suppress(OSError):
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def processes() -> BaseContext:
    """For processes that compute: they find torch imported, and no GPU that is in use, as a fork of this one would."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torchvision", "benchmarks.data"])  # what cannot be found is left out
    return context


def start(words: list[str], log: Path, **variables: str) -> subprocess.Popen:
    """Starts `python words`, with its output at the end of a log; whoever ends its process group ends its children."""
    return detached([sys.executable, *words], log, variables)


class Table:
    """Prints a Markdown table row by row, and appends each row to a file as a line of JSON.

    A list of numbers is a sample: the table shows its median (lowest to highest), the file keeps all of them.
    """

    def __init__(self, benchmark: str, caption: str, args: argparse.Namespace):
        self.about = {"benchmark": benchmark, "device": str(args.device)}
        self.about |= {"hardware": hardware(), "versions": versions()}
        self.file, self.is_empty = args.json, True
        place = ", ".join([self.about["hardware"], *(f"{name} {one}" for name, one in self.about["versions"].items())])
        print(f"\n{caption}\n{place}; load {os.getloadavg()[0]:.1f}\n", flush=True)

    def add(self, **row: Any) -> None:
        if self.is_empty:
            print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
        self.is_empty = False
        print("| " + " | ".join(map(cell, row.values())) + " |", flush=True)
        if self.file:
            append(self.file, {**self.about, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **row})


def cell(value: Any) -> str:
    """A number with three significant digits, or with all of those before its point."""
    if isinstance(value, list):
        return f"{cell(statistics.median(value))} ({cell(min(value))} to {cell(max(value))})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def ratio(over: list[float], under: list[float]) -> float:
    """Of two medians."""
    return statistics.median(over) / statistics.median(under)


def append(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a") as lines:
        lines.write(f"\n{json.dumps(record)}\n")  # a line of its own, even after one that was only half-written


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file; what was only half-written is skipped."""
    records = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return records
