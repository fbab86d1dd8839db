"""How much information weights hold: entropy, L1 norms and invalid filters, as pure functions on tensors."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .errors import MismatchError

SHORTCUT_NAMES = ("shortcut", "downsample", "proj")  # the 1x1 convolution beside a block: CIFAR code, torchvision
_CHUNK = 1 << 16  # values that are counted at once: few enough for the second-level cache


def convolutions(network: nn.Module) -> dict[str, _ConvNd]:
    """The convolutions of a network by module name, found by type (any `nn.ConvNd`), in module order."""
    return {
        name: module
        for name, module in network.named_modules(remove_duplicate=False)  # a shared layer has several names
        if isinstance(module, _ConvNd)
    }


def entropy(weight: Tensor, bins: int = 10) -> float:
    """Entropy of one layer's weights, in nats: `H = -sum_k p_k ln p_k` (paper, section 3.3; as published).

    The range of the values is cut in `bins` half-open bins of equal width, so that the maximum falls in none;
    `p_k` is the share of all values that is in bin k. `0 <= H <= ln(bins)`; 0 where all values are equal.

    Args:
        weight: any shape, any floating-point type.

    Raises:
        ValueError: if the tensor is empty, not of a floating-point type, or holds a value that is not finite.
    """
    value = entropies([weight], bins).item()
    if math.isnan(value):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: it has no entropy")
    return value


@torch.no_grad()
def entropies(weights: Sequence[Tensor], bins: int = 10) -> Tensor:
    """Entropies of several layers at once: float64 of shape (len(weights),), in nats, on the weights' device.

    A GPU is not waited for, as the host reads nothing: a layer that holds a value that is not finite has the
    entropy NaN, for the caller to name.

    Raises:
        ValueError: if a tensor is empty or not of a floating-point type, or `bins` is not within 1...127.
    """
    if not 1 <= bins <= 127:
        raise ValueError(f"bins: got {bins}, expected 1 to 127")
    if not weights:
        return torch.empty(0, dtype=torch.float64)
    layers = [_flatten(weight) for weight in weights]
    low, high = (torch.stack(ends).double() for ends in zip(*map(torch.aminmax, layers), strict=True))
    counts = (_count_on_cpu if low.device.type == "cpu" else _count)(layers, low, high, bins)
    # The probabilities of a layer do not add up to 1, as published: the maximum counts, but is in no bin.
    sizes = torch.tensor([[values.numel()] for values in layers]).to(low.device, non_blocking=True)
    return torch.special.entr(counts / sizes.double()).sum(1).masked_fill(~(high - low).isfinite(), math.nan)


def _flatten(weight: Tensor) -> Tensor:
    """The values in the order in which they lie in memory, so that channels_last weights are not copied."""
    if not weight.is_floating_point() or weight.numel() == 0:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"weight: got {found}, expected a floating-point tensor that is not empty")
    if weight.is_contiguous():  # the same, sooner
        return weight.reshape(-1)
    return weight.permute(sorted(range(weight.dim()), key=weight.stride, reverse=True)).reshape(-1)


def _count(layers: Sequence[Tensor], low: Tensor, high: Tensor, bins: int) -> Tensor:
    """How many values of each layer fall in each bin, (layers, bins) int64: the definition to the letter.

    Two kernels a layer. `torch.bincount` would wait for the GPU, to learn the range of its input.
    """
    edges = low[:, None] + torch.arange(bins + 1, device=low.device) * (high - low)[:, None] / bins
    edges[:, bins] = high  # exactly, however the sum was rounded
    reached = [(values >= edge[:, None]).sum(1) for values, edge in zip(layers, edges, strict=True)]
    return -torch.stack(reached).diff()


def _count_on_cpu(layers: Sequence[Tensor], low: Tensor, high: Tensor, bins: int) -> Tensor:
    """The same in chunks that stay in the cache, and two values at a time: counting is what costs."""
    base = bins + 1  # a pair is a number of two digits: a bin, or `bins` for the maximum
    tables, owners = [torch.zeros(base * base, dtype=torch.int64)], [0]
    for k, (values, bottom, top) in enumerate(zip(layers, low.tolist(), high.tolist(), strict=True)):
        if not 1e-300 < top - bottom < math.inf:
            continue  # all equal, so that all are the maximum; or not finite
        # Rounded up by more than the next steps' own rounding: no value on an edge falls short of its bin.
        scale = bins / (top - bottom) * (1 + 2**-50)
        for part in values.split(_CHUNK) if values.numel() > _CHUNK else [values]:
            digits = part.to(torch.float64, copy=True).sub_(bottom).mul_(scale).to(torch.int16)
            if digits.numel() % 2:
                digits = F.pad(digits, (0, 1), value=bins)
            half = digits.numel() // 2
            tables.append(torch.bincount(digits[:half].add_(digits[half:], alpha=base), minlength=base * base))
            owners.append(k)
    pairs = torch.zeros(len(layers), base * base, dtype=torch.int64)
    pairs = pairs.index_add_(0, torch.tensor(owners), torch.stack(tables)).view(-1, base, base)
    return (pairs.sum(1) + pairs.sum(2))[:, :bins]


def filter_norms(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """L1 norm of each filter of a convolution: the sum of |w| over all but the output channel.

    Args:
        weight: (filters, channels / groups, ...), or (channels, filters / groups, ...) of a transposed one.
        transposed, groups: as the convolution has them; `groups` matters for a transposed one only.

    Returns: (filters,) fp32, or fp64 for fp64 weights.
    """
    weight = weight.detach()
    if transposed:
        # (groups, channels of a group, filters of a group, ...): a filter sees the channels of its own group.
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).abs().sum(1, dtype=torch.promote_types(weight.dtype, torch.float32))


def norms_by_layer(network: nn.Module | Mapping[str, Tensor], shortcuts: bool | None = None) -> dict[str, Tensor]:
    """L1 norms of the filters of every convolution, by layer name (the first one, if a layer has several).

    Args:
        network: a module, or a state dict. A state dict has no module types: there, a convolution is an entry
            `*.weight` of three to five dimensions, and none is transposed.
        shortcuts: None for all convolutions, False for all but the shortcuts' (see SHORTCUT_NAMES), True for
            those alone.

    Raises:
        MismatchError: (a ValueError) if there is no convolution at all.
    """
    if isinstance(network, nn.Module):
        layers = {
            name: (module.weight, module.transposed, module.groups) for name, module in convolutions(network).items()
        }
    else:
        layers = {
            name.rpartition(".")[0]: (entry, False, 1)
            for name, entry in network.items()
            if name.rpartition(".")[2] == "weight" and isinstance(entry, Tensor) and 3 <= entry.dim() <= 5
        }
    if not layers:
        raise MismatchError("no convolution found: expected a network with an nn.ConvNd, or its state dict")
    distinct = {}
    for name, layer in layers.items():
        distinct.setdefault(layer[0].data_ptr(), (name, layer))

    def is_shortcut(name: str) -> bool:
        return any(part in SHORTCUT_NAMES for part in name.split("."))

    return {
        name: filter_norms(*layer)
        for name, layer in distinct.values()
        if shortcuts is None or is_shortcut(name) == shortcuts
    }


def invalid_filters(
    network: nn.Module | Mapping[str, Tensor], threshold: float, shortcuts: bool | None = None
) -> tuple[int, int]:
    """(invalid, total): filters with an L1 norm below the threshold, and all filters (paper, section 3.1).

    Args:
        network, shortcuts: see `norms_by_layer`.
        threshold: 0.1 and 0.01 are customary.
    """
    norms = norms_by_layer(network, shortcuts)
    if not norms:
        return 0, 0
    everything = torch.cat(list(norms.values()))
    return int((everything < threshold).sum()), everything.numel()
