"""Who is in a run: its settings, each network's heartbeat and status, and looking at a run from outside."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

BEAT_SECONDS = 5.0  # how often a living network rewrites its status file
ENDED = ("done", "stopped", "failed")


def printable(text: object, limit: int = 500) -> str:
    """Text out of a file that anyone may have written, fit for a terminal and a log: one line, no control codes."""
    return "".join(character if character.isprintable() else " " for character in str(text))[:limit]


def duration(seconds: float) -> str:
    """A time as people say it: 47 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A small JSON object that anyone may have written: OSError if it cannot be read, ValueError if it is none."""
    raise NotImplementedError


def read_run(directory: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """(the run's random name, the settings that its networks share) of run.json; OSError or ValueError if damaged."""
    raise NotImplementedError


def networks_of(directory: str | os.PathLike[str]) -> range:
    """The networks 1..N of the run in a save directory; empty if there is none."""
    raise NotImplementedError


class Status(NamedTuple):
    """What is known of a network: `state` is that of network{i}.json, "not started", or "died"."""

    network: int
    state: str = "not started"
    alive: bool = False
    detail: str = ""
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    accuracy: float | None = None
    best: float | None = None
    lr: float | None = None
    pid: int | None = None
    host: str = ""
    command: list[str] = []
    cwd: str = ""
    seen: float | None = None  # seconds since its last sign of life
    num: int | None = None


def observe(directory: str | os.PathLike[str], networks: Iterable[int] | None = None) -> list[Status]:
    """The status of networks (default: all of the run); alive is who holds its lock, or whose heartbeat moves."""
    raise NotImplementedError
