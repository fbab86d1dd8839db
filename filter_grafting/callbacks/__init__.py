"""Grafting inside a trainer: `callbacks.lightning` and `callbacks.transformers` have a GraftingCallback each."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn

from .. import Exchange, FileRing, Grafting, GraftingError
from ..grafting import Layers


class TrainerGrafting:
    """What the callbacks share: grafts a model whose epochs or steps, and checkpoints, are a trainer's.

    The trainer tests and saves the model at the end of an epoch, and this grafts it before the next batch. So what was
    tested and saved is the network's own, a resumed network first grafts, and after the last epoch nothing is grafted.

    Args:
        exchange: a FileRing, or whatever has `swap(state, round)`.
        every: of so many epochs or steps, the last one is followed by a graft.
        options: `a`, `c`, `level`, `layers`, `exclude`, `criterion` and `warmup` of `Grafting`.
    """

    def __init__(self, exchange: Exchange, every: int, options: Mapping[str, Any]):
        self.exchange, self.every, self.options = exchange, every, dict(options)
        self._batches = 0

    def start(self, model: nn.Module, processes: int, finished: int, is_deepspeed: bool) -> None:
        """Takes the model, after so many steps or epochs; what a graft would do wrong is refused before it trains."""
        if processes > 1:
            raise GraftingError(
                f"the trainer spreads one network over {processes} processes; start each network as one process of its "
                f"own, without torchrun, and let them exchange by a FileRing"
            )
        if is_deepspeed:
            raise GraftingError("DeepSpeed writes its own copies of the weights over each graft; train without it")
        ring = self.exchange
        if not finished and isinstance(ring, FileRing) and ring._rounds(ring.network):
            raise GraftingError(
                f"the trainer starts anew, but network {ring.network} has published in {ring.directory}, where its "
                f"neighbour's earlier weights would be grafted: resume the trainer from its own checkpoint, or give "
                f"another directory"
            )
        # Without the ring's own checkpoints: a run is resumed from the trainer's, which the trainer has loaded.
        swap_only = SimpleNamespace(swap=ring.swap)
        self._grafting = Grafting(model, swap_only, every=self.every, **self.options)

    def progress(self) -> None:
        """Says that one more batch was begun: a trainer that hangs is not waited for because its heart beats."""
        self._batches += 1
        if isinstance(self.exchange, FileRing):
            self.exchange.progress(self._batches)

    def step(self, finished: int) -> Layers | None:
        """Grafts if that is due after so many epochs or steps of training, with `finished - 1` for the round."""
        self._grafting.load_state_dict({"round": finished - 1})
        return self._grafting.step()
