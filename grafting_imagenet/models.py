"""torchvision's models by name, with fresh weights, torchvision's own, or those of anyone's checkpoint."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from filter_grafting.checkpoint import load
from filter_grafting.errors import CheckpointError, GraftingError, MismatchError
from filter_grafting.states import check_alike, plain_names, plain_state
from training.models import load_optimizer, load_state, own_model

AUXILIARY_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # of the loss of each auxiliary head, as in their papers


def usual_size(arch: str) -> int:
    """Side of the images that a model is trained on, in pixels."""
    return 299 if arch == "inception_v3" else 224


def build(arch: str, num_classes: int, image_size: int | None = None, pretrained: bool = False) -> nn.Module:
    """The model called arch, or `package.module:function`, with fresh weights from torch's global generator.

    Args:
        pretrained: whether torchvision's weights are to be loaded, which expect a form of their own of some models.

    Raises:
        GraftingError: if it does not work on images of this size.
    """
    image_size, options = image_size or usual_size(arch), {}
    if ":" in arch:
        return own_model(arch, num_classes)
    if arch in AUXILIARY_WEIGHT:
        # torchvision's weights of these two were trained on inputs of another scale, to which the model then converts.
        options = {"init_weights": not pretrained, "aux_logits": True, "transform_input": pretrained}
    elif arch.startswith("vit_"):
        options = {"image_size": image_size}
    elif arch.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    try:
        model = zoo.get_model(arch, weights=None, num_classes=num_classes, **options)
        if image_size != usual_size(arch):
            # On the meta device nothing is computed but shapes: says what the first batch would.
            state = {key: entry.to("meta") for key, entry in model.state_dict().items()}
            images = torch.empty(2, 3, image_size, image_size, device="meta")
            with torch.no_grad():
                torch.func.functional_call(model, state, images)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise GraftingError(
            f"{arch} does not work on images of {image_size} pixels ({reason}); try another --image_size"
        ) from error
    return model


def make_deterministic(model: nn.Module, arch: str, image_size: int) -> None:
    """Adaptive pooling to more than one pixel has no deterministic gradient on CUDA; where it does nothing, it goes."""
    if arch.startswith(("alexnet", "vgg")) and image_size == usual_size(arch):
        model.avgpool = nn.Identity()


def load_pretrained(model: nn.Module, arch: str, image_size: int) -> str:
    """Loads torchvision's weights, but for the layers that give the classes if their number differs; returns a line."""
    weights = zoo.get_model_weights(arch).DEFAULT
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        pretrained = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise GraftingError(
            f"--pretrained: the weights of {arch} cannot be downloaded ({error}); on a machine without a network, "
            f"put {weights.url} at {place}"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise GraftingError(f"--pretrained: {place} is damaged; delete it, to have it downloaded again") from error
    # In the files of the DenseNets, layers still have the names of their first release: norm.1 for norm1.
    old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")
    pretrained = {old_name.sub(r"\1\2", key): entry for key, entry in pretrained.items()}
    own, known = model.state_dict(), len(weights.meta["categories"])
    heads = {
        key
        for key in own.keys() & pretrained.keys()
        if own[key].shape != pretrained[key].shape == (known, *own[key].shape[1:])
    }
    try:
        load_state(model, {key: own[key] if key in heads else entry for key, entry in pretrained.items()})
    except RuntimeError as error:
        raise GraftingError(
            f"--pretrained: the weights of {arch} ({weights.name}) do not fit at --image_size {image_size}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    line = f"started from torchvision's weights of {arch} ({weights.name})"
    if heads:
        layers = ", ".join(sorted({key.rpartition(".")[0] for key in heads}))
        classes = next(iter(own[key].shape[0] for key in heads))
        line += f"; they know {known} classes and the data has {classes}: {layers} starts anew"
    return line


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Any checkpoint: of ours, of the published script, of PyTorch's example, or a state dict alone.

    Returns: its contents, with a state dict under "state_dict", and "recorded": what it says of its settings.
    """
    try:
        contents = load(path)
    except FileNotFoundError:
        raise GraftingError(f"--resume: there is no file {path}; expected a checkpoint, or the word auto") from None
    state = contents.get("state_dict", contents)
    if not isinstance(state, Mapping) or not all(isinstance(entry, Tensor) for entry in state.values()):
        keys = ", ".join(map(str, list(contents)[:10]))
        raise CheckpointError(f"{path} holds the keys {keys}; expected state_dict, or a state dict alone")
    extra = contents.get("extra") if isinstance(contents.get("extra"), dict) else {}
    recorded = {key: contents[key] for key in ("arch", "image_size") if key in contents}
    return {
        **extra,
        **contents,
        "state_dict": state,
        "recorded": {**(contents | extra).get("settings", {}), **recorded},
    }


def load_weights(model: nn.Module, contents: Mapping[str, Any], path: Path, arch: str, image_size: int) -> list[str]:
    """Loads the weights of a checkpoint, whatever wrapped the model that they are from; returns lines for the log."""
    recorded = contents["recorded"]
    try:
        state = plain_names(contents["state_dict"])
        check_alike(plain_state(model), state)
        load_state(model, state)
    except (RuntimeError, MismatchError) as error:
        is_other = recorded.get("arch", arch) != arch
        reason = (
            f"it is of a {recorded['arch']}, and -a says {arch}" if is_other else " ".join(str(error).split())[:300]
        )
        raise CheckpointError(f"{path} does not fit this network: {reason}") from error
    size = recorded.get("image_size", image_size)
    return [f"{path} is of images of {size} pixels, here they have {image_size}"] if size != image_size else []


def load_momentum(optimizer: torch.optim.Optimizer, contents: Mapping[str, Any], path: Path) -> None:
    """Loads a checkpoint's optimizer state, where it has one, but not its settings: those are the flags'."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        if "optimizer" in contents:
            load_optimizer(optimizer, contents["optimizer"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the optimizer's state in {path} does not fit this network: {error}") from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)
