"""The images: decoded, cropped and flipped as uint8 by worker processes, normalised on the device.

    train, val, classes = load("imagenet")
    batches = Batches(train, batch_size=256, device="cuda", train=True, workers=8)
    for images, labels in batches.epoch(seed=0): ...

What an epoch holds follows from its seed alone, not from the number of workers; nor, but for how it is dealt
out, from the number of ranks that share the network's batches.
"""

from __future__ import annotations

import functools
import io
import math
import multiprocessing
import os
import random
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from filter_grafting.errors import DataError
from filter_grafting.exchange import printable

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29; where it is gone, Pillow decodes everything
    decode_jpeg = None

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the PyTorch example; torchvision's weights expect them
STD = (0.229, 0.224, 0.225)
AREA = (0.08, 1.0)  # of a random crop, as a share of the image's
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # of its width to its height
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")


# Files


@dataclass(frozen=True)
class Files:
    """The images of one split, class by class."""

    paths: list[str]
    labels: Tensor  # int64 (n,): the rank of an image's class in sorted order

    def __len__(self) -> int:
        return len(self.paths)


def load(folder: str | Path) -> tuple[Files, Files, list[str]]:
    """The training images, the validation images and the names of the classes of a folder.

    It holds train/<class>/* and val/<class>/* (or test/, where there is no val/). Of these, files with the
    suffix of an image count, in sub-folders too, and hidden ones do not. No file is opened yet.

    Raises:
        DataError: if the folder is laid out in another way, or the classes of the two splits differ.
    """
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    try:
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            raise DataError(f"{printable(folder)} {problem}: give a folder that holds train/<class>/ and val/<class>/")
        held_out = "test" if (folder / "test").is_dir() and not (folder / "val").is_dir() else "val"
        train, val = _list_classes(folder, "train"), _list_classes(folder, held_out)
    except OSError as error:
        place, reason = printable(error.filename or folder), error.strerror or error
        raise DataError(f"{place} cannot be looked into ({reason})") from error
    if train.keys() != val.keys():
        differences = [
            f"only {split}/ has {_first_few(sorted(names))}"
            for split, names in (("train", train.keys() - val.keys()), (held_out, val.keys() - train.keys()))
            if names
        ]
        raise DataError(
            f"train/ and {held_out}/ of {printable(folder)} must have the same class folders, but "
            + " and ".join(differences)
        )
    return _files(train), _files(val), list(train)


def _list_classes(folder: Path, split: str) -> dict[str, list[str]]:
    """The image files of each class, all in sorted order."""
    place, wanted = folder / split, f"put the images of each class into {split}/<class>/"
    if not place.is_dir():
        raise DataError(f"{printable(folder)} has no folder {split}/: {wanted}")
    with os.scandir(place) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        images = "images but " if any(_is_image(entry) for entry in entries) else ""
        raise DataError(f"{printable(place)} has {images}no class folders: {wanted}")
    with ThreadPoolExecutor(16) as pool:  # on a network's disk every folder takes its time
        listed = pool.map(lambda name: sorted(_images(place / name)), names)
        classes = dict(zip(names, listed, strict=True))
    for name, images in classes.items():
        if not images:
            raise DataError(f"{printable(place / name)} has no image: put some there, or remove this class everywhere")
    return classes


def _images(folder: str | Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # .DS_Store, ._a.jpg
                continue
            if entry.is_dir():
                yield from _images(entry.path)
            elif _is_image(entry):
                yield entry.path


def _is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith(SUFFIXES)


def _files(classes: dict[str, list[str]]) -> Files:
    counts = torch.tensor([len(images) for images in classes.values()])
    paths = [path for images in classes.values() for path in images]
    return Files(paths, torch.arange(len(counts)).repeat_interleave(counts))


def _first_few(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return printable(", ".join(names[:most])) + more


# Images


def read_image(path: str) -> Tensor:
    """The image in a file, whatever its suffix: uint8 (3, h, w).

    The pixels are those of torchvision's ImageFolder: grey and CMYK become RGB, transparency is dropped, of
    an animation the first frame counts, and the orientation in EXIF is not applied. One thing differs: 16-bit
    grey is scaled to 8 bits, where it would be clipped to white.

    Raises:
        DataError: if the file cannot be read as an image; the sentence names it.
    """
    return _decode(_read(path), path)


def _read(path: str) -> Tensor:
    try:
        return torch.from_numpy(np.fromfile(path, dtype=np.uint8))
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error


def _decode(data: Tensor, path: str) -> Tensor:
    if not len(data):
        raise _unreadable(path, "it is empty")
    if decode_jpeg is not None and _is_jpeg(data):
        with suppress(RuntimeError):  # Pillow has the last word, and better words for what is wrong
            return decode_jpeg(data, ImageReadMode.RGB)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, of large images
            with Image.open(io.BytesIO(data.numpy())) as image:
                return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        raise _unreadable(path, "its contents are of no known format, or damaged from the start") from error
    except Exception as error:  # Pillow's decoders answer a broken file with nearly every exception there is
        raise _unreadable(path, error) from error


def _is_jpeg(data: Tensor) -> bool:
    return data[:3].tolist() == [0xFF, 0xD8, 0xFF]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image)
        grey = grey >> 8 if "16" in image.mode or grey.max() > 255 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _unreadable(path: str, reason: object) -> DataError:
    return DataError(f"{printable(path)} cannot be read as an image ({printable(reason)})")


def random_window(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, distributed as that of torchvision's RandomResizedCrop.

    Its area is uniform in 8 to 100 % of the image's, its ratio of width to height log-uniform in 3/4 to 4/3.
    If ten such windows do not fit into the image, it is the largest central one whose ratio is within these
    bounds.
    """
    for _ in range(10):
        area = height * width * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(*LOG_RATIO))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return draw.randrange(height - h + 1), draw.randrange(width - w + 1), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def augment(image: Tensor, size: int, draw: random.Random) -> Tensor:
    """A random crop, resized, and mirrored or not: uint8 (3, h, w) to (3, size, size)."""
    top, left, height, width = random_window(*image.shape[-2:], draw)
    image = _resize(image[:, top : top + height, left : left + width], size, size)
    return image.flip(-1) if draw.random() < 0.5 else image


def central(image: Tensor, size: int, resize: int) -> Tensor:
    """The shorter side resized to `resize`, then the centre cut out: uint8 (3, h, w) to (3, size, size)."""
    shorter = min(image.shape[-2:])
    height, width = (resize * side // shorter for side in image.shape[-2:])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resize(image, height, width)[:, top : top + size, left : left + size]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased; in channels_last memory format, as the decoders give it."""
    # A window of an image is in no memory format at all, which would double the time.
    image = image[None].contiguous(memory_format=torch.channels_last)
    if image.is_cuda:  # where it knows no integers
        resized = F.interpolate(image.float(), (height, width), mode="bilinear", antialias=True)
        return resized.round_().to(torch.uint8)[0]
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]  # in integers, as Pillow


def normalise(images: Tensor) -> Tensor:
    """(images / 255 - mean) / std: uint8 (n, h, w, 3) to float32 (n, 3, h, w) in channels_last memory
    format."""
    n, height, width, _ = images.shape
    scale, shift = _scale_and_shift(width, images.device)
    rows = images.reshape(n, height, 3 * width)
    return rows.float().mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache
def _scale_and_shift(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # For a whole row of pixels: on the CPU that is several times faster than three channels at a time.
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return tuple(x.float().repeat(width).to(device) for x in (1 / (255 * std), -mean / std))


# Batches


def _say(sentence: str) -> None:
    print(sentence, flush=True)


class Batches:
    """A split as batches on a device; one epoch at a time.

    Args:
        batch_size: of a batch in total, over all ranks; each has an equal part.
        train: shuffled, cropped and flipped at random; otherwise in order, the centre of each image.
        image_size: height and width of what comes out, in pixels.
        resize: shorter side of a validation image before its centre is cut out; None: image_size * 256 / 224.
        workers: processes that decode; 0 decodes in this one.
        decode: "cpu", or "gpu": nvJPEG decodes, threads read the files. Its pixels differ by a few levels.
        skip_bad: what cannot be read is named once (to `say`) and counted in `bad`, instead of ending the
            epoch. In training, the image that follows in the epoch's order takes its place, so that batches
            keep their sizes, and all ranks the same; in validation it is left out.
        rank, world_size: of the processes that train this network. In training the last batch is cut to a
            multiple of world_size, so that all ranks have equally many images in every step; one image a rank
            would be a batch without statistics for batch norm, and is left out. In validation
            every image comes once, on one of the ranks; a rank may have a batch less than another, or none.

    Raises:
        DataError: if these do not go together.
    """

    def __init__(
        self,
        files: Files,
        batch_size: int,
        device: str | torch.device,
        *,
        train: bool,
        image_size: int = 224,
        resize: int | None = None,
        workers: int = 0,
        decode: str = "cpu",
        skip_bad: bool = False,
        rank: int = 0,
        world_size: int = 1,
        say: Callable[[str], None] = _say,
    ) -> None:
        resize = resize or image_size * 256 // 224
        if batch_size % world_size:
            raise DataError(
                f"a batch of {batch_size} images cannot be shared equally by {world_size} processes: give a "
                f"batch size that is a multiple of {world_size}"
            )
        if train and len(files) < world_size:
            raise DataError(f"{len(files)} training images cannot be shared by {world_size} processes")
        if resize < image_size:
            raise DataError(f"images resized to {resize} pixels have no centre of {image_size} pixels")
        self.files = files
        self.device = torch.device(device)
        self.train = train
        self.samples = len(files)  # over all ranks
        self.batch_size = batch_size // world_size  # of this rank
        self.skip_bad, self.say = skip_bad, say
        self.bad: dict[str, str] = {}  # what cannot be read: path, sentence
        # This rank's places in the epoch's order; the k-th batch_size of them are its part of batch k.
        end = self.samples - self.samples % world_size if train else self.samples
        if train and end > batch_size and end % batch_size == world_size < batch_size:
            end -= world_size
        self._places = torch.arange(rank, max(rank, end), world_size)
        self._prepare = Prepare(train, image_size, resize)
        shape = (self.batch_size, image_size, image_size, 3)
        if decode == "gpu":
            self._loader = _GPU(self._prepare, shape, self.device, workers)
        elif workers:
            self._loader = _Workers(self._prepare, shape, workers)
        else:
            self._loader = _InProcess(self._prepare, shape)

    def __len__(self) -> int:
        """Batches per epoch, of this rank."""
        return -(-len(self._places) // self.batch_size)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, normalised, float32 (b, 3, s, s) in channels_last memory format, and labels (b,).

        All that is random about an image is a function of the seed and of its place in the epoch's order.
        Without `train` there is nothing random, and seed is not used.

        Raises:
            DataError: if a file cannot be read, which it names; with skip_bad, if these are no longer few.
        """
        order = torch.arange(self.samples)
        if self.train:
            order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))
        self._loader.reset()
        started = deque()
        for places in self._places.split(self.batch_size)[: len(self)]:  # no places would be one empty batch
            items = [
                Item(self.files.paths[row], f"{seed}/{place}")
                for row, place in zip(order[places].tolist(), places.tolist(), strict=True)
            ]
            self._loader.start(items)
            started.append((places, items))
            if len(started) > self._loader.ahead:
                yield from self._finish(order, *started.popleft())
        while started:
            yield from self._finish(order, *started.popleft())

    def _finish(self, order: Tensor, places: Tensor, items: list[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        images, errors = self._loader.finish()
        labels = self.files.labels[order[places]]
        for row in sorted(errors):
            self._note_bad(items[row].path, errors[row])
            if self.train:
                replacement, image = self._replacement(order, int(places[row]), items[row].draw)
                images[row].copy_(image.permute(1, 2, 0))
                labels[row] = self.files.labels[replacement]
        if errors and not self.train:
            good = [row for row in range(len(items)) if row not in errors]
            images, labels = images[good], labels[good]
        if self.device.type == "cuda":  # from pinned memory, so that the host need not wait for the copies
            images = images if images.is_cuda else images.pin_memory().to(self.device, non_blocking=True)
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        if len(labels):
            yield normalise(images), labels

    def _replacement(self, order: Tensor, place: int, draw: str) -> tuple[int, Tensor]:
        """(its row, the image) of the next one in the order that can be read: whoever asks gets the same."""
        for row in order.roll(-place)[1:].tolist():
            path = self.files.paths[row]
            if path not in self.bad:
                try:
                    return row, self._prepare(read_image(path), draw)
                except DataError as error:
                    self._note_bad(path, str(error))
        raise DataError(f"none of the {self.samples} training images can be read")

    def _note_bad(self, path: str, sentence: str) -> None:
        if not self.skip_bad:
            raise DataError(f"{sentence}: replace or remove it, or leave out such files with --skip_bad")
        if path in self.bad:
            return
        self.bad[path] = sentence
        self.say(f"left out, {len(self.bad)} so far: {sentence}")
        if len(self.bad) > max(10, self.samples // 10) or len(self.bad) == self.samples:
            raise DataError(
                f"{len(self.bad)} of {self.samples} images cannot be read, too many to leave out: is their "
                f"disk all right? The last: {sentence}"
            )


# Loaders: each is told which images the next batch has (start), and later gives out the batches in that order
# (finish), or forgets them (reset). `ahead` batches are worth starting before the first is asked for.


class Item(NamedTuple):
    path: str
    draw: str  # what the image's crop and flip are drawn from


class Prepare(NamedTuple):
    """Makes of an image as it was read what the network sees of it: of uint8 (3, h, w), (3, size, size)."""

    train: bool
    size: int
    resize: int

    def __call__(self, image: Tensor, draw: str) -> Tensor:
        if self.train:
            # Of a text Python makes a hash: what neighbouring seeds and places draw is unrelated.
            return augment(image, self.size, random.Random(draw))
        return central(image, self.size, self.resize)


# uint8 (b, s, s, 3), valid until the next start; by row, what is wrong with the files that could not be read
Batch = tuple[Tensor, dict[int, str]]


def _fill(images: Tensor, items: list[Item], prepare: Prepare, first: int = 0) -> dict[int, str]:
    errors = {}
    for row, item in enumerate(items, first):
        try:
            images[row].copy_(prepare(read_image(item.path), item.draw).permute(1, 2, 0))
        except DataError as error:
            errors[row] = str(error)
    return errors


class _InProcess:
    ahead = 0

    def __init__(self, prepare: Prepare, shape: tuple[int, ...]) -> None:
        self.prepare = prepare
        self.images = torch.empty(shape, dtype=torch.uint8)
        self.items: list[Item] = []

    def reset(self) -> None:
        pass

    def start(self, items: list[Item]) -> None:
        self.items = items

    def finish(self) -> Batch:
        return self.images[: len(self.items)], _fill(self.images, self.items, self.prepare)


class _Workers:
    """Processes that share every batch, and write their parts of it straight into shared memory.

    A DataLoader would lose its workers to a SIGTERM or Ctrl-C for the whole process group, while the main
    process means to finish its batch; and it makes new shared memory for every batch. Here
    - SIGINT and SIGTERM are blocked in workers, and a worker ends with its pipe: when the main process lets
      it go, or is no more, however it ended;
    - workers come from a fork server, and inherit no threads, locks, CUDA memory or sockets of the main
      process (by closed sockets the other ranks know that it died).
    """

    ahead = 2

    def __init__(self, prepare: Prepare, shape: tuple[int, ...], workers: int) -> None:
        self.prepare, self.shape, self.workers = prepare, shape, min(workers, shape[0])
        self.slots: Tensor | None = None  # (ahead + 1, b, s, s, 3): batch k goes into slot k mod (ahead + 1)
        self.pipes: list[Connection] = []
        self.started = 0  # batches
        self.waiting: deque[tuple[int, int, int]] = deque()  # of those not finished: k, images, workers at it
        with _explaining("cannot be started"):
            _start_fork_server()  # imports torch while this process goes on
        # At exit multiprocessing joins its processes: the pipes are closed before that, which ends them.
        util.Finalize(self, _close, (self.pipes,), exitpriority=0)

    def reset(self) -> None:
        if self.waiting or len(self.pipes) < self.workers:  # an epoch was broken off: they may be at anything
            _close(self.pipes)
            self.waiting.clear()
            with _explaining("cannot be started"):
                self._start_workers()

    def _start_workers(self) -> None:
        context = multiprocessing.get_context("forkserver")
        self.slots = torch.empty((self.ahead + 1, *self.shape), dtype=torch.uint8).share_memory_()
        for _ in range(self.workers):
            ours, theirs = context.Pipe()
            self.pipes.append(ours)
            context.Process(target=_work, args=(theirs, self.slots, self.prepare), daemon=True).start()
            theirs.close()

    def start(self, items: list[Item]) -> None:
        share = -(-len(items) // self.workers)
        shares = [(first, items[first : first + share]) for first in range(0, len(items), share)]
        self.waiting.append((self.started, len(items), len(shares)))
        with _explaining("have ended before their time"):
            for pipe, (first, part) in zip(self.pipes, shares, strict=False):  # a small batch needs fewer
                pipe.send((self.started % len(self.slots), first, part))
        self.started += 1

    def finish(self) -> Batch:
        k, length, shares = self.waiting[0]
        errors = {}
        with _explaining("have ended before their time"):
            for pipe in self.pipes[:shares]:
                errors |= pipe.recv()
        self.waiting.popleft()
        return self.slots[k % len(self.slots), :length], errors


@contextmanager
def _explaining(what: str) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:
        reason = str(error) or type(error).__name__
        raise DataError(
            f"the processes that load images {what} ({printable(reason)}): if memory is short, on the "
            "machine or in /dev/shm, fewer --workers or a smaller batch help"
        ) from error


def _start_fork_server() -> None:
    # What is blocked here stays so in the server and in the workers that it forks, from their first moment.
    resource_tracker.ensure_running()  # if the server had to start it, that would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.set_forkserver_preload(["torchvision", "PIL.Image"])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(pipe: Connection, slots: Tensor, prepare: Prepare) -> None:
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # nobody is at the other end any more
        while True:
            slot, first, items = pipe.recv()
            pipe.send(_fill(slots[slot], items, prepare, first))


def _close(pipes: list[Connection]) -> None:
    while pipes:
        pipes.pop().close()


class _GPU:
    """nvJPEG decodes a batch at once; threads read the files ahead. What is no JPEG is decoded on the CPU."""

    ahead = 2

    def __init__(self, prepare: Prepare, shape: tuple[int, ...], device: torch.device, workers: int) -> None:
        self.prepare, self.shape, self.device = prepare, shape, device
        self.stream = _start_nvjpeg(device)
        self.threads = ThreadPoolExecutor(max(1, workers), thread_name_prefix="read")
        self.waiting: deque[tuple[list[Item], list[Future[Tensor]]]] = deque()

    def reset(self) -> None:
        self.waiting.clear()

    def start(self, items: list[Item]) -> None:
        self.waiting.append((items, [self.threads.submit(_read, item.path) for item in items]))

    def finish(self) -> Batch:
        items, reading = self.waiting.popleft()
        files, errors = _results(dict(enumerate(reading)))
        jpegs = [row for row, data in files.items() if _is_jpeg(data)]
        decoded = dict(zip(jpegs, self._decode_jpegs([files[row] for row in jpegs]), strict=False))
        rest = files.keys() - decoded.keys()
        others, more_errors = _results({row: self.threads.submit(_decode, files[row], items[row].path) for row in rest})
        images = torch.empty((len(items), *self.shape[1:]), dtype=torch.uint8, device=self.device)
        for row, image in (decoded | others).items():
            images[row].copy_(self.prepare(image.to(self.device), items[row].draw).permute(1, 2, 0))
        return images, errors | more_errors

    def _decode_jpegs(self, files: list[Tensor]) -> list[Tensor]:
        """All or none: nvJPEG stops at the first that it refuses (CMYK, damaged), and does not say which."""
        if not files:
            return []
        try:
            # It writes at once, in a stream of its own, to memory of which the current stream may still have use:
            # the allocator thinks in the order of streams. In a stream that does nothing else, it is right.
            with torch.cuda.stream(self.stream):
                images = decode_jpeg(files, ImageReadMode.RGB, self.device)
        except torch.cuda.OutOfMemoryError:
            raise
        except RuntimeError:
            return []
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for image in images:
            image.record_stream(current)
        return images


def _results(futures: dict[int, Future[Tensor]]) -> tuple[dict[int, Tensor], dict[int, str]]:
    """By row, what could be had, and why the others could not."""
    results, errors = {}, {}
    for row, future in futures.items():
        try:
            results[row] = future.result()
        except DataError as error:
            errors[row] = str(error)
    return results, errors


def _start_nvjpeg(device: torch.device) -> torch.cuda.Stream:
    """A stream to decode in.

    Raises:
        DataError: if nvJPEG does not work here.
    """
    if device.type != "cuda":
        raise DataError(f"--decode gpu needs a network that trains on CUDA, and this one trains on {device}")
    if decode_jpeg is None:
        raise DataError("--decode gpu needs a torchvision that still has decoders: an older one")
    jpeg = io.BytesIO()
    Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
    try:
        decode_jpeg([torch.frombuffer(jpeg.getbuffer(), dtype=torch.uint8)], ImageReadMode.RGB, device)
    except RuntimeError as error:
        reason = printable(error)
        raise DataError(f"--decode gpu: torchvision cannot decode on {device} ({reason})") from error
    return torch.cuda.Stream(device)
