"""How networks exchange weights: through files in a shared directory, or between the processes of one job.

Network i of N sits in a ring: its neighbour is network i-1, and that of network 1 is network N. Its reader is network
i+1, of which it is the neighbour itself.
"""

import logging
import math
import operator
import os
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from .checkpoint import load, save
from .errors import CheckpointError, GraftingError, NeighbourTimeout, UnreadableError
from .membership import BEAT_SECONDS, ENDED, HOST, PROCESS, Membership, duration, is_held, read_status, status_of
from .states import State, plain_names, whole

POLL_SECONDS = 0.02  # how often a waiting network looks for its neighbour's checkpoint
LOOK_SECONDS = 0.5  # how often it looks at its neighbour's status, and whether the directory is still there
RETRY_SECONDS = 10.0  # how soon it tries a checkpoint again that was no good and has not changed since
FIRST_MESSAGE_SECONDS, MESSAGE_SECONDS = 10.0, 60.0
logger = logging.getLogger("filter_grafting")


class Exchange(Protocol):
    """What grafting needs of a ring: a network gives its own weights of a round, and gets its neighbour's."""

    def swap(self, state: Mapping[str, Tensor], round: int) -> Mapping[str, Tensor]: ...


class Checkpoint(NamedTuple):
    """A checkpoint that this network published: `extra` as it was given, its tensors on the CPU."""

    round: int
    state: State
    extra: Any
    path: Path


class FileRing(Membership):
    """Network i's place in a ring of N that exchanges weights through files; the networks need share nothing else.

        with FileRing("run", network=1, networks=2, settings={"lr": 0.1}) as ring:
            neighbour = ring.swap(model.state_dict(), round=0)

    A checkpoint is a `torch.save`d dict {key: state dict, "run", "network", "epoch": round, "extra"}. Of a process that
    knows only the file names, {key: state dict} is taken. The logger "filter_grafting" explains waits that last.

    Args:
        directory: the shared directory; it is made if it is not there.
        network: i, 1...N.
        networks: N; 1 is a baseline that exchanges nothing.
        settings: what all networks must have in common: plain values, tuples, dtypes, devices and paths, by name. The
            first network records them in `run.json`, the others are compared with that before anything is exchanged.
        resume: continue from the checkpoints that this network may already have there (see `newest`).
        may_raise: settings that a resumed run may raise while no other network is at work, such as the last epoch.
        timeout: seconds without progress of the neighbour after which `wait` gives up, but at least three heartbeats;
            0 waits for ever. A heartbeat is progress enough of one that does not call `progress(step)`.
        keep: at least so many of this network's checkpoints are kept (math.inf: all); by default at most N+1 are.
        name: file name of a checkpoint, with the fields {index} (i mod N) and {round}.
        key: the checkpoint's entry that holds the state dict.
        start_command: how network k is started or continued, for messages.
        details: further entries of this network's status file, such as the command line.
        check: called while waiting; raises to end the wait.

    Raises:
        SettingsError: if the settings differ from those of the run.
        AlreadyRunError: if this network has run there, and resume was not asked for.
        AliveError: if another process is this network, or this process is it twice.
        RefusedError: if the directory holds something else than this run.
        WriteError: if the directory cannot be written. A start that is refused has changed nothing.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        network: int,
        networks: int,
        *,
        settings: Mapping[str, Any] | None = None,
        resume: bool = False,
        may_raise: Collection[str] = (),
        timeout: float = 3600.0,
        keep: float = 0,
        name: str = "ckpt{index}_{round}.t7",
        key: str = "net",
        start_command: Callable[[int], str] | None = None,
        details: Mapping[str, Any] | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        super().__init__(directory, network, networks, name, details or {})
        self.neighbour, self.key = network - 1 or networks, key
        self._timeout, self._keep, self._check = timeout, keep, check
        self._start_command = start_command or (lambda k: f"FileRing({str(directory)!r}, {k}, {networks}, ...)")
        self._join(settings, resume, may_raise)

    # Publishing

    def publish(self, round: int, state: Mapping[str, Tensor], extra: Any = None) -> None:
        """Saves this network's weights of a round, for its neighbour and for a resume.

        It returns when the file is whole and on the disk, so that the weights may change from then on.

        Args:
            round: any increasing numbers, in all networks the same.
            extra: plain values and tensors, such as an optimizer's state; `newest` hands them back as they are.

        Raises:
            CheckpointError: if the file could not be loaded again, for `state` or `extra` holds something else.
            WriteError: if it cannot be written, or the directory is gone. What was published before is untouched.
            AliveError: if another process is this network by now.
            GraftingError: if this network has left the run, as at the end of `with`.
        """
        round = operator.index(round)
        if round < 0:
            raise ValueError(f"round: got {round}, expected 0 or more")
        if self._left.is_set():  # another process may be this network by now
            raise GraftingError(f"network {self.network} has left {self.directory}: train within `with FileRing(...)`")
        path = self.path(round)
        stamp = {"run": self.run, "network": self.network, "epoch": round, "extra": extra}
        try:
            self._check_place()
            save(path, {**stamp, self.key: plain_names(state)})
            self._is_starting, self._trouble = False, ""
            said = self._status["state"]
            self.update("training" if said == "starting" else said, self._status["detail"], round=round)
        except GraftingError as error:
            self._trouble = str(error)
            raise
        with suppress(OSError):  # what cannot be deleted just now the next round deletes
            self._prune(round)

    def _prune(self, newest: int) -> None:
        """Deletes those of this network's checkpoints that nobody can need again.

        Whoever resumes from a checkpoint of round r needs the neighbour's of round r as well, and may have to go back
        one more round if its newest file is damaged. So what counts is kept from the second newest round of this
        network, and of its reader, on. A network is at most N-1 rounds ahead of its reader: at most N+1 files.
        """
        own = [round for round in self._rounds(self.network) if round <= newest]  # a higher one is none of this run
        spare = min(len(own) - 2, len(own) - self._keep)
        if self.networks > 1:
            reader = self.network % self.networks + 1
            read = max((round for round in self._rounds(reader) if round <= newest), default=-1)
            spare = min(spare, sum(round < read for round in own) - 1)
        for round in own[: int(max(0, spare))]:
            self.path(round).unlink(missing_ok=True)

    def newest(self) -> Checkpoint | None:
        """This network's newest good checkpoint, or None if there is none.

        A damaged one is renamed to `NAME.damaged`, with a line in the log, and the one before it is taken.

        Raises:
            UnreadableError: if one that may be good cannot be read just now; it is left as it is.
        """
        for round in reversed(self._rounds(self.network)):
            path = self.path(round)
            try:
                contents = self._load(path, self.network, round)
            except UnreadableError:
                raise
            except CheckpointError as error:
                aside = path.with_name(path.name + ".damaged")
                os.replace(path, aside)
                logger.warning("network %d: %s; set aside as %s", self.network, error, aside.name)
            else:
                self._status["round"] = round
                return Checkpoint(round, State(contents[self.key], str(path)), contents.get("extra"), path)
        return None

    def _load(self, path: Path, network: int, round: int) -> dict[str, Any]:
        """Loads a checkpoint that must be that of a network and a round of this run."""
        contents = load(path)
        if not isinstance(contents.get(self.key), dict):
            raise CheckpointError(f"{path} is not a checkpoint: it has no state dict under {self.key!r}")
        if "run" in contents:  # a file of the published script carries no such stamp
            found, expected = [contents.get(key) for key in ("run", "network", "epoch")], [self.run, network, round]
            if found != expected:
                raise CheckpointError(
                    f"{path} is out of place: it is of run, network and round {found}, not {expected}"
                )
        return contents

    # Waiting

    def swap(self, state: Mapping[str, Tensor], round: int, extra: Any = None) -> State:
        """Publishes this network's weights of a round, and waits for its neighbour's (see `publish` and `wait`)."""
        self.publish(round, state, extra)
        return self.wait(round)

    def wait(self, round: int) -> State:
        """Waits for the neighbour's weights of a round, after this network's own were published.

        After 10 s, and then every minute, a line in the log says whom it waits for, and what is known of it.

        Returns:
            the state dict, on the CPU; its `source` is the file.

        Raises:
            NeighbourTimeout: if the neighbour made no progress for `timeout` seconds, or its file stayed damaged for as
                long. While it trains and reports its steps, progress is a step or a checkpoint, otherwise a heartbeat.
            WriteError: if the directory is gone.
            AliveError: if another process is this network by now.
        """
        timeout = max(self._timeout, 3 * BEAT_SECONDS) if self._timeout else math.inf
        now = time.monotonic()
        watch = _Watch(self, round, now)
        whom, before = f"network {self.neighbour} (round {round})", (self._status["state"], self._status["detail"])
        began, next_look, next_message, is_told = now, now + LOOK_SECONDS, now + FIRST_MESSAGE_SECONDS, False
        while (state := watch.try_to_load(now)) is None:
            self._check()
            if now >= next_look:
                next_look = now + LOOK_SECONDS
                watch.look(now)
                if not is_told:
                    is_told = True
                    self.update("waiting", f"for network {self.neighbour}", round=round)
                self._check_place()
            waited = duration(now - began)
            if now - watch.sign_at >= timeout:
                raise NeighbourTimeout(
                    f"network {self.network} gave up after {waited} of waiting for {whom}: {watch.describe(now)}. "
                    f"Stop network {self.neighbour} if it lives, resume it, then this one"
                )
            if now >= next_message:
                next_message = now + MESSAGE_SECONDS
                logger.warning("network %d waits for %s for %s: %s", self.network, whom, waited, watch.describe(now))
            time.sleep(POLL_SECONDS)
            last, now = now, time.monotonic()
            if now - last > BEAT_SECONDS:
                watch.leave_out(now - last)
        if is_told:
            self.update(*before)
        return state


class _Watch:
    """What a waiting network sees of its neighbour: its file, its heartbeat, and its progress."""

    def __init__(self, ring: FileRing, round: int, now: float):
        self.ring, self.round, self.path = ring, round, ring.path(round, ring.neighbour)
        self.beat_at = self.progress_at = self.sign_at = now  # when each was last seen to change
        self.beat: object = None
        self.progress: object = None
        self.rounds: list[int] = []  # of which its checkpoints are there
        self.form: tuple[int, ...] | None = None  # of the neighbour's file, as last seen
        self.problem, self.retry_at = "", 0.0  # why that file was no good

    def try_to_load(self, now: float) -> State | None:
        """The neighbour's state dict, if it is there; what is no good is tried again when it changes, and now and then.

        The published script writes its files in place, so that one may be seen half-written.
        """
        try:
            found = os.stat(self.path)
            form = (found.st_ino, found.st_size, found.st_mtime_ns)
            if form == self.form and now < self.retry_at:
                return None
            self.form = form
            contents = self.ring._load(self.path, self.ring.neighbour, self.round)
            return State(contents[self.ring.key], str(self.path))
        except FileNotFoundError:
            self.form, self.problem = None, ""
        except (OSError, CheckpointError) as error:
            # From now on, not from when it began: or reading a large one took all the time, of which none would count.
            self.problem, self.retry_at = str(error), time.monotonic() + RETRY_SECONDS
        return None

    def look(self, now: float) -> None:
        """Reads the neighbour's status, and keeps when it last gave a sign that it will publish the round.

        Of one that trains and reports its steps that is progress alone: it may hang, though its heart beats on in
        another thread. Nor is a heartbeat enough where something stands in the way. Else it is either.
        """
        ring, said = self.ring, read_status(self.ring.directory, self.ring.neighbour)
        held = is_held(ring.directory / f"network{ring.neighbour}.lock")
        lives = held is not False or said.get("host") not in (None, HOST)  # where locks cannot say, its heart does
        self.status = status_of(ring.neighbour, said, lives)
        with suppress(OSError):  # the file system is away for a moment
            self.rounds = ring._rounds(ring.neighbour)
        reached = said.get("round") if said.get("run") == ring.run else None
        self.obstacle = self.problem
        if (said.get("process"), said.get("pid")) == (PROCESS, os.getpid()):
            self.obstacle = (
                "that network is of this same process: publish the weights of all networks before you wait for any, or "
                "use graft_ring"
            )
        elif isinstance(reached, int) and reached >= self.round and self.form is None:
            self.obstacle = (
                f"it is past round {self.round}, of which there is no checkpoint any more: stop all networks, and "
                "resume them; FileRing(keep=...) keeps more"
            )
        progress = [*map(said.get, ("state", "epoch", "step", "round")), self.rounds[-1:], self.form]
        if progress != self.progress:
            self.progress, self.progress_at = progress, now
        if said.get("beat") != self.beat:
            self.beat, self.beat_at = said.get("beat"), now
        reports_steps = self.status.state in ("training", "testing") and self.status.step is not None
        is_beat_enough = not (reports_steps or self.obstacle)
        self.sign_at = max(self.progress_at, self.beat_at) if is_beat_enough else self.progress_at

    def leave_out(self, seconds: float) -> None:
        """Does not count a time in which this process itself stood still, as by Ctrl-Z, or for a file server."""
        self.beat_at += seconds
        self.progress_at += seconds
        self.sign_at += seconds

    def describe(self, now: float) -> str:
        """What is known of the neighbour, and of its file."""
        status, name = self.status, f"network {self.ring.neighbour}"
        command = self.ring._start_command(self.ring.neighbour)
        where = [f"{word} {at}" for word, at in (("epoch", status.epoch), ("step", status.step)) if at is not None]
        at = "at " + ", ".join(where) if where else "before its first epoch"
        if status.state == "not started" and self.rounds:
            text = f"{name} keeps no status file; its newest checkpoint is of round {self.rounds[-1]}"
        elif status.state == "not started":
            text = f"{name} has not started; start it with: {command}"
        elif status.state == "died":
            text = f"{name} died {at} (killed?); continue it with: {command}"
        elif status.state in ENDED:
            text = f"{name} {'is done' if status.state == 'done' else status.state} {at}"
            text += f": {status.detail}" if status.detail else ""
        else:
            doing = str(status) if status.state == "waiting" else status.state
            beat, progress = duration(now - self.beat_at), duration(now - self.progress_at)
            text = f"{name} is {doing} {at} (heartbeat {beat} ago, progress {progress} ago)"
        return f"{text}; {self.obstacle}" if self.obstacle else text


class ProcessGroupRing:
    """The processes of a `torch.distributed` group as a ring: rank r is network r+1, and no files are shared.

        dist.init_process_group("gloo")
        neighbour = ProcessGroupRing().swap(model.state_dict(), round=0)

    Works on NCCL (after `torch.cuda.set_device`: it sends from the current GPU), and on any backend that sends and
    receives tensors of the CPU, as Gloo. A process that dies or hangs ends the others by the timeout of the group (see
    `torch.distributed.init_process_group`).

    Args:
        group: the processes, one a network; by default all of the job. With several processes for a network, the group
            holds one of each.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self.group = dist.group.WORLD if group is None else group  # torch < 2.8 knows no ranks of None
        self.networks = dist.get_world_size(group)
        self.network = dist.get_rank(group) + 1
        self.neighbour = self.network - 1 or self.networks

    def swap(self, state: Mapping[str, Tensor], round: int) -> State:
        """Sends this network's weights of a round to its reader, and receives its neighbour's: all call it together.

        Returns:
            the neighbour's state dict, on the device that the backend works with.

        Raises:
            GraftingError: in all processes, if they are at different rounds.
        """
        plain = plain_names(state)
        if self.networks == 1:
            return State(plain, "network 1")
        tensors = {name: whole(entry.detach()) for name, entry in plain.items() if isinstance(entry, Tensor)}
        rest = {name: entry for name, entry in plain.items() if name not in tensors}
        # What will be sent is told first, so that heads of other sizes, and other types, can be received.
        told: list[Any] = [None] * self.networks
        own = [(name, entry.shape, entry.dtype) for name, entry in tensors.items()]
        dist.all_gather_object(told, (round, own, rest), group=self.group)
        rounds = [other for other, *_ in told]
        if len(set(rounds)) > 1:
            raise GraftingError(f"networks 1 to {self.networks} are at rounds {rounds}; let all swap the same round")
        _, table, rest = told[self.neighbour - 1]
        is_nccl = "nccl" in dist.get_backend(self.group)
        device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
        # All entries of a dtype in one row of bytes, which any backend can send.
        outgoing = [
            torch.cat([tensors[name].to(device).reshape(-1) for name, _ in entries]).view(torch.uint8)
            for entries in _by_dtype(own).values()
        ]
        groups = _by_dtype(table)
        sizes = {dtype: [shape.numel() for _, shape in entries] for dtype, entries in groups.items()}
        incoming = [torch.empty(sum(n) * t.itemsize, dtype=torch.uint8, device=device) for t, n in sizes.items()]
        self._exchange(outgoing, incoming)
        found: dict[str, Any] = dict.fromkeys(name for name, *_ in table)  # in their order
        for row, (dtype, entries) in zip(incoming, groups.items(), strict=True):
            parts = row.view(dtype).split(sizes[dtype])
            found |= {name: part.reshape(shape) for (name, shape), part in zip(entries, parts, strict=True)}
        return State({**found, **rest}, f"network {self.neighbour}")

    def _exchange(self, outgoing: list[Tensor], incoming: list[Tensor]) -> None:
        """One message per dtype to the reader, and from the neighbour, all at once: none waits for another."""
        ranks = dist.get_process_group_ranks(self.group)
        reader, neighbour = ranks[self.network % self.networks], ranks[self.neighbour - 1]
        sends = [dist.P2POp(dist.isend, data, reader, self.group, tag) for tag, data in enumerate(outgoing)]
        receives = [dist.P2POp(dist.irecv, data, neighbour, self.group, tag) for tag, data in enumerate(incoming)]
        for work in dist.batch_isend_irecv(sends + receives):
            work.wait()


def _by_dtype(table: list[tuple[str, torch.Size, torch.dtype]]) -> dict[torch.dtype, list[tuple[str, torch.Size]]]:
    groups: dict[torch.dtype, list[tuple[str, torch.Size]]] = {}
    for name, shape, dtype in table:
        groups.setdefault(dtype, []).append((name, shape))
    return groups
