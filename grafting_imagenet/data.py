"""The images: decoded, cropped and flipped as uint8 by worker processes, normalised on the device.

    images = load("imagenet")
    batches = Batches(images.train, batch_size=256, device="cuda", train=True, workers=8)
    for x, labels in batches.epoch(seed=0): ...

What an epoch holds follows from its seed alone, not from the number of workers; nor, but for how it is dealt
out, from the number of ranks that share the network's batches.
"""

from __future__ import annotations

import functools
import io
import math
import random
import shutil
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import context, forkserver, popen_forkserver, resource_tracker
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from filter_grafting.membership import printable
from training.images import DataError, Files, Images, checksum, class_folders, rgb

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29; where it is gone, Pillow decodes everything
    decode_jpeg = None

__all__ = ["Batches", "DataError", "Files", "Images", "checksum", "load"]
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the PyTorch example; torchvision's weights expect them
STD = (0.229, 0.224, 0.225)
AREA = (0.08, 1.0)  # of a random crop, as a share of the image's
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # of its width to its height

load = class_folders


# ---- Images


def read_image(path: str) -> Tensor:
    """The image in a file, whatever its suffix: uint8 (3, h, w).

    The pixels are those of torchvision's ImageFolder: grey and CMYK become RGB, transparency is dropped, of
    an animation the first frame counts, and the orientation in EXIF is not applied. One thing differs: 16-bit
    grey is scaled to 8 bits, where it would be clipped to white.

    Raises:
        DataError: if the file cannot be read as an image; the sentence names it.
    """
    try:
        data = np.fromfile(path, dtype=np.uint8)
        if not len(data):
            raise ValueError("it is empty")
        if decode_jpeg is not None and data[:3].tolist() == [0xFF, 0xD8, 0xFF]:
            with suppress(RuntimeError):  # Pillow has the last word, and better words for what is wrong
                return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata, of large images
            with Image.open(io.BytesIO(data)) as image:
                return torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)
    except Exception as error:  # Pillow's decoders answer a broken file with nearly every exception there is
        reason = error.strerror or error if isinstance(error, OSError) else error
        if isinstance(error, UnidentifiedImageError):
            reason = "its contents are of no known format, or damaged from the start"
        raise DataError(f"{printable(path)} cannot be read as an image ({printable(reason)})") from error


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


def central(image: Tensor, size: int) -> Tensor:
    """The shorter side resized to size * 256 / 224, then the centre cut out: uint8 (3, h, w) to (3, size, size)."""
    height, width = (size * 256 // 224 * side // min(image.shape[-2:]) for side in image.shape[-2:])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return _resize(image, height, width)[:, top : top + size, left : left + size]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, antialiased, in integers, as Pillow; in channels_last memory format, as the decoders give it."""
    # A window of an image is in no memory format at all, which would double the time.
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, (height, width), mode="bilinear", antialias=True)[0]


def normalise(images: Tensor) -> Tensor:
    """(images / 255 - mean) / std: uint8 (n, h, w, 3) to float32 (n, 3, h, w) in channels_last memory format."""
    n, height, width, _ = images.shape
    scale, shift = _scale_and_shift(width, images.device)
    rows = images.reshape(n, height, 3 * width)
    return rows.float().mul_(scale).add_(shift).view(images.shape).permute(0, 3, 1, 2)


@functools.lru_cache
def _scale_and_shift(width: int, device: torch.device) -> tuple[Tensor, ...]:
    # For a whole row of pixels: on the CPU that is several times faster than three channels at a time.
    mean, std = torch.tensor(MEAN, dtype=torch.float64), torch.tensor(STD, dtype=torch.float64)
    return tuple(x.float().repeat(width).to(device) for x in (1 / (255 * std), -mean / std))


# ---- Batches


class Batches:
    """A split as batches on a device; one epoch at a time.

    Args:
        batch_size: of a batch in total, over all ranks; each has an equal part.
        train: shuffled, cropped and flipped at random; otherwise in order, the centre of each image.
        image_size: height and width of what comes out, in pixels.
        workers: processes that decode; 0 decodes in this one.
        skip_bad: what cannot be read is named once and kept in `bad`, instead of ending the epoch. In training, the
            image that follows in the epoch's order takes its place, so that batches keep their sizes, and all ranks
            the same; in validation it is left out.
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
        workers: int = 0,
        skip_bad: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            wanted = f"give a batch size that is a multiple of {world_size}"
            raise DataError(f"{batch_size} images a batch cannot be shared equally by {world_size} processes: {wanted}")
        if train and len(files) < world_size:
            raise DataError(f"{len(files)} training images cannot be shared by {world_size} processes")
        self.device = torch.device(device)
        self.samples = len(files)  # over all ranks
        self.bad: list[str] = []  # what cannot be read: a sentence each
        self._train, self._skip_bad = train, skip_bad
        end = self.samples
        if train:
            end -= end % world_size
            if end > batch_size and end % batch_size == world_size < batch_size:
                end -= world_size
        # This rank's places in the epoch's order; the k-th batch_size of them are its part of batch k.
        places = torch.arange(rank, max(rank, end), world_size)
        parts = places.split(batch_size // world_size) if len(places) else ()
        self._requests = _Requests(files, parts, train)
        self._decoder = _Decoder(image_size, train)
        workers = min(workers, len(parts))
        # What is in flight: DataLoader keeps two batches a worker.
        self._shared_memory = 2 * workers * (batch_size // world_size) * 3 * image_size**2
        if workers:
            with _explaining(self._shared_memory):
                _start_fork_server()  # imports torch while this process goes on
        self._loader = DataLoader(
            self._decoder,
            batch_sampler=self._requests,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",  # so that the host need not wait for the copies
            multiprocessing_context=_Context() if workers else None,
            generator=torch.Generator(),  # or it would draw from the network's
        )

    def __len__(self) -> int:
        """Batches per epoch, of this rank."""
        return len(self._requests.parts)

    def epoch(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, normalised, float32 (b, 3, s, s) in channels_last memory format, and labels (b,).

        All that is random about an image is a function of the seed and of its place in the epoch's order.
        Without `train` there is nothing random, and seed is not used.

        Raises:
            DataError: if a file cannot be read, which it names; with skip_bad, if these are no longer few.
        """
        self._requests.seed = seed
        for places, (images, labels, errors) in zip(self._requests.parts, self._loaded(), strict=True):
            bad = [row for row, error in enumerate(errors) if error]
            for row in bad:
                self._note_bad(errors[row])
                if self._train:
                    images[row], labels[row] = self._replacement(int(places[row]))
            if bad and not self._train:
                good = [row for row, error in enumerate(errors) if not error]
                images, labels = images[good], labels[good]
            if len(labels):
                labels = labels.to(self.device, non_blocking=True)
                yield normalise(images.to(self.device, non_blocking=True)), labels

    def _loaded(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        with _explaining(self._shared_memory):
            yield from self._loader

    def _replacement(self, place: int) -> tuple[Tensor, int]:
        """The next image in the epoch's order that can be read, and its label: whoever asks gets the same."""
        for request in self._requests.after(place):
            image, label, error = self._decoder[request]
            if not error:
                return image, label
            self._note_bad(error)
        raise DataError(f"none of the {self.samples} training images can be read")

    def _note_bad(self, sentence: str) -> None:
        if not self._skip_bad:
            raise DataError(f"{sentence}: replace or remove it, or leave out such files with --skip_bad")
        if sentence in self.bad:
            return
        self.bad.append(sentence)
        print(f"left out, {len(self.bad)} so far: {sentence}", flush=True)
        if len(self.bad) > max(10, self.samples // 10) or len(self.bad) == self.samples:
            found = f"{len(self.bad)} of {self.samples} images cannot be read, too many to leave out"
            raise DataError(f"{found}: is their disk all right? The last: {sentence}")


Request = tuple[str, int, str]  # path, label, and the text that the crop and the flip are drawn from


class _Requests:
    """What the workers get to do, a batch at a time. They are told paths, so that they need no copy of the list."""

    def __init__(self, files: Files, parts: tuple[Tensor, ...], train: bool) -> None:
        self.files, self.parts, self.train = files, parts, train
        self.seed = 0

    def __iter__(self) -> Iterator[list[Request]]:
        order = self._order()
        for places in self.parts:
            rows = zip(order[places].tolist(), places.tolist(), strict=True)
            yield [self._request(row, place) for row, place in rows]

    def after(self, place: int) -> Iterator[Request]:
        """The images that follow in the order, each as it would be cropped and flipped in this place."""
        return (self._request(row, place) for row in self._order().roll(-place)[1:].tolist())

    def _order(self) -> Tensor:
        n = len(self.files)
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed)) if self.train else torch.arange(n)

    def _request(self, row: int, place: int) -> Request:
        # Of a text Python makes a hash: what neighbouring seeds and places draw is unrelated.
        return self.files.paths[row], int(self.files.labels[row]), f"{self.seed}/{place}"


class _Decoder(Dataset):
    """Makes of a request what the network sees: uint8 (size, size, 3), the label, and what is wrong with the file."""

    def __init__(self, size: int, train: bool) -> None:
        self.size, self.train = size, train

    def __getitem__(self, request: Request) -> tuple[Tensor, int, str]:
        path, label, draw = request
        try:
            image = read_image(path)
        except DataError as error:  # as a value: what is raised comes out of a DataLoader with the worker's stack
            return torch.zeros((self.size, self.size, 3), dtype=torch.uint8), label, str(error)
        image = augment(image, self.size, random.Random(draw)) if self.train else central(image, self.size)
        return image.permute(1, 2, 0), label, ""


# ---- Workers


class _Popen(popen_forkserver.Popen):
    def terminate(self) -> None:
        self.kill()  # by those who no longer need the worker: it does not listen to SIGTERM


class _Process(context.ForkServerProcess):
    @staticmethod
    def _Popen(process: context.ForkServerProcess) -> _Popen:
        return _Popen(process)


class _Context(context.ForkServerContext):
    """Workers from a fork server inherit no threads, locks, CUDA memory or sockets of the main process."""

    Process = _Process


def _start_fork_server() -> None:
    """Ctrl-C and SIGTERM for the whole process group are the main process's to answer, when its batch is done.

    What is blocked here stays so in the server and in the workers that it forks, from their first moment. They end
    with the main process, however it ends.
    """
    resource_tracker.ensure_running()  # if the server had to start it, that would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        forkserver.set_forkserver_preload(["torchvision", "PIL.Image"])
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _explaining(shared_memory: int) -> Iterator[None]:
    """Failures of the workers and of the ways to them, in a sentence. shared_memory: bytes that their batches take."""
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(
            f"images cannot be loaded ({printable(reason)}): {_advice(str(error), shared_memory)}"
        ) from error


def _advice(error: str, shared_memory: int) -> str:
    if "Too many open files" in error or "ancdata" in error:
        return "raise the limit of open files (ulimit -n 4096), or give fewer --workers"
    if "AF_UNIX path too long" in error:
        return "the name of the folder for temporary files is too long: set TMPDIR=/tmp"
    place = Path("/dev/shm")  # where Linux keeps the memory that processes share; a container may have little
    if place.is_dir() and (free := shutil.disk_usage(place).free) < shared_memory:
        sizes = f"{free / 2**20:.0f} MiB are free, and up to {shared_memory / 2**20:.0f} MiB are needed"
        return f"in {place} {sizes}: make it larger (docker run --shm-size=8g), or give fewer --workers"
    return "if memory is short, fewer --workers or a smaller batch help"
