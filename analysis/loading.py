"""The trained model in a file that either script has left, ready to use, and the images as that model wants them."""

import re
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from analysis.runs import read_checkpoint
from filter_grafting.errors import CheckpointError, GraftingError, MismatchError
from filter_grafting.states import State, load_plain_state, plain_names
from grafting_cifar import data as cifar
from grafting_cifar import models
from grafting_imagenet import data as imagenet
from grafting_imagenet import models as zoo
from training.flags import Parser, path
from training.images import DataError, Images
from training.models import own_model
from training.process import amp_dtype

WORKERS, FEW = 2, 500  # processes that decode images, where these are not few


class Trained(NamedTuple):
    """A trained model, with what its file says of it."""

    path: Path
    model: nn.Module  # in evaluation mode
    name: str
    classes: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    contents: dict[str, Any]  # all that the file holds, with its settings by flag
    missing: str  # a sentence: what it does not say, and what was taken instead, as older files say less

    @property
    def is_cifar(self) -> bool:
        return "state_dict" not in self.contents

    @property
    def settings(self) -> dict[str, Any]:
        return self.contents["settings"]


def file_parser(description: str) -> Parser:
    """A parser with the flags of a program that uses one model."""
    parser = Parser(description=description)
    parser.add_argument("file", metavar="FILE", type=path, help="best1.t7, final1.tar or the like of a run")
    parser.add_argument("--model", metavar="NAME", help="the model, where the file does not say it")
    return parser


def load_trained(path: Path, name: str | None = None, device: torch.device | str = "cpu") -> Trained:
    """Reads and builds a model; `name` is the model's, for a file that does not say it.

    Raises:
        GraftingError: naming the file, if it cannot be read, or does not say enough, or says what does not fit.
    """
    try:
        state, contents = read_checkpoint(path)
    except FileNotFoundError:
        raise GraftingError(f"{path}: there is no such file; expected best1.t7 or the like of a run") from None
    settings, is_cifar = contents["settings"], "state_dict" not in contents
    said = [name, contents.get("model"), contents.get("arch"), settings.get("model"), settings.get("arch")]
    name = next((value for value in said if isinstance(value, str)), None)
    if name is None:
        raise GraftingError(f"{path} does not say which model it holds: give it with --model")
    state, script = plain_names(state), cifar if is_cifar else imagenet
    scores = next(len(entry) for entry in reversed(state.values()) if entry.dim())
    instead = {"classes": [str(k) for k in range(scores)], "mean": list(script.MEAN), "std": list(script.STD)}
    instead["image_size"] = 32 if is_cifar else int(settings.get("image_size") or 224)
    missing = ", ".join(key for key in instead if contents.get(key) is None)
    known = {key: value if contents.get(key) is None else contents[key] for key, value in instead.items()}
    try:
        if ":" in name:
            model = own_model(name, len(known["classes"]))
        elif is_cifar:
            model = models.build(name, len(known["classes"]))
        else:
            model = zoo.build(name, len(known["classes"]), known["image_size"], bool(settings.get("pretrained")))
        load_plain_state(model, State(state, str(path)))
    except (GraftingError, ValueError) as error:
        how = "does not fit" if isinstance(error, MismatchError) else "cannot be built as"
        raise CheckpointError(f"{path} {how} {name} with {len(known['classes'])} classes: {error}") from error
    model.eval().to(device, memory_format=torch.channels_last)
    missing = (
        f"The file does not say: {missing}. Numbers of classes, and the script's values, are taken." if missing else ""
    )
    return Trained(path, model, name, **known, contents=contents, missing=missing)


def image(trained: Trained, path: Path) -> Tensor:
    """An image file as the model was tested with it: (1, 3, size, size), normalised. Raises DataError."""
    if trained.is_cifar:
        pixels = torch.from_numpy(cifar.read_image(path).copy())[None]
    else:
        pixels = imagenet.central(imagenet.read_image(str(path)), trained.image_size).permute(1, 2, 0)[None]
    mean, std = torch.tensor([trained.mean, trained.std]) * 255
    return ((pixels.float() - mean) / std).permute(0, 3, 1, 2)


def load_images(trained: Trained, source: str | Path | None = None) -> Images:
    """The images that the model was trained and tested on, from this source, or from where its command took them."""
    command = trained.contents.get("command") or []
    words = shlex.split(command) if isinstance(command, str) else list(map(str, command))
    recorded = re.findall(r"(?m)^--data[=\n](.+)$", "\n".join(words))
    default = cifar.DEFAULT_FOLDER if trained.is_cifar else "imagenet"
    source = source or (recorded[-1] if recorded else default)
    if trained.is_cifar:
        settings = trained.settings
        images = cifar.load(source, 100 if settings.get("cifar") == 100 or len(trained.classes) == 100 else 10)
        try:
            chosen = settings.get("images"), settings.get("val") or 0, settings.get("test_images")
            images = cifar.select(images, *chosen)
        except DataError as error:
            raise DataError(f"{source} is not what {trained.path} was trained on: {error}") from error
    else:
        images = imagenet.load(source)
    own = trained.contents.get("classes")
    if len(images.classes) != len(trained.classes) or own not in (None, images.classes):
        there, here = (f"{len(names)} classes ({', '.join(names[:3])}…)" for names in (images.classes, trained.classes))
        raise DataError(f"{source} has {there}, {trained.path} has {here}: give the --data of its training")
    return images


def batches_of(trained: Trained, split: Any, device: torch.device, size: int | None = None, train: bool = False) -> Any:
    """A split of the images as batches; with train, cropped and mirrored as in training."""
    if trained.is_cifar:
        return cifar.Batches(split, size or cifar.TEST_BATCH[device.type], device, augment=train)
    workers = WORKERS if len(split) > FEW else 0
    return imagenet.Batches(split, size or 64, device, train=train, image_size=trained.image_size, workers=workers)


def autocast(trained: Trained, device: torch.device) -> torch.autocast:
    """The precision that it was trained in: bfloat16, where that was asked for and the hardware computes in it."""
    dtype, _ = amp_dtype(bool(trained.settings.get("amp")), device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@torch.inference_mode()
def scores_of(
    trained: Trained, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Class scores (n, classes) of all images in order, fp32, and their labels (n,), on the CPU."""
    with autocast(trained, device):
        found = [(trained.model(images).float().cpu(), labels.cpu()) for images, labels in batches]
    scores, labels = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(labels)


def compare(trained: Trained, accuracy: float) -> None:
    """Says so if a model has not the accuracy that its file records."""
    before = trained.contents.get("accuracy")
    if isinstance(before, float) and abs(accuracy - before) > 1:
        asked = f"{trained.path} had {before:.2f} % when it was saved, and has {accuracy:.2f} % here"
        print(f"{asked}: is --data what it was in training?", file=sys.stderr)
