"""The images: listed once; decoded, cropped and flipped as uint8 by worker processes; normalised on the device.

    train, val, classes = load(Path("imagenet"))
    batches = Batches(train, batch_size=256, device="cuda", train=True, workers=8)
    for images, labels in batches.epoch(seed=0): ...

What an epoch holds follows from its seed alone: not from the number of workers, nor from the number of ranks that share
the network's batches.
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
except ImportError:  # deprecated since torchvision 0.29: in a release without it, Pillow decodes everything
    decode_jpeg = None

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as the PyTorch example and torchvision's weights have them
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

    It holds train/<class>/* and val/<class>/* (or test/, where there is no val/): files with the suffix of an image, in
    sub-folders too, and hidden ones not, as torchvision's ImageFolder takes them. None is opened yet.

    Raises:
        DataError: if the folder is laid out in another way, or the classes of the two differ.
    """
    folder = Path(os.path.abspath(os.path.expanduser(folder)))
    if not folder.is_dir():
        raise DataError(f"{printable(folder)} {'is not a folder' if folder.exists() else 'does not exist'}: give a folder "
                        "that holds train/<class>/ and val/<class>/")  # fmt: skip
    held_out = "test" if (folder / "test").is_dir() and not (folder / "val").is_dir() else "val"
    try:
        train, val = _list_classes(folder, "train"), _list_classes(folder, held_out)
    except OSError as error:
        raise DataError(f"{printable(error.filename)} cannot be listed ({error.strerror}): check its permissions") from error
    if train.keys() != val.keys():
        differences = [
            f"only {name}/ has {_first_few(sorted(classes))}"
            for name, classes in (("train", train.keys() - val.keys()), (held_out, val.keys() - train.keys()))
            if classes
        ]
        raise DataError(f"train/ and {held_out}/ of {printable(folder)} must have the same class folders, but "
                        + " and ".join(differences))  # fmt: skip
    return _files(train), _files(val), list(train)


def _list_classes(folder: Path, split: str) -> dict[str, list[str]]:
    """The image files of each class, all in sorted order."""
    place = folder / split
    if not place.is_dir():
        raise DataError(f"{printable(folder)} has no folder {split}/: put the images of each class into {split}/<class>/")
    with os.scandir(place) as found:
        entries = [entry for entry in found if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        loose = any(entry.name.lower().endswith(SUFFIXES) for entry in entries)
        raise DataError(f"{printable(place)} has {'images but ' if loose else ''}no class folders: put the images of each "
                        f"class into {split}/<class>/")  # fmt: skip
    with ThreadPoolExecutor(16) as pool:  # on a network's disk each folder takes its time
        classes = dict(zip(names, pool.map(lambda name: sorted(_images(place / name)), names)))
    for name, images in classes.items():
        if not images:
            raise DataError(f"{printable(place / name)} has no image: put some there, or remove this class from every split")
    return classes


def _images(folder: str | Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # .DS_Store, ._a.jpg
                continue
            if entry.is_dir():
                yield from _images(entry.path)
            elif entry.name.lower().endswith(SUFFIXES):
                yield entry.path


def _files(classes: dict[str, list[str]]) -> Files:
    counts = torch.tensor([len(images) for images in classes.values()])
    paths = [path for images in classes.values() for path in images]
    return Files(paths, torch.arange(len(counts)).repeat_interleave(counts))


def _first_few(names: Sequence[str], most: int = 3) -> str:
    return printable(", ".join(names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


# Images


def read_image(path: str) -> Tensor:
    """The image in a file, whatever its suffix says: uint8 (3, h, w).

    Pixels are those of the usual pipeline, ImageFolder over Pillow: grey becomes RGB, transparency is dropped, the
    orientation in EXIF is not applied, of an animation the first frame is taken. 16-bit grey is scaled to 8 bits,
    where Pillow would clip it.

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
    if decode_jpeg is not None and _is_jpeg(data):
        with suppress(RuntimeError):  # what it refuses may still be something for Pillow, which also says what is wrong
            return decode_jpeg(data, ImageReadMode.RGB)
    if not len(data):
        raise _unreadable(path, "it is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, of large images
            with Image.open(io.BytesIO(data.numpy())) as image:
                return torch.from_numpy(np.array(_rgb(image))).permute(2, 0, 1)
    except UnidentifiedImageError as error:
        raise _unreadable(path, "its contents are no image, or damaged from the start") from error
    except Exception as error:  # Pillow's decoders answer a broken file with nearly every exception there is
        raise _unreadable(path, error) from error


def _is_jpeg(data: Tensor) -> bool:
    return data[:3].tolist() == [0xFF, 0xD8, 0xFF]


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(image)
        grey = grey >> 8 if "16" in image.mode or grey.max() > 255 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # of a palette, which convert() drops only from RGBA without a warning
        image = image.convert("RGBA")
    return image.convert("RGB")


def _unreadable(path: str, reason: object) -> DataError:
    return DataError(f"{printable(path)} cannot be read as an image ({printable(reason)})")


def random_window(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, distributed as that of torchvision's RandomResizedCrop.

    Its area is uniform in 8 to 100 % of the image's, its ratio of width to height log-uniform in 3/4 to 4/3. After ten
    windows that do not fit into the image it is the largest central one of a ratio within these bounds.
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
    """A random crop, resized, mirrored or not: uint8 (3, h, w) to (3, size, size). All that is random comes from draw."""
    top, left, height, width = random_window(*image.shape[-2:], draw)
    image = _resize(image[:, top : top + height, left : left + width], size, size)
    return image.flip(-1) if draw.random() < 0.5 else image


def central(image: Tensor, size: int, resize: int) -> Tensor:
    """The shorter side resized to `resize`, then the centre cut out: uint8 (3, h, w) to (3, size, size)."""
    height, width = image.shape[-2:]
    shorter = min(height, width)
    height, width = resize * height // shorter, resize * width // shorter
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resize(image, height, width)[:, top : top + size, left : left + size]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased."""
    if image.is_cuda:
        resized = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)
        return resized.round_().to(torch.uint8)[0]
    return F.interpolate(image[None], (height, width), mode="bilinear", antialias=True)[0]  # in Pillow's integer arithmetic


def normalise(images: Tensor) -> Tensor:
    """(images / 255 - mean) / std per channel: uint8 (n, h, w, 3) to float32 (n, 3, h, w) in channels_last format."""
    n, height, width, _ = images.shape
    scale, shift = _scale_and_shift(width, images.device)
    return images.reshape(n, height, -1).float().mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache
def _scale_and_shift(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Repeated for a row of pixels: on the CPU, rows are several times faster than three channels at a time.
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return tuple(x.float().repeat(width).to(device) for x in (1 / (255 * std), -mean / std))


# Batches


class Batches:
    """A split as batches on a device; one epoch at a time.

    Args:
        batch_size: of a batch in total, over all ranks; each has an equal part.
        train: shuffled, cropped and flipped at random; otherwise in order, the centre of each image.
        image_size: height and width of what comes out, in pixels.
        resize: the shorter side of a validation image before its centre is cut out; image_size * 256 / 224 if None.
        workers: processes that decode; 0 decodes in this one.
        decode: "cpu", or "gpu": nvJPEG decodes, threads read the files. Its pixels differ by a few levels.
        skip_bad: files that cannot be read are named once (to `say`) and counted in `bad`, instead of ending the epoch.
            In training the next image of the epoch's order takes the place of such a one, so that batches and ranks keep
            their sizes; in validation it is left out.
        rank, world_size: of the processes that train the same network. In training the last batch is cut to a multiple of
            world_size, so that all ranks have equally many images in every step; in validation every image comes once,
            on one of the ranks, and a rank may have a batch less than another, or none.

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
        say: Callable[[str], None] = functools.partial(print, flush=True),
    ) -> None:
        resize = resize or image_size * 256 // 224
        if batch_size % world_size:
            raise DataError(f"a batch of {batch_size} images cannot be shared equally by {world_size} processes: give a "
                            f"batch size that is a multiple of {world_size}")  # fmt: skip
        if train and len(files) < world_size:
            raise DataError(f"there are fewer training images ({len(files)}) than processes that share them ({world_size})")
        if resize < image_size:
            raise DataError(f"images resized to {resize} pixels have no centre of {image_size}: resize to {image_size} or more")
        self.files = files
        self.device = torch.device(device)
        self.train = train
        self.samples = len(files)  # over all ranks
        self.batch_size = batch_size // world_size  # of this rank
        self.rank, self.world_size = rank, world_size
        self.skip_bad, self.say = skip_bad, say
        self.bad: dict[str, str] = {}  # what cannot be read: path, sentence
        self._prepare = Prepare(train, image_size, resize)
        slot = (self.batch_size, image_size, image_size, 3)
        if decode == "gpu":
            _check_nvjpeg(self.device)
            self._loader = _GPU(self._prepare, slot, self.device, workers)
        elif workers:
            self._loader = _Workers(self._prepare, slot, workers)
        else:
            self._loader = _InProcess(self._prepare, slot)

    def __len__(self) -> int:
        """Batches per epoch of this rank."""
        return -(-len(self._positions()) // self.batch_size)

    def _positions(self) -> Tensor:
        """The places in the epoch's order of this rank's images: batch after batch, every world_size-th of each."""
        end = self.samples - self.samples % self.world_size if self.train else self.samples
        return torch.arange(self.rank, end, self.world_size)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields normalised images, float32 (b, 3, s, s) in channels_last memory format, and their labels (b,).

        Everything random about an image is a function of the seed and its place in the epoch's order. Without train
        there is nothing random, and seed is not used.

        Raises:
            DataError: that names the first file that cannot be read; or, with skip_bad, if these are no longer few.
        """
        order = torch.arange(self.samples)
        if self.train:
            order = torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))
        self._loader.reset()
        started = deque()
        for positions in self._positions().split(self.batch_size):
            items = [
                Item(self.files.paths[row], f"{seed}/{position}")
                for row, position in zip(order[positions].tolist(), positions.tolist())
            ]
            self._loader.start(items)
            started.append((positions, items))
            if len(started) > self._loader.ahead:
                yield from self._finish(order, *started.popleft())
        while started:
            yield from self._finish(order, *started.popleft())

    def _finish(self, order: Tensor, positions: Tensor, items: list[Item]) -> Iterator[tuple[Tensor, Tensor]]:
        images, errors = self._loader.finish()
        labels = self.files.labels[order[positions]]
        kept = [row for row in range(len(items)) if row not in errors]
        for row in sorted(errors):
            self._note_bad(items[row].path, errors[row])
            if self.train:
                replacement, image = self._replacement(order, int(positions[row]), items[row].draw)
                images[row].copy_(image.permute(1, 2, 0))
                labels[row] = self.files.labels[replacement]
        if errors and not self.train:
            images, labels = images[kept], labels[kept]
        if self.device.type == "cuda":  # pinned, so that the host need not wait for the copies
            images = images if images.is_cuda else images.pin_memory().to(self.device, non_blocking=True)
            labels = labels.pin_memory().to(self.device, non_blocking=True)
        if len(labels):
            yield normalise(images), labels

    def _replacement(self, order: Tensor, position: int, draw: str) -> tuple[int, Tensor]:
        """(its row, the image) of the next image that can be read: the same on whatever rank, by whatever worker."""
        for step in range(1, self.samples):
            row = int(order[(position + step) % self.samples])
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
            raise DataError(f"{len(self.bad)} of {self.samples} images cannot be read, too many to leave out: is their disk "
                            "all right?")  # fmt: skip


# Loaders: each is given the images of a batch (start) and later hands them out (finish), in the same order, and lets the
# batches go that nobody has asked for (reset). Up to `ahead` batches are worth starting before the first is finished.


class Item(NamedTuple):
    path: str
    draw: str  # what the image's crop and flip are drawn from


class Prepare(NamedTuple):
    """An image as it was read to what the network sees of it: uint8 (3, h, w) to (3, size, size)."""

    train: bool
    size: int
    resize: int

    def __call__(self, image: Tensor, draw: str) -> Tensor:
        if self.train:
            # Seeded with a text, which is hashed: neighbouring seeds and positions have nothing in common.
            return augment(image, self.size, random.Random(draw))
        return central(image, self.size, self.resize)


Finished = tuple[Tensor, dict[int, str]]  # uint8 (b, s, s, 3), valid until the next start(); by row, why it is not there


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

    def __init__(self, prepare: Prepare, slot: tuple[int, ...]) -> None:
        self.prepare = prepare
        self.images = torch.empty(slot, dtype=torch.uint8)

    def reset(self) -> None:
        pass

    def start(self, items: list[Item]) -> None:
        self.items = items

    def finish(self) -> Finished:
        return self.images[: len(self.items)], _fill(self.images, self.items, self.prepare)


class _Workers:
    """Processes that share each batch, and write their parts of it straight into shared memory.

    A DataLoader would send every batch through new shared memory, and its workers would die of a SIGTERM or Ctrl-C that
    goes to the whole process group, under a main process that means to finish its batch. Here
    - a worker's only tie is the pipe to its main process, whose end, however it comes, ends the worker;
    - workers come from a fork server: they inherit none of the main process's threads, locks, sockets and CUDA memory
      (the ranks of a network learn of the death of one by its closed sockets);
    - SIGINT and SIGTERM are blocked in them.
    """

    ahead = 2

    def __init__(self, prepare: Prepare, slot: tuple[int, ...], count: int) -> None:
        self.prepare, self.shape, self.count = prepare, slot, min(count, slot[0])
        self.connections: list[Connection] = []
        self.started = 0  # batches
        self.waiting: deque[tuple[int, int]] = deque()  # of those not yet finished: images, workers that share them
        _start_fork_server()  # it imports torch while this process goes on

    def reset(self) -> None:
        if not self.connections:
            self._start_workers()
        while self.waiting:
            self.finish()

    def _start_workers(self) -> None:
        context = multiprocessing.get_context("forkserver")
        try:
            self.slots = torch.empty((self.ahead + 1, *self.shape), dtype=torch.uint8).share_memory_()
            for _ in range(self.count):
                ours, theirs = context.Pipe()
                worker = context.Process(target=_work, args=(theirs, self.slots, self.prepare), name="loader", daemon=True)
                worker.start()
                theirs.close()
                self.connections.append(ours)
        except (OSError, RuntimeError) as error:
            raise DataError(f"the {self.count} loading processes cannot be started ({error}): fewer --workers, or a smaller "
                            "batch, need less") from error  # fmt: skip
        # At exit this comes before multiprocessing waits for its processes, which would wait for us.
        util.Finalize(self, _close, (self.connections,), exitpriority=0)

    def start(self, items: list[Item]) -> None:
        share = -(-len(items) // self.count)
        shares = [(first, items[first : first + share]) for first in range(0, len(items), share)]
        with _explaining_lost_workers():
            for connection, (first, part) in zip(self.connections, shares):
                connection.send((self.started % len(self.slots), first, part))
        self.started += 1
        self.waiting.append((len(items), len(shares)))

    def finish(self) -> Finished:
        length, shares = self.waiting.popleft()
        errors = {}
        with _explaining_lost_workers():
            for connection in self.connections[:shares]:
                errors |= connection.recv()
        slot = (self.started - len(self.waiting) - 1) % len(self.slots)
        return self.slots[slot, :length], errors


@contextmanager
def _explaining_lost_workers() -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError) as error:
        raise DataError("a process that loads images has ended; its last words, if it had any, stand above. If it was killed, "
                        "memory may have run out: fewer --workers need less") from error  # fmt: skip


def _start_fork_server() -> None:
    # Signals that are blocked now stay so in the server, and in the workers that it forks, from their first moment.
    resource_tracker.ensure_running()  # the server would start it, and that would unblock them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.set_forkserver_preload(["torchvision", "PIL.Image"])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(connection: Connection, slots: Tensor, prepare: Prepare) -> None:
    torch.set_num_threads(1)
    with suppress(EOFError, ConnectionError):  # the main process has ended, or lets its workers go
        while True:
            slot, first, items = connection.recv()
            connection.send(_fill(slots[slot], items, prepare, first))


def _close(connections: list[Connection]) -> None:
    for connection in connections:
        connection.close()


class _GPU:
    """nvJPEG decodes whole batches; files are read ahead by threads. What is no JPEG is decoded on the CPU."""

    ahead = 2

    def __init__(self, prepare: Prepare, slot: tuple[int, ...], device: torch.device, threads: int) -> None:
        self.prepare, self.shape, self.device = prepare, slot, device
        self.threads = ThreadPoolExecutor(max(1, threads), thread_name_prefix="read")
        self.waiting: deque[tuple[list[Item], list[Future[Tensor]]]] = deque()

    def reset(self) -> None:
        self.waiting.clear()

    def start(self, items: list[Item]) -> None:
        self.waiting.append((items, [self.threads.submit(_read, item.path) for item in items]))

    def finish(self) -> Finished:
        items, reads = self.waiting.popleft()
        images = torch.zeros((len(items), *self.shape[1:]), dtype=torch.uint8, device=self.device)
        data, errors = {}, {}
        for row, read in enumerate(reads):
            try:
                data[row] = read.result()
            except DataError as error:
                errors[row] = str(error)
        decoded: dict[int, Tensor | Future[Tensor]] = {}
        jpegs = [row for row in data if _is_jpeg(data[row])]
        # It decodes all or nothing, and does not say which was not to its taste (CMYK, damage): the CPU tries them all.
        with suppress(RuntimeError):
            if jpegs:
                decoded.update(zip(jpegs, decode_jpeg([data[row] for row in jpegs], ImageReadMode.RGB, self.device)))
        for row in data.keys() - decoded.keys():
            decoded[row] = self.threads.submit(_decode, data[row], items[row].path)
        for row, image in decoded.items():
            try:
                image = image if isinstance(image, Tensor) else image.result().to(self.device)
            except DataError as error:
                errors[row] = str(error)
            else:
                images[row].copy_(self.prepare(image, items[row].draw).permute(1, 2, 0))
        return images, errors


def _check_nvjpeg(device: torch.device) -> None:
    if device.type != "cuda":
        raise DataError(f"--decode gpu needs CUDA, and the network trains on {device}: leave it out there")
    try:
        if decode_jpeg is None:
            raise RuntimeError("it has no JPEG decoder any more")
        jpeg = io.BytesIO()
        Image.new("RGB", (8, 8)).save(jpeg, "JPEG")
        decode_jpeg([torch.frombuffer(bytearray(jpeg.getvalue()), dtype=torch.uint8)], ImageReadMode.RGB, device)
    except RuntimeError as error:
        raise DataError(f"--decode gpu needs torchvision's nvJPEG decoder, which does not work here ({error})") from error
