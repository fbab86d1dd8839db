"""Says how the networks of a run are, and ends them.

python common/manage.py status checkpoint/grafting_cifar10_resnet32
python common/manage.py stop checkpoint/grafting_cifar10_resnet32
"""

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed

from filter_grafting.exchange import BEAT_SECONDS, ENDED, as_number, holder, moving, printable, read_run, read_status

WIDTH = 80


class Network(NamedTuple):
    """What can be known of a network from outside."""

    number: int
    state: str  # as its status file says, or "not started", or "died": neither ended nor alive
    alive: bool
    pid: int | None  # the living process, if it is on this host and holds the network's lock
    where: str  # "process 7 on host", as the status file says
    detail: str
    epoch: int | None  # counted from 0
    epochs: int | None
    accuracy: float | None
    best: float | None
    seen: float | None  # seconds since its last sign of life, by this host's clock

    def __str__(self) -> str:
        """`training`, `waiting for network 2`, `stopped by SIGTERM`, `failed: the loss became nan`."""
        return self.state + (": " if self.state == "failed" else " ") * bool(self.detail) + self.detail


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("status", "one line per network: state, epoch, accuracy, best, last seen"),
        (
            "stop",
            "end the networks that run on this host; --resume can continue them",
        ),
        ("alive", "print the numbers of the networks that are alive"),
        ("pending", "print the numbers of the networks that are neither alive nor done"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("directory", type=Path, help="the run's save directory")
        if name == "stop":
            command.add_argument("--timeout", type=float, default=120, help="seconds to wait (default: %(default)g)")
        if name == "pending":
            command.add_argument("num", type=int, help="number of networks of the run")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "…" is no reason to fail

    if args.command == "pending":
        networks = observe(args.directory, range(1, args.num + 1))
        print(*(network.number for network in networks if not (network.alive or network.state == "done")))
        return 0
    numbers = networks_of(args.directory)
    if args.command == "alive":
        print(*(network.number for network in observe(args.directory, numbers) if network.alive))
        return 0
    if not numbers:
        print(
            f"{printable(args.directory)} is not the save directory of a run: nothing has started there",
            file=sys.stderr,
        )
        return 1
    if args.command == "stop":
        return stop(args.directory, numbers, args.timeout)
    print(*table(observe(args.directory, numbers)), sep="\n")
    return 0


def networks_of(directory: Path) -> range:
    """The numbers of a run's networks: as run.json says, and at least those that have left a status file."""
    num = 0
    with contextlib.suppress(OSError, ValueError):
        num = int(as_number(read_run(directory)[1].get("num")) or 0)
    names = os.listdir(directory) if directory.is_dir() else []
    found = [int(match[1]) for name in names if (match := re.fullmatch(r"network([1-9]\d{0,2})\.json", name))]
    return range(1, max(min(num, 999), *found, 0) + 1)


def observe(directory: Path, numbers: range) -> list[Network]:
    """How the networks are.

    One that runs on this host is alive if it holds its lock: the kernel knows. One on another host, or on a
    file system without locks, is if its status file moves while we look, for a little over 5 s.
    """
    beats = {}
    for number in numbers:
        status = read_status(directory, number)
        if status and status.get("state") not in ENDED and holder(directory, number) is None and _may_live(status):
            beats[number] = status.get("beat")
    moved = moving(directory, beats, BEAT_SECONDS + 0.5)
    return [_network(directory, number, number in moved) for number in numbers]


def _may_live(status: dict[str, Any]) -> bool:
    """Whether a process that holds no lock here may live all the same: on another host, or without locks."""
    if status.get("host") != socket.gethostname():
        return True
    try:
        os.kill(status["pid"], 0)
    except PermissionError:
        return True
    except (KeyError, TypeError, OverflowError, ProcessLookupError):
        return False
    return True


def _network(directory: Path, number: int, has_moved: bool) -> Network:
    pid = holder(directory, number)  # before the status is read, which outlives the process
    status = read_status(directory, number) or {}
    if pid and pid > 0 and status.get("pid") != pid:
        status = {
            "state": "starting",
            "host": socket.gethostname(),
            "pid": pid,
        }  # not an earlier process's words
    state = status.get("state", "not started")
    alive = pid is not None or (has_moved and state not in ENDED)
    if status and not alive and state not in ENDED:
        state = "died"
    written = as_number(status.get("time"))
    return Network(
        number=number,
        state=printable(state, 20),
        alive=alive,
        pid=pid if pid and pid > 0 else None,
        where=printable(f"process {status.get('pid')} on {status.get('host')}", 80),
        detail="" if state == "died" else " ".join(printable(status.get("detail", "")).split()),
        epoch=as_number(status.get("epoch")),
        epochs=as_number(status.get("epochs")),
        accuracy=as_number(status.get("accuracy")),
        best=as_number(status.get("best")),
        seen=0 if has_moved else None if written is None else max(0, time.time() - written),
    )


def table(networks: list[Network]) -> list[str]:
    """One line per network under a heading, then why those that failed did; nothing wider than a terminal."""
    rows = [("network", "state", "epoch (last)", "accuracy", "best", "last seen")]
    for network in networks:
        rows.append(
            (
                str(network.number),
                shorten(network.state if network.state == "failed" else str(network), 26),
                "" if network.epoch is None else f"{network.epoch} ({(network.epochs or 0) - 1})",
                *("" if value is None else f"{value:.3f}" for value in (network.accuracy, network.best)),
                "" if network.seen is None else ago(network.seen),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [shorten("  ".join(map(str.ljust, row, widths)).rstrip()) for row in rows]
    for network in networks:
        if network.state == "failed":
            reason = f"network {network.number} {network}"
            lines += textwrap.wrap(reason, WIDTH, max_lines=4, placeholder=" …")
    return lines


def stop(directory: Path, numbers: range, timeout: float) -> int:
    """Sends SIGTERM to the processes that hold the networks' locks, and waits until these are free."""
    networks = observe(directory, numbers)
    asked, foreign = {}, []
    for network in networks:
        if not network.pid:
            continue
        process = f"network {network.number} (process {network.pid})"
        try:
            os.kill(network.pid, signal.SIGTERM)
        except ProcessLookupError:
            continue  # it has just ended by itself
        except PermissionError:
            foreign.append(network.number)
            print(f"{process} is another user's, who alone can stop it", flush=True)
            continue
        asked[network.number] = network.pid
        print(f"{process} is asked to stop", flush=True)
    deadline = time.monotonic() + timeout
    while (left := [i for i, pid in asked.items() if holder(directory, i) == pid]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in left:
        print(
            f"network {number} (process {asked[number]}) is still there after {timeout:g} s; "
            "asked a second time it leaves at once, without finishing its batch"
        )
    elsewhere = [network for network in networks if network.alive and not network.pid]
    for network in elsewhere:
        print(f"network {network.number} is {network.where}, out of reach from here: stop it there with kill")
    if not left and not foreign:
        print("no network of this run is alive" + (" on this host" if elsewhere else ""))
    return 1 if left or elsewhere or foreign else 0


def shorten(text: str, width: int = WIDTH) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


if __name__ == "__main__":
    sys.exit(main())
