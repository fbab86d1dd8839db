"""Grafting: how much of its own a layer keeps, and the blend with its neighbour's (paper, section 3.3).

Every layer of a network with weights W is blended with the same layer of its neighbour in the ring:

    W  <-  w * W + (1 - w) * W_neighbour        w = A/pi * arctan(c * (H - H_neighbour)) + 1/2

so that the more information (entropy H) a layer holds, compared with its neighbour's, the more of its own it keeps.
`coefficient` is w, `blend` the sum, `graft` does it to a model, and `compute` shows how, step by step.
"""

import functools
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import get_total_norm

from . import filter_level
from .errors import MismatchError
from .information import entropy
from .states import advice, local, paired, placed, plain_modules, plain_state, whole

logger = logging.getLogger("filter_grafting")


class Layer(NamedTuple):
    """A layer beside its neighbour's: entropies in nats (or what another criterion gave), and the share it keeps."""

    own_entropy: float
    neighbour_entropy: float
    coefficient: Any  # a float; at filter level a tensor with a share for each filter, (filters,)


Layers: TypeAlias = dict[str, Layer]  # by name of the module
Level: TypeAlias = Literal["layer", "filter"]
Selection: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool] | None
Criterion: TypeAlias = Callable[[Tensor], float]
Blends: TypeAlias = list[tuple[Tensor, Tensor]]  # a tensor of the model, and what it becomes


def coefficient(own_entropy: float, neighbour_entropy: float, a: float = 0.4, c: float = 500) -> float:
    """Share of its own weights that a layer keeps: `w = A/pi * arctan(c * (H_own - H_neighbour)) + 1/2`.

    Rounded to 2 decimals, as published. (The paper's formula lacks the pi; the published code divides by it, which
    alone keeps w within [0, 1].)

    Args:
        own_entropy, neighbour_entropy: in nats, or what another criterion gave.
        a: A, within [0, 1]: w stays within [(1-A)/2, (1+A)/2].
        c: steepness, at least 0.

    Raises:
        ValueError: if a, c or an entropy is out of its range or not finite.
    """
    check_ranges(a, c)
    if not (math.isfinite(own_entropy) and math.isfinite(neighbour_entropy)):
        raise ValueError(f"entropies: got {own_entropy} and {neighbour_entropy}, expected finite values")
    return round(a / math.pi * math.atan(c * (own_entropy - neighbour_entropy)) + 0.5, 2)


def check_ranges(a: float, c: float) -> None:
    if not 0 <= a <= 1:
        raise ValueError(f"a: got {a}, expected a value from 0 to 1")
    if not 0 <= c < math.inf:
        raise ValueError(f"c: got {c}, expected a finite value of at least 0")


def blend(own: Tensor, neighbour: Tensor, w: float | Tensor) -> Tensor:
    """`w * own + (1 - w) * neighbour`, computed in fp32 or better, returned in the type of `own`.

    By `lerp`, own + (1 - w) * (neighbour - own), which leaves constants that both have exactly as they are.
    """
    kind = torch.promote_types(torch.promote_types(own.dtype, neighbour.dtype), torch.float32)
    w = w.to(kind) if isinstance(w, Tensor) else w
    return torch.lerp(own.to(kind), neighbour.to(kind), 1 - w).to(own.dtype)


def graft(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float = 0.4,
    c: float = 500,
    level: Level = "layer",
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
    integers and booleans (`num_batches_tracked`, masks) stay the network's own. At filter level, so does whatever
    belongs to no filter of the chain: the bias of the classifier, and further linear layers. Of entries that share
    memory, the first one's coefficient counts. A wrapped model (torch.compile, DistributedDataParallel, FSDP2) is
    looked through, as is a neighbour's state dict under wrapped names.

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
            coefficient of the one before it.) A layer is judged by its `weight`, or else by the largest of the tensors
            that it has or that a parametrization computes its weight from; a pruned one by what is left of it.
        exclude: patterns of entries, by plain name (`("head.*",)`), that stay the network's own and are not compared.
            A tensor with several names stays as it is if a pattern covers one of them.
        criterion: what is compared in the place of entropy: a function of a weight to a float, such as `l1_norm`.

    Returns: by plain module name, both entropies and the coefficient, at filter level a tensor (filters,).

    Raises:
        ValueError: if a, c, level, layers or exclude is not what it should be.
        MismatchError: (a ValueError) naming the first entry that differs in name, shape or kind, holds a value that
            is not finite, or cannot be blended. The model is untouched in any of these cases.
    """
    found, blends = compute(model, neighbour, a, c, level, layers, exclude, criterion)
    write(blends)
    return found


def graft_ring(
    models: Sequence[nn.Module],
    a: float = 0.4,
    c: float = 500,
    level: Level = "layer",
    *,
    layers: Selection = None,
    exclude: Sequence[str] = (),
    criterion: Criterion = entropy,
) -> list[Layers]:
    """Grafts a ring of N models in one process, in place: each with the weights that the one before it had.

    The first model's neighbour is the last. All blends are computed before the first model is changed. At layer level
    two networks hold the same weights after it (up to rounding), since their coefficients add up to 1; more do not.

    Args:
        models: at least two, all different; see `graft` for the rest, and for the errors raised.

    Returns: what `graft` returns, for each model.
    """
    if len(models) < 2 or len({id(model) for model in models}) < len(models):
        raise ValueError(f"models: got {len(models)}, expected at least two, each a model of its own")
    states = [plain_state(model) for model in models]
    grafts = [compute(model, states[k - 1], a, c, level, layers, exclude, criterion) for k, model in enumerate(models)]
    for _, blends in grafts:
        write(blends)
    return [found for found, _ in grafts]


@torch.no_grad()
def compute(
    model: nn.Module,
    neighbour: Mapping[str, Tensor],
    a: float,
    c: float,
    level: Level = "layer",
    layers: Selection = None,
    exclude: Sequence[str] = (),
    criterion: Criterion = entropy,
) -> tuple[Layers, Blends]:
    """What a graft finds, and what it makes of each entry. Raises all errors of `graft`, and changes nothing."""
    check_ranges(a, c)
    if level not in ("layer", "filter"):
        raise ValueError(f"level: got {level!r}, expected 'layer' or 'filter'")
    if level == "filter" and layers is not None:
        raise ValueError("layers: at level 'filter' the chain's batch norms set the coefficients; expected None")
    entries, own, other = paired(model, neighbour, exclude)
    for side, state in ("the network", own), (f"its neighbour {other.source}".strip(), other):
        _check_finite(side, {key: whole(state[key]).detach() for key in entries})
    weights = _weights(model, entries, level, layers)  # of the layers that set a coefficient, by module
    entropies = {
        name: (_measure(own, key, entries, criterion), _measure(other, key, entries, criterion))
        for name, key in weights.items()
    }
    shares: Iterable[tuple[str, float | Tensor]]  # w of each entry
    if level == "filter":
        chain = filter_level.chain(model)
        of_filters = filter_level.coefficients(chain, entries, other)
        found = {name: Layer(*entropies[name], of_filters[name]) for name in weights}
        shares = filter_level.shares(chain, entries, of_filters)
    else:
        found = {name: Layer(*entropies[name], coefficient(*entropies[name], a, c)) for name in weights}
        shares = _shares(entries, found)
    blends = []
    for key, w in shares:  # of a sharded entry, this process's shard
        entry = local(entries[key].detach())
        blends.append((entry, blend(entry, local(placed(other[key], entries[key])), w)))
    return found, blends


@torch.no_grad()
def write(blends: Blends) -> None:
    """Changes the model. Of entries that share memory, the first is written last: it counts, wherever it lies."""
    for entry, blended in reversed(blends):
        if 0 in entry.stride():  # a value that is repeated without a copy is written once
            once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in entry.stride())
            entry, blended = entry[once], blended[once]
        entry.copy_(blended)


def _shares(entries: Iterable[str], found: Mapping[str, Layer]) -> Iterator[tuple[str, float]]:
    """(key, w) of each entry, in state-dict order: that of its own layer, or of the nearest before it that has one."""
    layer = next(iter(found.values()))
    for key in entries:
        layer = found.get(_module_of(key), layer)
        yield key, layer.coefficient


def _module_of(key: str) -> str:
    """The module that an entry belongs to: what a parametrization keeps belongs to the layer that it parametrizes."""
    parts = key.split(".")
    return ".".join(parts[: parts.index("parametrizations")] if "parametrizations" in parts else parts[:-1])


def _check_finite(side: str, entries: Mapping[str, Tensor]) -> None:
    if get_total_norm(entries.values()).isfinite():  # of all at once: quick, and one wait for the device
        return
    for key, entry in entries.items():
        if not entry.isfinite().all():
            raise MismatchError(f"{key}: {side} holds a value that is not finite{advice(key)}")


def _measure(state: Mapping[str, Tensor], key: str, entries: Mapping[str, Tensor], criterion: Criterion) -> float:
    """What the criterion, such as the entropy, gives for a weight in one of the two state dicts."""
    weight = whole(state[key]).detach().to(entries[key].device)
    mask = state.get(f"{key.removesuffix('_orig')}_mask")  # of a pruned layer, what is left counts
    try:
        value = float(criterion(weight if mask is None else weight * mask.to(weight)))
    except ValueError as error:
        raise MismatchError(f"{key}: {error}{advice(key)}") from error
    if not math.isfinite(value):
        raise MismatchError(f"{key}: the criterion gave {value}, expected a finite value{advice(key)}")
    return value


def _weights(model: nn.Module, entries: Mapping[str, Tensor], level: Level, layers: Selection) -> dict[str, str]:
    """By plain name of each module that sets a coefficient: the entry whose values the criterion is given."""
    modules, selects = plain_modules(model), _selector(layers)
    parts: dict[str, list[str]] = defaultdict(list)
    for key in entries:
        parts[_module_of(key)].append(key)
    rank = {key: (key.split(".")[-1] == "weight", entry.dim(), entry.numel()) for key, entry in entries.items()}
    selected = [name for name, module in modules.items() if name in parts and selects(module)]
    weights = {name: max(parts[name], key=rank.__getitem__) for name in selected}
    held = sum(entries[key].numel() for name in weights for key in parts[name])
    share = held / max(1, sum(entry.numel() for entry in entries.values()))
    if not weights or (level == "layer" and layers is None and share < 0.1):
        sizes: Counter[str] = Counter()
        for module in modules.values():
            sizes[type(module).__name__] += sum(parameter.numel() for parameter in module.parameters(recurse=False))
        most = " and ".join(kind for kind, size in sizes.most_common(2) if size)
        how = "layers=(nn.Conv2d, nn.Linear), types or a function of a module, lets other layers set their own"
        kind, advised = type(modules[""]).__name__, f"{how} (most weights are in {most})"
        if not weights and level == "filter":
            raise MismatchError(f"{kind} has no convolution, and level 'filter' needs a chain of them")
        if not weights:
            what = "convolution (nn.ConvNd)" if layers is None else "layer that layers= selects"
            raise MismatchError(f"{kind} has no {what} to compare; {advised}")
        _warn_once(f"{kind}: convolutions hold {share:.1%} of the weights and set all coefficients; {advised}")
    return weights


def _selector(layers: Selection) -> Callable[[nn.Module], bool]:
    kinds = _ConvNd if layers is None else layers
    if isinstance(kinds, (type, tuple)):
        return lambda module: isinstance(module, kinds)
    if not callable(kinds):
        raise ValueError(f"layers: got {kinds!r}, expected a type, a tuple of types, or a function of a module")
    return kinds


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
