"""Grafting filter by filter, for a chain of convolutions that are followed by a batch norm each, such as VGG."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .errors import MismatchError
from .information import convolutions
from .states import local, plain_modules


class Chain(NamedTuple):
    """(convolution, batch norm) by name, in order, and the classifier after the last, if there is one."""

    pairs: list[tuple[str, str]]
    classifier: str | None


def chain(model: nn.Module) -> Chain:
    """Finds the chain of a model. Only an nn.Sequential has an order that can be read off: it holds all convolutions.

    Raises:
        MismatchError: (a ValueError) naming the layer that does not fit in a chain.
    """
    modules, layers = plain_modules(model), convolutions(model)
    holder = next(iter(layers), "").rpartition(".")[0]
    if not isinstance(modules[holder], nn.Sequential) or any(name.rpartition(".")[0] != holder for name in layers):
        raise MismatchError(
            f"{type(modules['']).__name__}: level 'filter' needs all convolutions in one nn.Sequential, each followed "
            f"by its batch norm, as in a VGG; use level 'layer'"
        )
    children = [name for name in modules if name and name.rpartition(".")[0] == holder]
    pairs: list[tuple[str, str]] = []
    used: set[nn.Module] = set()
    filters = 0
    for name, layer in layers.items():
        after = children[children.index(name) + 1 :]
        norm = modules[after[0]] if after else None
        fits = isinstance(norm, _BatchNorm) and norm.affine and norm.num_features == layer.out_channels
        fits = fits and layer.groups == 1 and not layer.transposed and filters in (0, layer.in_channels)
        if norm is None or not fits or used & {layer, norm}:
            raise MismatchError(
                f"{name}: level 'filter' needs a plain convolution over all filters of the one before, and "
                f"right after it a batch norm with a scale, each used once; use level 'layer'"
            )
        used |= {layer, norm}
        filters = layer.out_channels
        pairs.append((name, after[0]))
    names = list(modules)
    for name in names[names.index(pairs[-1][0]) :]:
        if isinstance(module := modules[name], nn.Linear):
            if module.in_features % filters:
                raise MismatchError(
                    f"{name}: {module.in_features} inputs do not divide by the {filters} filters before"
                )
            return Chain(pairs, name)
    return Chain(pairs, None)


def coefficients(chain: Chain, own: Mapping[str, Tensor], neighbour: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`w_j = |gamma_own,j| / (|gamma_own,j| + |gamma_neighbour,j|)`, 1/2 where both are 0, by convolution: (filters,).

    gamma is the scale of the batch norm after the convolution.

    Raises:
        MismatchError: if a weight of the chain is not in the state dict.
    """
    result = {}
    for name, norm in chain.pairs:
        for key in f"{name}.weight", f"{norm}.weight":
            if key not in own:
                raise MismatchError(f"{key} is excluded or parametrized: level 'filter' needs it; use level 'layer'")
            if local(own[key]) is not own[key]:
                raise MismatchError("the model is sharded (DTensor): level 'filter' needs it whole; use level 'layer'")
        gamma = own[f"{norm}.weight"].detach()
        kind = torch.promote_types(gamma.dtype, torch.float32)
        mine, other = gamma.to(kind).abs(), neighbour[f"{norm}.weight"].to(gamma.device, kind).abs()
        total = mine + other
        result[name] = (mine / total).masked_fill(total == 0, 0.5)
    return result


def shares(chain: Chain, own: Mapping[str, Tensor], coefficients: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(key, share that broadcasts to the entry) of everything that belongs to a filter of the chain.

    A weight (o, i) keeps the share `w_o * w_i`; w_i is of the filter that made input channel i. Images and classes
    have no such filter: their factor is 1, so that the classifier's bias, as whatever is not in the chain, stays own.
    """
    before = None
    for name, norm in chain.pairs:
        share = coefficients[name]
        outer = share[:, None] if before is None else share[:, None] * before
        yield f"{name}.weight", outer[(...,) + (None,) * (own[f"{name}.weight"].dim() - 2)]
        for key in f"{name}.bias", *(f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var")):
            if key in own:
                yield key, share
        before = share
    if chain.classifier is not None and before is not None:
        # Flattened, channel j becomes a run of inputs, one for each position of its map.
        key = f"{chain.classifier}.weight"
        if key in own:
            yield key, before.repeat_interleave(own[key].shape[1] // len(before))
