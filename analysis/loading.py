"""The trained model in a file that either script has left, ready to use, and the images as that model wants them."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from filter_grafting.errors import CheckpointError, GraftingError
from filter_grafting.states import State, load_plain_state, plain_names
from grafting_cifar import data as cifar
from grafting_cifar import models
from grafting_imagenet import data as imagenet
from grafting_imagenet import models as zoo
from training.flags import Parser, path
from training.images import DataError, Images
from training.models import read_checkpoint
from training.process import UsageError, amp_dtype

WORKERS, FEW = 2, 500  # processes that decode images, where these are not few


class Trained(NamedTuple):
    """A trained model, with what its file says of it."""

    path: Path
    model: nn.Module  # in evaluation mode
    name: str
    is_cifar: bool
    contents: dict[str, Any]  # all that the file holds, with its settings by flag
    classes: list[str]
    image_size: int
    mean: list[float]
    std: list[float]

    @property
    def settings(self) -> dict[str, Any]:
        return self.contents["settings"]

    @property
    def command(self) -> list[str]:
        """The words of the command that trained it; none if the file does not say it."""
        return self.contents.get("command") or []


def file_parser(description: str) -> Parser:
    """A parser with the flags of a program that uses one model."""
    parser = Parser(description=description)
    parser.add_argument("file", metavar="FILE", type=path, help="best1.t7, final1.tar or the like of a run")
    parser.add_argument("--model", metavar="NAME", help="the model, where the file does not say it")
    return parser


def load_trained(path: Path, name: str | None = None, device: torch.device | str = "cpu") -> Trained:
    """Reads and builds a model; `name` is the model's, for a file that does not say it, as the authors' script's.

    Raises:
        OSError: if there is no such file.
        GraftingError: naming the file, if it cannot be read, or does not say enough, or says what does not fit.
    """
    state, contents = read_checkpoint(path)
    settings, is_cifar, state = contents["settings"], "state_dict" not in contents, plain_names(state)
    name = name or contents.get("model") or contents.get("arch") or settings.get("model")
    if name is None:
        raise GraftingError(f"{path} does not say which model it holds: give it with --model")
    script, outputs = cifar if is_cifar else imagenet, [entry for entry in state.values() if entry.dim()][-1]
    about = {"classes": [str(k) for k in range(len(outputs))], "image_size": 32 if is_cifar else 224}
    about |= {"mean": list(script.MEAN), "std": list(script.STD)}
    if missing := [key for key in about if contents.get(key) is None]:
        instead = "numbers of classes, and the script's values, are taken"
        print(f"{path} does not say: {', '.join(missing)}; {instead}", file=sys.stderr)
    about |= {key: contents[key] for key in about if key not in missing}
    classes = len(about["classes"])
    try:
        if is_cifar and ":" not in name:
            model = models.build(name, classes)
        else:
            model = zoo.build(name, classes, about["image_size"], bool(settings.get("pretrained")))
        load_plain_state(model, State(state, str(path)))
    except (GraftingError, ValueError) as error:
        raise CheckpointError(f"{path} is no {name} with {classes} classes: {error}") from error
    model.eval().to(device, memory_format=torch.channels_last)
    return Trained(path, model, name, is_cifar, contents, **about)


def load_images(trained: Trained, source: str | Path | None = None) -> Images:
    """The images that the model was trained and tested on, from this source, or from where its command took them."""
    parser = Parser()
    parser.add_argument("--data", default=cifar.DEFAULT_DATA if trained.is_cifar else "imagenet")
    if source is None:
        source = parser.parse_known_args([word for word in trained.command if word != "--"])[0].data
        if str(source) not in ("glyphs", str(cifar.DEFAULT_DATA)) and not Path(source).expanduser().is_dir():
            says = f"was trained on {source}, which is not a folder here" if trained.command else "names no images"
            raise DataError(f"{trained.path} {says}: say with --data where they are")
    if not trained.is_cifar:
        images = imagenet.load(source)
    else:
        settings = trained.settings
        try:
            images = cifar.load(source, 100 if len(trained.classes) == 100 else 10)
            images = cifar.select(images, settings.get("images"), settings.get("val") or 0, settings.get("test_images"))
        except UsageError as error:  # of the flags of its training
            problem = f"{source} is not what {trained.path} was trained on ({error})"
            raise DataError(f"{problem}: give the --data of its training") from error
    own = trained.contents.get("classes") or images.classes
    if len(images.classes) != len(trained.classes) or own != images.classes:
        there, here = (f"{len(names)} classes ({', '.join(names[:3])}…)" for names in (images.classes, trained.classes))
        raise DataError(f"{source} has {there}, {trained.path} has {here}: give the --data of its training")
    return images


def batches_of(trained: Trained, split: Any, device: torch.device, size: int | None = None, train: bool = False) -> Any:
    """A split of the images as batches; with train, cropped and mirrored as in training."""
    if trained.is_cifar:
        return cifar.Batches(split, size or cifar.TEST_BATCH[device.type], device, augment=train)
    options = {"image_size": trained.image_size, "workers": WORKERS if len(split) > FEW else 0}
    options["skip_bad"] = "--skip_bad" in trained.command  # as in its training
    return imagenet.Batches(split, size or 64, device, train=train, **options)


def autocast(trained: Trained, device: torch.device) -> torch.autocast:
    """The precision that it was trained in: bfloat16, where that was asked for and the hardware computes in it."""
    dtype, _ = amp_dtype(bool(trained.settings.get("amp")), device)
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


@torch.inference_mode()
def scores_of(trained: Trained, split: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Class scores (n, classes) of all images in order, fp32, and their labels (n,), on the CPU."""
    batches = batches_of(trained, split, device)
    bar = tqdm(batches.epoch(), total=len(batches), desc="test", leave=False, disable=None)  # None: no bar in a log
    with autocast(trained, device):
        found = [(trained.model(images).float().cpu(), labels.cpu()) for images, labels in bar]
    scores, labels = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(labels)
