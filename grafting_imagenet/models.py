"""torchvision's models by name, with fresh weights, torchvision's own, or those of anyone's checkpoint."""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision.models as zoo
from torch import Tensor, nn

from filter_grafting.errors import GraftingError, MismatchError
from filter_grafting.states import State, load_plain_state, plain_names
from grafting_imagenet.data import MEAN, STD
from training.models import load_optimizer, own_model

AUXILIARY_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # of the loss of each auxiliary head, as in their papers


def usual_size(arch: str, pretrained: bool = False) -> int:
    """Side of the images that a model is trained on, or that torchvision's weights of it were, in pixels."""
    if pretrained:
        return zoo.get_model_weights(arch).DEFAULT.transforms().crop_size[0]
    return 299 if arch == "inception_v3" else 224


def build(arch: str, num_classes: int, image_size: int | None = None, pretrained: bool = False) -> nn.Module:
    """The model called arch, or `package.module:function`, with fresh weights from torch's global generator.

    If torchvision's weights are to be loaded, some models have a form of their own.
    """
    image_size, options = image_size or usual_size(arch), {}
    if ":" in arch:
        return own_model(arch, num_classes, image_size)
    if arch in AUXILIARY_WEIGHT:
        # torchvision's weights of these two were trained on inputs of another scale, to which the model then converts.
        options = {"init_weights": not pretrained, "aux_logits": True, "transform_input": pretrained}
    elif arch.startswith("vit_"):
        options = {"image_size": image_size}
    elif arch.startswith("maxvit"):
        options = {"input_size": (image_size, image_size)}
    model = zoo.get_model(arch, weights=None, num_classes=num_classes, **options)
    if arch.startswith(("alexnet", "vgg")) and image_size == usual_size(arch):
        model.avgpool = nn.Identity()  # here it does nothing, and on CUDA it has no deterministic gradient
    return model


def load_pretrained(model: nn.Module, arch: str) -> str:
    """Loads torchvision's weights, but for the layers that give the classes if their number differs; returns a line."""
    weights = zoo.get_model_weights(arch).DEFAULT
    test = weights.transforms()
    if (tuple(test.mean), tuple(test.std)) != (MEAN, STD):  # as of efficientnet_v2_l
        expected = f"images of mean {test.mean} and standard deviation {test.std}, not {MEAN} and {STD}"
        raise GraftingError(f"--pretrained: torchvision's weights of {arch} expect {expected}: choose another model")
    try:
        state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        place, reason = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name), str(error).split(". ")[0]
        raise GraftingError(f"--pretrained: no weights of {arch} ({reason}): put {weights.url} at {place}") from error
    # In the files of the DenseNets, layers still have the names of their first release: norm.1 for norm1.
    for key in list(state):
        state[re.sub(r"(denselayer\d+\.(?:norm|conv))\.(\d)", r"\1\2", key)] = state.pop(key)
    anew = set()
    for key, entry in model.state_dict().items():
        if key in state and state[key].shape != entry.shape and state[key].shape[1:] == entry.shape[1:]:
            state[key] = entry
            anew.add(key.rpartition(".")[0])
    model.load_state_dict(state)
    (size,), accuracy = test.resize_size, weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    how = f"resized to {size}, {test.interpolation.value}, torchvision measured Acc@1 {accuracy}"
    line = f"started from torchvision's weights of {arch} ({weights.name}; {how})"
    return f"{line}; for other classes: {', '.join(sorted(anew))} starts anew" if anew else line


def load_weights(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, contents: Mapping[str, Any] | None = None, arch: str = ""
) -> None:
    """Loads the state dict of a checkpoint, whatever wrapped the model that it is from.

    Raises MismatchError, which names the first entry that differs, or the model that its contents say it is of.
    """
    try:
        load_plain_state(model, State(plain_names(state), str(path)))
    except MismatchError as error:
        of = (contents or {}).get("arch") or (contents or {}).get("model")
        raise MismatchError(f"{path} is of a {of}, and -a says {arch}" if of not in (None, arch) else error) from error


def load_momentum(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads an optimizer's state, but not its settings: those are the flags'."""
    load_optimizer(optimizer, {"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
