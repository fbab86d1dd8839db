"""Grafting as training goes on: an object that steps like a learning rate scheduler."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import GraftingError
from .grafting import Criterion, Layers, Level, Selection, compute, graft
from .information import entropy
from .rings import Checkpoint, Exchange, FileRing
from .states import load_plain_state, plain_state

logger = logging.getLogger("filter_grafting")


class Grafting:
    """Grafts a model with its neighbour in a ring as training goes on; steps like a learning rate scheduler.

        grafting = Grafting(model, ring)
        for epoch in range(grafting.round, epochs):
            train(model)
            test(model)
            if epoch + 1 < epochs:
                grafting.step()

    Args:
        model: trained as it is, wrapped or not.
        exchange: how weights get from one network to the next: a FileRing, a ProcessGroupRing, or whatever has
            `swap(state, round)`. From a FileRing made with `resume=True` the newest checkpoint of this network is
            loaded, and grafted as it would have been; `round` is the one after it.
        a, c, level, layers, exclude, criterion: see `graft`.
        every, warmup: only every `every`-th call of `step` grafts, and none of the first `warmup`.
        checkpoint: the optimizer, and whatever else has `state_dict` and `load_state_dict`, by name: published with
            the weights by a FileRing, and put back when it resumes.

    Raises:
        ValueError: if an argument is out of its range.
        GraftingError: as the exchange and `graft` raise it.
    """

    def __init__(
        self,
        model: nn.Module,
        exchange: Exchange,
        a: float = 0.4,
        c: float = 500,
        level: Level = "layer",
        *,
        layers: Selection = None,
        exclude: Sequence[str] = (),
        criterion: Criterion = entropy,
        every: int = 1,
        warmup: int = 0,
        checkpoint: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value, low in ("every", every, 1), ("warmup", warmup, 0):
            if value < low:
                raise ValueError(f"{name}: got {value}, expected at least {low}")
        if checkpoint and not isinstance(exchange, FileRing):
            raise ValueError(f"checkpoint: a {type(exchange).__name__} keeps none; save these states yourself")
        copies = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
        if isinstance(exchange, FileRing) and any(module.process_group.size() > 1 for module in copies):
            raise GraftingError(
                "a FileRing would graft the copy of one rank, and DistributedDataParallel does not tell the others: "
                "give all ranks an exchange that does, as in docs/library.md, Exchanges"
            )
        # What the first graft would refuse is refused now, not after an epoch: the model is compared with itself.
        compute(model, plain_state(model), a, c, level, layers, exclude, criterion)
        self.model = model
        self.exchange = exchange
        self.every = every
        self.warmup = warmup
        self.checkpoint = dict(checkpoint or {})
        self.round = 0  # of the next call of `step`
        self._graft = partial(graft, model, a=a, c=c, level=level, layers=layers, exclude=exclude, criterion=criterion)
        if isinstance(exchange, FileRing) and (last := exchange.newest()) is not None:
            self._resume(exchange, last)

    def step(self) -> Layers | None:
        """Counts a round, and grafts if it is due: gives this network's weights, waits for its neighbour's, blends.

        Returns: what `graft` returns; None if no graft was due.
        """
        found = None
        if self.round >= self.warmup and (self.round + 1) % self.every == 0:
            # With a FileRing, what is to be kept beside the weights; no other exchange was given any.
            extra = [{name: part.state_dict() for name, part in self.checkpoint.items()}] if self.checkpoint else []
            neighbour = self.exchange.swap(plain_state(self.model), self.round, *extra)
            found = self._graft(neighbour)
        self.round += 1
        return found

    def _resume(self, ring: FileRing, last: Checkpoint) -> None:
        for name in self.checkpoint:
            if not isinstance(last.extra, Mapping) or name not in last.extra:
                raise GraftingError(f"checkpoint: {last.path} holds no state of {name!r}; leave it out to go without")
        load_plain_state(self.model, last.state)
        for name, part in self.checkpoint.items():
            part.load_state_dict(last.extra[name])
        logger.info("network %d continues after round %d, from %s", ring.network, last.round, last.path)
        self._graft(ring.wait(last.round))
        self.round = last.round + 1

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of the caller's own, to be saved with the model as it is after `step`."""
        return {"round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the round of the caller's own checkpoint, whose weights have been grafted already."""
        self.round = state["round"]
