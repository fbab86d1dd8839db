"""Images in class folders, by one rule for both scripts: train/<class>/* and val/<class>/*, test/<class>/* or both."""

from __future__ import annotations

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import make_dataset

from filter_grafting.errors import GraftingError
from filter_grafting.membership import printable

STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow recognises, but does not decode
SYSTEM = {"@eadir", "__macosx", "#recycle", "@recycle", "$recycle.bin", "system volume information", "lost+found"}


class DataError(GraftingError):
    """Images that cannot be had as asked: a folder laid out in another way, a file that is no image."""


class Images(NamedTuple):
    """What a source of images holds. A split is whatever the script loads: pixels, or the files that have them."""

    train: Any
    val: Any  # to choose the best epoch on; None where the images do not come with any
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
    """Lists the images of a folder; no file is opened. Sub-folders of a class count, hidden and system folders do not.

    A split counts if it has class folders. With both val/ and test/, val/ is to choose the best epoch on, and test/ to
    be reported; with one of them, that one is reported. A label is the rank of its class in sorted order.

    Raises:
        DataError: if the folder is laid out in another way, cannot be read, or its splits have other classes.
    """
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{printable(folder)} {problem}: give one that holds train/<class>/ and test/<class>/")
    try:
        classes = {split: _classes(folder / split) for split in ("train", "val", "test")}
        _check(folder, classes)
        splits, left_out = {}, []
        for split in filter(classes.get, classes):
            splits[split] = _list(folder / split, classes[split], left_out)
    except OSError as error:
        place = printable(error.filename or folder)
        raise DataError(f"{place} cannot be read ({error.strerror}): mend it, or give another folder") from error
    notes = []
    if left_out:
        example = printable(os.path.relpath(min(left_out), folder))
        notes = [f"left out of {printable(folder)}, as no images or hidden: {len(left_out):,} files, such as {example}"]
    test = splits.get("test", splits.get("val"))
    return Images(splits["train"], splits.get("val") if "test" in splits else None, test, classes["train"], notes)


def _classes(place: Path) -> list[str]:
    if not place.is_dir():
        return []
    with os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if not _is_hidden(entry.name) and entry.is_dir())


def _check(folder: Path, classes: dict[str, list[str]]) -> None:
    there = [split for split in classes if classes[split]]
    if not classes["train"]:
        place = f"{printable(folder / 'train')} {'has' if (folder / 'train').is_dir() else 'is not there, or has'}"
        raise DataError(f"{place} no class folders: put the images of each class into train/<class>/")
    if there == ["train"]:
        place = f"{printable(folder)} has train/<class>/, but neither test/<class>/ nor val/<class>/"
        raise DataError(f"{place}: put the images to test on into test/<class>/")
    for split in there[1:]:
        only = {
            name: sorted(set(classes[name]) - set(classes[other]))
            for name, other in (("train", split), (split, "train"))
        }
        differences = [f"only {name}/ has {_first_few(names)}" for name, names in only.items() if names]
        if differences:
            rule = f"train/ and {split}/ of {printable(folder)} must have the same class folders"
            raise DataError(f"{rule}, but {' and '.join(differences)}: add or remove what differs")


def _first_few(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


def _list(place: Path, classes: list[str], left_out: list[str]) -> Files:
    """The images of a split; adds to left_out what it passes over."""
    with os.scandir(place) as entries:
        left_out += [entry.path for entry in entries if entry.name not in classes]
    with ThreadPoolExecutor(16) as pool:  # on a network's disk every folder takes its time
        listed = list(pool.map(lambda name: _list_class(place, name, left_out), classes))
    for name, paths in zip(classes, listed, strict=True):
        if not paths:
            raise DataError(f"{printable(place / name)} has no image: put some there, or remove this class everywhere")
    counts = torch.tensor([len(paths) for paths in listed])
    labels = torch.arange(len(classes)).repeat_interleave(counts)
    return Files([path for paths in listed for path in paths], labels)


def _list_class(place: Path, name: str, left_out: list[str]) -> list[str]:
    def is_image(path: str) -> bool:
        good = os.path.splitext(path)[1].lower() in suffixes()
        good = good and not any(map(_is_hidden, path[len(str(place)) + 1 :].split(os.sep)))
        if not good:
            left_out.append(path)
        return good

    os.scandir(place / name).close()  # raises where the folder may not be read; torchvision would pass over it
    return sorted(path for path, _ in make_dataset(place, {name: 0}, is_valid_file=is_image, allow_empty=True))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM


@cache
def suffixes() -> frozenset[str]:
    """Of the files that Pillow decodes: .bmp, .jfif, .jpg, .png and many more."""
    # Decoders registered first are tried first on every file: with the usual ones in front, that takes half the time.
    Image.preinit()
    formats = Image.OPEN.keys() - STUBS
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


def rgb(image: Image.Image) -> Image.Image:
    """As torchvision's ImageFolder converts it (transparency is dropped), but 16-bit grey scaled to 8, not clipped."""
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        grey = grey >> 8 if "16" in image.mode or grey.max() > 255 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # of a palette: dropped at once, it would draw a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def checksum(labels: Tensor) -> str:
    """Eight hexadecimal digits that tell a set of training images from another, by the labels in their order."""
    return f"{zlib.crc32(labels.numpy()):08x}"
