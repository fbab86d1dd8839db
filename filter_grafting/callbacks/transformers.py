"""Grafting inside the Trainer of Hugging Face's transformers."""

from typing import Any

from .. import Exchange, GraftingError
from ..grafting import Layers
from . import TrainerGrafting

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import has_length
except ImportError as error:
    raise ImportError(
        "filter_grafting.callbacks.transformers needs transformers and accelerate, which cannot be imported: "
        "pip install transformers[torch]"
    ) from error


class GraftingCallback(TrainerCallback):
    """Grafts the model that a Trainer trains with its neighbour's, before an epoch or a step.

        with FileRing("run", i, 2, resume=True) as ring:
            trainer = Trainer(model, arguments, train_dataset=data, callbacks=[GraftingCallback(ring)])
            trainer.train(resume_from_checkpoint=get_last_checkpoint(arguments.output_dir))

    Each network is one process with one Trainer and an `output_dir` of its own. A resumed network goes on from the
    Trainer's checkpoint; whether a graft is due follows from its step alone. The ring's checkpoints are for its reader.
    Where the Trainer saves every K grafts only, give `FileRing(keep=K + networks)`, so that the neighbour's weights of
    the rounds to repeat are still there.

    Args:
        ring: a FileRing, or whatever has `swap(state, round)`; a round is the number of the epoch or step before it.
        every_n_epochs, every_n_steps: of so many epochs (1 by default) or optimizer steps, the last one is followed by
            a graft, but not the very last one.
        options: `a`, `c`, `level`, `layers`, `exclude`, `criterion`, `warmup` (in epochs or steps): see `Grafting`.

    Attributes:
        layers: what the last graft found (see `graft`), None before the first.

    Raises:
        ValueError, GraftingError: as training starts, or at a graft: see `Grafting`.
    """

    def __init__(
        self, ring: Exchange, every_n_epochs: int | None = None, every_n_steps: int | None = None, **options: Any
    ) -> None:
        if every_n_epochs is not None and every_n_steps is not None:
            raise ValueError("every_n_epochs and every_n_steps: got both, expected one of them")
        self.layers: Layers | None = None
        self._by_steps = every_n_steps is not None
        every = every_n_steps if every_n_steps is not None else 1 if every_n_epochs is None else every_n_epochs
        self._grafting = TrainerGrafting(ring, every, options)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self._by_steps and not has_length(kwargs["train_dataloader"]):
            raise ValueError("every_n_epochs: the data have no length, so no epochs; expected every_n_steps")
        self._has_begun = False  # an epoch; the first one of a training that is resumed may begin in its midst
        self._grafted = 0  # the step before which a graft was due last
        is_deepspeed = getattr(args, "deepspeed_plugin", None) is not None
        self._grafting.start(kwargs["model"], args.world_size, state.global_step, is_deepspeed)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        epoch = 0.0 if self._by_steps else state.epoch or 0.0
        if epoch == int(epoch) > 0:
            self.layers = self._grafting.step(int(epoch)) or self.layers
        elif epoch != int(epoch) and self._has_begun:
            raise GraftingError(f"the epoch ended at {epoch:g}, before the end of its data: give every_n_steps")
        self._has_begun = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._grafting.progress()
        # Where data end within an accumulation, the next epoch begins at the same step.
        if self._by_steps and state.global_step > self._grafted:
            self._grafted = state.global_step
            self.layers = self._grafting.step(state.global_step) or self.layers

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        self._grafting.progress()
