"""Grafting: how much of its own weights a network keeps, and the blend with its neighbour's (paper, section 3.3)."""

import math
from collections.abc import Iterator, Mapping
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
        raise ValueError(f"entropies: got {own_entropy} and {neighbour_entropy}, expected finite values in nats")
    return round(a / math.pi * math.atan(c * (own_entropy - neighbour_entropy)) + 0.5, 2)


class Comparison(NamedTuple):
    """A convolution beside its neighbour's: entropies in nats, and the share of its own weights that it keeps."""

    own_entropy: float
    neighbour_entropy: float
    coefficient: float | Tensor  # a tensor (filters,) at filter level


def graft(
    network: nn.Module, neighbour: Mapping[str, Tensor], a: float = 0.4, c: float = 500, level: str = "layer"
) -> dict[str, float | Tensor]:
    """Blends a network, in place, with its neighbour's state dict: `W <- w * W_own + (1 - w) * W_neighbour`.

    Args:
        network: any module with a convolution, on any device; at filter level, one whose convolutions form a chain.
        neighbour: state dict of a network of the same architecture, on any device.
        a, c: see `coefficient`; without meaning at filter level.
        level: "layer": every convolution has its own coefficient, and every other floating-point entry of the
            state dict takes that of the nearest convolution before it (before the first one: the first one's).
            "filter": filter j has the coefficient |gamma_own,j| / (|gamma_own,j| + |gamma_neighbour,j|), gamma
            being the scale of the batch norm that follows.

    Returns: the coefficient of each convolution by module name; at filter level a tensor (filters,).

    Raises:
        MismatchError: (a ValueError) naming the first offending entry, if the two differ in keys, shapes or dtypes,
            hold a value that is not finite, or the network has no convolution. The network is then untouched.
    """
    coefficients = {name: layer.coefficient for name, layer in compare(network, neighbour, a, c, level).items()}
    blend(network, neighbour, coefficients, level)
    return coefficients


@torch.no_grad()
def compare(
    network: nn.Module, neighbour: Mapping[str, Tensor], a: float = 0.4, c: float = 500, level: str = "layer"
) -> dict[str, Comparison]:
    """First half of `graft`: checks that the two can be blended, and computes what the blend needs. Changes nothing."""
    if level not in LEVELS:
        raise ValueError(f"level: got {level!r}, expected one of {', '.join(LEVELS)}")
    own = network.state_dict()
    check_alike(own, neighbour)
    names = list(convolutions(network))
    if not names:
        raise MismatchError(f"{type(network).__name__} has no convolution (nn.ConvNd): there is nothing to compare")
    for name in names:
        if f"{name}.weight" not in own:
            raise MismatchError(f"{name}.weight is not an entry of the state dict (is it parametrized?)")
    device = own[f"{names[0]}.weight"].device
    neighbour = {key: entry.to(device, non_blocking=True) for key, entry in neighbour.items()}

    # Everything that the host has to know is read at once, at the end: a GPU is waited for a single time.
    weights = [state[f"{name}.weight"] for state in (own, neighbour) for name in names]
    entropy = entropies(weights)
    checked = [key for key, entry in own.items() if entry.is_floating_point() and entry.numel() > 0]
    extremes = [torch.stack(torch.aminmax(state[key])) for state in (own, neighbour) for key in checked]
    finite = torch.stack([extreme.isfinite().all() for extreme in extremes])
    *entropy, = torch.cat([entropy, finite.double()]).tolist()
    entropy, finite = entropy[: len(weights)], entropy[len(weights) :]
    for position, is_finite in enumerate(finite):
        if not is_finite:
            side = "the network" if position < len(checked) else "its neighbour"
            raise MismatchError(f"{checked[position % len(checked)]}: {side} holds a value that is not finite")

    pairs = dict(zip(names, zip(entropy[: len(names)], entropy[len(names) :], strict=True), strict=True))
    if level == "filter":
        shares = _filter_coefficients(network, neighbour)
        return {name: Comparison(*pair, shares[name]) for name, pair in pairs.items()}
    return {name: Comparison(*pair, coefficient(*pair, a, c)) for name, pair in pairs.items()}


@torch.no_grad()
def blend(
    network: nn.Module,
    neighbour: Mapping[str, Tensor],
    coefficients: Mapping[str, float | Tensor],
    level: str = "layer",
) -> None:
    """Second half of `graft`: `W <- w * W_own + (1 - w) * W_neighbour`, in place, half-precision types in fp32.

    Integer entries (`num_batches_tracked`) are left alone.
    """
    entries = (_filter_level if level == "filter" else _layer_level)(network, coefficients)
    done = set()
    for key, own, share in entries:
        if own.data_ptr() in done:  # one tensor under two names is blended once
            continue
        done.add(own.data_ptr())
        other = neighbour[key].to(own.device, non_blocking=True)
        if own.dtype in (torch.float32, torch.float64):
            own.lerp_(other, 1 - share)
        else:
            own.copy_(own.float().lerp_(other.float(), 1 - share))


def check_alike(own: Mapping[str, Tensor], neighbour: Mapping[str, Tensor]) -> None:
    """Raises MismatchError unless both state dicts have the same keys, shapes and dtypes."""
    for key, entry in own.items():
        other = neighbour.get(key)
        if not isinstance(other, Tensor):
            raise MismatchError(f"{key}: in the network {_form(entry)}, missing in the neighbour's state dict")
        if (entry.shape, entry.dtype) != (other.shape, other.dtype):
            raise MismatchError(f"{key}: in the network {_form(entry)}, in its neighbour {_form(other)}")
    for key in neighbour:
        if key not in own:
            raise MismatchError(f"{key}: missing in the network, in its neighbour {_form(neighbour[key])}")


def _form(entry: object) -> str:
    return f"{tuple(entry.shape)} {entry.dtype}" if isinstance(entry, Tensor) else f"a {type(entry).__name__}"


def _layer_level(network: nn.Module, coefficients: Mapping[str, float]) -> Iterator[tuple[str, Tensor, float]]:
    """(key, entry, coefficient) of each floating-point entry, in state-dict order."""
    share = next(iter(coefficients.values()))
    for key, entry in network.state_dict().items():
        share = coefficients.get(key.rpartition(".")[0], share)
        if entry.is_floating_point():
            yield key, entry, share


def _chain(network: nn.Module) -> tuple[list[tuple[str, nn.Module, str, nn.Module]], tuple[str, nn.Linear] | None]:
    """The (convolution, batch norm) pairs of a chain in the order of execution, by name, and the classifier after it.

    Only an nn.Sequential has an order of execution that can be read off it: all convolutions must lie in one.
    """
    names = dict(network.named_modules())
    layers = convolutions(network)
    holders = {name.rpartition(".")[0] for name in layers}
    holder = holders.pop() if len(holders) == 1 else None
    if holder is None or not isinstance(names[holder], nn.Sequential):
        raise MismatchError(
            f"{next(iter(layers))}: level 'filter' needs all convolutions in one nn.Sequential of convolution-batch norm "
            f"pairs, such as VGG with batch norm, not {type(network).__name__}; use level 'layer'"
        )
    prefix = f"{holder}." if holder else ""
    children = [(prefix + name, module) for name, module in names[holder].named_children()]
    chain = []
    for (name, module), (next_name, follower) in zip(children, [*children[1:], ("", None)], strict=True):
        if name not in layers:
            continue
        if not (isinstance(follower, _BatchNorm) and follower.affine and module.groups == 1 and not module.transposed):
            raise MismatchError(f"{name}: level 'filter' needs a plain convolution followed by a batch norm with a scale")
        chain.append((name, module, next_name, follower))
    linear = next(((name, module) for name, module in names.items() if isinstance(module, nn.Linear)), None)
    filters = chain[-1][1].out_channels
    if linear and linear[1].in_features % filters:
        raise MismatchError(f"{linear[0]}: {linear[1].in_features} inputs do not divide by the {filters} filters before it")
    return chain, linear


def _filter_coefficients(network: nn.Module, neighbour: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`w_j = |gamma_own,j| / (|gamma_own,j| + |gamma_neighbour,j|)`, 1/2 where both are 0; (filters,) fp32 or fp64."""
    shares = {}
    for name, _, norm_name, norm in _chain(network)[0]:
        own, other = norm.weight.detach().abs(), neighbour[f"{norm_name}.weight"].abs()
        if own.dtype != torch.float64:
            own, other = own.float(), other.float()
        total = own + other
        shares[name] = torch.where(total > 0, own / torch.where(total > 0, total, 1), 0.5)
    return shares


def _filter_level(network: nn.Module, coefficients: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(key, entry, coefficients that broadcast to the entry) of everything that belongs to a filter of the chain.

    A weight (o, i) is blended with `w_o * w_i`, where w_i belongs to the filter that made input channel i. The images
    and the classes have no such filter: their factor is 1, so the classifier's bias stays the network's own.
    """
    state = network.state_dict()
    chain, linear = _chain(network)
    before = None
    for name, module, norm_name, _ in chain:
        share = coefficients[name]
        outer = share[:, None] if before is None else share[:, None] * before
        yield f"{name}.weight", state[f"{name}.weight"], outer.reshape(*outer.shape, *[1] * (module.weight.dim() - 2))
        for key in (f"{name}.bias", *(f"{norm_name}.{entry}" for entry in ("weight", "bias", "running_mean", "running_var"))):
            if key in state:
                yield key, state[key], share
        before = share
    if linear:
        name, module = linear
        # Flattened, channel j becomes a run of inputs, one for each position of its map.
        share = before.repeat_interleave(module.in_features // before.numel())
        yield f"{name}.weight", state[f"{name}.weight"], share
