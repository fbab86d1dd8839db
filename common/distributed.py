"""Several processes that train one network together (`torchrun`): who they are, and how they stay together."""

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn

from filter_grafting.errors import GraftingError

POLL_SECONDS = 0.05


class World:
    """The processes ("ranks") of one network; a single one where the script was not started by `torchrun`.

    Rank 0 alone writes, waits for the neighbour and grafts; it tells the others what came of it through torchrun's
    key-value store, which they ask in a loop: a collective operation would end in a time-out, or not hear a signal,
    while rank 0 waits for hours for a neighbour.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size, self.store = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), None
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            self.store, _, _ = next(dist.rendezvous("env://"))
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=self.store, rank=self.rank, world_size=self.size
            )

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, topic: str, message: str = "") -> None:
        """Rank 0 tells the others something, once per topic."""
        if self.store is not None:
            self.store.set(topic, message or " ")

    def hear(self, topic: str, check: Callable[[], None]) -> str:
        """The others wait until rank 0 has told it; `check` is called meanwhile, and raises to end the wait."""
        while not self.store.check([topic]):
            check()
            time.sleep(POLL_SECONDS)
        return self.store.get(topic).decode().strip()

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all ranks, on each of them."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def align(self, tensors: Iterable[Tensor]) -> None:
        """Gives all ranks rank 0's values, and makes sure of it.

        Raises:
            GraftingError: if the ranks' weights still differ.
        """
        if self.size == 1:
            return
        tensors = list(tensors)
        for tensor in tensors:
            dist.broadcast(tensor, 0)
        digest = torch.stack([tensor.double().sum() for tensor in tensors])
        digests = [torch.empty_like(digest) for _ in range(self.size)]
        dist.all_gather(digests, digest)
        if not all(torch.equal(digest, other) for other in digests):
            raise GraftingError(f"rank {self.rank}: the weights of the {self.size} ranks differ after grafting")

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, wrapped so that every backward pass averages the gradients over the ranks."""
        if self.size == 1:
            return network
        return nn.parallel.DistributedDataParallel(network)

    def blame(self, state: str, sentence: str) -> None:
        """Leaves the reason for this rank's end ("failed" or "stopped") for the others to find."""
        if self.store is not None and not self.failure():
            with suppress(RuntimeError):  # the store is gone: torchrun is ending us all
                self.store.set(state, f"rank {self.rank}: {sentence}")

    def failure(self) -> str | None:
        """The reason that another rank left before it ended."""
        with suppress(RuntimeError):
            if self.store is not None and self.store.check(["failed"]):
                return self.store.get("failed").decode()
        return None

    def stopping(self) -> bool:
        """Whether another rank has ended because of a signal."""
        with suppress(RuntimeError):
            return self.store is not None and self.store.check(["stopped"])
        return False

    def leave(self) -> None:
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
