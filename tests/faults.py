"""Faults that strike a network at a chosen moment: made in its process before the script runs, so that the script
itself knows nothing of them.

A moment is an event, named by a regular expression, and how often it must have come: `("after rename best1.t7", 1)`.
"""

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filter_grafting.grafting
from filter_grafting import membership, rings
from training import loop, records


def at(event: str, count: int, action: str, *arguments: Any) -> None:
    """Does something when an event comes for the count-th time: "kill", or another function of `ACTIONS`."""
    if not _plans:
        _install()
    _plans.append([re.compile(event), count, action, arguments])


def quicken() -> None:
    """Seconds become tenths: a test need not wait for what is said after 10 s."""
    for name in "BEAT_SECONDS", "FIRST_MESSAGE_SECONDS", "MESSAGE_SECONDS":
        setattr(rings, name, getattr(rings, name) / 20)
    membership.BEAT_SECONDS /= 20


def set_environment(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def _fill(path: str) -> None:
    """Fills a disk to its last byte."""
    with open(path, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


ACTIONS: dict[str, Callable[..., Any]] = {
    "kill": lambda: signal.raise_signal(signal.SIGKILL),
    "signal": signal.raise_signal,
    "fill": _fill,
    "sleep": time.sleep,
}

_plans: list[list[Any]] = []


def _tell(event: str) -> None:
    for plan in _plans:
        pattern, left, action, arguments = plan
        if pattern.fullmatch(event):
            plan[1] = left - 1
            if left == 1:
                ACTIONS[action](*arguments)


def _around(function: Callable, name: Callable[..., str]) -> Callable:
    """The function, with the events `before NAME` and `after NAME` around it."""

    def told(*arguments: Any, **options: Any) -> Any:
        event = name(*arguments)
        _tell(f"before {event}")
        value = function(*arguments, **options)
        _tell(f"after {event}")
        return value

    return told


def _line(text: str) -> str:
    found = re.match(r"Network:\d+    epoch:(\d+) ", text)
    return f"line {found[1]}" if found else "another line"


def _install() -> None:
    os.replace = _around(os.replace, lambda source, target: f"rename {Path(target).name}")
    os.unlink = _around(os.unlink, lambda path, *_: f"delete {Path(path).name}")
    os.fsync = _around(os.fsync, lambda descriptor: f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
    rings.load = _around(rings.load, lambda path: f"load {Path(path).name}")
    loop.train_one_epoch = _around(loop.train_one_epoch, lambda *_: "train")
    loop.evaluate = _around(loop.evaluate, lambda *_: "test")
    filter_grafting.grafting.graft = _around(filter_grafting.grafting.graft, lambda *_: "graft")
    records.say = _around(records.say, _line)
