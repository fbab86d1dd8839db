"""What the benchmarks share: flags, clocks, and tables whose rows are kept as soon as they are had."""

import argparse
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.flags import Parser, number
from training.machine import hardware, versions
from training.process import UsageError, pick_device

count = number(int, 1)


def parser(description: str, repetitions: int | None = None) -> Parser:
    """A parser with the flags that every benchmark has."""
    # Whoever ends a benchmark gets the rows that it has by then, and none of its processes stays behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    flags = Parser(description=description)
    if repetitions:
        flags.add_argument("--repetitions", metavar="N", type=count, default=repetitions, help="of each measurement")
    flags.add_argument("--json", type=Path, metavar="FILE", help="append each row to FILE as a line of JSON")
    return flags


def add_device(flags: Parser) -> None:
    flags.add_argument("--device", choices=("cuda", "cpu"), help="where to compute (default: cuda where there is one)")


def device_of(flags: Parser, args: argparse.Namespace) -> torch.device:
    try:
        return pick_device(args.device)
    except UsageError as error:
        flags.error(str(error))


def wait_for(device: torch.device) -> None:
    """A GPU works on while the host goes on: before the clock is read, it has to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes."""
    wait_for(device)
    began = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - began


class Table:
    """Prints a Markdown table row by row, and appends each row to a file as a line of JSON.

    A list of numbers is a sample: the table shows its median (lowest to highest), the file keeps all of them.
    """

    def __init__(self, benchmark: str, caption: str, file: Path | None, device: torch.device | str = "cpu"):
        self.about = {"benchmark": benchmark, "device": str(device), "hardware": hardware(), "versions": versions()}
        self.file, self.columns = file, None
        place = ", ".join([self.about["hardware"], *(f"{name} {one}" for name, one in self.about["versions"].items())])
        print(f"\n{caption}\n{place}; load {os.getloadavg()[0]:.1f}\n", flush=True)

    def add(self, **row: Any) -> None:
        if self.columns != list(row):
            self.columns = list(row)
            print("| " + " | ".join(row) + " |\n|" + " --- |" * len(row))
        print("| " + " | ".join(map(cell, row.values())) + " |", flush=True)
        if self.file:
            append(self.file, {**self.about, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **row})


def append(file: Path, record: dict[str, Any]) -> None:
    """A line of its own, even after one that was only half-written."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "ab+") as lines:
        if lines.tell():
            lines.seek(-1, os.SEEK_END)
            lines.write(b"" if lines.read(1) == b"\n" else b"\n")
        lines.write(json.dumps(record).encode() + b"\n")


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file; a line that was only half-written is skipped."""
    records = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return [record for record in records if isinstance(record, dict)]


def cell(value: Any) -> str:
    if isinstance(value, list) and value:
        return f"{figure(statistics.median(value))} ({figure(min(value))} to {figure(max(value))})"
    return figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def figure(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def ratio(over: list[float], under: list[float]) -> float:
    """Of two medians."""
    return statistics.median(over) / statistics.median(under)


def make_images(folder: Path, images: int, size: tuple[int, int], classes: int = 10, suffix: str = "png") -> Path:
    """Class folders train/ and test/ of made-up pictures, soft shapes with some noise; kept if they are there."""
    done, shape = folder / f"made-{images}", (size[1], size[0], 3)
    if not done.exists():
        draw = np.random.default_rng(0)
        for split, n in (("train", images), ("test", max(classes, images // 5))):
            for k in range(n):
                path = folder / split / f"class{k % classes}" / f"{k}.{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                shapes = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size)
                noise = draw.integers(-8, 9, shape, dtype=np.int16)
                pixels = (np.asarray(shapes, dtype=np.int16) + noise).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(path)
        done.touch()
    return folder
