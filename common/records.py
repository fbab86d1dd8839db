"""The log and the tables of a run: whole lines only, none twice, none missing, however often it was interrupted."""

import csv
import io
import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from filter_grafting.checkpoint import write_atomically, write_error
from filter_grafting.errors import WriteError

LOG = "/proc/self/fd/1"  # standard output, by a name under which it can be opened again and read


class Log:
    """Standard output as network i's log: each line is written at once, and an epoch's line only once.

    A resumed network may come past an epoch again whose line it had already written when it was killed; where the
    log is a file, the line is looked up there.
    """

    def __init__(self, network: int, resumed: bool):
        self.prefix = f"Network:{network}    epoch:"
        self.resumed = resumed  # otherwise the lines that the log may hold are another run's
        self._last_epoch: int | None = None  # not looked up before the first line: until then the log may be another's
        with suppress(AttributeError):  # names of files need not fit the terminal's encoding
            sys.stdout.reconfigure(errors="backslashreplace")

    @property
    def last_epoch(self) -> int:
        """The last epoch whose line is in the log; -1 if there is none, or the log cannot be read."""
        self._take_over()
        return self._last_epoch

    def _take_over(self) -> None:
        if self._last_epoch is None:
            self._last_epoch = self._repair() if _is_file(1) else -1

    def _repair(self) -> int:
        """Cuts off a last line of this network that is half-written (a full disk); returns this run's last epoch."""
        try:
            with open(LOG, "rb") as file:
                text = file.read()
        except OSError:  # no such thing outside Linux, or a log that may not be read
            return -1
        lines, newline, rest = text.rpartition(b"\n")
        start = self.prefix.encode()[: len("Network")]
        try:
            if rest and rest[: len(start)] == start[: len(rest)]:
                os.ftruncate(1, len(lines) + len(newline))
                os.lseek(1, 0, os.SEEK_END)  # of a log that was not opened for appending
            elif rest:
                os.write(1, b"\n")  # people look for lines that begin with our words
        except OSError as error:
            raise self._error(error) from error
        epochs = re.findall(rb"^%b(\d{1,9}) " % re.escape(self.prefix.encode()), lines + newline, re.MULTILINE)
        return int(epochs[-1]) if epochs and self.resumed else -1

    def say(self, line: str) -> None:
        """Writes one line.

        Raises:
            WriteError: if it cannot.
        """
        self._take_over()
        try:
            print(line, flush=True)
        except OSError as error:
            failure = self._error(error)
            # What is left in the buffer would be tried again, and fail again, when Python exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            raise failure from error

    @staticmethod
    def _error(error: OSError) -> WriteError:
        if _is_file(1):
            return write_error(os.path.realpath(LOG), error)
        return WriteError(f"cannot write the log to standard output: {error.strerror or error}")

    def epoch(self, epoch: int, fields: str) -> None:
        """Writes an epoch's line, if it is not there yet."""
        if epoch > self.last_epoch:
            self.say(f"{self.prefix}{epoch}    {fields}")
            if _is_file(1):
                # Before the next epoch's checkpoint is: after a crash of the machine, too, no line is missing.
                with suppress(OSError):
                    os.fsync(1)
            self._last_epoch = epoch

    def recall(self, epoch: int, fields: str) -> None:
        """The same for an epoch of an earlier process, where the log is a file: a shell's `>` may have emptied it."""
        if _is_file(1):
            self.epoch(epoch, fields)


def _is_file(descriptor: int) -> bool:
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

    def start(self, epoch: int) -> list[Mapping[str, str]]:
        """Keeps the rows of the epochs before this one, and drops those after it and what is half-written.

        Returns: the rows that are kept.

        Raises:
            WriteError: if the file cannot be read or written.
        """
        rows = []
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(descriptor, newline="", encoding="utf-8", errors="replace") as file, suppress(csv.Error):
                missing = []
                for row in csv.reader(file):
                    if row == self.columns[: len(row)]:  # an earlier version of the program may have had fewer columns
                        missing = [""] * (len(self.columns) - len(row))
                    elif self._is_whole(row + missing) and int(row[0]) < epoch:
                        rows.append(row + missing)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise write_error(self.path, error) from error
        write_atomically(self.path, _text([self.columns, *rows]))
        return [dict(zip(self.columns, row, strict=True)) for row in rows]

    def _is_whole(self, row: Sequence[str]) -> bool:
        return len(row) == len(self.columns) and re.fullmatch("[0-9]{1,9}", row[0]) is not None

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Adds rows.

        Raises:
            WriteError: if they could not be written to their end; `start` removes what was.
        """
        data = _text(rows)
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
            try:
                while data:
                    data = data[os.write(descriptor, data) :]
                os.fsync(descriptor)  # before the next epoch's checkpoint, as in Log.epoch
            finally:
                os.close(descriptor)
        except OSError as error:
            raise write_error(self.path, error) from error


def _text(rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
