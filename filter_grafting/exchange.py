"""The ring: networks that exchange their weights through files in a shared save directory.

Network i of N publishes a checkpoint after every epoch and waits for that of its neighbour, network i-1 (network 1's
is network N). Nothing but files is shared, so the networks may run on different machines. Each keeps
a status file `network{i}.json`, rewritten every few seconds, and holds a lock on `network{i}.lock` while it lives.
"""

import errno
import fcntl
import json
import math
import os
import re
import secrets
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .checkpoint import TEMPORARY, load, save, write_atomically, write_error
from .errors import CheckpointError, NeighbourTimeout, RefusedError, UnreadableError, WriteError

BEAT_SECONDS = 5.0  # how often a living network rewrites its status file
POLL_SECONDS = 0.02  # how often a waiting network looks for its neighbour's checkpoint
LOOK_SECONDS = 0.5  # how often it looks at its neighbour's status, and whether the directory is still there
RETRY_SECONDS = 1.0  # how soon it tries a checkpoint again that was no good and has not changed since
FIRST_MESSAGE_SECONDS, MESSAGE_SECONDS = 10.0, 60.0
TURN_SECONDS = 120.0  # how long a network that starts waits for its turn: others need milliseconds, or a few beats
ENDED = ("done", "stopped", "failed")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer


def printable(text: object, limit: int = 500) -> str:
    """Text out of a file that anyone may have written, fit for a terminal and a log: one line, no control codes."""
    return "".join(character if character.isprintable() else " " for character in str(text))[:limit]


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object that anyone may have written; no link is followed, and no pipe waited for.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is something else.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        try:
            contents = json.loads(file.read(1 << 20) or b"")
        except RecursionError as error:
            raise ValueError(f"{path} is nested too deeply") from error
    if not isinstance(contents, dict):
        raise ValueError(f"{path} holds a {type(contents).__name__}, expected an object")
    return contents


def read_status(directory: str | os.PathLike, network: int) -> dict[str, Any] | None:
    """What network i last said of itself (see `Ring.update`), or None if there is no readable status file."""
    try:
        status = read_json(Path(directory) / f"network{network}.json")
    except (OSError, ValueError):
        return None
    return {key: printable(value) if isinstance(value, str) else value for key, value in status.items()}


def read_run(directory: str | os.PathLike) -> tuple[str, dict[str, Any]]:
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


def as_number(value: Any) -> float | None:
    """The value, out of a file that anyone may have written, if it is a number that can be worked with."""
    return value if isinstance(value, int | float) and abs(value) < 1e18 else None


def moving(directory: str | os.PathLike, beats: Mapping[int, Any], seconds: float) -> set[int]:
    """Those of some networks whose status changes while we look, at all of them together.

    Args:
        beats: what counts the heartbeats in each network's status, as last seen.
        seconds: for how long to look; a living network's heart beats every BEAT_SECONDS.
    """
    moved, deadline = set(), time.monotonic() + seconds
    while beats.keys() - moved and time.monotonic() < deadline:
        time.sleep(BEAT_SECONDS / 50)
        now = {network: read_status(directory, network) for network in beats.keys() - moved}
        moved |= {network for network, status in now.items() if status and status.get("beat") != beats[network]}
    return moved


def holder(directory: str | os.PathLike, network: int) -> int | None:
    """Process id of the living process of network i on this host, or None. The kernel answers, not a file.

    A lock held from another host shows as 0 or less. Not to be asked by a process about itself: closing the
    file would give up its own lock.
    """
    try:
        # Reading is enough to ask: whoever may see the run may see who is alive.
        descriptor = os.open(Path(directory) / f"network{network}.lock", os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        layout = "hhqqi4x"  # struct flock on 64-bit Linux
        question = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = struct.unpack(layout, fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
        return None if kind == fcntl.F_UNLCK else pid
    except OSError:
        return None
    finally:
        os.close(descriptor)


class Ring:
    """Network i's place in a ring of N.

    Args:
        directory: the shared save directory.
        network: i, 1...N.
        networks: N; 1 is a baseline that exchanges nothing.
        name: file name of a checkpoint, with the fields {index} (i mod N) and {epoch}.
        key: the checkpoint's entry that holds the state dict.
        timeout: seconds without a sign of life of the neighbour after which waiting ends, at least as long as a few of
            its heartbeats take; 0 waits for ever.
        keep_all: delete no checkpoint.
        say: prints one line to the log.
        check: called while waiting; raises to end the wait (a signal has come).
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        network: int,
        networks: int,
        *,
        name: str = "ckpt{index}_{epoch}.t7",
        key: str = "net",
        timeout: float = 3600.0,
        keep_all: bool = False,
        say: Callable[[str], None] = print,
        check: Callable[[], None] = lambda: None,
    ):
        if not 1 <= network <= networks:
            raise ValueError(f"network: got {network}, expected 1 to {networks}, the number of networks")
        self.directory, self.network, self.networks = Path(directory), network, networks
        self.neighbour = network - 1 or networks
        self.reader = network % networks + 1
        self.run = None
        self.key, self._name, self._timeout, self._keep_all = key, name, timeout, keep_all
        self._say, self._check = say, check
        self._status: dict[str, Any] = {}
        self._status_lock = threading.Lock()
        self._lock: int | None = None
        self._has_locks = True
        self._left = threading.Event()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")  # one thread: files appear in order
        self._pending: list[Future] = []

    # Joining: who may take part

    def join(self, resume: bool, command: Sequence[str] = ()) -> None:
        """Takes network i's place, makes the save directory, and starts to say so in `network{i}.json`.

        Args:
            resume: whether the checkpoints that network i may already have there are to be continued.
            command: the command line that started it, for messages that say how to start another network.

        Raises:
            RefusedError: if another process is network i, or network i has already run there.
            WriteError: if the directory cannot be written.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.directory, error) from error
        previous = read_status(self.directory, self.network) or {}
        self._claim(previous)
        if not resume and (trace := self._trace()):
            state = f" (state {previous.get('state')}, epoch {previous.get('epoch')})" if previous else ""
            raise RefusedError(
                f"network {self.network} has already run in {self.directory}{printable(state)}: there is {trace}. "
                f"Continue it with --resume, or start anew in another directory (--s)"
            )
        self._remove_leftovers()
        earlier = previous if resume else {}
        self._status = {
            "network": self.network, "num": self.networks, "run": None, "state": "starting", "detail": "",
            **{field: as_number(earlier.get(field)) for field in ("epoch", "epochs", "accuracy", "best")},
            "host": socket.gethostname(), "pid": os.getpid(), "time": time.time(),
            "beat": int(as_number(previous.get("beat")) or 0) + 1, "command": list(command),
        }  # fmt: skip
        self._write_status()
        threading.Thread(target=self._keep_fresh, name="heartbeat", daemon=True).start()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Within it, no other network is looking at the settings or recording them."""
        path = self.directory / "run.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        began = time.monotonic()
        try:
            while _try_to_lock(descriptor, path) is False:
                if time.monotonic() - began > TURN_SECONDS:
                    raise RefusedError(
                        f"{path} has been held for {duration(TURN_SECONDS)} by another network that starts; see "
                        f"whether it is stuck, end it if so, and start again"
                    )
                time.sleep(POLL_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def _claim(self, previous: Mapping[str, Any]) -> None:
        path = self.directory / f"network{self.network}.lock"
        try:
            # Never opened again by this process: closing any descriptor of it would give the lock up.
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        where = f"process {previous.get('pid')} on {previous.get('host')}" if previous else "another process"
        alive = RefusedError(
            f"network {self.network} is already running in {self.directory} ({where}); wait for its end or stop it "
            f"before you start it again"
        )
        locked = _try_to_lock(self._lock, path)
        if locked is False:
            raise alive
        self._has_locks = locked is True
        may_live = previous.get("state") not in (None, *ENDED) and self._locks_are_silent_about(previous)
        if may_live and moving(self.directory, {self.network: previous.get("beat")}, 2 * BEAT_SECONDS):
            raise alive

    def _locks_are_silent_about(self, status: Mapping[str, Any]) -> bool:
        """Whether the process that wrote a status may live although no lock shows it.

        A lock does not reach across every network file system.
        """
        return not self._has_locks or status.get("host") != socket.gethostname()

    def _trace(self) -> str | None:
        """A file that shows that network i has already run here."""
        epochs = self._published(self.network)
        if epochs:
            return self._path(self.network, epochs[-1]).name
        paths = [self.directory / f"metrics{self.network}.csv", self.file("best"), self.file("final")]
        return next((path.name for path in paths if path.exists()), None)

    def _remove_leftovers(self) -> None:
        """Deletes what an earlier process of this network left half-written when it was killed."""
        index = self.network % self.networks
        own = (
            self._name.format(index=index, epoch="*"), f"*[a-z]{self.network}.json", f"*[a-z]{self.network}.csv",
            f"best{self.network}.*", f"final{self.network}.*",
        )  # fmt: skip
        for pattern in own:
            self._remove_temporary(pattern)

    def _remove_temporary(self, pattern: str) -> None:
        for path in self.directory.glob(f".{pattern}.*{TEMPORARY}"):
            with suppress(OSError):  # it only takes space
                path.unlink()

    def agree(self, settings: Mapping[str, Any], may_raise: Sequence[str] = (), why_not: str = "") -> None:
        """Records the settings that all networks of a run share in `run.json`, or compares with what is recorded.

        Args:
            settings: plain values by flag name.
            may_raise: the settings that a resumed run may raise while no other network is at work.
            why_not: why none may be, for the message.

        Raises:
            RefusedError: naming each setting that differs, and both values.
        """
        with self._turn():
            if self._has_locks:  # nobody else is writing it now
                self._remove_temporary("run.json")
            recorded = self.recorded()
            if recorded is None:
                self._refuse_remains()
                with suppress(FileExistsError):  # where locks do not work, another network may have been first
                    self._record(settings, new=True)
                recorded = self.recorded() or {}
            differing = sorted(key for key in {**recorded, **settings} if recorded.get(key) != settings.get(key))
            if differing:
                self._change(recorded, settings, differing, may_raise, why_not)
            self.update("starting", run=self.run)

    def _change(
        self,
        recorded: Mapping[str, Any],
        settings: Mapping[str, Any],
        differing: Sequence[str],
        may_raise: Sequence[str],
        why_not: str,
    ) -> None:
        """Records other settings than those of `run.json`, where that harms nobody; otherwise refuses."""
        raised = [
            key for key in differing if key in may_raise and settings[key] > (as_number(recorded.get(key)) or math.inf)
        ]
        others = self._at_work()
        if not others and raised == differing:
            return self._record(settings)
        if not others and not self._trace() and not any(map(self._published, range(1, self.networks + 1))):
            self.run = None  # a start that came to nothing, with other settings: there is nothing to protect
            return self._record(settings)
        rows = ", ".join(
            f"{key} is {settings.get(key)!r} here and {recorded.get(key)!r} in the run" for key in differing
        )
        more = ""
        if "epochs" in differing and why_not:
            more = f" ({why_not})"
        elif others and raised:
            more = f" (network {others[0]} is at work with the recorded value)"
        raise RefusedError(
            f"network {self.network} does not fit the run in {self.directory}: {printable(rows)}{more}; give the same "
            f"settings, or another directory (--s)"
        )

    def recorded(self) -> dict[str, Any] | None:
        """The settings in `run.json`, whose run becomes this network's; None if there is no such file."""
        try:
            self.run, settings = read_run(self.directory)
            return settings
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            path = self.directory / "run.json"
            raise RefusedError(
                f"{path} is damaged: it holds no settings of a run. Start anew in another directory (--s)"
            ) from error

    def _record(self, settings: Mapping[str, Any], new: bool = False) -> None:
        self.run = self.run or secrets.token_hex(8)
        contents = {"run": self.run, "settings": dict(settings), "created": time.time()}
        write_atomically(self.directory / "run.json", json.dumps(contents, indent=1).encode(), new=new)

    def _refuse_remains(self) -> None:
        """A new run must not start among an old one's checkpoints: its neighbours would take them for this run's."""
        for network in range(1, self.networks + 1):
            epochs = self._published(network)
            # A process of the authors' own script that started earlier can be ahead, but by less than the ring is long.
            if epochs and epochs[-1] >= self.networks:
                raise RefusedError(
                    f"{self.directory} holds checkpoints of an earlier run ({self._path(network, epochs[-1]).name}) "
                    f"without its run.json; start anew in another directory (--s)"
                )

    def _at_work(self) -> list[int]:
        """The other networks that have agreed on the recorded settings, and live."""
        working, silent = [], {}
        for network in range(1, self.networks + 1):
            status = read_status(self.directory, network) or {}
            if network == self.network or status.get("run") != self.run or status.get("state") in ENDED:
                continue
            if holder(self.directory, network) is not None:
                working.append(network)
            elif self._locks_are_silent_about(status):
                silent[network] = status.get("beat")
        return sorted([*working, *moving(self.directory, silent, 2 * BEAT_SECONDS)])

    def _check_place(self) -> None:
        """Raises WriteError if the directory was deleted under this network, or made anew by another run."""
        if self.run is None:
            return
        path, why = self.directory / "run.json", None
        try:
            if read_json(path).get("run") != self.run:
                why = "it is now that of another run"
        except (FileNotFoundError, NotADirectoryError):
            why = f"there is no {path.name} any more"
        except (OSError, ValueError):
            pass  # what cannot be read just now says nothing
        if why:
            raise WriteError(f"the save directory {self.directory} of network {self.network} is gone: {why}")

    # Status: what others are told

    def update(self, state: str, detail: str = "", **fields: Any) -> None:
        """Rewrites `network{i}.json`: state is starting, training, waiting, done, stopped or failed.

        Further fields: epoch, epochs, accuracy, best (in percent).
        """
        with self._status_lock:
            self._status.update(state=state, detail=detail, **fields)
            self._write_status()

    def _write_status(self) -> None:
        self._check_place()
        self._status["time"] = time.time()
        path, data = self.directory / f"network{self.network}.json", json.dumps(self._status).encode()
        try:
            write_atomically(path, data, durable=False)
        except WriteError as error:
            # A full disk has no room for a new file, but the old one can be written over: why a network fails must
            # not be lost just then.
            try:
                _write_over(path, data)
            except OSError:
                raise error from None

    def _keep_fresh(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with self._status_lock:
                if self._left.is_set():
                    return
                self._status["beat"] += 1
                with suppress(OSError):  # the network itself says so when it next writes a file that matters
                    self._write_status()

    def leave(self, state: str, detail: str = "") -> None:
        """Finishes what is being written, then records how network i ended: done, stopped or failed.

        Raises:
            WriteError: if a network that is done cannot say so; the others have a failure to tell of already.
        """
        self._writer.shutdown(wait=True)
        self._left.set()
        try:
            if self._status:
                self.update(state, detail)
        except OSError:
            if state == "done":
                raise
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    # Publishing

    def publish(self, epoch: int, contents: Mapping[str, Any], location: str = "cpu") -> None:
        """Saves network i's checkpoint of an epoch, in the background; it appears whole or not at all.

        Args:
            contents: plain values and CPU tensors that nobody changes any more.
            location: the device that they are from. The published script loads them to where the file says, and
                blends them there with its own.

        Raises:
            WriteError: now or at a later call, if it could not be written.
        """
        self._check_place()
        self.flush()  # one epoch is never further ahead of the disk than its own training takes
        stamped = {**contents, "run": self.run, "network": self.network, "epoch": epoch}
        self._pending.append(self._writer.submit(self._publish, epoch, stamped, location))

    def _publish(self, epoch: int, contents: Mapping[str, Any], location: str) -> None:
        self._prune(epoch - 1)  # first, so that the disk never holds more than it must
        save(self._path(self.network, epoch), contents, location)
        self._prune(epoch)

    def write(self, path: str | os.PathLike, contents: Mapping[str, Any]) -> None:
        """`checkpoint.save` in the background, after everything that was given to be written before it."""
        self._check_place()
        self.flush(wait=False)
        self._pending.append(self._writer.submit(save, path, contents))

    def flush(self, wait: bool = True) -> None:
        """Raises what went wrong in the background; first waits for all that is being written, if asked to."""
        for job in list(self._pending):
            if wait or job.done():
                job.result()
                self._pending.remove(job)

    def _prune(self, newest: int) -> None:
        """Deletes those of network i's checkpoints that nobody can need again, `newest` being its newest.

        Whoever continues from a checkpoint of epoch e needs the neighbour's of epoch e as well, and may have to go
        back one more epoch if its newest file is damaged. So what counts is kept from the second newest epoch
        of this network, and of its reader, on. A network is at most N-1 epochs ahead of its reader, which bounds the
        number of files by N+1.
        """
        if self._keep_all:
            return
        keep = newest - 1
        if self.networks > 1:
            # Its reader can be one epoch ahead; a higher number is of no file of this run.
            read = [epoch for epoch in self._published(self.reader) if epoch <= newest + 1]
            keep = min(keep, max(read, default=0) - 1)
        for epoch in self._published(self.network):
            if epoch < keep:
                path = self._path(self.network, epoch)
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise write_error(path, error) from error

    def file(self, kind: str) -> Path:
        """Path of network i's own file of a kind ("best", "final"), which no other network shares."""
        return self.directory / f"{kind}{self.network}{Path(self._name).suffix}"

    def path(self, epoch: int) -> Path:
        """Path of network i's checkpoint of an epoch."""
        return self._path(self.network, epoch)

    @property
    def epoch(self) -> int | None:
        """The epoch that network i last said to be at; None before the first."""
        return self._status.get("epoch")

    def _path(self, network: int, epoch: int | str) -> Path:
        return self.directory / self._name.format(index=network % self.networks, epoch=epoch)

    def _published(self, network: int) -> list[int]:
        """The epochs of which network k's checkpoints are there, in ascending order."""
        before, after = self._path(network, "*").name.split("*")
        pattern = re.compile(re.escape(before) + "(0|[1-9][0-9]{0,8})" + re.escape(after))
        try:
            return sorted(int(match[1]) for name in os.listdir(self.directory) if (match := pattern.fullmatch(name)))
        except OSError as error:
            raise write_error(self.directory, error, "list") from error

    def newest(self, first: int = 0) -> tuple[int, dict[str, Any]] | None:
        """(epoch, contents) of network i's newest good checkpoint, or None if it is to start from the beginning.

        A damaged one is renamed to `NAME.damaged`, with a line in the log, and the one before it is taken.

        Args:
            first: the epoch that the run began with.

        Raises:
            RefusedError: if no checkpoint is good, and the neighbour has deleted what a new beginning needs.
            UnreadableError: if one that may be good cannot be read; everything is left as it is.
            WriteError: if a damaged one cannot be renamed.
        """
        found, damaged = None, {}
        for epoch in reversed(self._published(self.network)):
            path = self._path(self.network, epoch)
            try:
                found = epoch, self._own(epoch)
                break
            except FileNotFoundError:
                continue  # deleted just now
            except UnreadableError as error:
                raise UnreadableError(f"{error}; mend that, then continue with --resume") from error
            except CheckpointError as error:
                damaged[path] = error
        others = self._published(self.neighbour) if self.networks > 1 else []
        if found is None and others and first not in others:
            names = ", ".join(path.name for path in damaged)
            raise RefusedError(
                f"network {self.network} has no good checkpoint in {self.directory}"
                + (f" ({names} damaged)" if names else "")
                + f", and cannot begin anew: its neighbour has gone on to epoch {others[-1]}, and no longer has what "
                f"it would need; start the run anew in another directory (--s)"
            )
        for path, error in damaged.items():
            aside = path.with_name(path.name + ".damaged")
            try:
                os.replace(path, aside)
            except OSError as trouble:
                raise write_error(aside, trouble) from error
            self._say(f"Network:{self.network}    {error}; set aside as {aside.name}")
        return found

    def has_checkpoint(self) -> bool:
        """Whether `newest` would find one; looks, and changes nothing. To be asked once the run is known."""
        for epoch in reversed(self._published(self.network)):
            with suppress(FileNotFoundError, CheckpointError):
                return bool(self._own(epoch))
        return False

    def _own(self, epoch: int) -> dict[str, Any]:
        path = self._path(self.network, epoch)
        contents = self._verify(load(path), path, self.network, epoch)
        if "optimizer" not in contents:
            raise CheckpointError(f"{path} holds no training state")
        return contents

    def _verify(self, contents: dict[str, Any], path: Path, network: int, epoch: int) -> dict[str, Any]:
        if not isinstance(contents.get(self.key), dict):
            raise CheckpointError(f"{path} is not a checkpoint: it has no state dict under {self.key!r}")
        # A file of the authors' own script carries none of these; what is there must be right.
        if contents.get("run", self.run) != self.run:
            raise CheckpointError(f"{path} belongs to another run")
        if contents.get("run") and (contents.get("network"), contents.get("epoch")) != (network, epoch):
            found = f"network {contents.get('network')}, epoch {contents.get('epoch')}"
            raise CheckpointError(f"{path} is out of place: it holds {printable(found)}")
        import torch  # here, so that the status of a run can be read in the blink of an eye

        for name, entry in contents[self.key].items():
            if isinstance(entry, torch.Tensor) and (entry.layout != torch.strided or entry.is_meta):
                raise CheckpointError(f"{path} is not a checkpoint: its entry {printable(name)} is not a dense tensor")
        return contents

    # Waiting

    def wait(self, epoch: int) -> tuple[Path, dict[str, Any]]:
        """Waits for the neighbour's checkpoint of an epoch: (its path, its state dict).

        After 10 s, and then every minute, one line says whom it waits for and what is known of it.

        Raises:
            NeighbourTimeout: if the neighbour gave no sign of life for `timeout` seconds, or its file stayed damaged
                for as long.
            WriteError: if network i's own checkpoint could not be written meanwhile, or the directory is gone.
        """
        own, path = self._path(self.network, epoch), self._path(self.neighbour, epoch)
        timeout = max(self._timeout, 3 * BEAT_SECONDS) if self._timeout else math.inf
        began = heard = time.monotonic()  # heard: when the neighbour last gave a sign of life
        message, look, retry = began + FIRST_MESSAGE_SECONDS, began, began  # when each is due
        signs = None  # of the neighbour's life, as last seen
        tried = None  # which form of its file was no good
        problem = missing = None  # with its file; why there is none, if that is known
        since = None  # when the problem was first seen
        announced = False
        while True:
            self._check()
            self.flush(wait=False)
            now = time.monotonic()
            try:
                found = os.stat(path)
                form = (found.st_ino, found.st_size, found.st_mtime_ns)
                if form != tried or now >= retry:
                    tried = form
                    return path, self._verify(load(path), path, self.neighbour, epoch)[self.key]
            except FileNotFoundError:
                tried, problem = None, missing
            except (OSError, CheckpointError) as error:
                # It may be the authors' script writing it just now, or the neighbour may come to replace it.
                problem, retry = str(error), now + max(RETRY_SECONDS, min(now - (since or now), MESSAGE_SECONDS))
            since = (since or now) if problem else None
            if now >= look:
                look = now + LOOK_SECONDS
                self._check_place()
                if not self._pending and _is_gone(own):
                    raise WriteError(f"{own} of network {self.network} was deleted before its reader is past it")
                seen = self._signs_of_life()
                if seen != signs:
                    signs, heard = seen, now
                missing = self._describe_missing(epoch)
            if not announced and now - began > 1:
                announced = True
                self.update("waiting", f"for network {self.neighbour}")
            gives_up = now - (since or heard) >= timeout
            if now >= message or gives_up:
                message = now + MESSAGE_SECONDS
                whom, state = f"network {self.neighbour} (epoch {epoch})", self._describe_neighbour(now - heard)
                if problem:
                    state = f"{problem}; {state}"
                if gives_up:
                    raise NeighbourTimeout(
                        f"network {self.network} gave up after {duration(now - began)} of waiting for {whom}: "
                        f"{state}. Start network {self.neighbour} again with --resume, then this one"
                    )
                self._say(f"Network:{self.network}    waiting for {whom} for {duration(now - began)}: {state}")
            asleep = time.monotonic()
            time.sleep(POLL_SECONDS)
            asleep = time.monotonic() - asleep
            if asleep > BEAT_SECONDS:  # suspended, perhaps together with the neighbour: that was not its silence
                heard, since = heard + asleep, since and since + asleep

    def _signs_of_life(self) -> tuple:
        """What changes as long as the neighbour lives: a counter and its files, never a clock of another host."""
        status = read_status(self.directory, self.neighbour) or {}
        return status.get("beat"), status.get("state"), tuple(self._published(self.neighbour)[-1:])

    def _describe_missing(self, epoch: int) -> str | None:
        """Why there is no checkpoint of the neighbour and an epoch, if it is past it and will hardly make it again."""
        published = self._published(self.neighbour)
        status = read_status(self.directory, self.neighbour) or {}
        reached = as_number(status.get("epoch")) if status.get("run") == self.run else None
        # Any other file of a high epoch may be of another run.
        latest = max(epoch + self.networks - 1, reached or 0)
        later = [other for other in published if epoch < other <= latest]
        if not later or epoch in published:
            return None
        return f"{self._path(self.neighbour, epoch)} was deleted, there is that of epoch {later[0]}"

    def _describe_neighbour(self, silence: float) -> str:
        name, status = f"network {self.neighbour}", read_status(self.directory, self.neighbour)
        if status is None:
            epochs = self._published(self.neighbour)
            if epochs:
                return f"{name} keeps no status file; its newest checkpoint is of epoch {epochs[-1]}"
            return f"{name} has not started; start it with: {self._start_command(self.neighbour)}"
        state, detail = printable(status.get("state")), printable(status.get("detail"))
        epoch = as_number(status.get("epoch"))
        at = "before its first epoch" if epoch is None else f"at epoch {epoch}"
        if state in ENDED:
            return f"{name} {'is done' if state == 'done' else state} {at}" + (f": {detail}" if detail else "")
        is_silent = silence >= 1.5 * BEAT_SECONDS
        if is_silent and holder(self.directory, self.neighbour) is None and not self._locks_are_silent_about(status):
            return f"{name} died {at} (killed?); continue it with: {self._start_command(self.neighbour)} --resume"
        doing = f", waiting {detail}" if state == "waiting" else ""
        return f"{name} is {at}{doing}, last seen {duration(silence)} ago"

    def _start_command(self, network: int) -> str:
        """The command line that started this network, made that of another."""
        command = shlex.join(self._status.get("command") or [Path(sys.argv[0]).name, "..."])
        words = shlex.split(re.sub(r"(?<= )--resume([ =]auto)?(?= -|$)", "", command))
        for position, word in enumerate(words):
            if word == "--i" and position + 1 < len(words):
                words[position + 1] = str(network)
                break
            if word.startswith("--i="):
                words[position] = f"--i={network}"
                break
        else:
            words += ["--i", str(network)]
        return shlex.join(words)


def _try_to_lock(descriptor: int, path: Path) -> bool | None:
    """Locks an open file, if no other process has (False); None where the file system has no locks."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno in NO_LOCKS:
            return None
        raise write_error(path, error) from error


def _write_over(path: Path, data: bytes) -> None:
    """Replaces the contents of a file in place."""
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if os.fstat(descriptor).st_nlink != 1:
            raise OSError(errno.EMLINK, "the file has another name, perhaps elsewhere")
        if os.write(descriptor, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def _is_gone(path: Path) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except OSError:
        pass  # what cannot be looked at just now says nothing
    return False


def duration(seconds: float) -> str:
    """A time as people say it: 47 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
