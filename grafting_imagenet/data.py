"""The images: decoded, cropped and flipped as uint8 by worker processes, normalised on the device.

    images = load("imagenet")
    batches = Batches(images.train, batch_size=256, device="cuda", train=True, workers=8)
    for x, labels in batches.epoch(seed=0): ...

What an epoch holds follows from its seed alone, not from the number of workers; nor, but for how it is dealt
out, from the number of ranks that share the network's batches.
"""

from __future__ import annotations

import errno
import functools
import io
import itertools
import math
import multiprocessing
import os
import random
import re
import resource
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import context, forkserver, popen_forkserver, resource_tracker

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from filter_grafting.membership import printable
from training.images import DataError, Files, Images, checksum, class_folders, normalised, reading, rgb

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


normalise = functools.partial(normalised, mean=MEAN, std=STD)


# ---- Batches

Request = tuple[str, int, str]  # path, label, and the text that the crop and the flip are drawn from
Batch = tuple[Tensor, list[int], dict[int, str]]  # uint8 (b, size, size, 3), labels, what is wrong with which row


class Batches:
    """A split as batches on a device; one epoch at a time.

    Args:
        batch_size: of a batch in total, over all ranks; each has an equal part.
        train: shuffled, cropped and flipped at random; otherwise in order, the centre of each image.
        image_size: height and width of what comes out, in pixels.
        workers: processes that decode; 0 decodes in this one.
        skip_bad: what cannot be read is named once and kept in `bad`, instead of ending the epoch. In training, the
            next image in the epoch's order takes its place, so that batches keep their sizes; in validation none does.
        rank, world_size: of the processes that train this network. In training the last batch is cut so that all ranks
            have equally many images in every step, and left out where that is one, a batch without statistics for batch
            norm. In validation every image comes once; a rank may have a batch less than another, or none.

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
        if batch_size % world_size or (train and len(files) < world_size):
            shares = f"{len(files)} images in batches of {batch_size} cannot be shared by {world_size} processes"
            raise DataError(f"{shares}: give a batch size that is a multiple of {world_size}, and more images")
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
        self._requests = Requests(files, places.split(batch_size // world_size) if len(places) else ())
        self._decoder = Decoder(batch_size // world_size, image_size, train)
        self._loader = start_workers(self._decoder, self._requests, min(workers, len(self)), self.device)

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
        self._requests.start(seed, shuffle=self._train)
        for places, (images, labels, errors) in zip(self._requests.parts, self._loaded(), strict=True):
            for row in errors:
                self._note_bad(errors[row])
                if self._train:
                    images[row], labels[row] = self._replacement(int(places[row]))
            if errors and not self._train:
                good = [row for row in range(len(labels)) if row not in errors]
                images, labels = images[good], [labels[row] for row in good]
            if labels:
                images = normalise(images.to(self.device, non_blocking=True))
                yield images, torch.tensor(labels).to(self.device, non_blocking=True)

    def _loaded(self) -> Iterator[Batch]:
        with explaining():
            yield from self._loader

    def _replacement(self, place: int) -> tuple[Tensor, int]:
        """The next image in the epoch's order that can be read, and its label: whoever asks gets the same."""
        for other in itertools.count(place + 1):  # ends: _note_bad does not let all be bad
            path, label, draw = self._requests.request(other % self.samples, place)
            try:
                return self._decoder.decode(path, draw), label
            except DataError as error:
                self._note_bad(str(error))

    def _note_bad(self, sentence: str) -> None:
        if not self._skip_bad:
            raise DataError(f"{sentence}: replace or remove it, or leave out such files with --skip_bad")
        if sentence in self.bad:
            return
        self.bad.append(sentence)
        print(f"left out, {len(self.bad)} so far: {sentence}", flush=True)
        if len(self.bad) > min(max(10, self.samples // 10), self.samples - 1):
            found = f"{len(self.bad)} of {self.samples} images cannot be read, too many to leave out"
            raise DataError(f"{found}: is their disk all right? The last: {sentence}")


class Requests:
    """What the workers get to do, a batch at a time. They are told paths, so that they need no copy of the list."""

    def __init__(self, files: Files, parts: Sequence[Tensor]) -> None:
        self.files, self.parts = files, parts

    def start(self, seed: int, shuffle: bool) -> None:
        n, generator = len(self.files), torch.Generator().manual_seed(seed)
        self.order = torch.randperm(n, generator=generator) if shuffle else torch.arange(n)
        self.seed = seed

    def __iter__(self) -> Iterator[list[Request]]:
        for places in self.parts:
            yield [self.request(place, place) for place in places.tolist()]

    def request(self, place: int, of: int) -> Request:
        """The image at a place of the order, cropped and flipped as that of another place."""
        row = int(self.order[place])
        # Of a text Python makes a hash: what neighbouring seeds and places draw is unrelated.
        return self.files.paths[row], int(self.files.labels[row]), f"{self.seed}/{of}"


class Decoder(Dataset):
    """Makes of a batch of requests what the network sees.

    A worker writes into three buffers of shared memory by turns, since new memory for every batch costs 5 % of the
    time. That is enough of them: DataLoader sends a worker its batch k + 3 to do when its batch k + 1 is fetched, and
    by then `Batches.epoch` has made normalised images of batch k.
    """

    def __init__(self, batch_size: int, size: int, train: bool) -> None:
        self.size, self.train = size, train
        self.shape = (batch_size, size, size, 3)
        self.buffers: deque[Tensor] = deque()

    def __getitems__(self, requests: list[Request]) -> Batch:
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


# ---- Workers


def start_workers(decoder: Decoder, requests: Requests, workers: int, device: torch.device) -> DataLoader:
    if workers:
        with explaining():
            left = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - len(os.listdir("/dev/fd"))
            if 0 <= left < 6 * workers + 10:  # as much as they take; half-started workers would drown the sentence
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            start_fork_server()  # imports torch while this process goes on
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than there are cores; at length
    return DataLoader(
        decoder,
        batch_sampler=requests,
        collate_fn=as_it_is,
        worker_init_fn=end_with_main_process,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",  # so that the host need not wait for the copies
        multiprocessing_context=ForkServer() if workers else None,
        generator=torch.Generator(),  # or it would draw from the one that the network draws from
    )


def as_it_is(batch: Batch) -> Batch:
    return batch


def start_fork_server() -> None:
    """Ctrl-C and SIGTERM for the whole process group are the main process's to answer, when its batch is done.

    What is blocked here stays so in the server and in the workers that it forks, from their first moment.
    """
    resource_tracker.ensure_running()  # if the server had to start it, that would unblock the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    forkserver.set_forkserver_preload(["torchvision", "PIL.Image"])
    forkserver.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_main_process(worker: int) -> None:
    """However it ends. DataLoader would have a worker wait for the end of the fork server, which waits for workers."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Popen(popen_forkserver.Popen):
    def terminate(self) -> None:
        self.kill()  # whoever no longer needs a worker asks so, and it does not listen to SIGTERM


class Worker(context.ForkServerProcess):
    _Popen = Popen


class ForkServer(context.ForkServerContext):
    """Workers that inherit no threads, locks, CUDA memory or sockets of the main process."""

    Process = Worker


ADVICE = {
    "Too many open files|ancdata": "raise the limit of open files (ulimit -n 4096), or give fewer --workers",
    "AF_UNIX path too long": "the name of the folder for temporary files is too long: set TMPDIR=/tmp",
    "": "if memory is short (in a container: docker run --shm-size=8g), fewer --workers or a smaller batch help",
}


@contextmanager
def explaining() -> Iterator[None]:
    """What goes wrong with the workers, in one sentence."""
    try:
        yield
    except (EOFError, OSError, RuntimeError) as error:
        reason = printable((str(error).strip() or type(error).__name__).splitlines()[-1])
        advice = next(advice for cause, advice in ADVICE.items() if re.search(cause, str(error)))
        raise DataError(f"images cannot be loaded ({reason}): {advice}") from error
