"""The log and the tables of a run: whole lines only, and none twice, however often the run was interrupted."""

import csv
import io
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from filter_grafting.checkpoint import write_atomically, write_error


class Log:
    """Standard output as network i's log: each line is written at once, and an epoch's line only once.

    A resumed network may come past an epoch again whose line it had already written when it was killed; where the
    log is a file, the line is looked up there.
    """

    def __init__(self, network: int):
        self.prefix = f"Network:{network}    epoch:"
        self.last_epoch = self._repair() if _is_file(1) else -1

    def _repair(self) -> int:
        """Cuts off a half-written last line of this network (the disk was full); returns the last epoch in the log."""
        try:
            with open("/proc/self/fd/1", "rb") as file:
                text = file.read()
        except OSError:  # no such thing outside Linux, or a log that may not be read
            return -1
        whole, newline, rest = text.rpartition(b"\n")
        if rest.startswith(self.prefix[:7].encode()):
            os.ftruncate(1, len(whole) + len(newline))
        epochs = re.findall(rb"^%b(\d+) " % re.escape(self.prefix.encode()), whole + newline, re.MULTILINE)
        return int(epochs[-1]) if epochs else -1

    def say(self, line: str) -> None:
        """Writes one line; raises WriteError if it cannot."""
        try:
            print(line, flush=True)
        except OSError as error:
            name = os.path.realpath("/proc/self/fd/1") if _is_file(1) else "standard output"
            # What is left in the buffer would be tried again, and fail again, when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise write_error(f"the log {name}", error) from error

    def epoch(self, epoch: int, fields: str) -> None:
        if epoch > self.last_epoch:
            self.say(f"{self.prefix}{epoch}    {fields}")
            self.last_epoch = epoch


def _is_file(descriptor: int) -> bool:
    import stat

    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def on_terminal() -> bool:
    return sys.stdout.isatty()


class Table:
    """A CSV file whose first column is the epoch, and that grows by whole rows."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, list(columns)

    def start(self, epoch: int) -> None:
        """Keeps the rows of the epochs before this one, and drops those after it and what is half-written."""
        rows = []
        try:
            with open(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW), newline="", errors="replace") as file:
                rows = [row for row in csv.reader(file) if self._is_whole(row) and int(row[0]) < epoch]
        except FileNotFoundError:
            pass
        except OSError as error:
            raise write_error(self.path, error) from error
        write_atomically(self.path, _text([self.columns, *rows]))

    def _is_whole(self, row: list[str]) -> bool:
        return len(row) == len(self.columns) and row[0].isdecimal()

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        data = _text(rows)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error


def _text(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
