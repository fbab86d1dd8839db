"""The images: decoded, cropped and flipped as uint8 by worker processes, normalised on the device.

    images = load("imagenet")
    batches = Batches(images.train, batch_size=256, device="cuda", train=True, workers=8)
    for x, labels in batches.epoch(seed=0): ...

What an epoch holds follows from its seed alone, not from the number of workers; nor, but for how it is dealt
out, from the number of ranks that share the network's batches.
"""

import functools
import io
import math
import multiprocessing
import os
import random
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from training.images import DataError, Files, Images, checksum, class_folders, normalised, reading, rgb
from training.records import say

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29; where it is gone, Pillow decodes everything
    decode_jpeg = None

__all__ = ["Batches", "DataError", "Files", "Images", "checksum", "load"]
MEAN = (0.485, 0.456, 0.406)  # of ImageNet, as in the PyTorch example; nearly all of torchvision's weights expect them
STD = (0.229, 0.224, 0.225)
AREA = (0.08, 1.0)  # of a random crop, as a share of the image's
LOG_RATIO = (math.log(3 / 4), math.log(4 / 3))  # of its width to its height

load = class_folders
normalise = functools.partial(normalised, mean=MEAN, std=STD)


# ---- Images


def read_image(path: str) -> Tensor:
    """The image in a file, whatever its suffix: uint8 (3, h, w).

    The pixels are those of torchvision's ImageFolder (the orientation in EXIF is not applied, of an animation the
    first frame counts), but that 16-bit grey is scaled to 8 bits, not clipped. Raises DataError, naming the file.
    """
    with reading(path), warnings.catch_warnings():
        data = np.fromfile(path, dtype=np.uint8)
        if not len(data):
            raise ValueError("it is empty")
        if decode_jpeg is not None and data[:3].tolist() == [0xFF, 0xD8, 0xFF]:
            with suppress(RuntimeError):  # Pillow has the last word, and better words for what is wrong
                return decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
        warnings.simplefilter("ignore")  # of damaged metadata, of large images
        with Image.open(io.BytesIO(data)) as image:
            return torch.from_numpy(np.array(rgb(image))).permute(2, 0, 1)


def random_window(height: int, width: int, draw: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop, distributed as that of torchvision's RandomResizedCrop.

    Its area is uniform in 8 to 100 % of the image's, its ratio of width to height log-uniform in 3/4 to 4/3. If ten
    such windows do not fit into the image, it is the largest central one with a ratio within these bounds.
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


# ---- Batches

Request = tuple[str, int, str]  # path, label, and the text that the crop and the flip are drawn from
Batch = tuple[Tensor, list[int], dict[int, str]]  # uint8 (b, size, size, 3), labels, what is wrong with which row


class Batches:
    """A split as batches on a device; one epoch at a time.

    Args:
        batch_size: of a batch in total, over all ranks; each has an equal part.
        train: shuffled, cropped and flipped at random; otherwise in order, the centre of each image.
        skip_bad: what cannot be read is named once and kept in `bad`, instead of ending the epoch. In training, another
            image of the batch takes its place, so that batches keep their sizes; in validation none does.
        rank, world_size: in training the last batch is cut so that all ranks have equally many images in every step,
            and left out where that is one, a batch without statistics for batch norm. In validation every image comes
            once; a rank may have a batch less than another, or none.
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
        self.device = torch.device(device)
        self.samples = end = len(files)  # over all ranks
        self.bad: list[str] = []  # what cannot be read: a sentence each
        self._train, self._skip_bad = train, skip_bad
        if train:
            end -= end % world_size
            if end > batch_size and end % batch_size == world_size < batch_size:
                end -= world_size
        # This rank's places in the epoch's order; the k-th part of them is its part of batch k.
        places = torch.arange(rank, max(rank, end), world_size)
        self._requests = Requests(files, places.split(batch_size // world_size) if len(places) else (), shuffle=train)
        decoder = Decoder(batch_size // world_size, image_size, train)
        self._loader = make_loader(decoder, self._requests, min(workers, len(self)), self.device)

    def __len__(self) -> int:
        """Batches per epoch, of this rank."""
        return len(self._requests.parts)

    def epoch(self, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images, normalised, float32 (b, 3, s, s) in channels_last memory format, and labels (b,).

        All that is random about an image is a function of the seed and of its place in the epoch's order.
        Raises DataError if a file cannot be read, which it names; with skip_bad, if these are no longer few.
        """
        self._requests.seed = seed
        for images, labels, errors in self._loader:
            if errors:
                rows = self._rows_without(errors, len(labels))
                images, labels = images[rows], [labels[row] for row in rows]
            if labels:
                images = normalise(images.to(self.device, non_blocking=True))
                yield images, torch.tensor(labels).to(self.device, non_blocking=True)

    def _rows_without(self, errors: dict[int, str], count: int) -> list[int]:
        """The rows of a batch that stand for all of it, as some cannot be read."""
        for sentence in errors.values():
            if not self._skip_bad:
                raise DataError(f"{sentence}: replace or remove it, or leave out such files with --skip_bad")
            if sentence not in self.bad:
                self.bad.append(sentence)
                say(f"left out, {len(self.bad)} so far: {sentence}")
        good = [row for row in range(count) if row not in errors]
        if len(self.bad) > max(10, self.samples // 10) or (self._train and not good):
            found = f"{len(self.bad)} of {self.samples} images cannot be read, too many to leave out"
            raise DataError(f"{found}: is their disk all right? The last: {self.bad[-1]}")
        if self._train:
            return [good[row % len(good)] if row in errors else row for row in range(count)]
        return good


class Requests:
    """What the workers get to do, a batch at a time. They are told paths, so that they need no copy of the list."""

    def __init__(self, files: Files, parts: Sequence[Tensor], shuffle: bool) -> None:
        self.files, self.parts, self.shuffle, self.seed = files, parts, shuffle, 0

    def __iter__(self) -> Iterator[list[Request]]:
        n, generator = len(self.files), torch.Generator().manual_seed(self.seed)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        for places in self.parts:
            rows = order[places]
            labelled = zip(rows.tolist(), self.files.labels[rows].tolist(), places.tolist(), strict=True)
            # Of a text Python makes a hash: what neighbouring seeds and places draw is unrelated.
            yield [(self.files.paths[row], label, f"{self.seed}/{place}") for row, label, place in labelled]


class Decoder(Dataset):
    """Makes of the requests of a batch what the network sees.

    A worker writes into three buffers of shared memory by turns, since new memory for every batch costs 5 % of the
    time. That is enough of them: DataLoader sends a worker its batch k + 3 to do when its batch k + 1 is fetched, and
    by then `Batches.epoch` has made normalised images of batch k.
    """

    def __init__(self, batch_size: int, size: int, train: bool) -> None:
        self.size, self.train = size, train
        self.shape = (batch_size, size, size, 3)
        self.buffers: deque[Tensor] = deque()

    def __getitem__(self, requests: list[Request]) -> Batch:
        if len(self.buffers) < 3:
            buffer = torch.empty(self.shape, dtype=torch.uint8)
            self.buffers.append(buffer.share_memory_() if get_worker_info() else buffer)
        self.buffers.rotate()
        images, errors = self.buffers[0][: len(requests)], {}
        for row, (path, _, draw) in enumerate(requests):
            try:
                images[row] = self.decode(path, draw)
            except DataError as error:  # what is raised comes out of a DataLoader with the worker's stack
                errors[row] = str(error)
        return images, [label for _, label, _ in requests], errors

    def decode(self, path: str, draw: str) -> Tensor:
        """uint8 (size, size, 3)."""
        image = read_image(path)
        image = augment(image, self.size, random.Random(draw)) if self.train else central(image, self.size)
        return image.permute(1, 2, 0)


def make_loader(decoder: Decoder, requests: Requests, workers: int, device: torch.device) -> DataLoader:
    # Workers are forked from a small server: they inherit no threads, locks, CUDA memory or sockets of this process.
    multiprocessing.set_forkserver_preload(["torchvision", "PIL.Image"])
    return DataLoader(
        decoder,
        batch_size=None,  # what the sampler yields is a whole batch
        sampler=requests,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",  # so that the host need not wait for the copies
        worker_init_fn=end_with_main_process,
        multiprocessing_context="forkserver" if workers else None,
        generator=torch.Generator(),  # or it would draw from the one that the network draws from
    )


def end_with_main_process(worker: int) -> None:
    """However it ends. DataLoader would have a worker wait for the end of the fork server, which waits for workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C, which all processes get, is the main process's to answer

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
