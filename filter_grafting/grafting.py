"""Grafting: how much of its own a layer keeps, and the blend with its neighbour's (paper, section 3.3)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import MismatchError
from .information import convolutions, entropies

LEVELS = ("layer", "filter")


def coefficient(own_entropy: float, neighbour_entropy: float, a: float = 0.4, c: float = 500) -> float:
    """Share of its own weights that a layer keeps: `w = A/pi * arctan(c * (H_own - H_neighbour)) + 1/2`.

    Rounded to 2 decimals, as published.

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


class Comparison(NamedTuple):
    """A convolution beside its neighbour's: entropies in nats, and the share of its own that it keeps."""

    own_entropy: float
    neighbour_entropy: float
    coefficient: float | Tensor  # a tensor (filters,) at filter level


def graft(
    network: nn.Module, neighbour: Mapping[str, Tensor], a: float = 0.4, c: float = 500, level: str = "layer"
) -> dict[str, float | Tensor]:
    """Blends a network, in place, with its neighbour's state dict: `W <- w * W_own + (1 - w) * W_neighbour`.

    Args:
        network: any module with a convolution, on any device; at filter level, a chain of them.
        neighbour: state dict of a network of the same architecture, on any device.
        a, c: see `coefficient`; without meaning at filter level.
        level: "layer": every convolution has its own coefficient, and every other floating-point entry of the
            state dict takes that of the nearest convolution before it (ahead of the first one: the first's).
            "filter": filter j has the coefficient |gamma_own,j| / (|gamma_own,j| + |gamma_neighbour,j|), with
            the scale gamma of the batch norm that follows.

    Returns: the coefficient of each convolution by module name; at filter level a tensor (filters,).

    Raises:
        MismatchError: (a ValueError) naming the first offending entry, if the two differ in keys, shapes or
            dtypes, hold a value that is not finite, or the network has no convolution (at filter level: no
            chain of them). The network is then untouched.
    """
    own = network.state_dict()
    neighbour = _beside(own, neighbour)
    layers = _compare(network, own, neighbour, a, c, level)
    coefficients = {name: layer.coefficient for name, layer in layers.items()}
    _blend(network, own, neighbour, coefficients, level)
    return coefficients


def compare(
    network: nn.Module, neighbour: Mapping[str, Tensor], a: float = 0.4, c: float = 500, level: str = "layer"
) -> dict[str, Comparison]:
    """First half of `graft`: checks that the two can be blended, and how; changes nothing."""
    own = network.state_dict()
    return _compare(network, own, _beside(own, neighbour), a, c, level)


def blend(
    network: nn.Module,
    neighbour: Mapping[str, Tensor],
    coefficients: Mapping[str, float | Tensor],
    level: str = "layer",
) -> None:
    """Second half of `graft`: `W <- w * W_own + (1 - w) * W_neighbour`, in place.

    Half-precision types are computed in fp32; integer entries (`num_batches_tracked`) are left alone. Whether
    all values are finite is for `compare` to check.
    """
    own = network.state_dict()
    _blend(network, own, _beside(own, neighbour), coefficients, level)


def check_alike(own: Mapping[str, Tensor], neighbour: Mapping[str, Tensor]) -> None:
    """Raises MismatchError unless both state dicts have the same keys, shapes and dtypes."""
    if not isinstance(neighbour, Mapping):
        raise MismatchError(f"the neighbour is a {type(neighbour).__name__}: expected its state dict")
    for key, entry in own.items():
        if key not in neighbour:
            raise MismatchError(f"{key}: in the network {_form(entry)}, in its neighbour missing")
        other = neighbour[key]
        if not isinstance(entry, Tensor) and not isinstance(other, Tensor):
            continue  # whatever a module keeps there of its own (`get_extra_state`): it is not blended
        if _kind(entry) != _kind(other):
            raise MismatchError(f"{key}: in the network {_form(entry)}, in its neighbour {_form(other)}")
    for key, other in neighbour.items():
        if key not in own:
            raise MismatchError(f"{key}: in the network missing, in its neighbour {_form(other)}")


def _kind(entry: object) -> tuple:
    return (entry.shape, entry.dtype) if isinstance(entry, Tensor) else (type(entry),)


def _form(entry: object) -> str:
    return f"{tuple(entry.shape)} {entry.dtype}" if isinstance(entry, Tensor) else f"a {type(entry).__name__}"


def _check_level(level: str) -> None:
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")


def _beside(own: Mapping[str, Tensor], neighbour: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The neighbour's floating-point entries, checked to be like the network's, and on the same devices."""
    check_alike(own, neighbour)
    return {
        # Asynchronous towards a GPU only: towards the CPU, an entry could be read before it has arrived.
        key: neighbour[key].to(entry.device, non_blocking=entry.is_cuda)
        for key, entry in own.items()
        if isinstance(entry, Tensor) and entry.is_floating_point()
    }


@torch.no_grad()
def _compare(
    network: nn.Module,
    own: Mapping[str, Tensor],
    neighbour: Mapping[str, Tensor],
    a: float,
    c: float,
    level: str,
) -> dict[str, Comparison]:
    _check_level(level)
    weights = {name: f"{name}.weight".removeprefix(".") for name in convolutions(network)}
    if not weights:
        raise MismatchError(f"{type(network).__name__} has no convolution (nn.ConvNd) to compare")
    for key in weights.values():
        if key not in neighbour or neighbour[key].numel() == 0:
            found = f"is {_form(own[key])}" if key in own else "is in no state dict (is it parametrized?)"
            raise MismatchError(f"{key} {found}: expected the floating-point weight of a convolution")
    shares = _filter_coefficients(network, own, neighbour) if level == "filter" else {}

    # Everything that the host has to know is read at once: a GPU is waited for a single time.
    sides = {"the network": own, "its neighbour": neighbour}
    keys = set(weights.values())
    entropy = entropies([state[key] for state in sides.values() for key in weights.values()])
    extremes = _extremes([state[key] for state in sides.values() for key in neighbour if key not in keys])
    numbers = torch.cat([entropy, *extremes]).tolist()
    if not all(map(math.isfinite, numbers)):
        for key in neighbour:
            for side, state in sides.items():
                if not state[key].isfinite().all():
                    raise MismatchError(f"{key}: {side} holds a value that is not finite")
    count = len(weights)
    pairs = zip(numbers[:count], numbers[count : 2 * count], strict=True)
    return {
        name: Comparison(*pair, shares[name] if level == "filter" else coefficient(*pair, a, c))
        for name, pair in zip(weights, pairs, strict=True)
    }


def _extremes(entries: Sequence[Tensor]) -> list[Tensor]:
    """Smallest and largest values, each of shape (1,): one is not finite if any value of an entry is not."""
    small = [entry if entry.dim() == 1 else entry.reshape(-1) for entry in entries if entry.numel() <= 1 << 16]
    groups = [torch.cat(small)] if small else []
    groups += [entry for entry in entries if entry.numel() > 1 << 16]
    return [extreme[None] for group in groups if group.numel() > 0 for extreme in torch.aminmax(group)]


@torch.no_grad()
def _blend(
    network: nn.Module,
    own: Mapping[str, Tensor],
    neighbour: Mapping[str, Tensor],
    coefficients: Mapping[str, float | Tensor],
    level: str,
) -> None:
    _check_level(level)
    done = set()
    for key, share in (_filter_level if level == "filter" else _layer_level)(network, own, coefficients):
        entry, other = own[key], neighbour[key]
        if (place := entry.data_ptr()) in done:  # one tensor under two names is blended once
            continue
        done.add(place)
        if isinstance(share, Tensor):
            share = share.to(torch.promote_types(entry.dtype, torch.float32))
        if entry.dtype in (torch.float32, torch.float64):
            entry.lerp_(other, 1 - share)
        else:
            entry.copy_(entry.float().lerp_(other.float(), 1 - share))


def _layer_level(
    network: nn.Module, own: Mapping[str, Tensor], coefficients: Mapping[str, float]
) -> Iterator[tuple[str, float]]:
    """(key, coefficient) of each floating-point entry, in state-dict order."""
    share = next(iter(coefficients.values()))
    for key, entry in own.items():
        share = coefficients.get(key.rpartition(".")[0], share)
        if isinstance(entry, Tensor) and entry.is_floating_point():
            yield key, share


def _chain(network: nn.Module) -> tuple[list[tuple[str, str]], str | None]:
    """The names of the convolutions, each with its batch norm's, in order, and of the classifier.

    Only an nn.Sequential has an order of execution that can be read off it: all convolutions must lie in one.
    """
    modules = dict(network.named_modules(remove_duplicate=False))
    names = list(convolutions(network))
    holders = {name.rpartition(".")[0] for name in names}
    holder = min(holders)
    if len(holders) > 1 or not isinstance(modules[holder], nn.Sequential):
        raise MismatchError(
            f"{type(network).__name__}: level 'filter' needs all convolutions in one nn.Sequential, each "
            f"followed by its batch norm, as in a VGG ({names[0]!r} is not); use level 'layer'"
        )
    children = [name for name in modules if name and name.rpartition(".")[0] == holder]
    chain, used, filters = [], set(), None
    for name, next_name in zip(children, [*children[1:], None], strict=True):
        layer, norm = modules[name], modules.get(next_name)
        if name not in names:
            continue
        fits = isinstance(norm, _BatchNorm) and norm.affine and norm.num_features == layer.out_channels
        fits = fits and layer.groups == 1 and not layer.transposed and filters in (None, layer.in_channels)
        if not fits or used & {layer, norm}:
            raise MismatchError(
                f"{name}: level 'filter' needs a plain convolution over all filters of the one before, and "
                f"right after it a batch norm with a scale, each used once; use level 'layer'"
            )
        used |= {layer, norm}
        filters = layer.out_channels
        chain.append((name, next_name))
    after = list(modules)[list(modules).index(chain[-1][0]) :]
    classifier = next((name for name in after if isinstance(modules[name], nn.Linear)), None)
    if classifier is not None and modules[classifier].in_features % filters:
        inputs = modules[classifier].in_features
        raise MismatchError(f"{classifier}: {inputs} inputs do not divide by the {filters} filters before it")
    return chain, classifier


def _filter_coefficients(
    network: nn.Module, own: Mapping[str, Tensor], neighbour: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """`w_j = |gamma_own,j| / (|gamma_own,j| + |gamma_neighbour,j|)`, 1/2 where both are 0: by layer."""
    shares = {}
    for name, norm in _chain(network)[0]:
        gamma = own[f"{norm}.weight"]
        kind = torch.promote_types(gamma.dtype, torch.float32)
        mine, other = gamma.to(kind).abs(), neighbour[f"{norm}.weight"].to(kind).abs()
        total = mine + other
        shares[name] = (mine / total).masked_fill(total == 0, 0.5)
    return shares


def _filter_level(
    network: nn.Module, own: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(key, coefficients that broadcast to the entry) of everything that belongs to a filter of the chain.

    A weight (o, i) is blended with `w_o * w_i`; w_i is of the filter that made input channel i. Images and
    classes have no such filter: their factor is 1, so that the classifier's bias stays its own.
    """
    chain, classifier = _chain(network)
    before = None
    for name, norm in chain:
        share = coefficients[name]
        outer = share[:, None] if before is None else share[:, None] * before
        yield f"{name}.weight", outer[(...,) + (None,) * (own[f"{name}.weight"].dim() - 2)]
        of_norm = (f"{norm}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var"))
        for key in (f"{name}.bias", *of_norm):
            if key in own:
                yield key, share
        before = share
    if classifier is not None:
        # Flattened, channel j becomes a run of inputs, one for each position of its map.
        positions = own[f"{classifier}.weight"].shape[1] // len(before)
        yield f"{classifier}.weight", before[:, None].expand(-1, positions).reshape(-1)
