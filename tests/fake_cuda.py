"""CUDA without a GPU: tensors that have a device, shape, type and strides, but no values (FakeTensorMode).

Torch's autograd engine needs a real GPU: here, its nodes are called from Python in the order in which it calls
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from training.images import _scale_and_shift

CUDA = torch.device("cuda", 0)
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.masked_select", "aten.is_nonzero")


class HostWaits(AssertionError):
    """An operation for which the host has to wait until the device has done all that was asked of it."""


class Watch(TorchDispatchMode):
    """Counts the operations that are work for the device; within `strict`, fails on those that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0
        self.strict = False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name, kwargs = str(operation).rpartition(".")[0], kwargs or {}
        on_cuda = any(isinstance(one, Tensor) and one.is_cuda for one in tree_leaves((args, kwargs)))
        self.launches += name.startswith("aten.") and not operation.is_view and "empty" not in name
        if name == "aten._fused_sgd_":
            return None
        if self.strict and on_cuda and name in WAITS:
            raise HostWaits(name)
        if name == "aten._local_scalar_dense":
            return True if args[0].dtype == torch.bool else 1.0
        result = operation(*args, **kwargs)
        if self.strict and on_cuda and any(isinstance(one, Tensor) and one.is_cpu for one in tree_leaves(result)):
            raise HostWaits(f"{name}: a copy from CUDA to the CPU")
        return result


def backward(loss: Tensor) -> None:
    """`loss.backward()`."""
    waiting = {loss.grad_fn: {0: torch.ones_like(loss)}}
    while waiting:
        node = max(waiting, key=lambda one: one._sequence_nr())
        given = waiting.pop(node)
        if hasattr(node, "variable"):  # a parameter, which takes the gradient as it is, if it lies in memory alike
            alike = given[0].stride() == node.variable.stride()
            node.variable.grad = given[0] if alike else torch.empty_like(node.variable).copy_(given[0])
            continue
        with torch.no_grad():
            results = node(*(given.get(k) for k in range(len(node._input_metadata))))
        results = results if isinstance(results, tuple) else (results,)
        for (following, k), gradient in zip(node.next_functions, results, strict=False):
            if following is None or gradient is None:
                continue
            form, sums = following._input_metadata[k], waiting.setdefault(following, {})
            with torch.no_grad():
                if gradient.shape != form.shape:
                    gradient = gradient.sum_to_size(form.shape)
                if gradient.dtype != form.dtype:
                    gradient = gradient.to(form.dtype)
                sums[k] = sums[k] + gradient if k in sums else gradient


@contextmanager
def fake_cuda() -> Iterator[Watch]:
    """Within it, device "cuda" is there, and tensors that are made have no values."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), Watch() as watch:
        patch.setattr(Tensor, "backward", backward)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        # A generator on CUDA needs a GPU; what is drawn here has no values anyway.
        patch.setattr(torch, "Generator", lambda device="cpu": SimpleNamespace(manual_seed=lambda seed: None))
        _scale_and_shift.cache_clear()
        try:
            yield watch
        finally:
            _scale_and_shift.cache_clear()  # what was made within has no values


def to_fake_cuda(model: nn.Module) -> nn.Module:
    """`model.to("cuda")` of a model that was built outside, with its strides."""

    def moved(entry: Tensor) -> Tensor:
        return torch.empty_strided(entry.shape, entry.stride(), dtype=entry.dtype, device=CUDA)

    for module in model.modules():
        module._parameters |= {
            key: one if one is None else nn.Parameter(moved(one)) for key, one in module._parameters.items()
        }
        module._buffers |= {key: one if one is None else moved(one) for key, one in module._buffers.items()}
    return model


def through_a_file(contents):
    """What is loaded of what was saved: the same strides, on the CPU."""

    def copied(entry):
        if not isinstance(entry, Tensor):
            return entry
        return torch.empty_strided(entry.shape, entry.stride(), dtype=entry.dtype, device="cpu")

    return tree_map(copied, contents)
