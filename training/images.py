"""Images in class folders, by one rule for both scripts: train/<class>/* and val/<class>/*, test/<class>/* or both."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import make_dataset

from filter_grafting.errors import GraftingError
from filter_grafting.membership import printable

SYSTEM = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"}


class DataError(GraftingError):
    """Images that cannot be had as asked: a folder laid out in another way, a file that is no image."""


class Images(NamedTuple):
    """What a source of images holds. A split is what the script loads: pixels and labels, or files and labels."""

    train: Any
    val: Any  # to choose the best epoch on; None where the images come without
    test: Any  # to report
    classes: list[str]
    notes: list[str]  # sentences for the log, as of files that were left out


@dataclass(frozen=True)
class Files:
    """The images of one split, class by class, in sorted order."""

    paths: list[str]
    labels: Tensor  # int64 (n,): the rank of an image's class among the sorted names

    def __len__(self) -> int:
        return len(self.paths)


def class_folders(folder: str | Path) -> Images:
    """Lists the images of a folder, in sub-folders of a class too; no file is opened. Hidden and system folders,
    hidden files and those that Pillow does not decode are left out, and counted in a note.

    A split counts if it has class folders. With both val/ and test/, val/ is to choose the best epoch on, and test/ to
    be reported; with one of them, that one is reported. Raises DataError if the folder is laid out in another way.
    """
    folder, left_out = Path(os.path.abspath(os.path.expanduser(folder))), []
    try:
        classes = {split: names for split in ("train", "val", "test") if (names := _classes(folder / split))}
        if "train" not in classes or len(classes) == 1:
            problem = "lacks class folders in train/, or in test/ and val/" if folder.is_dir() else "does not exist"
            layout = "the images of each class belong into train/<class>/, and others of it into test/ or val/<class>/"
            raise DataError(f"{folder} {problem}: {layout}")
        for split, names in classes.items():
            if differing := sorted({*names} ^ {*classes["train"]}):
                rule = f"train/ and {split}/ of {folder} must have the same class folders"
                raise DataError(f"{rule}, but one of them alone has {', '.join(differing)[:100]}")
        files = {split: _list(folder / split, names, left_out) for split, names in classes.items()}
    except OSError as error:
        raise DataError(f"{error.filename or folder}: {error.strerror or error}") from error
    notes = []
    if left_out:
        example = printable(os.path.relpath(min(left_out), folder))
        notes.append(f"left out of {folder}: {len(left_out):,} files that are hidden or no images, such as {example}")
    val = files.get("val") if "test" in files else None
    return Images(files["train"], val, files.get("test", files.get("val")), classes["train"], notes)


def _classes(place: Path) -> list[str]:
    names = sorted(os.listdir(place)) if place.is_dir() else []
    return [name for name in names if not _is_hidden(name) and (place / name).is_dir()]


def _list(place: Path, classes: list[str], left_out: list[str]) -> Files:
    """The images of a split; what is passed over is added to left_out."""

    def is_image(path: str) -> bool:
        hidden = any(map(_is_hidden, path[len(str(place)) :].split(os.sep)))
        counts = not hidden and os.path.splitext(path)[1].lower() in suffixes()
        if not counts:
            left_out.append(path)
        return counts

    ranks = {name: rank for rank, name in enumerate(classes)}
    samples = sorted(make_dataset(str(place), ranks, is_valid_file=is_image), key=lambda sample: sample[::-1])
    return Files([path for path, _ in samples], torch.tensor([rank for _, rank in samples]))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


@cache
def suffixes() -> frozenset[str]:
    """Of the files that Pillow reads: .bmp, .jfif, .jpg, .png and many more."""
    # Decoders registered first are tried first on every file: with the usual ones in front, that takes half the time.
    Image.preinit()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with the image in a file, as a DataError that names the file."""
    try:
        yield
    except Exception as error:  # Pillow's decoders answer a broken file with nearly every exception there is
        reason = "it is of no known format" if isinstance(error, UnidentifiedImageError) else printable(error)
        raise DataError(f"{path} cannot be read as an image ({reason})") from error


def rgb(image: Image.Image) -> Image.Image:
    """As torchvision's ImageFolder converts it (transparency is dropped), but 16-bit grey scaled to 8, not clipped."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


Three = tuple[float, float, float]


def normalised(images: Tensor, mean: Three, std: Three) -> Tensor:
    """(images / 255 - mean) / std: uint8 (n, h, w, 3) to float32 (n, 3, h, w) in channels_last memory format."""
    n, h, w, _ = images.shape
    # In rows of many pixels, on the CPU several times faster than three channels at a time; a small image is one row.
    row = w * h if h <= 32 else w
    scale, shift = _scale_and_shift(mean, std, row, images.device)
    return images.reshape(-1, 3 * row).float().mul_(scale).add_(shift).view(n, h, w, 3).permute(0, 3, 1, 2)


@cache
def _scale_and_shift(mean: Three, std: Three, pixels: int, device: torch.device) -> tuple[Tensor, ...]:
    means, stds = torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)
    return tuple(x.float().repeat(pixels).to(device) for x in (1 / (255 * stds), -means / stds))


def checksum(labels: Tensor) -> str:
    """Eight hexadecimal digits that tell a set of training images from another, by the labels in their order."""
    return f"{zlib.crc32(labels.numpy()):08x}"
