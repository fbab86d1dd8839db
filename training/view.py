"""How the networks of a run are, as lines for a terminal or a file."""

import csv
import re
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tabulate
from tqdm import tqdm

from filter_grafting.membership import ENDED, Status, duration, observe, printable

if TYPE_CHECKING:
    from training.launch import Network

tabulate.MIN_PADDING = 0  # columns no wider than need be: a line of 80 has room for whom a network waits for
SECONDS = ["train_seconds", "test_seconds", "wait_seconds", "graft_seconds"]  # of metrics{i}.csv: an epoch's time
LOOK_SECONDS = 0.5  # between two looks at the networks
START_SECONDS = 60.0  # after which a network that is still starting is left to itself


def last_words(path: Path, size: int = 0) -> str:
    """What a network said last in its log, behind what stood there before, but for torchrun's report on it."""
    with open(path, errors="replace") as log:
        log.seek(size)
        said = re.split(r"\n.*torch/distributed/elastic/", "\n" + log.read())[0].strip() or "it said nothing"
    return printable(said.splitlines()[-1].strip())


def table(directory: Path, statuses: Iterable[Status]) -> str:
    """A line for each network below a heading; what is left takes as long as the last ten epochs did."""
    lines = []
    for one in statuses:
        path = directory / f"metrics{one.network}.csv"
        rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
        done, epochs = int(rows[-1]["epoch"]) + 1 if rows else 0, one.epochs or 0
        seconds = [sum(float(row[part] or 0) for part in SECONDS) for row in rows[-10:]]
        left = duration((epochs - done) * sum(seconds) / len(seconds)) if rows and done < epochs and one.alive else ""
        bar = f"{f'{done}/{epochs}':>8} {'#' * round(4 * min(done / epochs, 1)):.<4}" if epochs else ""
        lines.append([one.network, bar, one.accuracy, one.best, one.lr, left, str(one)])
    head = ["network", "epoch", "accuracy", "best", "rate", "left", "state"]
    form = ("", "", ".3f", ".3f", ".3g", "", "")
    return tabulate.tabulate(lines, head, tablefmt="plain", floatfmt=form, disable_numparse=[1, 5, 6])


def watch(directory: Path, num: int, started: Sequence["Network"], to_end: bool = True) -> int:
    """Shows how the networks are until all have ended; without to_end or a terminal, until they have begun to train.

    Returns 1 if one of those that were started has failed meanwhile, else 0.
    """
    failed, drawn, deadline = set(), 0, time.monotonic() + START_SECONDS
    to_end = to_end and sys.stdout.isatty()
    while True:
        running = {one.i for one in started if one.process.poll() is None}
        statuses = observe(directory, range(1, num + 1))
        at_work = {one.network for one in statuses if one.alive and one.state not in ("starting", *ENDED)}
        lines = [one.ending() for one in started if one.process.returncode and one.i not in failed]
        failed |= {one.i for one in started if one.process.returncode}
        if to_end:
            width, height = shutil.get_terminal_size()
            shown = [line[: width - 1] for line in table(directory, statuses).splitlines()][: height - 1]
            print(f"\x1b[{drawn}A\x1b[J" if drawn else "", end="")
            lines, drawn = [*lines, *shown], len(shown)
        print(*(f"{line}\n" for line in lines), sep="", end="", flush=True)
        has_begun = not to_end and (failed or running <= at_work or time.monotonic() > deadline)
        if has_begun or not running | at_work:
            return int(bool(failed))
        time.sleep(LOOK_SECONDS)


def follow(started: Sequence["Network"], epochs: int) -> "Network | None":
    """Shows one bar over all epochs of all networks, and the lines of their logs, until all have ended or one failed.

    Returns the one that has failed.
    """
    form = "{bar:40} {percentage:3.0f}%  {remaining} left"
    options = {"bar_format": form, "leave": False, "disable": None, "smoothing": 0, "file": sys.stdout}
    shown = [0] * len(started)  # of the lines of each log
    with tqdm(total=epochs * len(started), **options) as bar:
        while True:
            running = [one for one in started if one.process.poll() is None]
            for k, one in enumerate(started):
                lines = [line for line in one.log.read_text(errors="replace").splitlines() if "Network:" in line]
                for line in lines[shown[k] :]:  # of which the first four fields fit a line of 80
                    bar.write(f"{one.name:11}{'    '.join(line.split('    ')[:4])}", file=sys.stdout)
                    bar.update()
                shown[k] = len(lines)
            sys.stdout.flush()
            failed = next((one for one in started if one.process.returncode), None)
            if failed or not running:
                return failed
            time.sleep(LOOK_SECONDS)
