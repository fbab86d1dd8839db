"""The ring: networks that exchange their weights through files in a shared save directory.

Network i of N publishes a checkpoint after every epoch and waits for that of its neighbour, network i-1 (network 1's
is network N). Nothing but files is shared, so the networks may run on different machines. Each keeps
a status file `network{i}.json`, rewritten every few seconds, and holds a lock on `network{i}.lock` while it lives.
"""

import errno
import fcntl
import json
import os
import re
import secrets
import shlex
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .checkpoint import TEMPORARY, load, save, write_atomically, write_error
from .errors import CheckpointError, NeighbourTimeout, RefusedError

BEAT_SECONDS = 5.0  # how often a living network rewrites its status file
POLL_SECONDS = 0.02  # how often a waiting network looks for its neighbour's checkpoint
FIRST_MESSAGE_SECONDS, MESSAGE_SECONDS = 10.0, 60.0
ENDED = ("done", "stopped", "failed")
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer


def printable(text: object, limit: int = 500) -> str:
    """Text out of a file that anyone may have written, made fit for a terminal and a log: one line, no control codes."""
    return "".join(character if character.isprintable() else " " for character in str(text))[:limit]


def read_status(directory: str | os.PathLike, network: int) -> dict[str, Any] | None:
    """What network i last said of itself (see `Ring.update`), or None if there is no readable status file."""
    try:
        descriptor = os.open(Path(directory) / f"network{network}.json", os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = json.loads(file.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(status, dict):
        return None
    return {key: printable(value) if isinstance(value, str) else value for key, value in status.items()}


def holder(directory: str | os.PathLike, network: int) -> int | None:
    """Process id of the living process of network i on this host, or None. The kernel answers, not a file.

    A lock held from another host shows as 0 or less. Not to be asked by a process about itself: closing the
    file would give up its own lock.
    """
    try:
        descriptor = os.open(Path(directory) / f"network{network}.lock", os.O_RDWR | os.O_NOFOLLOW)
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
        timeout: seconds without a sign of life of the neighbour after which waiting ends; 0 waits for ever.
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
        self._lock = None
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
        with self._starting():
            previous = read_status(self.directory, self.network)
            self._claim(previous)
            if not resume and (trace := self._trace()):
                state = f" (state {previous.get('state')}, epoch {previous.get('epoch')})" if previous else ""
                raise RefusedError(
                    f"network {self.network} has already run in {self.directory}{state}: there is {trace}. Continue it "
                    f"with --resume, or start anew in another directory (--s)"
                )
            self._remove_leftovers()
            beat = (previous or {}).get("beat")
            self._status = {
                "network": self.network, "num": self.networks, "state": "starting", "detail": "", "epoch": None,
                "epochs": None, "accuracy": None, "best": None, "host": socket.gethostname(), "pid": os.getpid(),
                "time": time.time(), "beat": beat + 1 if isinstance(beat, int) else 0, "command": list(command),
            }  # fmt: skip
            self._write_status()
        threading.Thread(target=self._keep_fresh, name="heartbeat", daemon=True).start()

    @contextmanager
    def _starting(self):
        """Networks that start at the same moment take turns."""
        path = self.directory / "run.lock"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise write_error(path, error) from error
            yield
        finally:
            os.close(descriptor)

    def _claim(self, previous: Mapping[str, Any] | None) -> None:
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
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise alive from None
            if error.errno not in NO_LOCKS:
                raise write_error(path, error) from error
            locked = False
        elsewhere = previous and previous.get("host") != socket.gethostname()
        if previous and previous.get("state") not in ENDED and (elsewhere or not locked):
            # A lock does not reach across every network file system; a heart that beats does.
            deadline = time.monotonic() + 2 * BEAT_SECONDS
            while time.monotonic() < deadline:
                time.sleep(0.2)
                now = read_status(self.directory, self.network)
                if now and now.get("beat") != previous.get("beat"):
                    raise alive

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
            self._name.format(index=index, epoch="*"), f"network{self.network}.json", f"*[a-z]{self.network}.csv",
            f"best{self.network}.*", f"final{self.network}.*",
        )  # fmt: skip
        for pattern in own:
            for path in self.directory.glob(f".{pattern}.*{TEMPORARY}"):
                path.unlink(missing_ok=True)

    def agree(self, settings: Mapping[str, Any], may_raise: Sequence[str] = (), why_not: str = "") -> None:
        """Records the settings that all networks of a run share in `run.json`, or compares with what is recorded.

        Args:
            settings: plain values by flag name.
            may_raise: the settings that a resumed run may raise while no other network is at work.
            why_not: why none may be, for the message.

        Raises:
            RefusedError: naming each setting that differs, and both values.
        """
        path = self.directory / "run.json"
        with self._starting():
            if os.path.lexists(path):
                recorded = self._recorded(path)
                differing = {key for key in {**recorded, **settings} if recorded.get(key) != settings.get(key)}
                raised = {key for key in differing if key in may_raise and settings[key] > recorded.get(key, 0)}
                if not differing:
                    return
                others = self._at_work()
                fresh = not any(self._published(network) for network in range(1, self.networks + 1)) and not self._trace()
                if not others and fresh:
                    pass  # a start that came to nothing, with other settings: there is nothing to protect
                elif not others and raised == differing:
                    self._record(path, settings)
                    return
                else:
                    rows = ", ".join(
                        f"--{key} is {settings.get(key)!r} here and {recorded.get(key)!r} in the run"
                        for key in sorted(differing)
                    )
                    more = f" (network {others[0]} is at work with the recorded value)" if others and raised else ""
                    if "epochs" in differing and why_not:
                        more = f" ({why_not})"
                    raise RefusedError(
                        f"network {self.network} does not fit the run in {self.directory}: {printable(rows)}{more}; "
                        f"give the same settings, or another directory (--s)"
                    )
            else:
                self._refuse_remains()
            self.run = secrets.token_hex(8)
            self._record(path, settings)

    def _recorded(self, path: Path) -> dict[str, Any]:
        try:
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                contents = json.loads(file.read(1 << 20))
            self.run, settings = contents["run"], contents["settings"]
            if isinstance(self.run, str) and isinstance(settings, dict):
                return settings
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass
        raise RefusedError(f"{path} is damaged: the run's settings cannot be read. Start anew in another directory (--s)")

    def _record(self, path: Path, settings: Mapping[str, Any]) -> None:
        contents = {"run": self.run, "settings": dict(settings), "created": time.time()}
        write_atomically(path, json.dumps(contents, indent=1).encode())

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
        """The other networks that live and have agreed on the recorded settings."""
        others = [network for network in range(1, self.networks + 1) if network != self.network]
        return [
            network
            for network in others
            if holder(self.directory, network) is not None
            and (read_status(self.directory, network) or {}).get("state") in ("training", "waiting")
        ]

    # Status: what others are told

    def update(self, state: str, detail: str = "", **fields: Any) -> None:
        """Rewrites `network{i}.json`: state is starting, training, waiting, done, stopped or failed.

        Further fields: epoch, epochs, accuracy, best (in percent).
        """
        with self._status_lock:
            self._status.update(state=state, detail=detail, **fields)
            self._write_status()

    def _write_status(self) -> None:
        self._status["time"] = time.time()
        data = json.dumps(self._status).encode()
        write_atomically(self.directory / f"network{self.network}.json", data, durable=False)

    def _keep_fresh(self) -> None:
        while not self._left.wait(BEAT_SECONDS):
            with self._status_lock:
                if self._left.is_set():
                    return
                self._status["beat"] += 1
                try:
                    self._write_status()
                except OSError:
                    pass  # the network itself says so, in a sentence, when it next writes a file that matters

    def leave(self, state: str, detail: str = "") -> None:
        """Finishes what is being written, then records how network i ended: done, stopped or failed.

        Raises:
            WriteError: if a network that is done cannot say so; the others have a failure to tell of already.
        """
        self._writer.shutdown(wait=True)
        self._left.set()
        if self._status:
            try:
                self.update(state, detail)
            except OSError:
                if state == "done":
                    raise

    # Publishing

    def publish(self, epoch: int, contents: Mapping[str, Any]) -> None:
        """Saves network i's checkpoint of an epoch, in the background; it appears whole or not at all.

        Args:
            contents: plain values and CPU tensors that nobody changes any more.

        Raises:
            WriteError: now or at a later call, if it could not be written.
        """
        self.flush()  # one epoch is never further ahead of the disk than its own training takes
        if not self._keep_all:
            self._prune()
        stamped = {**contents, "run": self.run, "network": self.network, "epoch": epoch}
        self.write(self._path(self.network, epoch), stamped)

    def write(self, path: str | os.PathLike, contents: Mapping[str, Any]) -> None:
        """`checkpoint.save` in the background, after everything that was given to be written before it."""
        self.flush(wait=False)
        self._pending.append(self._writer.submit(save, path, contents))

    def flush(self, wait: bool = True) -> None:
        """Raises what went wrong in the background; first waits for all that is being written, if asked to."""
        for job in list(self._pending):
            if wait or job.done():
                job.result()
                self._pending.remove(job)

    def _prune(self) -> None:
        """Deletes those of network i's checkpoints that nobody can need again.

        Whoever continues from a checkpoint of epoch e needs the neighbour's of epoch e as well, and may have to go
        back one more epoch if its newest file is damaged. So what counts is kept from the second newest epoch
        of this network, and of its reader, on. A network is at most N-1 epochs ahead of its reader, which bounds the
        number of files by N+1.
        """
        own = self._published(self.network)
        if not own:
            return
        keep = own[-1] - 1
        if self.networks > 1:
            read = self._published(self.reader)
            keep = min(keep, (read[-1] if read else 0) - 1)
        for epoch in own:
            if epoch < keep:
                self._path(self.network, epoch).unlink(missing_ok=True)

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
        pattern = re.compile(re.escape(before) + r"(\d{1,9})" + re.escape(after))
        try:
            return sorted(int(match[1]) for name in os.listdir(self.directory) if (match := pattern.fullmatch(name)))
        except OSError as error:
            raise write_error(self.directory, error) from error

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """(epoch, contents) of network i's newest good checkpoint, or None if it has published none.

        A damaged one is renamed to `NAME.damaged`, with a line in the log, and the one before it is taken.

        Raises:
            RefusedError: if there are checkpoints, but none of them is good.
        """
        damaged = []
        for epoch in reversed(self._published(self.network)):
            path = self._path(self.network, epoch)
            try:
                contents = self._verify(load(path), path, self.network, epoch)
                if "optimizer" not in contents:
                    raise CheckpointError(f"{path} holds no training state")
                return epoch, contents
            except CheckpointError as error:
                aside = path.with_name(path.name + ".damaged")
                self._say(f"Network:{self.network}    {error}; set aside as {aside.name}")
                os.replace(path, aside)
                damaged.append(path.name)
        if damaged:
            raise RefusedError(
                f"network {self.network} has no good checkpoint left in {self.directory} ({', '.join(damaged)} damaged), "
                f"and its neighbours have gone on; start the run anew in another directory (--s)"
            )
        return None

    def _verify(self, contents: dict[str, Any], path: Path, network: int, epoch: int) -> dict[str, Any]:
        if not isinstance(contents.get(self.key), dict):
            raise CheckpointError(f"{path} is not a checkpoint: it has no state dict under {self.key!r}")
        # A file of the authors' own script carries none of these; what is there must be right.
        if contents.get("run", self.run) != self.run:
            raise CheckpointError(f"{path} belongs to another run")
        if contents.get("run") and (contents.get("network"), contents.get("epoch")) != (network, epoch):
            found = f"network {contents.get('network')}, epoch {contents.get('epoch')}"
            raise CheckpointError(f"{path} is out of place: it holds {printable(found)}")
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
        path = self._path(self.neighbour, epoch)
        began = sign = time.monotonic()
        message = began + FIRST_MESSAGE_SECONDS
        look = began  # when the neighbour's status and the directory are looked at next
        retry = began  # when a file that was no good is tried again although it has not changed
        seen, problem, problem_since, tried, waiting = None, None, None, None, False
        while True:
            self._check()
            self.flush(wait=False)
            now = time.monotonic()
            try:
                found = os.stat(path)
                form = (found.st_ino, found.st_size, found.st_mtime_ns)
                if form != tried or now >= retry:
                    tried, retry = form, now + 1.0
                    return path, self._verify(load(path), path, self.neighbour, epoch)[self.key]
            except FileNotFoundError:
                problem = problem_since = tried = None
            except OSError as error:
                problem, problem_since = str(error), problem_since or now
            except CheckpointError as error:
                # It may be the authors' script writing it just now, or the neighbour may come to replace it.
                problem, problem_since = str(error), problem_since or now
            if now >= look:
                look = now + 0.5
                self._published(self.network)  # raises, if the directory is gone
                signs = self._signs_of_life()
                if signs != seen:
                    seen, sign = signs, now
            if not waiting and now - began > 1:
                waiting = True
                self.update("waiting", f"for network {self.neighbour}")
            silent_since = problem_since or sign
            if now >= message or (self._timeout and now - silent_since >= self._timeout):
                state = problem or self._describe_neighbour(now - sign)
                line = f"waiting for network {self.neighbour} (epoch {epoch}) for {_duration(now - began)}: {state}"
                if self._timeout and now - silent_since >= self._timeout:
                    raise NeighbourTimeout(
                        f"network {self.network} gave up {line}; start network {self.neighbour} again with --resume, "
                        f"then this one"
                    )
                self._say(f"Network:{self.network}    {line}")
                message = now + MESSAGE_SECONDS
            time.sleep(POLL_SECONDS)

    def _signs_of_life(self) -> tuple:
        """What changes as long as the neighbour lives: a counter and its files, never a clock of another host."""
        status = read_status(self.directory, self.neighbour) or {}
        return status.get("beat"), status.get("state"), tuple(self._published(self.neighbour)[-1:])

    def _describe_neighbour(self, silence: float) -> str:
        name, status = f"network {self.neighbour}", read_status(self.directory, self.neighbour)
        if status is None:
            epochs = self._published(self.neighbour)
            if epochs:
                return f"{name} keeps no status file; its newest checkpoint is of epoch {epochs[-1]}"
            return f"{name} has not started; start it with: {self._start_command(self.neighbour)}"
        epoch = "before its first epoch" if status.get("epoch") is None else f"at epoch {status['epoch']}"
        state, detail = status.get("state"), status.get("detail")
        if state in ("stopped", "failed"):
            return f"{name} {state} {epoch}: {detail}"
        if status.get("host") == socket.gethostname() and holder(self.directory, self.neighbour) is None and state != "done":
            return f"{name} died {epoch} (killed?); continue it with: {self._start_command(self.neighbour)} --resume"
        if state == "waiting":
            epoch += f", waiting {detail}"
        return f"{name} is {epoch}, last seen {_duration(silence)} ago"

    def _start_command(self, network: int) -> str:
        command = [word for word in self._status.get("command", []) if word != "--resume"]
        for position, word in enumerate(command):
            if word == "--i" and position + 1 < len(command):
                command[position + 1] = str(network)
            elif word.startswith("--i="):
                command[position] = f"--i={network}"
        return shlex.join(command or [Path(sys.argv[0]).name, "...", "--i", str(network)])


def _duration(seconds: float) -> str:
    """A time as people say it: 47 s, 12 min, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
