"""Other scions than a neighbour's weights: what the paper's ablation grafts onto a network's invalid filters."""

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .information import convolutions, filter_norms

SCIONS = ("external", "noise", "internal")


def noise(weight: Tensor, count: int, scale: float, generator: torch.Generator | None = None) -> Tensor:
    """Gaussian noise as filters: (count, ...) of mean 0, and of `scale` times the standard deviation of the layer.

    Args:
        weight: (filters, channels, ...), of the layer.
        generator: on the CPU, so that a seed gives the same noise on every device.
    """
    drawn = torch.randn(count, *weight.shape[1:], generator=generator).to(weight)
    return drawn * (scale * weight.std(correction=0))


def internal(weight: Tensor, norms: Tensor, count: int, threshold: float) -> Tensor:
    """The layer's own most informative filters, from the largest L1 norm down: (count, ...).

    Invalid ones are not among them: where there are too few others, these come again from the largest down.

    Args:
        weight: (filters, channels, ...), of the layer.
        norms: (filters,), their L1 norms, at least one of them not below the threshold.
    """
    ranked = norms.argsort(descending=True, stable=True)[: int((norms >= threshold).sum())]
    return weight[ranked[torch.arange(count, device=ranked.device) % len(ranked)]]


@torch.no_grad()
def graft_scions(
    network: nn.Module, kind: str, threshold: float = 0.1, scale: float = 1.0, generator: torch.Generator | None = None
) -> int:
    """Adds a scion to each invalid filter of a network, in place; returns how many there were.

    Args:
        kind: "noise" or "internal". ("external", the weights of a neighbour, is `filter_grafting.graft`.)
        threshold: the filters whose L1 norm is below it are invalid.
        scale, generator: of the noise, see `noise`.

    Raises:
        MismatchError: (a ValueError) if a convolution is transposed, whose filters are not the rows of its weight,
            or parametrized, whose weight is no parameter.
    """
    if kind not in SCIONS[1:]:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(SCIONS[1:])}")
    grafted = 0
    for name, layer in convolutions(network).items():
        if layer.transposed:
            raise MismatchError(f"{name} is a transposed convolution: no scion can be grafted onto its filters")
        if not isinstance(layer.weight, nn.Parameter):
            raise MismatchError(f"{name} is parametrized: its weight is computed anew each time, and cannot be grafted")
        norms = filter_norms(layer.weight)
        invalid = (norms < threshold).nonzero().flatten()
        count = len(invalid)
        if kind == "noise":
            scion = noise(layer.weight, count, scale, generator)
        elif count < len(norms):
            scion = internal(layer.weight, norms, count, threshold)
        else:
            continue  # a layer without a single informative filter
        layer.weight.index_add_(0, invalid, scion)
        grafted += count
    return grafted
