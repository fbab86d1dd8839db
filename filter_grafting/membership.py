"""Who is in a run: a place for each network, the settings they share, heartbeats, and looking at all this from outside.

In the save directory lie `run.json`, the run's name and settings, and for network i `network{i}.json`, what it last
said of itself, rewritten every few seconds, and `network{i}.lock`, which it holds locked while it lives.
"""

import errno
import json
import math
import os
import re
import secrets
import socket
import stat
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from filelock import BaseFileLock, FileLock, Timeout

from .checkpoint import TEMPORARY, write_atomically, write_error
from .errors import AliveError, AlreadyRunError, GraftingError, RefusedError, SettingsError, WriteError

try:
    import fcntl
except ImportError:  # another platform than Linux or macOS: FileRing says so
    fcntl = None  # type: ignore[assignment]

BEAT_SECONDS = 5.0  # how often a living network rewrites its status file
TURN_SECONDS = 120.0  # how long a network that starts waits for its turn: others need milliseconds, or a few beats
ENDED = ("done", "stopped", "failed")
NOT_GIVEN = "(not given)"
Self = TypeVar("Self", bound="Membership")


# Reading what anyone may have written


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
    """A small JSON object that anyone may have written; no link is followed, and no pipe waited for.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is something else.
    """
    if not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        try:
            contents = json.loads(file.read(1 << 20))
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, expected an object")
    return contents


def read_status(directory: str | os.PathLike[str], network: int) -> dict[str, Any]:
    """What a network last said of itself (see `Membership.update`); empty if it has said nothing that can be read."""
    with suppress(OSError, ValueError):
        status = read_json(Path(directory) / f"network{network}.json")
        return {key: printable(value) if isinstance(value, str) else value for key, value in status.items()}
    return {}


def read_run(directory: str | os.PathLike[str]) -> tuple[str, dict[str, Any]]:
    """(the run's random name, the settings that its networks share), out of `run.json`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is something else.
    """
    contents = read_json(Path(directory) / "run.json")
    run, settings = contents.get("run"), contents.get("settings")
    if not isinstance(run, str) or not isinstance(settings, dict):
        raise ValueError("run.json holds no settings of a run")
    return run, settings


def networks_of(directory: str | os.PathLike[str]) -> range:
    """The networks 1...N of the run in a directory: as its settings have it, else those that left a status file."""
    with suppress(OSError, ValueError):
        networks = read_run(directory)[1].get("num")
        if isinstance(networks, int) and 1 <= networks <= 1000:
            return range(1, networks + 1)
    names = [path.name for path in Path(directory).glob("network*.json")]
    found = [int(match[1]) for name in names if (match := re.fullmatch(r"network([1-9]\d{0,2})\.json", name))]
    return range(1, max(found, default=0) + 1)


def _number(value: Any) -> float | None:
    """The value, out of a file that anyone may have written, if it is a number that can be worked with."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
    return value if is_number else None


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and _number(value) is not None else None


# Who lives


def is_held(path: Path) -> bool | None:
    """Whether a living process holds a lock; the kernel answers, not a file. None where it cannot tell."""
    if fcntl is None:
        return None
    try:
        # Reading is enough to ask: whoever may see the run may see who is alive.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return False if error.errno == errno.ENOENT else None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: those who ask do not disturb each other
        return False
    except OSError as error:
        return True if error.errno in (errno.EAGAIN, errno.EACCES) else None
    finally:
        os.close(descriptor)


def take_lock(path: Path, seconds: float) -> BaseFileLock | None:
    """Holds a lock on a file until it is released, or None where the file system has no locks.

    Raises:
        filelock.Timeout: if another process has held it for so long.
        WriteError: if the file cannot be made.
    """
    try:
        path.touch()
        if is_held(path) is None:
            return None
        lock = FileLock(path, thread_local=False)
        lock.acquire(timeout=seconds, poll_interval=0.02)
        return lock
    except Timeout:
        raise
    except OSError as error:
        raise write_error(path, error) from error


def may_live_unlocked(held: bool | None, status: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a status may live although it holds no lock.

    A lock does not reach across every network file system, and some have none.
    """
    is_told = held is not None and status.get("host") == socket.gethostname()
    return not held and not is_told and status.get("state") not in (None, *ENDED)


def moving(directory: Path, networks: Collection[int]) -> set[int]:
    """Those of some networks whose heartbeat moves while we look, for up to two beats, at all of them together."""
    beats = {network: read_status(directory, network).get("beat") for network in networks}
    moved: set[int] = set()
    deadline = time.monotonic() + 2 * BEAT_SECONDS
    while len(moved) < len(beats) and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 50)
        moved |= {network for network, beat in beats.items() if read_status(directory, network).get("beat") != beat}
    return moved


def living(directory: Path, networks: Iterable[int]) -> set[int]:
    """Those of some networks that live: who holds its lock; where locks say nothing, whose heartbeat moves."""
    held = {network: is_held(directory / f"network{network}.lock") for network in networks}
    unknown = [network for network in held if may_live_unlocked(held[network], read_status(directory, network))]
    return {network for network in held if held[network]} | moving(directory, unknown)


class Status(NamedTuple):
    """What is known of a network.

    `state` is that of network{i}.json (starting, training, testing, waiting, done, stopped, failed), or "not started",
    or "died" of one that has neither ended nor lives. Accuracies are in percent.
    """

    network: int
    state: str
    alive: bool
    detail: str
    epoch: int | None
    epochs: int | None
    step: int | None
    accuracy: float | None
    best: float | None
    lr: float | None
    pid: int | None
    host: str
    command: list[str]
    cwd: str
    seen: float | None  # seconds since it last wrote its status, by this host's clock
    num: int | None

    def __str__(self) -> str:
        """As people say it: "waiting for network 2", "failed: the loss became nan"."""
        return self.state + (f"{' ' if self.state == 'waiting' else ': '}{self.detail}" if self.detail else "")


def observe(directory: str | os.PathLike[str], networks: Iterable[int] | None = None) -> list[Status]:
    """The status of networks (default: all of the run), in ascending order. Reads only.

    Who holds its lock is alive. Of processes on other hosts that is whose heartbeat moves, which takes up to two beats.
    """
    directory = Path(directory)
    wanted = sorted(networks_of(directory) if networks is None else networks)
    alive = living(directory, wanted)
    return [_status(network, read_status(directory, network), network in alive) for network in wanted]


def _status(network: int, said: Mapping[str, Any], alive: bool) -> Status:
    state, written = said.get("state"), _number(said.get("time"))
    if state is None:
        state = "starting" if alive else "not started"
    elif state not in ENDED and not alive:
        state = "died"
    whole = {key: _whole(said.get(key)) for key in ("epoch", "epochs", "step", "pid", "num")}
    numbers = {key: _number(said.get(key)) for key in ("accuracy", "best", "lr")}
    texts = {key: printable(said.get(key) or "") for key in ("detail", "host", "cwd")}
    command = said.get("command")
    known: dict[str, Any] = {"state": printable(state), "alive": alive, **whole, **numbers, **texts}
    return Status(
        network=network,
        command=[str(word) for word in command] if isinstance(command, list) else [],
        seen=None if written is None else max(0.0, time.time() - written),
        **known,
    )


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

    Until the network trains, a start that fails takes back whatever it did in the directory.
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
        self.directory, self.network, self.networks = Path(directory), network, networks
        self.run, self.resumed = "", False
        self._name, self._pid = name, os.getpid()
        self._status: dict[str, Any] = {**details, "network": network, "num": networks, "host": socket.gethostname()}
        self._mutex, self._left = threading.Lock(), threading.Event()
        self._lock_path = self.directory / f"network{network}.lock"
        self._lock: BaseFileLock | None = None
        self._step: int | None = None
        self._trouble = ""  # why the last checkpoint could not be written
        self._is_starting, self._undo = True, ExitStack()  # what a start has done, to be taken back if it fails

    # Files

    def path(self, round: int, network: int | None = None) -> Path:
        """Path of a network's checkpoint of a round; of this network's own by default."""
        return self._path(round, network or self.network)

    def _path(self, round: int | str, network: int) -> Path:
        return self.directory / self._name.format(index=network % self.networks, round=round)

    def file(self, kind: str) -> Path:
        """Path of this network's own file of a kind ("best", "final"), which no other network shares."""
        return self.directory / f"{kind}{self.network}{Path(self._name).suffix}"

    def _rounds(self, network: int) -> list[int]:
        """The rounds of which a network's checkpoints are there, in ascending order."""
        before, after = self._path("*", network).name.split("*")
        pattern = re.compile(re.escape(before) + "(0|[1-9][0-9]{0,17})" + re.escape(after))
        try:
            names = os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise write_error(self.directory, error, "list") from error
        return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))

    def _trace(self) -> Path | None:
        """A file that shows that this network has run here."""
        own = [self.directory / f"metrics{self.network}.csv", self.file("best"), self.file("final")]
        return next((path for path in [*map(self.path, self._rounds(self.network)), *own] if path.exists()), None)

    def _remove_leftovers(self) -> None:
        """Deletes what an earlier process of this network left half-written when it was killed."""
        for kind in self._path("*", self.network).name, f"*[a-z]{self.network}.*":
            for path in self.directory.glob(f".{kind}.*{TEMPORARY}"):
                with suppress(OSError):  # it only takes space
                    path.unlink()

    # Joining

    def _join(self, settings: Mapping[str, Any] | None, resume: bool, may_raise: Collection[str]) -> None:
        given, is_part = plain({**(settings or {}), "num": self.networks}), settings is None
        may_raise = may_raise if resume else ()
        self._agreed(given, may_raise, is_part)  # reads only: a refused start changes nothing
        trace, held = self._trace(), is_held(self._lock_path)
        if trace and not resume:
            raise self._alive() if held else self._already_run(trace)
        if may_live_unlocked(held, read_status(self.directory, self.network)) and moving(
            self.directory, [self.network]
        ):
            raise self._alive()
        self.resumed = trace is not None
        self._make_directory()
        with self._turn():
            try:
                self._claim()
                self._remove_leftovers()
                self._record(self._agreed(given, may_raise, is_part))
                if self._lock is None:  # others may have recorded theirs at this moment: whoever was last has won
                    time.sleep(1.0)
                    self._record(self._agreed(given, may_raise, is_part))
                self._introduce()
            except BaseException:
                self._take_back()
                raise
        threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True).start()

    def _make_directory(self) -> None:
        missing = [folder for folder in (self.directory, *self.directory.parents) if not folder.exists()]
        for folder in reversed(missing):
            self._undo.callback(folder.rmdir)
        self._undo.callback(self._remove_run_lock)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.directory, error) from error

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Within it no other network joins, leaves or changes the settings; without locks, that is left to luck."""
        path = self.directory / "run.lock"
        try:
            lock = take_lock(path, TURN_SECONDS)
        except Timeout as error:
            raise RefusedError(
                f"{path} has been held for {duration(TURN_SECONDS)} by another network that starts; see whether it is "
                "stuck, end it if so, and start again"
            ) from error
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _claim(self) -> None:
        if not self._lock_path.exists():
            self._undo.callback(self._lock_path.unlink)
        try:
            self._lock = take_lock(self._lock_path, 1.0)  # a process that was killed may take a moment to end
        except Timeout as error:
            raise self._alive() from error

    def _alive(self) -> AliveError:
        status = read_status(self.directory, self.network)
        is_here = (status.get("pid"), status.get("host")) == (self._pid, socket.gethostname())
        where = printable(f"process {status.get('pid')} on {status.get('host')}")
        end = "call leave() of that FileRing" if is_here else "wait for its end, or stop it,"
        return AliveError(
            f"network {self.network} is already running in {self.directory} ({where}); {end} before you start it again"
        )

    def _already_run(self, trace: Path) -> AlreadyRunError:
        status = observe(self.directory, [self.network])[0]
        at = "" if status.epoch is None else f", epoch {status.epoch}"
        return AlreadyRunError(
            f"network {self.network} has already run in {self.directory} ({status.state}{at}): there is "
            f"{trace.name}; resume it (resume=True), or start anew in another directory"
        )

    def _introduce(self) -> None:
        """Writes the first status; of an earlier process, what it had reached is kept."""
        path, earlier = self.directory / f"network{self.network}.json", read_status(self.directory, self.network)
        kept = ("epoch", "epochs", "accuracy", "best") if self.resumed else ()
        self._status |= {key: _number(earlier.get(key)) for key in kept}
        self._status |= {"run": self.run, "pid": self._pid, "beat": int(_number(earlier.get("beat")) or 0)}
        self._undo.callback(_restore, path, path.read_bytes() if path.is_file() else None)
        self.update("starting")

    # Agreeing: the settings that all networks of a run share

    def agree(self, settings: Mapping[str, Any], may_raise: Collection[str] = ()) -> None:
        """Further settings that all networks share, known only after the start, such as a checksum of the data.

        Args:
            settings: plain values by name; recorded in `run.json`, or compared with what is recorded there.
            may_raise: settings that a resumed run may raise while no other network is at work.

        Raises:
            SettingsError: naming each setting that differs, and both values.
        """
        self._check_place()
        with self._turn():
            self._record(self._agreed(plain(settings), may_raise if self.resumed else (), is_part=True))

    def _agreed(self, given: dict[str, Any], may_raise: Collection[str], is_part: bool) -> dict[str, Any]:
        """What `run.json` is to hold once these settings are given. Reads only.

        Args:
            is_part: other settings may be recorded; otherwise those that are not given differ, too.
        """
        contents = self._recorded()
        if contents is None:
            return {"run": secrets.token_hex(8), "settings": given, "later": [], "created": time.time()}
        recorded, later = contents["settings"], contents["later"]
        new = given.keys() - recorded.keys() if is_part else set()
        compared = given.keys() - new if is_part else given.keys() | recorded.keys() - {*later}
        differing = sorted(key for key in compared if recorded.get(key, NOT_GIVEN) != given.get(key, NOT_GIVEN))
        contents |= {"settings": recorded | given, "later": sorted({*later, *new})}
        if not differing:
            return contents
        others = living(self.directory, {*networks_of(self.directory)} - {self.network})
        raised = [key for key in differing if key in may_raise and _is_higher(given.get(key), recorded.get(key))]
        if not others and raised == differing:
            return contents
        rows = ", ".join(
            f"{key} is {given.get(key, NOT_GIVEN)!r} here and {recorded.get(key, NOT_GIVEN)!r} in the run"
            for key in (["num"] if "num" in differing else differing)  # which is the cause of whatever else differs
        )
        at_work = f" (network {min(others)} is at work with the recorded value)" if others and raised else ""
        raise SettingsError(
            f"network {self.network} does not fit the run in {self.directory}: {printable(rows)}{at_work}; give the "
            "same settings, or another directory"
        )

    def _recorded(self) -> dict[str, Any] | None:
        """The contents of `run.json`, or None if this network is the first of a new run."""
        path = self.directory / "run.json"
        try:
            read_run(self.directory)
            contents = read_json(path)
        except (FileNotFoundError, NotADirectoryError):
            self._refuse_remains()
            return None
        except (OSError, ValueError) as error:
            raise RefusedError(f"{path} is damaged ({error}); start anew in another directory") from error
        later = contents.get("later")  # the settings that not all networks know when they start
        return contents | {"later": [str(key) for key in later] if isinstance(later, list) else []}

    def _refuse_remains(self) -> None:
        """A new run must not start among an old one's checkpoints: its neighbours would take them for this run's."""
        for network in range(1, self.networks + 1):
            rounds = self._rounds(network)
            # A process of the published script that started earlier can be ahead, but by less than the ring is long.
            if rounds and rounds[-1] >= self.networks:
                raise RefusedError(
                    f"{self.directory} holds checkpoints of an earlier run ({self.path(rounds[-1], network).name}) "
                    "without its run.json; start anew in another directory"
                )

    def _record(self, contents: dict[str, Any]) -> None:
        path, data = self.directory / "run.json", json.dumps(contents, indent=1).encode()
        before = path.read_bytes() if path.is_file() else None
        self.run = contents["run"]
        if data != before:
            self._undo.callback(self._restore_run, before)
            write_atomically(path, data)

    def _check_place(self) -> None:
        """Raises WriteError if the directory was deleted under this network, or made anew by another run."""
        path, why = self.directory / "run.json", ""
        try:
            if self.run and read_json(path).get("run") != self.run:
                why = "it is now that of another run"
        except (FileNotFoundError, NotADirectoryError):
            why = "there is no run.json any more"
        except (OSError, ValueError):
            pass  # what cannot be read just now says nothing
        if why:
            raise WriteError(f"the save directory {self.directory} of network {self.network} is gone: {why}")

    # A start that fails

    def _take_back(self) -> None:
        """Leaves everything as this start found it, as far as nobody else builds on it. In this network's turn."""
        with suppress(GraftingError, OSError), self._mutex:
            self._check_place()
            self._undo.close()
        self._release()

    def _restore_run(self, before: bytes | None) -> None:
        others = {*networks_of(self.directory)} - {self.network}
        if before is None:
            needed = any(read_status(self.directory, network).get("run") == self.run for network in others)
        else:
            needed = bool(living(self.directory, others))
        if not needed:
            _restore(self.directory / "run.json", before)

    def _remove_run_lock(self) -> None:
        if not (self.directory / "run.json").exists():
            (self.directory / "run.lock").unlink()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()

    # Status: what others are told

    def update(self, state: str, detail: str = "", **fields: Any) -> None:
        """Rewrites `network{i}.json`.

        Args:
            state: starting, training, testing or waiting. With "training" the start is over.
            fields: epoch, epochs, steps (of an epoch), accuracy, best (in percent), lr, ...

        Raises:
            WriteError: if it cannot be written, or the directory is gone.
        """
        self._check_process()
        if state == "training":
            self._begin()
        with self._mutex:
            self._status |= {"state": state, "detail": printable(detail), **fields}
            self._write_status()

    def _begin(self) -> None:
        """The start is over: what it did stays."""
        self._undo.pop_all()
        self._is_starting = False

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
        self._status |= {"time": time.time(), "beat": self._status["beat"] + 1}
        data = json.dumps(self._status).encode()
        write_atomically(self.directory / f"network{self.network}.json", data, durable=False)

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
        self._release()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.leave()
        else:
            self.leave("failed" if isinstance(error, Exception) else "stopped", str(error) or type(error).__name__)

    def __reduce__(self) -> NoReturn:
        raise GraftingError(
            f"a FileRing cannot be pickled or copied: it holds the place of network {self.network} for process "
            f"{self._pid}; make it in the process that trains"
        )

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise GraftingError(
                f"this FileRing belongs to process {self._pid}, and this is its fork {os.getpid()}; make the ring in "
                "the process that trains"
            )


def _is_higher(value: Any, than: Any) -> bool:
    return (_number(value) or 0) > (math.inf if _number(than) is None else than)


def _restore(path: Path, before: bytes | None) -> None:
    if before is None:
        path.unlink(missing_ok=True)
    else:
        write_atomically(path, before)
