"""How the networks of a run are, as lines for a terminal or a file."""

import csv
import os
import re
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from tqdm import tqdm

from filter_grafting.membership import ENDED, Status, duration, is_held, networks_of, observe, printable, read_status

LOG = re.compile(r"([1-9]\d{0,2})\.(log|out)")  # of a network in the save directory: the CIFAR or the ImageNet script's
SECONDS = ("train_seconds", "test_seconds", "wait_seconds", "graft_seconds")  # of metrics{i}.csv: an epoch's time
WIDTH = 80  # of a table, at most
LOOK_SECONDS = 0.5  # between two looks at the networks
START_SECONDS = 60.0  # after which a network that is still starting is left to itself
STOPPED = (130, 143, -2, -15)  # exit statuses after Ctrl-C and SIGTERM


class Started(NamedTuple):
    """A process that trains a network, or torchrun with those that do."""

    name: str
    process: Popen
    log: Path
    size: int  # of the log before
    line: str  # how a shell would start it

    def sentence(self) -> str:
        """How it has ended: what it said last, but for torchrun's report on it."""
        with open(self.log, errors="replace") as log:
            log.seek(self.size)
            said = re.split(r"\n.*torch/distributed/elastic/", "\n" + log.read())[0].strip() or "it said nothing"
        how = "was stopped" if self.process.returncode in STOPPED else "has failed"
        return f"{self.name} {how}: {printable(said.splitlines()[-1].strip())}"


# Looking


def started_here(directory: Path) -> set[int]:
    """The networks of which a process that grafting.sh started lives, torchrun's included: it holds the log locked."""
    with suppress(OSError):
        logs = [match for name in os.listdir(directory) if (match := LOG.fullmatch(name))]
        return {int(log[1]) for log in logs if is_held(directory / log[0])}
    return set()


def networks(directory: Path) -> range:
    """The networks of the run in a directory; none if there is no run."""
    return range(1, max({*networks_of(directory), *started_here(directory)}, default=0) + 1)


def look(directory: Path, of: Iterable[int] | None = None) -> list[Status]:
    """How the networks are: as `observe` says; but one whose process has not said a word yet is starting."""
    here = started_here(directory)
    return [
        status._replace(state="starting", alive=True)
        if status.network in here and not status.alive and status.state not in ENDED
        else status
        for status in observe(directory, networks(directory) if of is None else of)
    ]


def living(directory: Path) -> list[Status]:
    """The networks that are not gone yet: their last process may still be ending, or be a first that is starting."""
    here = started_here(directory)
    return [status for status in look(directory) if status.alive or status.network in here]


def progress(directory: Path, status: Status) -> tuple[float, float | None]:
    """(epochs that are done, seconds that the others take if they take as long as the last ten), by metrics{i}.csv."""
    done, seconds, part = 0, [], 0.0
    with suppress(OSError, ValueError, TypeError, KeyError), open(directory / f"metrics{status.network}.csv") as file:
        for row in csv.DictReader(file):
            seconds.append(sum(float(row[part] or 0) for part in SECONDS))
            done = int(row["epoch"]) + 1
    steps = read_status(directory, status.network).get("steps")
    if status.state == "training" and status.epoch == done and isinstance(steps, int) and steps > 0:
        part = min((status.step or 0) / steps, 1.0)
    left = max(0.0, (status.epochs or 0) - done - part) * sum(seconds[-10:]) / len(seconds[-10:]) if seconds else None
    return done + part, left


# Lines


def short(path: Path) -> str:
    """A path as one would type it here."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return printable(path.relative_to(here) if path.is_relative_to(here) else path)


def columns(done: float, epochs: int | None) -> str:
    """Epochs, as a number and as a bar."""
    return f"{f'{int(done)}/{epochs}':>9} {('#' * round(8 * min(done / epochs, 1))):.<8}" if epochs else " " * 18


def number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def table(directory: Path, statuses: Sequence[Status]) -> list[str]:
    """A line for each network below a heading, then why those that failed have; none is wider than WIDTH."""
    lines = ["network     epoch          accuracy    best     rate       left  state"]
    for status in statuses:
        done, left = progress(directory, status)
        measures = f"{number(status.accuracy):>8} {number(status.best):>7} {number(status.lr, '.3g'):>8}"
        time_left = duration(left) if left and status.alive else ""
        state = str(status).replace("network ", "") if status.state == "waiting" else status.state
        line = f"{status.network:>7} {columns(done, status.epochs)} {measures} {time_left:>10}  {state}"
        lines.append(line[:WIDTH].rstrip())
    sentences = [f"network {status.network} {status}" for status in statuses if status.state == "failed"]
    return lines + [line for text in sentences for line in textwrap.wrap(text, WIDTH, max_lines=4, placeholder=" …")]


def listing(directories: Sequence[Path]) -> list[str]:
    """A line for each run below a heading; its name comes last, and whole."""
    lines = ["alive     epoch             best       left  run"]
    with ThreadPoolExecutor(16) as pool:  # a network on another machine takes seconds to tell
        observed = list(pool.map(look, directories))
    for directory, statuses in zip(directories, observed, strict=True):
        done, left = zip(*(progress(directory, status) for status in statuses), strict=True)
        alive = [status.alive for status in statuses]
        most = max((seconds or 0 for seconds, lives in zip(left, alive, strict=True) if lives), default=0)
        best = max((status.best for status in statuses if status.best is not None), default=None)
        epochs = max(status.epochs or 0 for status in statuses)
        line = f"{columns(min(done), epochs)} {number(best):>7} {duration(most) if most else '':>10}"
        lines.append(f"{f'{sum(alive)}/{len(alive)}':>5} {line}  {short(directory)}")
    return lines


# Watching


def watch(directory: Path, started: Mapping[int, Started]) -> int:
    """Shows how the networks are until all have ended; where there is no terminal, until they have begun to train.

    Returns:
        1 if one of those that were started has failed meanwhile, else 0.
    """
    is_live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    failed, drawn, deadline = set(), 0, time.monotonic() + START_SECONDS
    while True:
        running = {i for i, one in started.items() if one.process.poll() is None}
        statuses = look(directory)
        new = {i for i, one in started.items() if one.process.returncode} - failed
        failed |= new
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in table(directory, statuses)][: height - 1] if is_live else []
        erase = f"\x1b[{drawn}A\x1b[J" if drawn else ""
        print(erase, *(f"{line}\n" for line in [*(started[i].sentence() for i in new), *lines]), sep="", end="")
        sys.stdout.flush()
        drawn = len(lines)
        at_work = {status.network for status in statuses if status.alive and status.state not in ("starting", *ENDED)}
        has_begun = failed or running <= at_work or time.monotonic() > deadline
        if not running | at_work or (not is_live and has_begun):
            return int(bool(failed))
        time.sleep(LOOK_SECONDS)


def follow(started: Sequence[Started], directories: Iterable[Path], epochs: int) -> Started | None:
    """Shows one bar over all epochs of all networks, and the lines of their logs, until all have ended or one failed.

    Returns:
        The one that has failed.
    """
    form, read = "{bar:40} {percentage:3.0f}%  {remaining} left", [0] * len(started)
    with tqdm(total=epochs * len(started), bar_format=form, leave=False, disable=None, file=sys.stdout) as bar:
        while True:
            running = [one for one in started if one.process.poll() is None]
            for k, one in enumerate(started):
                lines = [line for line in one.log.read_text(errors="replace").splitlines() if line[:8] == "Network:"]
                for line in lines[read[k] :]:
                    bar.write(f"{one.name:11}{line}", file=sys.stdout)
                read[k] = len(lines)
            bar.n = sum(progress(place, status)[0] for place in directories for status in look(place))
            bar.refresh()
            sys.stdout.flush()
            failed = next((one for one in started if one.process.returncode), None)
            if failed or not running:
                return failed
            time.sleep(LOOK_SECONDS)
