"""How much information weights hold: entropy, L1 norms and invalid filters, as pure functions on tensors."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .errors import MismatchError

SHORTCUT_NAMES = ("shortcut", "downsample")  # what CIFAR code and torchvision call the 1x1 convolution beside a block


def convolutions(network: nn.Module) -> dict[str, _ConvNd]:
    """The convolutions of a network by module name, found by type (any `nn.ConvNd`), in module order."""
    return {
        name: module
        for name, module in network.named_modules(remove_duplicate=False)  # a shared layer has several names
        if isinstance(module, _ConvNd)
    }


def entropy(weight: Tensor, bins: int = 10) -> float:
    """Entropy of one layer's weights, in nats: `H = -sum_k p_k ln p_k` (paper, section 3.3; binning as published).

    The range of the values is cut in `bins` bins of equal width, half-open, so that the maximum falls in none;
    `p_k` is the share of all values in bin k. `0 <= H <= ln(bins)`; 0 where all values are equal.

    Args:
        weight: any shape, any floating-point type (half-precision types are computed in fp32).

    Raises:
        ValueError: if the tensor is empty or holds a value that is not finite.
    """
    value = entropies([weight], bins).item()
    if math.isnan(value):
        raise ValueError(f"the entropy of a weight of shape {tuple(weight.shape)} needs finite values; it holds NaN or infinity")
    return value


def entropies(weights: Sequence[Tensor], bins: int = 10) -> Tensor:
    """Entropies of several layers at once: float64 of shape (len(weights),), in nats, on the weights' device.

    Nothing is read by the host, so that a GPU is never waited for: a layer that holds a value that is not finite
    has the entropy NaN, for the caller to name.

    Raises:
        ValueError: if a tensor is empty or not of a floating-point type, or `bins` is not within 1...127.
    """
    if not 1 <= bins <= 127:
        raise ValueError(f"bins: got {bins}, expected 1 to 127")
    if not weights:
        return torch.empty(0, dtype=torch.float64)
    flat = [_flatten(weight) for weight in weights]
    ranges = [torch.aminmax(values) for values in flat]
    low = torch.stack([r.min.double() for r in ranges])
    high = torch.stack([r.max.double() for r in ranges])
    width = high - low
    # All equal: every value belongs to the first bin, and 0 / 1 puts it there. Not finite: any number will do here.
    divisor = torch.where((width > 0) & width.isfinite(), width, 1.0)
    # Multiplied after the division, the maximum becomes `bins` exactly, one past the last bin, whatever the
    # rounding; and a layer that has shrunk to denormal numbers does not overflow.
    positions = (
        ((values - low[k].to(values.dtype)) / divisor[k].to(values.dtype)).mul_(bins) for k, values in enumerate(flat)
    )
    counts = (_count_cuda if weights[0].is_cuda else _count_cpu)(positions, bins)
    # The sizes are known, and the maximum is in no bin: the probabilities do not add up to 1, as published.
    sizes = torch.tensor([values.numel() for values in flat], dtype=torch.float64, device=counts.device)
    entropy = torch.special.entr(counts / sizes[:, None]).sum(1)
    return torch.where(width.isfinite(), entropy, math.nan)


def _flatten(weight: Tensor) -> Tensor:
    """The values as one row of fp32 or fp64, in the order in which they lie in memory (no copy for channels_last)."""
    if not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"expected a non-empty floating-point weight, got {weight.dtype} of shape {tuple(weight.shape)}")
    weight = weight.detach()
    order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
    flat = weight.permute(order).reshape(-1)
    return flat if flat.dtype == torch.float64 else flat.float()


def _count_cpu(positions: Iterable[Tensor], bins: int) -> Tensor:
    """How many values of each layer fall in each bin, (layers, bins) float64, from positions in [0, bins].

    Counting is what costs, and it costs the same for a wide integer: two one-byte codes are counted as one pair.
    """
    counts = []
    for position in positions:
        code = position.to(torch.int16).to(torch.uint8).clamp_(max=bins)  # by int16, for the vectorised conversion
        even = code.numel() // 2 * 2
        pairs = torch.bincount(code[:even].view(torch.int16), minlength=256 * 256).view(256, 256)
        count = pairs.sum(0) + pairs.sum(1)
        count[code[even:].long()] += 1
        counts.append(count[:bins])
    return torch.stack(counts).double()


def _count_cuda(positions: Iterable[Tensor], bins: int) -> Tensor:
    """The same for all layers in one kernel: each call of bincount waits for the device to learn its input's range."""
    codes = [position.to(torch.int32).clamp_(0, bins) + (bins + 1) * k for k, position in enumerate(positions)]
    counts = torch.bincount(torch.cat(codes), minlength=(bins + 1) * len(codes))
    return counts.view(-1, bins + 1)[:, :bins].double()


def filter_norms(weight: Tensor, transposed: bool = False) -> Tensor:
    """L1 norm of each filter of a convolution: the sum of |w| over all but the output channel.

    Args:
        weight: (filters, ...); for a transposed convolution (channels, filters, ...), `transposed=True`.

    Returns: (filters,) fp32, or fp64 for fp64 weights.
    """
    weight = weight.detach()
    if transposed:
        weight = weight.transpose(0, 1)
    return weight.abs().flatten(1).sum(1, dtype=torch.promote_types(weight.dtype, torch.float32))


def norms_by_layer(network: nn.Module | Mapping[str, Tensor], shortcuts: bool | None = None) -> dict[str, Tensor]:
    """L1 norms of the filters of every convolution, by layer name.

    Args:
        network: a module, or a state dict. In a state dict, which has no module types, a convolution is an entry
            `*.weight` of three to five dimensions.
        shortcuts: None for all convolutions, False for all but the shortcut convolutions, True for those alone.
    """
    if isinstance(network, nn.Module):
        weights = {name: (module.weight, module.transposed) for name, module in convolutions(network).items()}
    else:
        weights = {
            name.removesuffix(".weight"): (entry, False)
            for name, entry in network.items()
            if name.endswith(".weight") and 3 <= entry.dim() <= 5
        }
    if not weights:
        raise MismatchError("no convolution found: expected a network with at least one nn.ConvNd, or its state dict")

    def is_shortcut(name: str) -> bool:
        return any(part in SHORTCUT_NAMES for part in name.split("."))

    return {
        name: filter_norms(weight, transposed)
        for name, (weight, transposed) in weights.items()
        if shortcuts is None or is_shortcut(name) == shortcuts
    }


def invalid_filters(
    network: nn.Module | Mapping[str, Tensor], threshold: float, shortcuts: bool | None = None
) -> tuple[int, int]:
    """(invalid, total): the filters whose L1 norm is below the threshold, and all filters (paper, section 3.1).

    Args:
        network: a module, or a state dict.
        threshold: 0.1 and 0.01 are customary.
        shortcuts: None counts all convolutions, False all but the shortcut convolutions, True those alone.
    """
    norms = norms_by_layer(network, shortcuts)
    if not norms:
        return 0, 0
    everything = torch.cat(list(norms.values()))
    return int((everything < threshold).sum()), everything.numel()
