"""How the networks of a run are, as lines for a terminal or a file."""

import csv
import re
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

import tabulate
from tqdm import tqdm

from filter_grafting.membership import ENDED, Status, duration, observe, printable

tabulate.MIN_PADDING = 0  # columns no wider than need be: a line of 80 has room for whom a network waits for
SECONDS = ("train_seconds", "test_seconds", "wait_seconds", "graft_seconds")  # of metrics{i}.csv: an epoch's time
LOOK_SECONDS = 0.5  # between two looks at the networks
START_SECONDS = 60.0  # after which a network that is still starting is left to itself


class Started(NamedTuple):
    """A process that trains a network, or torchrun with those that do."""

    name: str
    process: Popen
    log: Path
    size: int  # of the log before
    line: str  # how a shell would start it

    def ending(self) -> str:
        return f"{self.name} ended with status {self.process.returncode}: {last_words(self.log, self.size)}"


def last_words(path: Path, size: int = 0) -> str:
    """What a network said last in its log, behind what stood there before, but for torchrun's report on it."""
    with open(path, errors="replace") as log:
        log.seek(size)
        said = re.split(r"\n.*torch/distributed/elastic/", "\n" + log.read())[0].strip() or "it said nothing"
    return printable(said.splitlines()[-1].strip())


# Tables


def progress(directory: Path, status: Status) -> tuple[int, float]:
    """(epochs that are done, seconds that the others take if they take as long as the last ten), by metrics{i}.csv."""
    path = directory / f"metrics{status.network}.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    if not rows:
        return 0, 0.0
    done, last = int(rows[-1]["epoch"]) + 1, rows[-10:]
    seconds = sum(float(row[part] or 0) for row in last for part in SECONDS) / len(last)
    return done, max(0, (status.epochs or 0) - done) * seconds


def epochs_of(done: int, epochs: int | None) -> str:
    """As a number and a bar."""
    return f"{f'{done}/{epochs}':>8} {'#' * round(4 * min(done / epochs, 1)):.<4}" if epochs else ""


def table(directory: Path, statuses: Iterable[Status]) -> str:
    """A line for each network below a heading."""
    rows = []
    for one in statuses:
        done, left = progress(directory, one)
        time_left = duration(left) if left and one.alive else ""
        rows.append([one.network, epochs_of(done, one.epochs), one.accuracy, one.best, one.lr, time_left, str(one)])
    head = ["network", "epoch", "accuracy", "best", "rate", "left", "state"]
    form = ("", "", ".3f", ".3f", ".3g", "", "")
    return tabulate.tabulate(rows, head, tablefmt="plain", floatfmt=form, disable_numparse=[1, 5, 6])


# Watching


def watch(directory: Path, num: int, started: Mapping[int, Started]) -> int:
    """Shows how the networks are until all have ended; where there is no terminal, until they have begun to train.

    Returns:
        1 if one of those that were started has failed meanwhile, else 0.
    """
    failed, drawn, deadline = set(), 0, time.monotonic() + START_SECONDS
    while True:
        running = {i for i, one in started.items() if one.process.poll() is None}
        statuses = observe(directory, range(1, num + 1))
        at_work = {one.network for one in statuses if one.alive and one.state not in ("starting", *ENDED)}
        new = {i for i, one in started.items() if one.process.returncode} - failed
        failed |= new
        lines = [started[i].ending() for i in new]
        if sys.stdout.isatty():
            width, height = shutil.get_terminal_size()
            shown = [line[: width - 1] for line in table(directory, statuses).splitlines()][: height - 1]
            print(f"\x1b[{drawn}A\x1b[J" if drawn else "", end="")
            lines, drawn = [*lines, *shown], len(shown)
        print(*(f"{line}\n" for line in lines), sep="", end="", flush=True)
        has_begun = not sys.stdout.isatty() and (failed or running <= at_work or time.monotonic() > deadline)
        if has_begun or not running | at_work:
            return int(bool(failed))
        time.sleep(LOOK_SECONDS)


def follow(started: Sequence[Started], epochs: int) -> Started | None:
    """Shows one bar over all epochs of all networks, and the lines of their logs, until all have ended or one failed.

    Returns:
        The one that has failed.
    """
    form = "{bar:40} {percentage:3.0f}%  {remaining} left"
    options = {"bar_format": form, "leave": False, "disable": None, "smoothing": 0, "file": sys.stdout}
    with tqdm(total=epochs * len(started), **options) as bar, ExitStack() as stack:
        ended = 0
        logs = [stack.enter_context(open(one.log, errors="replace")) for one in started]
        while True:
            running = [one for one in started if one.process.poll() is None]
            for one, log in zip(started, logs, strict=True):
                for line in log.readlines():
                    if line.startswith("Network:"):  # of which the first four fields fit a line of 80
                        bar.write(f"{one.name:11}{'    '.join(line.split('    ')[:4])}", file=sys.stdout)
                        ended += 1
            bar.update(ended - bar.n)
            sys.stdout.flush()
            failed = next((one for one in started if one.process.returncode), None)
            if failed or not running:
                return failed
            time.sleep(LOOK_SECONDS)
