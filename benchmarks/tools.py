"""What the benchmarks share: the machine in words, tables in Markdown, and the same as lines of JSON."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from common.machine import processor


def parser(description: str, repetitions: int | None = None) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark has."""
    flags = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    if repetitions:
        text = f"of each measurement (default: {repetitions})"
        flags.add_argument("--repetitions", type=at_least(1), default=repetitions, help=text)
    flags.add_argument("--json", type=Path, metavar="FILE", help="append each row to FILE as a line of JSON")
    return flags


def at_least(lowest: int) -> Callable[[str], int]:
    """A converter for argparse."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {lowest}")
        return int(text)

    return convert


def add_device(flags: argparse.ArgumentParser) -> None:
    default = "cuda" if torch.cuda.is_available() else "cpu"
    flags.add_argument("--device", choices=("cpu", "cuda"), default=default, help=f"(default: {default})")


def machine(device: str = "cpu") -> str:
    """Processor, GPU, versions and load in one line."""
    words = [processor()]
    if device == "cuda":
        words.append(torch.cuda.get_device_name())
    words.append(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()}")
    return "; ".join([*words, f"load {os.getloadavg()[0]:.1f}"])


def wait_for(device: str) -> None:
    """A GPU works on while the host goes on: before the clock is read, it has to be done."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(action: Callable[[], object], device: str = "cpu") -> float:
    """Seconds that an action takes."""
    wait_for(device)
    began = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - began


def report(
    benchmark: str, caption: str, rows: Iterable[Mapping[str, Any]], file: Path | None, device: str = "cpu"
) -> None:
    """Prints rows as a Markdown table below its caption; appends them to a file.

    A list of numbers is a sample: the table has its median (lowest to highest), the file all of them.
    """
    rows, place = list(rows), machine(device)
    print(f"{caption}\n{place}\n")
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(cell(value) for value in row.values()) + " |")
    print(flush=True)
    if file:
        with open(file, "a") as lines:
            for row in rows:
                record = {"benchmark": benchmark, "machine": place, "time": time.time(), **row}
                lines.write(json.dumps(record) + "\n")


def cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{number(statistics.median(value))} ({number(min(value))} to {number(max(value))})"
    return number(value) if isinstance(value, (int, float)) else str(value)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def ratio(over: list[float], under: list[float]) -> float:
    """Of two medians."""
    return statistics.median(over) / statistics.median(under)
