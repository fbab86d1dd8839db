"""A model and its optimizer: anyone's own, compiled, and loaded from what a checkpoint holds."""

import importlib
import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from filter_grafting.checkpoint import load
from filter_grafting.errors import CheckpointError, SettingsError
from filter_grafting.membership import printable
from filter_grafting.rings import Checkpoint
from filter_grafting.states import load_plain_state, plain_state
from training.process import UsageError


def own_model(name: str, num_classes: int, image_size: int) -> nn.Module:
    """Anyone's model by `package.module:function`, which is called with num_classes; looked for here first.

    Raises UsageError if there is none, or if what it returns does not turn images into scores (b, num_classes).
    """
    place, _, function = name.partition(":")
    sys.path.insert(0, os.getcwd())  # ahead of the script's folder, which has modules of common names, as models
    try:
        model = getattr(importlib.import_module(place), function)(num_classes=num_classes)
        with torch.no_grad():
            scores = model.eval()(torch.zeros(2, 3, image_size, image_size))
        if scores.shape != (2, num_classes):
            raise ValueError(f"its scores of 2 images have the shape {tuple(scores.shape)}, not {(2, num_classes)}")
    except Exception as error:  # it is anyone's code
        wanted = "expected package.module:function, which returns a torch.nn.Module that gives (images, num_classes)"
        raise UsageError(f"{name}: {type(error).__name__}: {error}; {wanted}") from error
    return model.train()


def compiled(model: nn.Module, device: torch.device, enabled: bool = True, captured: bool = False) -> nn.Module:
    """The model with its forward and backward compiled, or as it is if that is not enabled.

    `captured` says that the step which calls it will be captured in a CUDA graph.
    """
    if not enabled:
        return model
    # Graphs of the compiler's own ("reduce-overhead") save launches where the step is not captured; not under DDP.
    own_graphs = device.type == "cuda" and not captured and not isinstance(model, nn.parallel.DistributedDataParallel)
    # One graph for each size of a batch: there are two, and a graph for any size would be slower.
    return torch.compile(model, dynamic=False, mode="reduce-overhead" if own_graphs else None)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in anyone's checkpoint (its `net` or `state_dict`, or all that it holds), and its contents.

    These have `settings` in any case, and hold what a network's own checkpoint keeps as `extra`.
    Raises FileNotFoundError; CheckpointError, naming the file, if it holds no state dict or cannot be loaded.
    """
    contents = load(path)
    state = contents.get("net", contents.get("state_dict", contents))
    if not isinstance(state, dict) or not state or not all(isinstance(entry, Tensor) for entry in state.values()):
        keys = printable(", ".join(map(str, contents)), 100)
        raise CheckpointError(f"{path} holds no state dict: it has the keys {keys}; expected net or state_dict")
    extra = contents.get("extra")
    return state, {"settings": {}, **(extra if isinstance(extra, dict) else {}), **contents}


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """`load_state_dict`, and every buffer in its parameter's memory layout.

    Fused optimizers walk through the memory of both as if it were the same: with a momentum saved in another layout
    they would update the wrong weights on CPUs without a word, and fail on CUDA.
    """
    optimizer.load_state_dict(dict(state))
    for parameter, buffers in optimizer.state.items():
        for name, buffer in buffers.items():
            if isinstance(buffer, Tensor) and buffer.dim() > 0:
                buffers[name] = torch.empty_like(parameter).copy_(buffer)


def to_resume(
    optimizer: torch.optim.Optimizer, row: Mapping, layers: list, settings: Mapping, trained: nn.Module | None = None
) -> dict[str, Any]:
    """What a checkpoint holds beside the published weights, so that `restore` can go on exactly from there."""
    extra = {"optimizer": optimizer.state_dict(), "row": dict(row), "layers": layers, "settings": dict(settings)}
    return extra if trained is None else extra | {"trained": plain_state(trained)}


def restore(
    found: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    settings: Mapping,
    trained: nn.Module | None = None,
    may_raise: Collection[str] = (),
) -> int:
    """Puts a network's own checkpoint back in place; returns the epoch to go on with.

    `model` is the one that was published, `trained` that which the optimizer trains, if it is another. Raises
    CheckpointError if another program has left the file, and SettingsError if its settings differ, but for those that
    may be raised.
    """
    extra = found.extra
    if not isinstance(extra, Mapping) or "optimizer" not in extra:
        raise CheckpointError(f"{found.path} holds no training state to go on from, as of another program")
    recorded = extra["settings"]
    # Of the epochs, too, which the ring has let another network raise: this one's cosine may depend on them.
    differing = [key for key in settings if key not in may_raise and recorded.get(key) != settings[key]]
    if differing:
        rows = ", ".join(f"{key} is {settings[key]!r} here and was {recorded.get(key)!r}" for key in differing)
        advice = "give the same settings, or another directory"
        raise SettingsError(f"the network cannot be continued with other settings: {rows}; {advice}")
    load_plain_state(model, found.state)
    if trained is not None:
        load_plain_state(trained, extra["trained"])
    load_optimizer(optimizer, extra["optimizer"])
    return found.round + 1
