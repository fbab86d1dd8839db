"""The trained model in a file that either script has left, ready to use, and the images as that model wants them."""

import re
import shlex
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
from training.images import DataError, Images
from training.models import own_model
from training.process import amp_dtype

WORKERS, FEW = 2, 500  # processes that decode images, where these are not few


CPU = torch.device("cpu")


class Trained(NamedTuple):
    """A trained model, with what its file says of it."""

    path: Path
    model: nn.Module  # in evaluation mode
    name: str
    classes: list[str]
    image_size: int
    mean: list[float]
    std: list[float]
    settings: dict[str, Any]  # by flag
    contents: dict[str, Any]  # all that the file holds
    missing: list[str]  # what it does not say, and what was taken instead: older files say less

    @property
    def is_cifar(self) -> bool:
        return "state_dict" not in self.contents


def load_trained(path: Path, name: str | None = None, device: torch.device = CPU) -> Trained:
    """Reads and builds a model.

    Args:
        name: the model's, for a file that does not say it.

    Raises:
        GraftingError: naming the file, if it cannot be read, or does not say enough, or says what does not fit.
    """
    try:
        state, contents = read_checkpoint(path)
    except FileNotFoundError:
        raise GraftingError(f"{path}: there is no such file; expected best1.t7 or the like of a run") from None
    settings = contents["settings"] if isinstance(contents.get("settings"), dict) else {}
    said = [contents.get("model"), contents.get("arch"), settings.get("model"), settings.get("arch")]
    name = name or next((value for value in said if isinstance(value, str)), None)
    if name is None:
        raise GraftingError(f"{path} does not say which model it holds: give it with --model")
    is_cifar = "state_dict" not in contents
    script = cifar if is_cifar else imagenet
    missing = []

    def take(key: str, instead: Any, words: str) -> Any:
        if contents.get(key) is not None:
            return contents[key]
        missing.append(f"{key} (taken: {words})")
        return instead

    state = plain_names(state)
    numbers = [str(k) for k in range(next(len(entry) for entry in reversed(state.values()) if entry.dim()))]
    classes = list(map(str, take("classes", numbers, "their numbers")))
    size = 32 if is_cifar else int(settings.get("image_size") or 224)
    size = int(take("image_size", size, f"{size} pixels"))
    mean, std = (list(take(key, getattr(script, key.upper()), "the script's")) for key in ("mean", "std"))
    model = build(name, len(classes), size, is_cifar, bool(settings.get("pretrained")), path)
    try:
        load_plain_state(model, State(state, str(path)))
    except MismatchError as error:
        raise CheckpointError(f"{path} does not fit {name} with {len(classes)} classes: {error}") from error
    model.eval().to(device, memory_format=torch.channels_last)
    return Trained(path, model, name, classes, size, mean, std, settings, contents, missing)


def build(name: str, classes: int, image_size: int, is_cifar: bool, pretrained: bool, path: Path) -> nn.Module:
    """A model of grafting_cifar, of torchvision, or what package.module:function returns."""
    try:
        if ":" in name:
            return own_model(name, classes, image_size)
        return models.build(name, classes) if is_cifar else zoo.build(name, classes, image_size, pretrained)
    except (GraftingError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be built as {name} with {classes} classes: {error}") from error


def image(trained: Trained, path: Path) -> Tensor:
    """An image file as the model was tested with it: (1, 3, size, size), normalised. Raises DataError."""
    if trained.is_cifar:
        pixels = torch.from_numpy(cifar.read_image(path).copy())[None]
    else:
        pixels = imagenet.central(imagenet.read_image(str(path)), trained.image_size).permute(1, 2, 0)[None]
    scale = torch.tensor([trained.mean, trained.std]) * 255
    return ((pixels.float() - scale[0]) / scale[1]).permute(0, 3, 1, 2)


def load_images(trained: Trained, source: str | Path | None = None) -> Images:
    """The images that the model was trained and tested on, from this source, or from where its command took them."""
    command = trained.contents.get("command") or []
    words = shlex.split(command) if isinstance(command, str) else list(map(str, command))
    recorded = re.findall(r"(?m)^--data[=\n](.+)$", "\n".join(words))
    default = cifar.DEFAULT_FOLDER if trained.is_cifar else "imagenet"
    source = source or (recorded[-1] if recorded else default)
    if not trained.is_cifar:
        images = imagenet.load(source)
    else:
        images = cifar.load(source, 100 if len(trained.classes) == 100 and not is_own(source) else 10)
        chosen = {key: trained.settings[key] for key in ("val", "test_images") if trained.settings.get(key)}
        n = trained.settings.get("images")
        try:
            images = cifar.select(images, n=n, **chosen)
        except DataError as error:
            raise DataError(f"{source} is not what {trained.path} was trained on: {error}") from error
    has_names = "classes" in trained.contents
    if len(images.classes) != len(trained.classes) or (has_names and images.classes != trained.classes):
        there, here = (
            f"{len(names)} classes ({', '.join(names[:3])}{', …' * (len(names) > 3)})"
            for names in (images.classes, trained.classes)
        )
        raise DataError(f"{source} has {there}, {trained.path} has {here}: give the --data of its training")
    return images


def is_own(source: str | Path) -> bool:
    """Whether a source has classes of its own, rather than CIFAR's."""
    return str(source) == "glyphs" or (Path(source).expanduser() / "train").is_dir()


def batches_of(trained: Trained, split: Any, device: torch.device, size: int | None = None, train: bool = False) -> Any:
    """A split of the images as batches; with train, cropped and mirrored as in training."""
    if trained.is_cifar:
        return cifar.Batches(split, size or cifar.TEST_BATCH[device.type], device, augment=train)
    workers = WORKERS if len(split) > FEW else 0
    return imagenet.Batches(split, size or 64, device, train=train, image_size=trained.image_size, workers=workers)


@torch.inference_mode()
def scores_of(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device, amp: bool = False
) -> tuple[Tensor, Tensor]:
    """Class scores (n, classes) of all images in order, fp32, and their labels (n,), on the CPU.

    Args:
        amp: whether in bfloat16, where the hardware computes in it, as in training.
    """
    dtype, _ = amp_dtype(amp, device)
    scores, labels = [], []
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for images, own in batches:
            scores.append(model(images).float().cpu())
            labels.append(own.cpu())
    return torch.cat(scores), torch.cat(labels)
