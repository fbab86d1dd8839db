"""Grafting inside a Lightning Trainer, of the package `lightning` or `pytorch_lightning`."""

from typing import Any

from .. import Exchange
from ..grafting import Layers
from . import TrainerGrafting

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DeepSpeedStrategy
except ImportError:
    try:
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
        from pytorch_lightning.strategies import DeepSpeedStrategy  # type: ignore[assignment]
    except ImportError as error:
        raise ImportError(
            "filter_grafting.callbacks.lightning needs Lightning, which cannot be imported: pip install lightning"
        ) from error


class GraftingCallback(Callback):
    """Grafts the module that a Trainer trains with its neighbour's, before the first batch of an epoch.

        with FileRing("run", i, 2, resume=True) as ring:
            trainer = Trainer(max_epochs=10, callbacks=[GraftingCallback(ring), ModelCheckpoint(save_last=True)])
            trainer.fit(module, batches, ckpt_path="last")

    Each network is one process with one Trainer. A resumed network goes on from the Trainer's checkpoint, of which its
    grafts so far are a part; the ring's checkpoints are for its reader. Where the Trainer saves every K grafts only,
    give `FileRing(keep=K + networks)`, so that the neighbour's weights of the rounds to repeat are still there.

    Args:
        ring: a FileRing, or whatever has `swap(state, round)`; a round is the number of the epoch before it.
        every_n_epochs: of so many epochs, the last one is followed by a graft, but not the very last one.
        options: `a`, `c`, `level`, `layers`, `exclude`, `criterion`, `warmup` (in epochs): see `Grafting`.

    Attributes:
        layers: what the last graft found (see `graft`), None before the first.

    Raises:
        ValueError, GraftingError: as training starts, or at a graft: see `Grafting`.
    """

    def __init__(self, ring: Exchange, every_n_epochs: int = 1, **options: Any) -> None:
        self.layers: Layers | None = None
        self._grafting = TrainerGrafting(ring, every_n_epochs, options)
        self._begun = 0  # the epoch at whose head a graft was due, or was none

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_deepspeed = isinstance(trainer.strategy, DeepSpeedStrategy)
        finished = trainer.global_step or trainer.current_epoch  # an optimizer of the module's own leaves steps at 0
        self._grafting.start(pl_module, trainer.world_size, finished, is_deepspeed)

    # Not on_train_epoch_start: where a checkpoint is of the end of an epoch, Lightning may leave out the next one's.
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._grafting.progress()
        if trainer.current_epoch > self._begun:
            self.layers = self._grafting.step(trainer.current_epoch) or self.layers
            self._begun = trainer.current_epoch

    def on_validation_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self._grafting.progress()

    def state_dict(self) -> dict[str, Any]:
        return {"begun": self._begun}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._begun = state_dict["begun"]
