"""Other scions than a neighbour's weights: what the authors' ablation grafts onto a network's invalid filters."""

import torch
from torch import Tensor, nn

from .errors import MismatchError
from .information import convolutions, filter_norms


@torch.no_grad()
def noise(model: nn.Module, scale: float, threshold: float = 0.1, generator: torch.Generator | None = None) -> int:
    """Adds Gaussian noise, `randn * scale`, to each invalid filter of a model, in place; returns how many there were.

    As published, the scale is that of the noise itself, whatever the layer's weights are like.

    Args:
        scale: `0.975 ** epoch`, as published.
        threshold: the filters with an L1 norm below it are invalid.
        generator: on the CPU, so that a seed gives the same noise on every device.

    Raises:
        MismatchError: (a ValueError) if there is a convolution that no scion can be grafted onto.
    """
    grafted = 0
    for weight, norms in _filters(model):
        invalid = (norms < threshold).nonzero().flatten()
        scion = torch.randn(len(invalid), *weight.shape[1:], generator=generator, device="cpu")
        weight.index_add_(0, invalid, scion.to(weight) * scale)
        grafted += len(invalid)
    return grafted


@torch.no_grad()
def internal(model: nn.Module, threshold: float = 0.1) -> int:
    """Adds a layer's largest filters to its invalid ones, in place; returns how many there were.

    By L1 norm, the i-th largest filter is added to the i-th smallest, if that one is below the threshold. Filters are
    ranked within their layer, as published: those of different layers differ in shape. All are added as they were
    before; where over half of a layer is invalid, as published, the i-th largest is an invalid one itself.

    Raises:
        MismatchError: (a ValueError) if there is a convolution that no scion can be grafted onto.
    """
    grafted = 0
    for weight, norms in _filters(model):
        ranked = norms.argsort(stable=True)
        count = int((norms < threshold).sum())
        weight.index_add_(0, ranked[:count], weight[ranked.flip(0)[:count]])
        grafted += count
    return grafted


def _filters(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(weight, L1 norms of its filters (filters,)) of each convolution, once if it has several names."""
    layers = convolutions(model)
    for name, layer in layers.items():
        if layer.transposed:
            raise MismatchError(f"{name} is a transposed convolution: no scion can be grafted onto its filters")
        if not isinstance(layer.weight, nn.Parameter):
            raise MismatchError(f"{name}: its weight is computed anew each time (pruned, parametrized): no scion holds")
        if hasattr(layer.weight, "full_tensor"):
            raise MismatchError(f"{name} is sharded: graft scions before the model is, or gather it")
    return [(layer.weight, filter_norms(layer.weight)) for layer in dict.fromkeys(layers.values())]
