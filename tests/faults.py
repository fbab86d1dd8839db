"""Faults that strike a network at a chosen moment: made in its process before the script runs, so that the script
itself knows nothing of them.

A moment is an event, named by a regular expression, and how often it must have come: `("after rename best1.t7", 1)`.
"""

import builtins
import os
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common.records
import common.run
import filter_grafting.exchange


def at(event: str, count: int, action: str, *arguments: Any) -> None:
    """Does something when an event comes for the count-th time: "kill", or another function of `ACTIONS`."""
    left = count

    def listen(name: str) -> None:
        nonlocal left
        if re.fullmatch(event, name):
            left -= 1
            if left == 0:
                ACTIONS[action](*arguments)

    if not _listeners:
        _install()
    _listeners.append(listen)


def quicken() -> None:
    """Seconds become tenths: a test need not wait for what is said after 10 s."""
    for name in "BEAT_SECONDS", "FIRST_MESSAGE_SECONDS", "MESSAGE_SECONDS":
        setattr(filter_grafting.exchange, name, getattr(filter_grafting.exchange, name) / 20)


def become_nobody() -> None:
    """The superuser may write everywhere; a user may not."""
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)


def limit_file_size(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _limit_growth(path: str, size: int) -> None:
    """From now on no file can be longer than this one is, and a few bytes."""
    limit_file_size(os.path.getsize(path) + size)


def _fill(path: str) -> None:
    """Fills a disk to its last byte."""
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


def _truncate(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


def _remove(folder: str) -> None:
    while os.path.exists(folder):  # others may write there at the same moment
        shutil.rmtree(folder, ignore_errors=True)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


ACTIONS: dict[str, Callable[..., Any]] = {
    "kill": _kill,
    "terminate": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "fill": _fill,
    "limit": _limit_growth,
    "remove": _remove,
    "truncate": _truncate,
    "sleep": time.sleep,
}

_listeners: list[Callable[[str], None]] = []


def _tell(event: str) -> None:
    for listen in _listeners:
        listen(event)


def _around(function: Callable, name: Callable[..., str | None]) -> Callable:
    """The function, with the events `before NAME` and `after NAME` around it."""

    def told(*arguments: Any, **options: Any) -> Any:
        event = name(*arguments)
        if event:
            _tell(f"before {event}")
        value = function(*arguments, **options)
        if event:
            _tell(f"after {event}")
        return value

    return told


def _install() -> None:
    os.replace = _around(os.replace, lambda source, target: f"rename {Path(target).name}")
    os.unlink = _around(os.unlink, lambda path, *_: f"delete {Path(path).name}")
    os.fsync = _around(os.fsync, lambda descriptor: f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
    exchange, run, records = filter_grafting.exchange, common.run, common.records
    exchange.load = _around(exchange.load, lambda path: f"load {Path(path).name}")
    run.train_one_epoch = _around(run.train_one_epoch, lambda *_: "train")
    run.evaluate = _around(run.evaluate, lambda *_: "test")
    run.blend = _around(run.blend, lambda *_: "blend")
    records.Table.append = _around(records.Table.append, lambda table, rows: f"rows {table.path.name}")
    records.Log.epoch = _around(records.Log.epoch, lambda log, epoch, fields: f"line {epoch}")

    sleep = time.sleep

    def told_sleep(seconds: float) -> None:
        if sys._getframe(1).f_code is exchange.Ring.wait.__code__:
            _tell("wait")
        sleep(seconds)

    time.sleep = told_sleep


def tear_row(name: str, count: int) -> None:
    """Kills the process when half of what is appended to a table for the count-th time is written."""
    left, write = count, os.write

    def torn(descriptor: int, data: bytes) -> int:
        nonlocal left
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"/{name}"):
            left -= 1
            if left == 0:
                write(descriptor, data[: len(data) // 2])
                _kill()
        return write(descriptor, data)

    os.write = torn


def tear_line(epoch: int) -> None:
    """Kills the process when half of an epoch's line is in the log."""

    def torn(*values: Any, **options: Any) -> None:
        if f"    epoch:{epoch} " in str(values[0]):
            os.write(1, str(values[0]).encode()[:40])
            _kill()
        builtins.print(*values, **options)

    common.records.print = torn
