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
            lines = re.split(r"^.*torch/distributed/elastic/", log.read(), maxsplit=1, flags=re.MULTILINE)[
                0
            ].splitlines()
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
        return f"{self.name} {'was stopped' if self.process.returncode in STOPPED else 'has failed'}: {printable(last)}"


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
    done, seconds = 0, []
    with suppress(OSError, ValueError, TypeError, KeyError), open(directory / f"metrics{status.network}.csv") as file:
        for row in csv.DictReader(file):
            seconds.append(sum(float(row[part] or 0) for part in SECONDS))
            done = int(row["epoch"]) + 1
    steps, part = read_status(directory, status.network).get("steps"), 0.0
    if status.state == "training" and status.epoch == done and status.step and isinstance(steps, int) and steps > 0:
        part = min(status.step / steps, 1.0)
    left = max(0.0, (status.epochs or 0) - done - part) * sum(seconds[-10:]) / len(seconds[-10:]) if seconds else None
    return done + part, left


# Lines


def short(path: Path) -> str:
    """A path as one would type it here."""
    path, here = Path(os.path.abspath(path)), Path.cwd()
    return printable(path.relative_to(here) if path.is_relative_to(here) else path)


def bar(share: float, width: int = 8) -> str:
    return ("#" * round(width * min(share, 1.0))).ljust(width, ".")


def columns(done: float, epochs: int | None) -> str:
    """Epochs, as a number and as a bar."""
    return f"{f'{int(done)}/{epochs}':>9} {bar(done / epochs)}" if epochs else " " * 18


def number(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def table(
    directory: Path, statuses: Sequence[Status], since: dict[int, tuple[float, float]] | None = None
) -> list[str]:
    """A line for each network below a heading, then why those that failed have; none is wider than WIDTH.

    Args:
        since: one dict for all tables of a view: it keeps what tells the time left before an epoch has ended.
    """
    lines = ["network     epoch          accuracy    best     rate       left  state"]
    for status in statuses:
        done, left = progress(directory, status)
        if left is None and since is not None and done:
            began, before = since.setdefault(status.network, (time.monotonic(), done))
            if done > before:
                left = (time.monotonic() - began) * ((status.epochs or 0) - done) / (done - before)
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
        alive = [status for status in statuses if status.alive]
        done = min((progress(directory, status)[0] for status in statuses), default=0)
        left = max((progress(directory, status)[1] or 0 for status in alive), default=0)
        best = max((status.best for status in statuses if status.best is not None), default=None)
        epochs = max((status.epochs or 0 for status in statuses), default=0)
        line = f"{columns(done, epochs)} {number(best):>7} {duration(left) if left else '':>10}  {short(directory)}"
        lines.append(f"{f'{len(alive)}/{len(statuses)}':>5} {line}")
    return lines


# Watching


class Screen:
    """Lines on a terminal that are drawn anew below what is said; elsewhere only what is said."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self.drawn = 0

    def show(self, lines: Sequence[str], said: Sequence[str] = ()) -> None:
        """Prints what is said, then the lines in the place of those before, as many as there is room for."""
        erase = f"\x1b[{self.drawn}A\x1b[J" if self.drawn else ""
        width, height = shutil.get_terminal_size()
        lines = [line[: width - 1] for line in lines][: height - 1] if self.live else []
        self.drawn = len(lines)
        print(erase, *(f"{line}\n" for line in [*said, *lines]), sep="", end="", flush=True)


def watch(directory: Path, started: Mapping[int, Started]) -> int:
    """Shows how the networks are until all have ended; where there is no terminal, until they have begun to train.

    Returns:
        1 if one of those that were started has failed meanwhile, else 0.
    """
    screen, failed, since, deadline = Screen(), [], {}, time.monotonic() + START_SECONDS
    while True:
        running = {i for i, one in started.items() if one.process.poll() is None}
        statuses = look(directory)
        new = [i for i, one in started.items() if one.process.returncode and i not in failed]
        failed += new
        screen.show(table(directory, statuses, since), [started[i].sentence() for i in new])
        at_work = {status.network for status in statuses if status.alive and status.state not in ("starting", *ENDED)}
        has_begun = failed or running <= at_work or time.monotonic() > deadline
        if not running | at_work or (not screen.live and has_begun):
            return int(bool(failed))
        time.sleep(LOOK_SECONDS)


def follow(started: Sequence[Started], directories: Sequence[Path], epochs: int) -> Started | None:
    """Shows one bar over all epochs of all networks, and the lines of their logs, until all have ended or one failed.

    Returns:
        The one that has failed.
    """
    screen, began, read = Screen(), time.monotonic(), [0] * len(started)
    while True:
        running = [one for one in started if one.process.poll() is None]
        said = []
        for k, one in enumerate(started):
            lines = [line for line in one.log.read_text(errors="replace").splitlines() if line.startswith("Network:")]
            said += [f"{one.name:11}{line}" for line in lines[read[k] :]]
            read[k] = len(lines)
        share = sum(progress(place, status)[0] for place in directories for status in look(place))
        share /= epochs * len(started)
        seconds = (time.monotonic() - began) * (1 - share) / share if share > 0.02 else None
        left = "" if seconds is None else f"  {duration(seconds)} left"
        screen.show([f"{bar(share, 40)} {share:4.0%}{left}"] if running else [], said)
        failed = next((one for one in started if one.process.returncode), None)
        if failed or not running:
            return failed
        time.sleep(LOOK_SECONDS)
