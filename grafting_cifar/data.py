"""The images: loaded once, kept as they are (uint8), augmented and normalised a batch at a time.

    images = load("glyphs")
    batches = Batches(images.train, batch_size=128, device="cuda", augment=True)
    for x, labels in batches.epoch(seed=0): ...

What has been decoded is cached; processes on one machine share the cache's pages in memory.
"""

import contextlib
import functools
import hashlib
import os
import socket
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from tqdm import tqdm

from filter_grafting.checkpoint import save
from grafting_cifar import glyphs
from grafting_cifar.flags import DEFAULT_DATA
from training.images import DataError, Images, checksum, class_folders, normalised, reading, rgb
from training.process import UsageError
from training.records import say

__all__ = ["Batches", "DataError", "Images", "Split", "checksum", "load", "select"]
SIZE = 32  # pixels; every source is brought to it
PADDING = 4
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10, as published; used for every source
STD = (0.2023, 0.1994, 0.2010)
# Images: many fill a GPU, few stay in the caches of a CPU (250 are 1.3 times as fast there).
TEST_BATCH = {"cuda": 1000, "cpu": 250}
LOCK_SECONDS = 7200  # to wait for another process that decodes; then this one does


class Split(NamedTuple):
    images: Tensor  # uint8 (n, 32, 32, 3), on the CPU
    labels: Tensor  # int64 (n,)


def load(source: str | Path, cifar: int = 10) -> Images:
    """The splits, the names of the classes and the notes of a source, which is one of

    - "glyphs": 10,000 + 2,000 images of the digits 0-9, drawn here, the same for everyone;
    - a folder with train/<class>/* and test/<class>/*, val/<class>/* or both (see `class_folders`): images of any
      size, resized to 32x32;
    - any other folder: CIFAR-10 or CIFAR-100 (cifar) in its standard files, downloaded where they are not.

    The first start decodes, and leaves a cache beside the images (in the user's cache folder where that place cannot
    be written, in memory where nothing can). Of processes that start together one decodes and the others wait for it.
    Raises DataError where the user has to act, and UsageError if cifar is 100 and the number of classes is not.
    """
    folder = Path(os.path.abspath(os.path.expanduser(source)))
    if str(source) == "glyphs":
        images = _load_glyphs()
    elif (folder / "train").is_dir():
        images = _load_class_folders(folder)
    else:
        images = _load_standard(folder, {10: CIFAR10, 100: CIFAR100}[cifar])
    if cifar == 100 and len(images.classes) != 100:
        raise UsageError(f"{source} has {len(images.classes)} classes, not 100: leave out --cifar 100")
    return images


def select(images: Images, n: int | None = None, val: int = 0, test_images: int | None = None) -> Images:
    """n of the training images, val more of them to choose the best epoch on, test_images to test on; None: all.

    They are the same for everyone: the first and the last of a shuffled order that follows from the number of images.
    Raises UsageError if there are too few, or if val is asked of images that come with a val/ of their own.
    """
    train, test, end = images.train, images.test, len(images.train.labels)
    if (n or 1) + val > end:
        asked = " and ".join(f"--{flag} {count}" for flag, count in (("images", n), ("val", val)) if count)
        raise UsageError(f"got {asked}, but there are {end} images to train on: ask for fewer")
    if (test_images or 1) > len(test.labels):
        raise UsageError(f"got --test_images {test_images}, but there are {len(test.labels)} to test on: ask for fewer")
    if val and images.val:
        raise UsageError(f"got --val {val}, but these images have a val/ to choose the best epoch on: leave out --val")
    return images._replace(
        train=_shuffled(train, 0, n or end - val) if n or val else train,
        val=_shuffled(train, end - val, end) if val else images.val,
        test=_shuffled(test, 0, test_images) if test_images else test,
    )


def _shuffled(split: Split, start: int, end: int) -> Split:
    """The images at these places of the shuffled order, in the split's own order."""
    # RandomState, as NumPy promises that its numbers stay what they are.
    order = np.random.RandomState(2020).permutation(len(split.labels))
    rows = torch.from_numpy(np.sort(order[start:end]))
    return Split(split.images[rows], split.labels[rows])


class Batches:
    """A split as batches on a device, to which it is copied once, as uint8; the last batch may be smaller."""

    def __init__(self, split: Split, batch_size: int, device: str | torch.device, augment: bool) -> None:
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size = batch_size
        self.augment = augment
        self.samples = len(self.images)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, normalised, float32 (b, 3, 32, 32) in channels_last memory format, and labels (b,).

        With augment the images come shuffled, each cropped at an offset of its own and mirrored or not: a
        function of the split, the seed and the kind of device. Without it they come in order, and seed is not used.
        """
        if not self.augment:
            for images, labels in self._batches(self.images, self.labels):
                yield normalise(images), labels
            return
        device = self.images.device
        # All that is random is drawn here, on the device: nothing below makes the host wait for it.
        generator = torch.Generator(device).manual_seed(seed)
        order = torch.randperm(self.samples, generator=generator, device=device)
        offsets = torch.randint(2 * PADDING + 1, (2, self.samples), generator=generator, device=device)
        flips = torch.rand(self.samples, generator=generator, device=device) < 0.5
        for rows, dy, dx, flip in self._batches(order, *offsets, flips):
            # index_select copies whole images; images[rows] would copy byte by byte on the CPU.
            images = crop_and_flip(self.images.index_select(0, rows), dy, dx, flip)
            yield normalise(images), self.labels[rows]

    def _batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(tensor.split(self.batch_size) for tensor in tensors), strict=True)


def crop_and_flip(images: Tensor, dy: Tensor, dx: Tensor, flip: Tensor) -> Tensor:
    """Pads each image with 4 black pixels on every side, crops it to its size at (dy, dx), mirrors it or not.

    images: uint8 (n, h, w, c). dy, dx: int64 (n,) in 0..8, where 4 changes nothing. flip: bool (n,).
    Returns uint8 (n, h, w, c).
    """
    n, h, w, c = images.shape
    padded = images.new_zeros((2, n, h + 2 * PADDING, w + 2 * PADDING, c))
    padded[0, :, PADDING:-PADDING, PADDING:-PADDING] = images
    padded[1] = padded[0].flip(2)
    # A view of every window of every image and of its mirror image: one gather crops and flips the batch.
    windows = padded.unfold(2, h, 1).unfold(3, w, 1).permute(0, 1, 2, 3, 5, 6, 4)  # (2, n, 9, 9, h, w, c)
    dx = torch.where(flip, 2 * PADDING - dx, dx)
    return windows[flip.long(), torch.arange(n, device=images.device), dy, dx]


normalise = functools.partial(normalised, mean=MEAN, std=STD)


# ---- The cache: a file that is named by the state of what it was made from, appears whole and never changes.


def _cached(folder: Path, name: str, state: str, make: Callable[[], Images]) -> Images:
    """What make() returns, from a cache beside the images, or where that place cannot be written, the user's."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "filter_grafting")
    places = (folder / ".grafting_cache", user / hashlib.blake2b(os.fsencode(folder), digest_size=8).hexdigest())
    made = None
    for place in places:
        path = place / f"{name}-{state}.pt"
        if images := _read_cache(path):
            return images
        with contextlib.suppress(OSError, NotImplementedError):  # read-only, full, without locks, or held for too long
            place.mkdir(parents=True, exist_ok=True)
            with _lock(place / f"{name}.lock"):  # if another process held it, that one has made the cache
                if images := _read_cache(path):
                    return images
                made = made or make()
                for old in place.glob(f"*{name}-*"):  # of an earlier state, or left by a killed process
                    old.unlink()
                save(path, {"splits": [split and tuple(split) for split in made[:3]], "classes": made.classes})
                return _read_cache(path) or made
    note = f"the images are kept in memory: neither {places[0]} nor {places[1]} can be written"
    return (made or make())._replace(notes=[note])


def _lock(path: Path) -> contextlib.AbstractContextManager:
    with contextlib.suppress(Timeout):
        return FileLock(path).acquire(timeout=5)
    say(f"Waiting for another process, which prepares the images in {path.parent} ...")
    return FileLock(path).acquire(timeout=LOCK_SECONDS)


def _read_cache(path: Path) -> Images | None:
    """A whole cache, mapped into memory: writing to the images changes no file."""
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:  # whatever a damaged file makes of it
        if not archive.testzip():
            cached = torch.load(path, mmap=True, weights_only=True)
            return Images(*(split and Split(*split) for split in cached["splits"]), cached["classes"], [])
    return None


# ---- The sources


def _load_glyphs() -> Images:
    def draw() -> Images:
        say("Drawing the 12,000 images of glyphs, once ...")
        train, test = (Split(*split) for split in glyphs.draw())
        return Images(train, None, test, glyphs.CLASSES, [])

    return _cached(DEFAULT_DATA, "glyphs", glyphs.VERSION, draw)


def _load_class_folders(folder: Path) -> Images:
    listed = class_folders(folder)
    paths = sorted(path for split in listed[:3] if split for path in split.paths)
    files = [(os.path.relpath(path, folder), os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths]
    state = hashlib.blake2b(ascii(files).encode(), digest_size=8).hexdigest()
    images = _cached(folder, "images", state, lambda: _decode(folder, listed))
    return images._replace(notes=listed.notes + images.notes)


def _decode(folder: Path, listed: Images) -> Images:
    files = [split for split in listed[:3] if split]
    paths = [path for split in files for path in split.paths]
    say(f"Decoding the {len(paths):,} images of {folder}, once ...")
    # Threads, since Pillow decodes and resizes without the interpreter's lock. disable=None: no bar in a log.
    with ThreadPoolExecutor() as pool:
        images = list(tqdm(pool.map(read_image, paths), total=len(paths), unit="image", leave=False, disable=None))
    parts = iter(torch.from_numpy(np.stack(images)).split([len(split) for split in files]))
    return Images(*(split and Split(next(parts), split.labels) for split in listed[:3]), listed.classes, [])


def read_image(path: str | Path) -> np.ndarray:
    """uint8 (32, 32, 3), resized with antialiasing."""
    with reading(path), Image.open(path) as image:
        image.draft(None, (2 * SIZE, 2 * SIZE))  # lets a large JPEG be decoded at a fraction of its size
        image = rgb(image)
        if image.size != (SIZE, SIZE):
            image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return np.asarray(image)


def _load_standard(folder: Path, dataset: type[CIFAR10]) -> Images:
    visible = [path.name for path in folder.glob("[!.]*")]
    has_files = any(name.startswith("cifar-") for name in visible)
    if folder != DEFAULT_DATA and not has_files and (visible or not folder.is_dir()):
        problem = f"has neither train/<class>/ and test/<class>/ nor the {dataset.__name__} files"
        wanted = "a folder that has, an empty one, which gets the download, or the word glyphs"
        raise DataError(f"{folder} {problem}: give {wanted}")
    # torchvision compares the files with their published checksums: they cannot be in any other state.
    return _cached(folder, dataset.__name__.lower(), dataset.tgz_md5, lambda: _read_standard(folder, dataset))


def _read_standard(folder: Path, dataset: type[CIFAR10]) -> Images:
    socket.setdefaulttimeout(30)  # torchvision sets none: behind a silent firewall it would wait for ever
    try:
        train, test = (dataset(folder, train=train, download=True) for train in (True, False))
    except Exception as error:  # of the network, the archive, the disk, or a file with another checksum
        missing = f"{dataset.__name__} is not (or not whole) in {folder} and could not be downloaded ({error})"
        raise DataError(f"{missing}: put {dataset.filename} from {dataset.url} into {folder}") from error
    splits = [Split(torch.from_numpy(np.ascontiguousarray(x.data)), torch.tensor(x.targets)) for x in (train, test)]
    return Images(splits[0], None, splits[1], list(train.classes), [])
