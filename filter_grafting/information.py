"""How much information weights hold: entropy, L1 norms and invalid filters, as pure functions on tensors."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .errors import MismatchError
from .states import place, plain_modules, plain_names, whole

BINS = 10  # of the paper and the published code
SHORTCUT_NAMES = ("shortcut", "downsample", "proj")  # the 1x1 convolution beside a block: CIFAR code, torchvision


def convolutions(model: nn.Module) -> dict[str, _ConvNd]:
    """The convolutions of a model by plain name, found by type (any `nn.ConvNd`), in module order."""
    return {name: module for name, module in plain_modules(model).items() if isinstance(module, _ConvNd)}


def entropy(weight: Tensor) -> float:
    """Entropy of one layer's weights, in nats: `H = -sum_k p_k ln p_k` (paper, section 3.3).

    The range of the values is cut in 10 bins of equal width `scale = (max - min) / 10`; bin k holds the values with
    `min + k * scale <= x < min + (k + 1) * scale`, and `p_k` is its share of all values. As published, the maximum is
    in no bin. `0 <= H <= ln 10`; 0 where all values are equal. Unlike the published code, which computes in fp32,
    the edges are fp64: a value on an edge always belongs to the bin above.

    Args:
        weight: any shape, any floating-point type, on any device.

    Raises:
        ValueError: if the tensor is empty, not of a floating-point type, or holds a value that is not finite.
    """
    if not weight.is_floating_point() or weight.numel() == 0:
        found = f"{weight.dtype} of shape {tuple(weight.shape)}"
        raise ValueError(f"weight: got {found}, expected a floating-point tensor that is not empty")
    values = _values(weight).flatten()
    low, high = torch.stack(values.aminmax()).tolist()
    if not math.isfinite(high - low):
        raise ValueError(f"a weight of shape {tuple(weight.shape)} holds NaN or infinity: it has no entropy")
    if high - low < 1e-300:
        return 0.0
    # Rounded up by more than the steps below round: no value on an edge falls short of its bin.
    per_unit = BINS / (high - low) * (1 + 2**-50)
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=values.device)  # the last one: of the maximum
    for part in values.split(1 << 20):  # whose copies in fp64 need little memory
        indices = part.to(torch.float64, copy=True).sub_(low).mul_(per_unit).to(torch.uint8)
        counts += torch.bincount(indices, minlength=BINS + 1)
    shares = [count / values.numel() for count in counts[:BINS].tolist()]
    return sum((-p * math.log(p) for p in shares if p > 0), start=0.0)


def l1_norm(weight: Tensor) -> float:
    """The sum of |w| over a whole layer: the criterion that the authors compare entropy with."""
    return _values(weight).abs().sum(dtype=torch.float64).item()


def _values(weight: Tensor) -> Tensor:
    """A weight, whole, on a device that computes in fp64: of Apple GPUs (MPS), which do not, on the CPU."""
    values = whole(weight).detach()
    return values.cpu() if values.device.type == "mps" else values


CRITERIA = {"entropy": entropy, "l1": l1_norm}  # by the names that the scripts have for them


def filter_norms(weight: Tensor, transposed: bool = False, groups: int = 1) -> Tensor:
    """L1 norm of each filter of a convolution: the sum of |w| over all but the output channel.

    Args:
        weight: (filters, channels / groups, ...), or (channels, filters / groups, ...) of a transposed one.
        transposed, groups: as the convolution has them; `groups` matters for a transposed one only.

    Returns: (filters,) fp32, or fp64 for fp64 weights.
    """
    weight = whole(weight).detach()
    if transposed:
        # (groups, channels of a group, filters of a group, ...): a filter sees the channels of its own group.
        weight = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2).flatten(0, 1)
    sizes = weight.flatten(1).abs()
    return sizes.sum(1, dtype=torch.promote_types(sizes.dtype, torch.float32))


def norms_by_layer(source: nn.Module | Mapping[str, Tensor], shortcuts: bool | None = None) -> dict[str, Tensor]:
    """L1 norms of the filters of every convolution, by plain name (the first one, if a layer has several).

    Args:
        source: a model, or a state dict. A state dict has no module types: there, a convolution is an entry
            `*.weight` of three to five dimensions, and none is transposed. Of a pruned layer of a model, and of one
            with the older `nn.utils.weight_norm`, the weight is that of its last forward.
        shortcuts: None for all convolutions, False for all but the shortcuts' (see SHORTCUT_NAMES), True for
            those alone.

    Raises:
        MismatchError: (a ValueError) if there is no convolution at all, or the weight of one is not in the state dict
            but what a parametrization computes it from: the model itself has to be counted, then.
    """
    layers: dict[object, tuple[str, Tensor]] = {}  # by what is the same under all its names
    if isinstance(source, nn.Module):
        for name, layer in convolutions(source).items():
            norms = filter_norms(layer.weight, layer.transposed, layer.groups)
            layers.setdefault(layer, (name, norms))
    else:
        for key, entry in plain_names(source).items():
            if not isinstance(entry, Tensor) or not 3 <= entry.dim() <= 5:
                continue
            name, _, kind = key.rpartition(".")
            if kind in ("weight_orig", "weight_v") or name.endswith("parametrizations.weight"):
                raise MismatchError(f"{key}: a weight is computed from it; count the filters of the model itself")
            if kind == "weight":
                layers.setdefault(place(entry), (name, filter_norms(entry)))
    if not layers:
        raise MismatchError("no convolution found: expected a model with an nn.ConvNd, or its state dict")
    return {
        name: norms
        for name, norms in layers.values()
        if shortcuts is None or any(part in SHORTCUT_NAMES for part in name.split(".")) == shortcuts
    }


def invalid_filters(
    source: nn.Module | Mapping[str, Tensor], threshold: float, shortcuts: bool | None = None
) -> tuple[int, int]:
    """(invalid, total): filters with an L1 norm below the threshold or not a number, and all (paper, section 3.1).

    Args:
        source, shortcuts: see `norms_by_layer`, and the errors raised there.
        threshold: 0.1 and 0.01 are customary.
    """
    norms = norms_by_layer(source, shortcuts).values()
    return sum(int((~(norm >= threshold)).sum()) for norm in norms), sum(norm.numel() for norm in norms)
