"""Grafting: how much of its own a layer keeps, and the blend with its neighbour's (paper, section 3.3)."""

import functools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from . import filter_level
from .errors import GraftingError, MismatchError
from .information import entropy
from .rings import Checkpoint, Exchange, FileRing
from .states import (
    State,
    advice,
    as_patterns,
    blendable,
    check_alike,
    check_patterns,
    is_excluded,
    load_plain_state,
    local,
    placed,
    plain_modules,
    plain_names,
    plain_state,
    storage,
    whole,
)

logger = logging.getLogger("filter_grafting")

LEVELS = ("layer", "filter")


class Layer(NamedTuple):
    """A layer beside its neighbour's: entropies in nats (or what another criterion gave), and the share it keeps."""

    own_entropy: float
    neighbour_entropy: float
    coefficient: float


class FilterLayer(NamedTuple):
    """The same at filter level, with a share for each filter: (filters,)."""

    own_entropy: float
    neighbour_entropy: float
    coefficient: Tensor


class Stateful(Protocol):
    """An optimizer, a learning rate schedule, or whatever else has a state."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


Layers: TypeAlias = dict[str, Layer] | dict[str, FilterLayer]
Selection: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool] | None
Criterion: TypeAlias = Callable[[Tensor], float]
Blend: TypeAlias = tuple[Tensor, Tensor, float | Tensor]  # own values, the neighbour's, share of the own


def coefficient(own_entropy: float, neighbour_entropy: float, a: float = 0.4, c: float = 500) -> float:
    """Share of its own weights that a layer keeps: `w = A/pi * arctan(c * (H_own - H_neighbour)) + 1/2`.

    Rounded to 2 decimals, as published. (The paper's formula lacks the pi; the published code divides by it, which
    alone keeps w within [0, 1].)

    Args:
        own_entropy, neighbour_entropy: in nats.
        a: A, within [0, 1]: w stays within [(1-A)/2, (1+A)/2].
        c: steepness, at least 0.

    Raises:
        ValueError: if a, c or an entropy is out of its range or not finite.
    """
    if not 0 <= a <= 1:
        raise ValueError(f"a: got {a}, expected a value from 0 to 1")
    if not 0 <= c < math.inf:
        raise ValueError(f"c: got {c}, expected a finite value of at least 0")
    if not (math.isfinite(own_entropy) and math.isfinite(neighbour_entropy)):
        raise ValueError(f"entropies: got {own_entropy} and {neighbour_entropy}, expected finite values")
    return round(a / math.pi * math.atan(c * (own_entropy - neighbour_entropy)) + 0.5, 2)


def check_arguments(a: float, c: float, level: str, layers: Selection = None) -> None:
    """Raises a ValueError that names the first argument of `graft` that is not what it should be."""
    coefficient(0, 0, a, c)
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")
    if level == "filter" and layers is not None:
        raise ValueError("layers: at level 'filter' the chain's batch norms set the coefficients; expected None")
    kinds = layers if isinstance(layers, tuple) else () if layers is None or callable(layers) else (layers,)
    if not all(isinstance(kind, type) for kind in kinds):
        raise ValueError(f"layers: got {layers!r}, expected a type, a tuple of types, or a function of a module")


@overload
def graft(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float = ...,
    c: float = ...,
    level: Literal["layer"] = ...,
    *,
    layers: Selection = ...,
    exclude: Sequence[str] = ...,
    criterion: Criterion = ...,
) -> dict[str, Layer]: ...
@overload
def graft(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float = ...,
    c: float = ...,
    *,
    level: Literal["filter"],
    exclude: Sequence[str] = ...,
    criterion: Criterion = ...,
) -> dict[str, FilterLayer]: ...
@overload
def graft(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float = ...,
    c: float = ...,
    level: str = ...,
    *,
    layers: Selection = ...,
    exclude: Sequence[str] = ...,
    criterion: Criterion = ...,
) -> Layers: ...
def graft(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float = 0.4,
    c: float = 500,
    level: str = "layer",
    *,
    layers: Selection = None,
    exclude: Sequence[str] = (),
    criterion: Criterion = entropy,
) -> Layers:
    """Blends a model, in place, with its neighbour's state dict: `W <- w * W_own + (1 - w) * W_neighbour`.

    Every network of a ring has to be blended with weights from before any was: call this with the neighbour's state
    as it was published, or a copy. For networks in one process, use `graft_ring`: a loop of
    `graft(models[i], models[i - 1].state_dict())` would give the second network the first one's grafted weights,
    which is not the method.

    Every floating-point or complex entry of the state dict is blended, in its own type, computed in fp32 or better;
    integers and booleans (`num_batches_tracked`, masks) stay the network's own. A wrapped model (torch.compile,
    DistributedDataParallel, FSDP2) is looked through, as is a neighbour's state dict under wrapped names.

    Args:
        model: any module with a convolution (or see `layers`), on any device; at filter level, a chain of them.
        neighbour: state dict of a network of the same architecture, on any device, in any floating-point type.
        a, c: see `coefficient`; without meaning at filter level.
        level: "layer": each layer that `layers` selects has its own coefficient, and every other entry takes that of
            the nearest such layer before it in the state dict (ahead of the first one: the first's).
            "filter": filter j of a convolution has the coefficient |gamma_own,j| / (|gamma_own,j| +
            |gamma_neighbour,j|), with the scale gamma of the batch norm that follows.
        layers: which modules set a coefficient: types, or a function of a module. None: every convolution, found by
            type. (The published code looks for "conv" in names, so that there a shortcut's convolution takes the
            coefficient of the one before it.) A parametrized layer is judged by the largest of the tensors that its
            weight is computed from, a pruned one by what is left of it.
        exclude: patterns of entries, by plain name (`("head.*",)`), that stay the network's own and are not compared.
        criterion: what is compared in the place of entropy: a function of a weight to a float, such as `l1_norm`.

    Returns: by plain module name, both entropies and the coefficient, at filter level a tensor (filters,).

    Raises:
        ValueError: if a, c, level or exclude is not what it should be.
        MismatchError: (a ValueError) naming the first entry that differs in name, shape or kind, holds a value that
            is not finite, or cannot be blended. The model is untouched in any of these cases.
    """
    found, blends = _plan(model, neighbour, a, c, level, layers, exclude, criterion)
    _blend(blends)
    return found


@overload
def graft_ring(
    models: Sequence[nn.Module],
    a: float = ...,
    c: float = ...,
    level: Literal["layer"] = ...,
    *,
    layers: Selection = ...,
    exclude: Sequence[str] = ...,
    criterion: Criterion = ...,
) -> list[dict[str, Layer]]: ...
@overload
def graft_ring(
    models: Sequence[nn.Module],
    a: float = ...,
    c: float = ...,
    level: str = ...,
    *,
    layers: Selection = ...,
    exclude: Sequence[str] = ...,
    criterion: Criterion = ...,
) -> list[Layers]: ...
def graft_ring(
    models: Sequence[nn.Module],
    a: float = 0.4,
    c: float = 500,
    level: str = "layer",
    *,
    layers: Selection = None,
    exclude: Sequence[str] = (),
    criterion: Criterion = entropy,
) -> Sequence[Layers]:
    """Grafts a ring of N models in one process, in place: each with the weights that the one before it had.

    The first model's neighbour is the last. All weights are copied before the first is changed. Two networks hold
    the same weights after it, since their coefficients of a layer add up to 1; more do not.

    Args:
        models: at least two, all different; see `graft` for the rest, and for the errors raised.

    Returns: what `graft` returns, for each model.
    """
    if len(models) < 2 or len({id(model) for model in models}) < len(models):
        raise ValueError(f"models: got {len(models)}, expected at least two, each a model of its own")
    states = [
        {key: entry.clone() if isinstance(entry, Tensor) else entry for key, entry in plain_state(model).items()}
        for model in models
    ]
    plans = [_plan(model, states[k - 1], a, c, level, layers, exclude, criterion) for k, model in enumerate(models)]
    for _, blends in plans:
        _blend(blends)
    return [found for found, _ in plans]


@torch.no_grad()
def _plan(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float,
    c: float,
    level: str,
    layers: Selection,
    exclude: Sequence[str],
    criterion: Criterion,
) -> tuple[Layers, list[Blend]]:
    """What a graft finds and what it will do; raises all of its errors, and changes nothing."""
    check_arguments(a, c, level, layers)
    if not isinstance(neighbour, Mapping):
        raise MismatchError(f"the neighbour is a {type(neighbour).__name__}: expected its state dict")
    own = plain_names(model.state_dict(keep_vars=True))
    other = State(
        {key: whole(entry) for key, entry in plain_names(neighbour).items()}, getattr(neighbour, "source", "")
    )
    check_patterns(exclude, [*own, *other])
    check_alike(own, other, exclude)
    entries = blendable(model, {key: entry for key, entry in own.items() if not is_excluded(key, exclude)}, other)
    weights = _weights(model, own, entries, layers)

    values = _judged(own, other, entries, set(weights.values()), criterion)
    if level == "filter":
        if any(local(entry) is not entry for entry in entries.values()):
            raise MismatchError("the model is sharded (DTensor): level 'filter' needs it whole; use level 'layer'")
        chain = filter_level.chain(model)
        shares = filter_level.coefficients(chain, entries, other)
        filters = {name: FilterLayer(*values[key], shares[name]) for name, key in weights.items()}
        return filters, _blends(entries, other, filter_level.shares(chain, entries, shares))
    found = {name: Layer(*values[key], coefficient(*values[key], a, c)) for name, key in weights.items()}
    return found, _blends(entries, other, _layer_shares(entries, found))


def _judged(
    own: Mapping[str, Any], other: State, entries: Iterable[str], weights: Collection[str], criterion: Criterion
) -> dict[str, tuple[float, float]]:
    """By key: what the criterion gives for both sides' weights. All entries are checked, and brought to one device."""
    sides = ("the network", own), (f"its neighbour{f' ({other.source})' if other.source else ''}", other)
    values = {}
    for key in entries:
        other[key] = other[key].to(own[key].device)
        for side, state in sides:
            if not _is_finite(whole(state[key])):
                raise MismatchError(f"{key}: {side} holds a value that is not finite{advice(key)}")
        if key in weights:
            try:
                values[key] = float(criterion(_effective(key, own))), float(criterion(_effective(key, other)))
                coefficient(*values[key])  # refuses what is not finite
            except ValueError as error:
                raise MismatchError(f"{key}: {error}{advice(key)}") from error
    return values


def _weights(
    model: nn.Module, own: Mapping[str, Any], entries: Mapping[str, Tensor], layers: Selection
) -> dict[str, str]:
    """By plain module name: the entry that each layer which sets a coefficient is judged by."""
    parts: dict[str, list[str]] = defaultdict(list)
    for key, entry in own.items():
        if isinstance(entry, Tensor) and (entry.is_floating_point() or entry.is_complex()):
            parts[_module_of(key)].append(key)
    modules, weights = plain_modules(model), {}
    for name in [name for name, module in modules.items() if _is_selected(module, layers)]:
        largest = max(parts[name], key=lambda key: (own[key].dim(), own[key].numel()), default="")
        key = f"{name}.weight".removeprefix(".")
        key = key if key in own else largest
        if not key or own[key].numel() == 0:
            raise MismatchError(f"{name} ({type(modules[name]).__name__}) has no weights to judge it by")
        if key in entries:
            weights[name] = key
    kind = type(modules[""]).__name__
    if not weights:
        what = "convolution (nn.ConvNd)" if layers is None else "layer that layers= selects"
        raise MismatchError(f"{kind} has no {what} to compare; {_layers_advice(modules.values())}")
    sizes: Counter[bool] = Counter()
    for key, entry in entries.items():
        sizes[_module_of(key) in weights] += entry.numel()
    if layers is None and (share := sizes[True] / sizes.total()) < 0.1:
        held = f"{kind}: convolutions hold {share:.1%} of the weights and set all coefficients"
        _warn_once(f"{held}; {_layers_advice(modules.values())}")
    return weights


def _layers_advice(modules: Iterable[nn.Module]) -> str:
    sizes: Counter[str] = Counter()
    for module in modules:
        sizes[type(module).__name__] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
    most = " and ".join(kind for kind, size in sizes.most_common(2) if size)
    how = "layers=(nn.Conv2d, nn.Linear), types or a function of a module, lets other layers set their own"
    return f"{how} (most weights are in {most})"


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _is_selected(module: nn.Module, layers: Selection) -> bool:
    layers = _ConvNd if layers is None else layers
    return isinstance(module, layers) if isinstance(layers, (type, tuple)) else layers(module)


def _module_of(key: str) -> str:
    """The module that an entry belongs to: what a parametrization keeps belongs to the layer that it parametrizes."""
    parts = key.split(".")
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts[:-1])


def _effective(key: str, state: Mapping[str, Tensor]) -> Tensor:
    """A layer's weight; of a pruned one, what is left of it."""
    weight, mask = whole(state[key]).detach(), state.get(f"{key.removesuffix('_orig')}_mask")
    return weight if mask is None else weight * mask.to(weight)


def _is_finite(entry: Tensor) -> bool:
    return entry.numel() == 0 or math.isfinite(entry.abs().max())


def _layer_shares(entries: Mapping[str, Tensor], found: Mapping[str, Layer]) -> Iterator[tuple[str, float]]:
    """(key, share) of each entry, in state-dict order: that of the nearest layer before it."""
    layer = next(iter(found.values()))
    for key in entries:
        layer = found.get(_module_of(key), layer)
        yield key, layer.coefficient


def _blends(
    entries: Mapping[str, Tensor], other: Mapping[str, Tensor], shares: Iterable[tuple[str, float | Tensor]]
) -> list[Blend]:
    """What to blend with what: a tensor under two names once; of a sharded one, this process's shard."""
    blends: dict[tuple[object, ...], tuple[str, Blend]] = {}
    kinds: dict[int, torch.dtype] = {}
    for key, share in shares:
        if key not in entries:
            continue
        own, theirs = local(entries[key].detach()), local(placed(other[key], entries[key]))
        if 0 in own.stride():  # repeated without a copy: one of each
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in own.stride())
            own, theirs = own[once], theirs[once]
        place = (storage(own), own.storage_offset(), own.shape, own.stride())
        first, blend = blends.setdefault(place, (key, (own, theirs, share)))
        if first != key and not torch.equal(theirs, blend[1]):
            raise MismatchError(f"{key}: in the network it is {first}, in its neighbour they differ{advice(key)}")
        if kinds.setdefault(storage(own), own.dtype) != own.dtype:
            raise MismatchError(f"{key}: it shares memory with an entry of another type{advice(key)}")
    return [blend for _, blend in blends.values()]


@torch.no_grad()
def _blend(blends: Sequence[Blend]) -> None:
    """`W <- w * W_own + (1 - w) * W_neighbour`, in place; where entries overlap in memory, the first one's w counts."""
    shared = Counter(storage(own) for own, _, _ in blends)
    done: dict[int, Tensor] = {}
    for own, other, share in blends:
        kind = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
        weight = 1 - (share.to(kind) if isinstance(share, Tensor) else share)
        mixed = own.to(kind).lerp(other.to(kind), weight)
        if shared[place := storage(own)] > 1:
            if place not in done:
                size = own.untyped_storage().nbytes() // own.itemsize
                done[place] = torch.zeros(size, dtype=torch.bool, device=own.device)
            covered = done[place].as_strided(own.shape, own.stride(), own.storage_offset())
            mixed = mixed.where(~covered, own.to(kind))
            covered.fill_(True)
        own.copy_(mixed)


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
        every, warmup: `step` grafts at every so manieth call only, and not in the first `warmup` ones.
        checkpoint: the optimizer, and whatever else has a state, by name: published with the weights by a FileRing,
            and put back when it resumes.

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
        level: str = "layer",
        *,
        layers: Selection = None,
        exclude: Sequence[str] = (),
        criterion: Criterion = entropy,
        every: int = 1,
        warmup: int = 0,
        checkpoint: Mapping[str, Stateful] | None = None,
    ) -> None:
        for name, value, low in ("every", every, 1), ("warmup", warmup, 0):
            if value < low:
                raise ValueError(f"{name}: got {value}, expected at least {low}")
        if checkpoint and not isinstance(exchange, FileRing):
            raise ValueError(f"checkpoint: a {type(exchange).__name__} keeps none; save these states yourself")
        # What would fail at the first graft fails now, not after an epoch: the model is compared with itself. A pattern
        # may be meant for entries that only the neighbour has.
        state = plain_state(model)
        patterns = [pattern for pattern in as_patterns(exclude) if any(is_excluded(key, pattern) for key in state)]
        _plan(model, state, a, c, level, layers, patterns, criterion)
        self.model = model
        self.exchange = exchange
        self.every = every
        self.warmup = warmup
        self.checkpoint = dict(checkpoint or {})
        self.round = 0  # of the next call of `step`
        self._graft = functools.partial(
            graft, model, a=a, c=c, level=level, layers=layers, exclude=exclude, criterion=criterion
        )
        if isinstance(exchange, FileRing) and (last := exchange.newest()) is not None:
            self._resume(exchange, last)

    def step(self) -> Layers | None:
        """Counts a round, and grafts if it is due: gives this network's weights, waits for its neighbour's, blends.

        Returns: what `graft` returns; None if no graft was due.
        """
        found = None
        if self.round >= self.warmup and (self.round + 1) % self.every == 0:
            state = plain_state(self.model)
            if isinstance(self.exchange, FileRing):
                extra = {name: part.state_dict() for name, part in self.checkpoint.items()}
                found = self._graft(self.exchange.swap(state, self.round, extra))
            else:
                found = self._graft(self.exchange.swap(state, self.round))
        self.round += 1
        return found

    def _resume(self, ring: FileRing, last: Checkpoint) -> None:
        for name in self.checkpoint:
            if not isinstance(last.extra, Mapping) or name not in last.extra:
                raise GraftingError(
                    f"checkpoint: {last.path} holds no state of {name!r}; leave it out to resume without"
                )
        load_plain_state(self.model, last.state)
        for name, part in self.checkpoint.items():
            part.load_state_dict(last.extra[name])
        self._graft(ring.wait(last.round))
        self.round = last.round + 1

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint of the caller's own, to be saved with the model as it is after `step`."""
        return {"round": self.round}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at the round of the caller's own checkpoint, whose weights have been grafted already."""
        self.round = state["round"]
