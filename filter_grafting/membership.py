"""Who is in a run: a place for each network, the settings they share, heartbeats, and looking at all this from outside.

In the save directory lie `run.json`, the run's name and settings, and for network i `network{i}.json`, what it last
said of itself, rewritten every few seconds, and `network{i}.lock`, which it holds locked while it lives.
"""

import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path, PurePath
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from filelock import FileLock, Timeout

from .checkpoint import TEMPORARY, write_atomically, write_error
from .errors import AliveError, AlreadyRunError, GraftingError, RefusedError, SettingsError, WriteError

try:
    import fcntl
except ImportError:  # another platform than Linux or macOS: FileRing says so
    fcntl = None  # type: ignore[assignment]

BEAT_SECONDS = 5.0  # how often a living network rewrites its status file
TURN_SECONDS = 120.0  # how long a network that starts waits for another that does
ENDED = ("done", "stopped", "failed")
HOST = socket.gethostname()
PROCESS = secrets.token_hex(8)  # with the pid: in containers of one host, each may be process 1
Self = TypeVar("Self", bound="Membership")


def printable(text: object, limit: int = 500) -> str:
    """Text out of a file that anyone may have written, fit for a terminal and a log: one line, no control codes."""
    return "".join(character if character.isprintable() else " " for character in str(text))[:limit]


def duration(seconds: float) -> str:
    """A time as people say it: 47 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# Looking at a run from outside


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A JSON object out of a file. Raises OSError or ValueError if there is none."""
    contents = json.loads(Path(path).read_bytes())
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, expected an object")
    return contents


def read_status(directory: str | os.PathLike[str], network: int) -> dict[str, Any]:
    """What a network last said of itself (see `Membership.update`); empty if it has said nothing that can be read."""
    with suppress(OSError, ValueError):
        return read_json(Path(directory) / f"network{network}.json")
    return {}


def read_run(directory: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """(the run's random name, the settings that its networks share), out of `run.json`; raises as `read_json` does."""
    contents = read_json(Path(directory) / "run.json")
    run, settings = contents.get("run"), contents.get("settings")
    if not isinstance(run, str) or not isinstance(settings, dict):
        raise ValueError("run.json holds no settings of a run")
    return run, settings


def networks_of(directory: str | os.PathLike[str]) -> range:
    """The networks 1...N of the run in a directory; none if there is no run."""
    with suppress(OSError, ValueError, TypeError):
        return range(1, read_run(directory)[1].get("num", 0) + 1)
    return range(1, 1)


def is_held(path: str | os.PathLike[str]) -> bool | None:
    """Whether a living process holds a lock; the kernel answers, not a file. Reading it is enough to ask.

    None if its file system cannot say: it knows no such locks, or is away for a moment.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask do not disturb each other
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (BlockingIOError, PermissionError):  # the second is what some file systems say
        return True
    except OSError:
        return None
    return False


def take_lock(path: Path, seconds: float, refusal: RefusedError) -> AbstractContextManager[Any]:
    """Holds a lock until it is released; raises the refusal if another has held it for so long."""
    try:
        return FileLock(path, thread_local=False).acquire(timeout=seconds)
    except Timeout as error:
        raise refusal from error
    except NotImplementedError as error:  # where there is no flock; newer versions of filelock leave a marker instead
        raise RefusedError(
            f"{path} cannot be locked: its file system knows no flock; give another directory"
        ) from error
    except OSError as error:
        raise write_error(path, error) from error


def living(directory: Path, networks: Iterable[int]) -> set[int]:
    """Those of some networks that hold their locks, or whose hearts beat where locks may not reach: on other hosts."""
    held = {network: is_held(directory / f"network{network}.lock") for network in networks}
    alive = {network for network in held if held[network]}
    said = {network: read_status(directory, network) for network in held if not held[network]}
    remote = {network for network, status in said.items() if held[network] is None or status.get("host") != HOST}
    may_live = {network for network in remote if said[network].get("state") not in (None, *ENDED)}
    deadline = time.monotonic() + 2 * BEAT_SECONDS
    while may_live - alive and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 50)
        alive |= {
            network for network in may_live if read_status(directory, network).get("beat") != said[network].get("beat")
        }
    return alive


class Status(NamedTuple):
    """What is known of a network.

    `state` is that of network{i}.json (starting, training, testing, waiting, done, stopped, failed), or "not started",
    or "died" of one that has neither ended nor lives. Accuracies are in percent.
    """

    network: int
    state: str
    alive: bool
    detail: str = ""
    epoch: int | None = None
    epochs: int | None = None
    step: int | None = None
    accuracy: float | None = None
    best: float | None = None
    lr: float | None = None
    pid: int | None = None
    host: str = ""
    command: Sequence[str] = ()
    cwd: str = ""

    def __str__(self) -> str:
        """As people say it: "waiting for network 2", "failed: the loss became nan"."""
        return self.state + (f"{' ' if self.state == 'waiting' else ': '}{self.detail}" if self.detail else "")


def observe(directory: str | os.PathLike[str], networks: Iterable[int] | None = None) -> list[Status]:
    """The status of networks (default: all of the run), in ascending order. Reads only.

    Who holds its lock is alive. Of processes on other hosts, and where there are no locks, that is whose heartbeat
    moves, which takes up to two beats.
    """
    directory = Path(directory)
    wanted = sorted(networks_of(directory) if networks is None else networks)
    alive = living(directory, wanted)
    return [status_of(network, read_status(directory, network), network in alive) for network in wanted]


def status_of(network: int, said: Mapping[str, Any], alive: bool) -> Status:
    state = said.get("state")
    if state is None:
        state = "starting" if alive else "not started"
    elif state not in ENDED and not alive:
        state = "died"
    known = {key: said[key] for key in Status._fields if said.get(key) is not None}
    return Status(**{**known, "network": network, "state": state, "alive": alive})


# Taking part


def plain(value: Any, name: str = "settings") -> Any:
    """A value as JSON can hold and compare it: tuples as lists; paths, dtypes and devices as their names.

    Raises:
        TypeError: naming the entry that is something else.
    """
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and value == value):
        return value
    if isinstance(value, PurePath | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{name}.{key}") for key, item in value.items()}
    raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; give plain values, which can be compared")


class Membership:
    """Network i's place in a run of N: which files are whose, the settings agreed on, its lock, heartbeat and status.

    Until the network trains, a start that fails leaves the directory as it found it.
    """

    def __init__(
        self, directory: str | os.PathLike[str], network: int, networks: int, name: str, details: Mapping[str, Any]
    ):
        if fcntl is None:
            raise GraftingError(
                "FileRing needs the file locks of Linux and macOS (the module fcntl), which this platform lacks; use "
                "ProcessGroupRing, or graft_ring in one process"
            )
        if not 1 <= network <= networks:
            raise ValueError(f"network: got {network}, expected 1 to {networks}, the number of networks")
        if not all(field in name for field in ("{index}", "{round}")):  # or networks would write to the same file
            raise ValueError(f"name: got {name!r}, expected a file name with the fields {{index}} and {{round}}")
        self.directory, self.network, self.networks = Path(directory), network, networks
        self.run = ""
        self._name, self._pid = name, os.getpid()
        self._run_path, self._own_path = self.directory / "run.json", self.directory / f"network{network}.json"
        self._lock_path = self.directory / f"network{network}.lock"
        self._place = ExitStack()  # holds the lock
        self._status: dict[str, Any] = {**details, "network": network, "num": networks}
        self._status |= {"host": HOST, "pid": self._pid, "process": PROCESS}
        self._mutex, self._left = threading.Lock(), threading.Event()
        self._step: int | None = None
        self._trouble = ""  # why the last checkpoint could not be written
        self._is_starting = True
        self._has_spoken = False  # from then on its status file names this process, or another that is this network

    # Files

    def path(self, round: int | str, network: int | None = None) -> Path:
        """Path of a network's checkpoint of a round; of this network's own by default."""
        return self.directory / self._name.format(index=(network or self.network) % self.networks, round=round)

    def file(self, kind: str) -> Path:
        """Path of this network's own file of a kind ("best", "final"), which no other network shares."""
        return self.directory / f"{kind}{self.network}{Path(self._name).suffix}"

    def _rounds(self, network: int) -> list[int]:
        """The rounds of which a network's checkpoints are there, in ascending order."""
        before, after = self.path("*", network).name.split("*")
        pattern = re.compile(re.escape(before) + "(0|[1-9][0-9]{0,17})" + re.escape(after))
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))

    # Joining

    def _join(self, settings: Mapping[str, Any] | None, resume: bool, may_raise: Collection[str]) -> None:
        given, may_raise = plain({**(settings or {}), "num": self.networks}), may_raise if resume else ()
        self._agreed(given, may_raise)  # reads only: a refused start changes nothing
        said, is_alive = read_status(self.directory, self.network), bool(living(self.directory, [self.network]))
        kept = [self.directory / f"metrics{self.network}.csv", self.file("best"), self.file("final")]
        trace = next((path for path in [*map(self.path, self._rounds(self.network)), *kept] if path.exists()), None)
        if is_alive and (said.get("host") != HOST or (trace and not resume)):
            raise self._alive()
        if trace and not resume:
            raise AlreadyRunError(
                f"network {self.network} has already run in {self.directory} ({said.get('state')}): there is "
                f"{trace.name}; resume it (resume=True), or start anew in another directory"
            )
        if trace:
            self._status |= {key: said.get(key) for key in ("epoch", "epochs", "accuracy", "best")}
        self._made = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.directory, error) from error
        with self._turn():
            # A process that was killed may take a moment to end; and who asks whether we live holds it for one.
            self._place.enter_context(take_lock(self._lock_path, 1.0, self._alive()))
            self._before = self._own_path.read_bytes() if said else None
            try:
                for kind in self.path("*").name, f"*[a-z]{self.network}.*":  # what an earlier process left half-written
                    for path in self.directory.glob(f".{kind}.*{TEMPORARY}"):
                        path.unlink(missing_ok=True)
                self._record(*self._agreed(given, may_raise, alone=True))
                self.update("starting")
            except BaseException:
                self._take_back()
                raise
        threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True).start()

    def _turn(self) -> AbstractContextManager[Any]:
        """Within it no other network joins, gives up its start, or changes the settings."""
        path = self.directory / "run.lock"
        refusal = RefusedError(f"{path} is held by another network that starts; end that one if it is stuck")
        return take_lock(path, TURN_SECONDS, refusal)

    def _take_back(self) -> None:
        """After a start that failed: the status of before, and no run if there is none. Within this network's turn."""
        with suppress(GraftingError, OSError), self._mutex:
            self._check_place()
            if self._before is not None:
                write_atomically(self._own_path, self._before)
            else:
                self._own_path.unlink(missing_ok=True)
                self._lock_path.unlink()
            networks = range(1, self.networks + 1)
            if not any(self._rounds(k) or (self.directory / f"network{k}.json").exists() for k in networks):
                self._run_path.unlink(missing_ok=True)
                (self.directory / "run.lock").unlink()
                for folder in self._made:
                    folder.rmdir()
        self._place.close()

    def _alive(self) -> AliveError:
        status = read_status(self.directory, self.network)
        where = printable(f"process {status.get('pid')} on {status.get('host')}")
        marker = f" (if it is dead, delete {self._lock_path.name})" if is_held(self._lock_path) is None else ""
        return AliveError(
            f"network {self.network} is already running in {self.directory} ({where}); wait for its end, or stop it, "
            f"before you start it again{marker}"
        )

    # Agreeing: the settings that all networks of a run share

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Further settings that all networks share, known only after the start, such as a checksum of the data.

        Raises:
            SettingsError: naming each one that differs from what another network gave, and both values.
        """
        self._check_place()
        with self._turn():
            self._record(*self._agreed(plain(settings), may_add=True))

    def _agreed(
        self, given: dict[str, Any], may_raise: Collection[str] = (), may_add: bool = False, alone: bool = False
    ) -> tuple[str, dict[str, Any]]:
        """(name, settings) that `run.json` is to hold once these settings are given. Reads only.

        Whether others are at work is asked within this network's turn alone: one that starts at the same moment, and
        raises the same settings, holds its place before it records them.
        """
        try:
            run, recorded = read_run(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            # A new run must not start among an old one's checkpoints: its neighbours would take them for this run's. A
            # process of the published script that started earlier can be ahead, but by less than the ring is long.
            newest = max([-1, *(round for k in range(1, self.networks + 1) for round in self._rounds(k))])
            if newest >= self.networks:
                raise RefusedError(
                    f"{self.directory} holds checkpoints of an earlier run (of round {newest}) without its run.json; "
                    "start anew in another directory"
                ) from None
            return secrets.token_hex(8), given
        except (OSError, ValueError) as error:
            raise RefusedError(f"{self._run_path} is damaged ({error}); start anew in another directory") from error
        known = {key: recorded.get(key, value if may_add else "(not given)") for key, value in given.items()}
        differing = sorted(key for key, value in given.items() if known[key] != value)
        raised = [key for key in differing if key in may_raise and key in recorded and given[key] > recorded[key]]
        others = living(self.directory, {*networks_of(self.directory)} - {self.network}) if raised and alone else set()
        if raised == differing and not others:
            return run, recorded | given
        rows = ", ".join(
            f"{key} is {given[key]!r} here and {known[key]!r} in the run"
            for key in (["num"] if "num" in differing else differing)  # which is the cause of whatever else differs
        )
        at_work = f" (network {min(others)} is at work with the recorded value)" if others else ""
        raise SettingsError(
            f"network {self.network} does not fit the run in {self.directory}: {rows}{at_work}; give the same "
            "settings, or another directory"
        )

    def _record(self, run: str, settings: dict[str, Any]) -> None:
        self.run = run
        if not self._run_path.exists() or read_run(self.directory) != (run, settings):
            write_atomically(self._run_path, json.dumps({"run": run, "settings": settings}, indent=1).encode())

    def _check_place(self) -> None:
        """Raises WriteError if the directory was deleted under this network, or made anew by another run.

        And AliveError if another process is this network by now, as may be after its lock was lost or it stood still.
        """
        why = ""
        with suppress(OSError, ValueError):  # what cannot be read just now says nothing
            try:
                if self.run and read_run(self.directory)[0] != self.run:
                    why = "it is now that of another run"
            except (FileNotFoundError, NotADirectoryError):
                why = "there is no run.json any more"
        if why:
            raise WriteError(f"the save directory {self.directory} of network {self.network} is gone: {why}")
        said = read_status(self.directory, self.network)
        if self._has_spoken and said and (said.get("process"), said.get("pid")) != (PROCESS, self._pid):
            where = printable(f"process {said.get('pid')} on {said.get('host')}")
            raise AliveError(f"network {self.network} in {self.directory} is now {where}: this process ends")

    # Status: what others are told

    def update(self, state: str, detail: str = "", **fields: Any) -> None:
        """Rewrites `network{i}.json`, or leaves that to the next heartbeat if it cannot be written just now.

        Args:
            state: starting, training, testing or waiting. With "training" the start is over: what it did stays.
            fields: epoch, epochs, steps (of an epoch), accuracy, best (in percent), lr, ...

        Raises:
            WriteError: if the directory is gone; while the network starts, also if the file cannot be written.
            AliveError: if another process is this network by now.
        """
        with self._mutex:
            self._is_starting = self._is_starting and state != "training"
            self._status |= {"run": self.run, "state": state, "detail": printable(detail), **fields}
            self._write_status()

    def progress(self, step: int) -> None:
        """Says how many steps of the epoch are done; cheap enough for every batch, since the next heartbeat tells it.

        A network that reports its steps must go on doing so while it trains and tests: when the number stands still
        for its reader's timeout, it is taken to hang, though its heart beats.
        """
        self._step = step

    def _write_status(self) -> None:
        self._check_place()
        if self._step is not None:
            self._status["step"] = self._step
        self._status |= {"time": time.time(), "beat": self._status.get("beat", 0) + 1}
        try:
            write_atomically(self._own_path, json.dumps(self._status).encode(), durable=False)
        except WriteError:  # a disk that stays full is told by the next checkpoint, and an epoch is not lost for this
            if self._is_starting:
                raise
        else:
            self._has_spoken = True

    def _keep_beating(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with self._mutex, suppress(GraftingError):  # whoever trains is told by its next checkpoint
                if not self._left.is_set():
                    self._write_status()

    # Leaving

    def leave(self, state: str = "done", detail: str = "") -> None:
        """Ends this network's part in the run, and gives up its place; does nothing the second time.

        Args:
            state: done, stopped or failed. One whose last checkpoint could not be written has failed, and not done.
        """
        if self._left.is_set() or os.getpid() != self._pid:
            return
        self._left.set()
        if state == "done" and self._trouble:
            state, detail = "failed", self._trouble
        with suppress(GraftingError):  # the directory may be gone; that must not hide why the network ends
            if state == "done" or not self._is_starting:
                self.update(state, detail)
            else:
                with self._turn():
                    self._take_back()
        self._place.close()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.leave()
        else:
            self.leave("failed" if isinstance(error, Exception) else "stopped", str(error) or type(error).__name__)

    def __reduce__(self) -> NoReturn:
        raise GraftingError(
            f"a FileRing cannot be pickled or copied: it holds the place of network {self.network} for process "
            f"{self._pid}; make it in the process that trains"
        )
