"""Several processes that train one network together (`torchrun`): how they keep together, and how they end together."""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from filter_grafting.errors import GraftingError

POLL_SECONDS = 0.05
BEAT_SECONDS = 2.0  # how often a rank shows that it lives, and looks at the others
SILENCE_SECONDS = 40.0  # after which a rank of which nothing else is known counts as dead
GRACE_SECONDS = 8.0  # for a rank to end by itself once another has; torchrun kills it 30 s after it asked it to end
FAREWELL_SECONDS = 5.0  # within which the reason is known why a connection was lost: torchrun reaps what has died


class End(NamedTuple):
    """How a network ended: the first of its ranks that ends decides, whatever befalls the others because of it."""

    state: str  # "failed" or "stopped"
    sentence: str
    status: int


class RankLost(GraftingError):
    """Another rank of this network has ended."""


class World:
    """The processes ("ranks") of one network; a single one where the script was not started by `torchrun`.

    Rank 0 alone writes, waits for the neighbour and grafts; it tells the others what came of it through torchrun's
    key-value store, which they ask in a loop: a collective operation would end in a time-out, or not hear a signal,
    while rank 0 waits for hours for a neighbour.

    A rank that ends leaves its reason in the store. A thread in each of the others looks for it, and for signs of life:
    they may run on other machines, and NCCL's operations just go on waiting for a rank that is gone.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.last_words: Callable[[End], None] = lambda end: None  # called before a rank that hangs is ended
        self._ended: End | None = None  # what another rank has said
        self._left = threading.Event()
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        # Two connections: torch may keep one busy for long.
        (self._store, _, _), (self._words, _, _) = (next(dist.rendezvous("env://")) for _ in range(2))
        place = f"{socket.gethostname()} {os.environ.get('GROUP_RANK', 0)}"
        self._words.set(f"process {self.rank}", json.dumps([place, os.getpid()]))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=self._store, rank=self.rank, world_size=self.size)
        processes = {rank: json.loads(self._words.get(f"process {rank}")) for rank in range(self.size)}
        self._beside = {  # other ranks on this machine
            rank: pid for rank, (where, pid) in processes.items() if where == place and rank != self.rank
        }
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # Working together

    def tell(self, topic: str, message: str = "") -> None:
        """Rank 0 tells the others something, once per topic."""
        if self.size > 1:
            self._words.set(topic, message or " ")

    def hear(self, topic: str, check: Callable[[], None]) -> str:
        """The others wait until rank 0 has told it; `check` is called meanwhile, and raises to end the wait."""
        while not self._words.check([topic]):
            check()
            time.sleep(POLL_SECONDS)
        return self._words.get(topic).decode().strip()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, wrapped so that every backward pass averages the gradients over the ranks."""
        if self.size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    def align(self, tensors: Mapping[str, Tensor]) -> None:
        """Gives all ranks rank 0's values, and makes sure of it."""
        if self.size > 1:
            for tensor in tensors.values():
                dense = tensor.contiguous()  # weights in channels_last format are not, as NCCL and Gloo see it
                dist.broadcast(dense, 0)
                if dense is not tensor:
                    tensor.copy_(dense)
            self.compare(tensors)

    def compare(self, tensors: Mapping[str, Tensor]) -> None:
        """Makes sure that all ranks hold the same values, by the sum of the bits of each tensor.

        Raises:
            GraftingError: naming the first tensor that differs.
        """
        if self.size == 1 or not tensors:
            return
        own = torch.stack([_sum_of_bits(tensor) for tensor in tensors.values()])
        sums = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(sums, own)
        differs = (torch.stack(sums) != sums[0]).any(0).tolist()
        if any(differs):
            name = list(tensors)[differs.index(True)]
            raise GraftingError(f"the {self.size} ranks of this network no longer agree: {name} differs between them")

    # Ending together

    def check(self) -> None:
        """Raises RankLost once another rank has ended."""
        if self._ended:
            raise RankLost(self._ended.sentence)

    def end(self, own: End, may_follow: bool) -> End:
        """Leaves word of this rank's end for the others; returns how the network ended.

        Args:
            own: as this rank sees it.
            may_follow: whether that may have come of another rank's end (torchrun then sends SIGTERM, and connections
                break), which is to be found first.
        """
        if self.size == 1:
            return own
        deadline = time.monotonic() + (FAREWELL_SECONDS if own.state == "failed" else 0)
        try:
            while may_follow:
                if found := self._ended or self._said() or self._dead():
                    return found
                if time.monotonic() > deadline:
                    break
                time.sleep(POLL_SECONDS)
            told = f"rank {self.rank}: {own.sentence}" if self.rank and own.state == "failed" else own.sentence
            self._words.compare_set("end", "", json.dumps(own._replace(sentence=told)))
        except RuntimeError:  # the store is gone, and torchrun with it
            pass
        return own

    def leave(self) -> None:
        """The last thing that a rank does that is done."""
        self._left.set()
        if self.size > 1:
            with suppress(RuntimeError):
                self._words.set(f"left {self.rank}", "")
            dist.destroy_process_group()

    def _watch(self) -> None:
        others = range(1, self.size) if self.leads else [0]  # rank 0 hears of all, and all hear of it from rank 0
        beats, heard, last = {}, {}, time.monotonic()
        while not self._left.wait(BEAT_SECONDS):
            now = time.monotonic()
            if now - last > SILENCE_SECONDS / 2:
                heard.clear()  # suspended, perhaps together with the others: that was not their silence
            last = now
            try:
                self._words.add(f"beat {self.rank}", 1)
                for rank in others:
                    beat = self._words.add(f"beat {rank}", 0)
                    if beat != beats.get(rank) or rank not in heard:
                        beats[rank], heard[rank] = beat, now
                    elif now - heard[rank] > SILENCE_SECONDS and not self._words.check([f"left {rank}"]):
                        self._say(f"rank {rank} has given no sign of life for {SILENCE_SECONDS:g} s")
                self._ended = self._said() or self._dead()
            except RuntimeError:
                self._ended = End("failed", "the connection to torchrun was lost: it has died (killed?)", 1)
            if self._ended:
                break
        if self._ended and not self._left.wait(GRACE_SECONDS):  # the main thread hangs
            with suppress(OSError):
                self.last_words(self._ended)
            os._exit(self._ended.status)

    def _say(self, sentence: str) -> End:
        """Speaks for a rank that cannot, unless a rank has said something before."""
        self._words.compare_set("end", "", json.dumps(End("failed", sentence, 1)))
        return self._said()

    def _said(self) -> End | None:
        """What the first rank that ended has said."""
        return End(*json.loads(self._words.get("end"))) if self._words.check(["end"]) else None

    def _dead(self) -> End | None:
        """A rank on this machine whose process has ended without a word: killed, by a person or for its memory."""
        for rank, pid in self._beside.items():
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                if not self._words.check([f"left {rank}"]):
                    return self._say(f"rank {rank} (process {pid}) died (killed?)")
        return None


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """int64 scalar; unlike a sum of values it tells 0.0 from -0.0, and a NaN equals itself."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().reshape(-1).view(bits).sum(dtype=torch.int64)
