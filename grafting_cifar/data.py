"""The images: loaded once, kept as they are (uint8), augmented and normalised a batch at a time.

    train, test, classes = load("glyphs")
    batches = Batches(train, batch_size=128, device="cuda", augment=True)
    for images, labels in batches.epoch(seed=0): ...

load() knows three sources: the standard CIFAR files, images in class folders, and "glyphs", a data set that
it draws itself. What it has decoded is cached; processes on one machine share the cache's pages in memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import io
import itertools
import json
import os
import shutil
import socket
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from filter_grafting.errors import DataError

SIZE = 32  # pixels; every source is brought to it
PADDING = 4
MEAN = (0.4914, 0.4822, 0.4465)  # of CIFAR-10, as published; used for every source
STD = (0.2023, 0.1994, 0.2010)
# Images: many fill a GPU, few stay in the caches of a CPU (250 are 1.3 times as fast there).
TEST_BATCH = {"cuda": 1000, "cpu": 250}
DEFAULT_FOLDER = Path(__file__).resolve().parent.parent / "data"


class Split(NamedTuple):
    images: Tensor  # uint8 (n, 32, 32, 3), on the CPU
    labels: Tensor  # int64 (n,)


Loaded = tuple[Split, Split, int]  # train, test, number of classes


def load(source: str | Path, cifar: int = 10) -> Loaded:
    """The training images, the test images and the number of classes of a source, which is one of

    - "glyphs": 10,000 + 2,000 images of the digits 0-9, drawn here, the same for everyone;
    - a folder with train/<class>/* and test/<class>/* (or val/<class>/*; test/ where both exist): images of
      any size (resized to 32x32) in any format that Pillow reads. A label is the rank of its class in sorted
      order. Transparency is dropped, as by torchvision's ImageFolder;
    - any other folder: CIFAR-10 or CIFAR-100 (cifar) in its standard files, downloaded where they are not.

    The first start decodes, and leaves a cache beside the images (in the user's cache folder where that place
    cannot be written, in memory where nothing can); a later one maps it into memory. Of processes that start
    together one decodes and the others wait for it. Raises DataError where the user has to act.
    """
    if cifar not in _STANDARD:
        raise ValueError(f"cifar must be 10 or 100, not {cifar}")
    if str(source) == "glyphs":
        return _cached(DEFAULT_FOLDER / "glyphs", lambda: _GLYPHS_VERSION, _draw_glyphs)
    folder = Path(os.path.abspath(os.path.expanduser(source)))
    try:
        return _load_class_folders(folder) if (folder / "train").is_dir() else _load_standard(folder, cifar)
    except OSError as error:
        reason = f"{error.filename or folder} cannot be read ({error.strerror or error})"
        raise DataError(f"{reason}: mend it, or give another folder of images.") from error


def select(
    loaded: Loaded, images: int | None = None, val: int = 0, test_images: int | None = None
) -> tuple[Split, Split | None, Split]:
    """The images to train on, to choose the best epoch on (None if val is 0) and to test on; None: all that there are.

    They are the same for everyone: the first and the last of a shuffled order that follows from the number of images.
    Raises DataError if there are too few.
    """
    train, test, _ = loaded
    for flag, asked, there in (
        (f"--images {images or 1} and --val {val}", (images or 1) + val, len(train.labels)),
        (f"--test_images {test_images}", test_images or 1, len(test.labels)),
    ):
        if asked > there:
            raise DataError(f"got {flag}, but there are {there:,} such images: ask for fewer, or give a larger --data")
    kept = _shuffled(train, 0, images if images else len(train.labels) - val) if images or val else train
    held_out = _shuffled(train, len(train.labels) - val, len(train.labels)) if val else None
    return kept, held_out, _shuffled(test, 0, test_images) if test_images else test


def _shuffled(split: Split, start: int, end: int) -> Split:
    """The images at these places of the shuffled order, in the split's own order."""
    # RandomState, as NumPy promises that its numbers stay what they are.
    order = np.random.RandomState(2020).permutation(len(split.labels))
    rows = torch.from_numpy(np.sort(order[start:end]))
    return Split(split.images[rows], split.labels[rows])


# ---- Batches


class Batches:
    """A split as batches on a device; the images stay uint8 until they are used.

    On the CPU the split's own memory is used (it may be a cache's, shared between processes); to CUDA it is
    copied once. The last batch may be smaller.
    """

    def __init__(self, split: Split, batch_size: int, device: str | torch.device, augment: bool) -> None:
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.batch_size = batch_size
        self.augment = augment
        self.samples = len(self.images)

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, normalised, float32 (b, 3, 32, 32) in channels_last memory format, and labels (b,).

        With augment the images come shuffled, each cropped at an offset of its own and mirrored or not: a
        function of the split, the seed and the kind of device. Without it they come in order, without a seed.
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
            images = self.images.index_select(0, rows)
            yield normalise(crop_and_flip(images, dy, dx, flip)), self.labels[rows]

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


def normalise(images: Tensor) -> Tensor:
    """(images / 255 - mean) / std: uint8 (n, h, w, 3) to float32 (n, 3, h, w) in channels_last format."""
    n, h, w, _ = images.shape
    scale, shift = _scale_and_shift(h * w, images.device)
    return images.reshape(n, -1).float().mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2)


@functools.cache
def _scale_and_shift(pixels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Repeated for every pixel, so that an image is one long row: on the CPU many times faster than rows of 3.
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    scale, shift = (x.float().repeat(pixels).to(device) for x in (1 / (255 * std), -mean / std))
    return scale, shift


# ---- The cache: a folder per source, and in it one per state of that source, named by its fingerprint. The
# latter appears whole (it is renamed into place) and never changes, so that reading it takes no lock.

_CACHE = ".grafting_cache"
_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
_CONTENTS = "contents.json"
_LOCK_MINUTES = 120


def _cached(place: Path, fingerprint: Callable[[], str | None], make: Callable[[], Loaded]) -> Loaded:
    """What make() returns, from the cache in place where it has one of this fingerprint (None: it cannot)."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.blake2b(os.fsencode(place), digest_size=8).hexdigest()
    places = (place, Path(user, "filter_grafting", name))

    def read() -> Loaded | None:
        state = fingerprint()
        return next(filter(None, (_read_cache(place / state) for place in places)), None) if state else None

    if loaded := read():
        return loaded
    for place in places:
        with contextlib.ExitStack() as stack:
            try:
                place.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(place / "lock", "a+b", buffering=0))
                _wait_for(lock, place)
            except OSError:  # read-only, full, or a file system without locks
                continue
            if loaded := read():  # made by the process that was waited for
                return loaded
            loaded = make()
            return _write_cache(place, fingerprint(), loaded)
    _say(f"Neither {places[0]} nor {places[1]} can be written: the images are kept in memory, for now.")
    return make()


def _read_cache(folder: Path) -> Loaded | None:
    """The cache in folder, mapped into memory; None where it is missing, incomplete or damaged."""
    try:
        contents = json.loads((folder / _CONTENTS).read_text())
        tensors = []
        for key in _ARRAYS:
            # "c", copy on write: the pages are shared, and torch gets memory that it may write to.
            array = np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False)
            if zlib.crc32(array) != contents["crc32"][key]:
                return None
            tensors.append(torch.from_numpy(array))
        if _crc32_of(contents) != contents["own_crc32"]:
            return None
        return Split(*tensors[:2]), Split(*tensors[2:]), contents["classes"]
    except Exception:  # any exception can come out of a damaged header
        return None


def _crc32_of(contents: dict) -> int:
    """Of what a cache's record says, but for this number itself."""
    return zlib.crc32(json.dumps([contents["classes"], contents["crc32"]], sort_keys=True).encode())


def _write_cache(place: Path, state: str, loaded: Loaded) -> Loaded:
    """Writes what was loaded to place/state and returns it mapped from there; as it is, if that fails."""
    train, test, classes = loaded
    arrays = {key: tensor.numpy() for key, tensor in zip(_ARRAYS, (*train, *test), strict=True)}
    unfinished = place / f"{socket.gethostname()}-{os.getpid()}.tmp"
    try:
        # The lock is ours: what is here is damaged, of an earlier state, or of a process that was killed.
        for entry in list(place.iterdir()):
            if entry.name == state or entry.suffix == ".tmp" or (entry / _CONTENTS).exists():
                shutil.rmtree(entry, ignore_errors=True)
        unfinished.mkdir()
        for key, array in arrays.items():
            np.save(unfinished / f"{key}.npy", array)
        contents = {"classes": classes, "crc32": {key: zlib.crc32(array) for key, array in arrays.items()}}
        (unfinished / _CONTENTS).write_text(json.dumps(contents | {"own_crc32": _crc32_of(contents)}))
        unfinished.rename(place / state)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        reason = f"The images could not be cached in {place} ({error.strerror or error})"
        _say(f"{reason}: they are kept in memory, and will be prepared again at the next start.")
        return loaded
    return _read_cache(place / state) or loaded


def _wait_for(lock: io.FileIO, place: Path) -> None:
    """Takes the lock, of which a process lets go when it ends, in whatever way."""
    begun, notice = time.monotonic(), 5
    while True:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        seconds = time.monotonic() - begun
        if seconds >= notice:
            notice += 60
            lock.seek(0)
            holder = lock.read().decode(errors="replace") or "another process"
            sentence = f"{seconds:.0f} s for {holder}, which prepares the images in {place}"
            if seconds > 60 * _LOCK_MINUTES:
                raise DataError(f"Waited {sentence}: see whether it is stuck, end it if so, and start again.")
            _say(f"Waiting {sentence}.")
        time.sleep(0.1)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}".encode())


class _File(NamedTuple):
    path: str  # relative to the data folder
    size: int  # bytes
    time: int  # of the last change, in ns


def _files(folder: str | Path, path: str, suffixes: frozenset[str] | None = None) -> Iterator[_File]:
    """The files in folder and its sub-folders, all or of these suffixes, but hidden ones (as ._1.jpg)."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name.startswith("."):
                continue
            if entry.is_dir():
                yield from _files(entry.path, f"{path}/{name}", suffixes)
            elif suffixes is None or os.path.splitext(name)[1].lower() in suffixes:
                status = entry.stat()
                yield _File(f"{path}/{name}", status.st_size, status.st_mtime_ns)


def _fingerprint(files: Iterable[_File]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        digest.update(os.fsencode(f"{file.path}\0{file.size}\0{file.time}\0"))
    return digest.hexdigest()


def _say(sentence: str) -> None:
    print(sentence, flush=True)


# ---- Class folders

_Classes = dict[str, list[_File]]  # the image files of each class, both in sorted order


def _load_class_folders(folder: Path) -> Loaded:
    train, test = _list_class_folders(folder)
    state = _fingerprint(file for split in (train, test) for files in split.values() for file in files)
    return _cached(folder / _CACHE / "images", lambda: state, lambda: _decode(folder, train, test))


def _list_class_folders(folder: Path) -> tuple[_Classes, _Classes]:
    """What train/ and test/ (or val/) hold."""
    other = next((name for name in ("test", "val") if (folder / name).is_dir()), None)
    if other is None:
        raise DataError(f"{folder} has train/ but neither test/ nor val/: put images into test/<class>/.")
    train, test = _list_classes(folder, "train"), _list_classes(folder, other)
    only = {"train": train.keys() - test.keys(), other: test.keys() - train.keys()}
    if any(only.values()):
        differences = [f"only {name}/ has {', '.join(sorted(only[name]))}" for name in only if only[name]]
        reason = f"train/ and {other}/ of {folder} must have the same class folders"
        raise DataError(f"{reason}, but {' and '.join(differences)}: add or remove what differs.")
    return train, test


def _list_classes(folder: Path, split: str) -> _Classes:
    with os.scandir(folder / split) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder / split} has no class folders: put images into {split}/<class>/.")
    classes = {name: sorted(_files(folder / split / name, f"{split}/{name}", _suffixes())) for name in names}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise DataError(f"{folder / split / empty[0]} has no image: put some there, or remove the class.")
    return classes


@functools.cache
def _suffixes() -> frozenset[str]:
    """Of the formats that Pillow reads: .bmp, .jpg, .png ..."""
    # Both calls register decoders, which threads must not do at once. Those registered first are tried first
    # on every file: with the usual ones (JPEG, PNG ...) in front, small images are opened in half the time.
    Image.preinit()
    extensions = Image.registered_extensions()
    return frozenset(suffix for suffix, name in extensions.items() if name in Image.OPEN)


def _decode(folder: Path, train: _Classes, test: _Classes) -> Loaded:
    from tqdm import tqdm

    paths = [file.path for split in (train, test) for files in split.values() for file in files]
    images = np.empty((len(paths), SIZE, SIZE, 3), dtype=np.uint8)

    def decode(chunk: range) -> int:
        for k in chunk:
            images[k] = _read_image(folder / paths[k])
        return len(chunk)

    _say(f"Decoding the {len(paths):,} images of {folder}, once ...")
    everything = range(len(paths))
    chunks = [everything[start : start + 64] for start in everything[::64]]
    # Threads, since Pillow decodes and resizes without the interpreter's lock. disable=None: no bar in a log.
    with ThreadPoolExecutor() as pool, tqdm(total=len(paths), unit="image", leave=False, disable=None) as bar:
        for done in pool.map(decode, chunks):
            bar.update(done)

    counts = [torch.tensor([len(files) for files in split.values()]) for split in (train, test)]
    labels = [torch.arange(len(count)).repeat_interleave(count) for count in counts]
    parts = torch.from_numpy(images).split([len(label) for label in labels])
    return Split(parts[0], labels[0]), Split(parts[1], labels[1]), len(train)


def _read_image(path: Path) -> np.ndarray:
    """uint8 (32, 32, 3), resized with antialiasing."""
    try:
        with Image.open(path) as image:
            image.draft(None, (2 * SIZE, 2 * SIZE))  # lets a large JPEG be decoded at a fraction of its size
            if image.mode.startswith("I"):  # 16-bit grey, of which convert() may clip all that is above 255
                grey = np.asarray(image)
                grey = grey >> 8 if "16" in image.mode or grey.max() > 255 else grey
                image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
            if "transparency" in image.info:  # of a palette: dropped at once, it would draw a warning
                image = image.convert("RGBA")
            image = image.convert("RGB")
            if image.size != (SIZE, SIZE):
                image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # Pillow's decoders answer a broken file with nearly every exception there is
        raise DataError(f"{path} cannot be read as an image ({error}): replace or remove it.") from error


# ---- The standard files

_STANDARD = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def _load_standard(folder: Path, cifar: int) -> Loaded:
    folder = _standard_folder(folder, cifar)
    files = folder / _STANDARD[cifar]

    def state() -> str | None:
        return _fingerprint(_files(files, files.name)) if files.is_dir() else None

    return _cached(folder / _CACHE / f"cifar{cifar}", state, lambda: _read_standard(folder, cifar))


def _standard_folder(folder: Path, cifar: int) -> Path:
    """The folder that holds the standard files or may get them; DataError where another one must be meant."""
    files = _STANDARD[cifar]
    wanted = f"one with train/<class>/ and test/<class>/, one for the CIFAR-{cifar} files, or the word glyphs"
    if folder.name == files and folder.is_dir():
        return folder.parent
    if folder == DEFAULT_FOLDER:
        return folder
    if not folder.exists():
        raise DataError(f"There is no folder {folder}: give {wanted} (an empty one gets the download).")
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder: give {wanted}.")
    if not any(name.startswith("cifar-") for name in os.listdir(folder)):
        stray = [f"{name}/" for name in ("test", "val") if (folder / name).is_dir()] or _stray_images(folder)
        if stray:
            reason = f"{folder} has no train/ but has {stray[0]}"
            wanted = f"for CIFAR-{cifar}, give an empty folder or the one that holds {files}/"
            raise DataError(f"{reason}: put images into train/<class>/ and test/<class>/; {wanted}.")
    return folder


def _stray_images(folder: Path) -> list[str]:
    """Images in folder, or up to two folders deep in it, as class folders laid out in another way have them.

    Those that lie deeper belong to other data sets, beside which the standard files may well be put.
    """
    for depth in range(3):
        # Only the first entries are looked at: there may be millions.
        paths = itertools.islice(folder.glob("*/" * depth + "*.*"), 1000)
        if images := [str(path.relative_to(folder)) for path in paths if path.suffix.lower() in _suffixes()]:
            return images
    return []


def _read_standard(folder: Path, cifar: int) -> Loaded:
    from torchvision import datasets

    dataset = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[cifar]
    if not (folder / dataset.base_folder).is_dir() and not (folder / dataset.filename).is_file():
        _say(f"Downloading CIFAR-{cifar} to {folder}, once ...")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # torchvision sets none: behind a silent firewall it would wait for ever
    try:
        # On a terminal torchvision's progress bar is welcome; in a log it is thousands of characters long.
        noise = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with noise, contextlib.redirect_stdout(io.StringIO()):
            parts = [dataset(folder, train=train, download=True) for train in (True, False)]
    except Exception as error:  # of the network, the archive, the disk, or a file with another checksum
        raise DataError(
            f"CIFAR-{cifar} is not (or not whole) in {folder} and could not be downloaded ({error}): put "
            f"{dataset.filename} from {dataset.url} into {folder}."
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)
    images = [torch.from_numpy(np.ascontiguousarray(part.data)) for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return Split(images[0], labels[0]), Split(images[1], labels[1]), cifar


# ---- Glyphs

_GLYPHS_VERSION = "2"  # to be raised with every change of the images
_CHARACTERS = "0123456789ABCDEFGHJKLMNPQRSTUVWXYZ"
_LUMA = np.array([299, 587, 114])  # brightness of red, green and blue, in thousandths


def _draw_glyphs() -> Loaded:
    _say("Drawing the 12,000 images of glyphs, once ...")
    random = np.random.default_rng(2020)
    train, test = (_draw_split(count, random) for count in (10_000, 2_000))
    return train, test, 10


def _draw_split(count: int, random: np.random.Generator) -> Split:
    labels = random.permutation(np.arange(count) % 10)
    images = np.stack([_draw_image(str(label), random) for label in labels])
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def _draw_image(digit: str, random: np.random.Generator) -> np.ndarray:
    """A bright digit near the middle of a dark ground, over smaller and dimmer glyphs at the edges: uint8 (32, 32, 3).

    Most images are easy to read; some, by the cubes of the blur and the noise, hardly. A network that finds nothing
    easy in its first steps at lr 0.1 turns its features off, and stays at 10 % for epochs: so it was with digits
    brighter or darker than the ground, with clutter of their own brightness, and with noise on every image.
    """
    ground = random.integers(80, size=3)
    image = Image.new("RGB", (SIZE, SIZE), tuple(ground.tolist()))
    for _ in range(random.integers(1, 4)):
        along, across = random.uniform(0, SIZE), SIZE * random.integers(2)
        border = (along, across) if random.random() < 0.5 else (across, along)
        mask = _tilt(_glyph(_CHARACTERS[random.integers(len(_CHARACTERS))], random.integers(12, 19)), 180, random)
        _paint(image, mask, border, _ink(ground, 15, 60, random))
    mask = _tilt(_glyph(digit, random.integers(18, 29)), 25, random)
    _paint(image, mask, SIZE / 2 + random.uniform(-3, 3, size=2), _ink(ground, 110, 255, random))
    image = image.filter(ImageFilter.GaussianBlur(4 * random.random() ** 3))
    noise = random.normal(0, 60 * random.random() ** 3, size=(SIZE, SIZE, 3))
    return np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)


def _ink(ground: np.ndarray, least: int, most: int, random: np.random.Generator) -> tuple[int, int, int]:
    """A colour that is brighter than the ground by least to most (of 255)."""
    while True:
        ink = random.integers(256, size=3)
        if 1000 * least <= (ink - ground) @ _LUMA <= 1000 * most:  # in integers: the same on every machine
            return tuple(ink.tolist())


def _tilt(mask: Image.Image, degrees: float, random: np.random.Generator) -> Image.Image:
    return mask.rotate(random.uniform(-degrees, degrees), Image.Resampling.BICUBIC, expand=True)


def _paint(image: Image.Image, mask: Image.Image, centre: Sequence[float], ink: tuple[int, int, int]) -> None:
    image.paste(ink, (round(centre[0] - mask.width / 2), round(centre[1] - mask.height / 2)), mask)


@functools.cache
def _glyph(character: str, size: int) -> Image.Image:
    """The character in Pillow's own font: white on black, cut to its bounding box."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox(character)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), character, fill=255, font=font)
    return mask
