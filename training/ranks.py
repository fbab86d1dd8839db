"""One network trained by several processes, as torchrun starts them: a GPU each, one batch in equal parts."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from training.flags import world


class Ranks:
    """The processes ("ranks") of this network; a single one where the script was not started by torchrun.

    The save directory, the log and the grafting are rank 0's. If one ends, its connections break and torchrun ends the
    others: failure handling is torch's own.
    """

    def __init__(self, device: torch.device):
        self.rank, self.size = world()
        if self.size > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            # While rank 0 waits for its neighbour the others wait for rank 0, for hours if need be: not on the GPU,
            # where a collective operation that takes minutes counts as hung.
            self._patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def tell(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank, however long it takes to come by it."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, 0, group=self._patient)
        return values[0]

    def sum(self, totals: Tensor) -> Tensor:
        """Sum over all ranks, in place, on each of them."""
        if self.size > 1:
            dist.all_reduce(totals)
        return totals

    def broadcast(self, model: nn.Module) -> None:
        """Gives every rank rank 0's weights and batch-norm statistics."""
        if self.size > 1:
            dist.barrier(group=self._patient)
            for entry in model.state_dict().values():
                dense = entry.contiguous()  # weights in channels_last format are not, as NCCL and Gloo see it
                dist.broadcast(dense, 0)
                entry.copy_(dense)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, such that every backward pass averages the gradients over the ranks."""
        if self.size == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.size > 1 and error is None:  # else the others are to see the connection break
            dist.destroy_process_group()
