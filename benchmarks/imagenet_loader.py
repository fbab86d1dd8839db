"""Images per second and core: our loader against that of the PyTorch ImageNet example, on the same images.

    python benchmarks/imagenet_loader.py --data imagenet/train --workers 2

The example's is ImageFolder over Pillow with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize,
through a DataLoader. Both make float32 batches on the device, in turns, and are timed over whole epochs once
their workers are warm. "Core" is a second of processor time, of the main process and its workers together:
that stays comparable on a machine that others use as well. Prints Markdown.
"""

import argparse
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import PIL
import torch
import torchvision
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from grafting_imagenet import data

Epoch = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


def example(folder: Path, repeats: int, args: argparse.Namespace) -> Epoch:
    steps = [
        transforms.RandomResizedCrop(args.size),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(data.MEAN, data.STD),
    ]
    images = ImageFolder(folder, transforms.Compose(steps))
    images.samples *= repeats
    loader = torch.utils.data.DataLoader(
        images,
        args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        pin_memory=args.device == "cuda",
        persistent_workers=args.workers > 0,
    )

    def epoch(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        torch.manual_seed(seed)
        for images, labels in loader:
            yield images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)

    return epoch


def ours(folder: Path, repeats: int, args: argparse.Namespace, decode: str = "cpu") -> Epoch:
    images = ImageFolder(folder)  # for the same list of files
    paths, labels = zip(*images.samples * repeats, strict=True)
    files = data.Files(list(paths), torch.tensor(labels))
    return data.Batches(
        files,
        args.batch_size,
        args.device,
        train=True,
        image_size=args.size,
        workers=args.workers,
        decode=decode,
    ).epoch


def measure(epoch: Epoch, seed: int, processes: list[int]) -> tuple[int, float, float]:
    """(images, seconds, processor seconds of these processes) of an epoch."""
    images, began, used = 0, time.perf_counter(), sum(map(processor_seconds, processes))
    for _, labels in epoch(seed):
        images += len(labels)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return images, time.perf_counter() - began, sum(map(processor_seconds, processes)) - used


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of class folders")
    parser.add_argument("--images", type=int, default=2000, help="images per epoch: the list is repeated")
    parser.add_argument("--size", type=int, default=224, help="image size in pixels")
    parser.add_argument("--batch-size", type=int, default=64, help="images per batch")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each loader")
    parser.add_argument("--repetitions", type=int, default=5, help="timed epochs of each loader")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(1)

    files = len(ImageFolder(args.data))
    repeats = -(-args.images // files)
    loaders = {"PyTorch example": example(args.data, repeats, args), "ours": ours(args.data, repeats, args)}
    if args.device == "cuda":
        loaders["ours, --decode gpu"] = ours(args.data, repeats, args, "gpu")
    processes = {}
    for name, epoch in loaders.items():  # one epoch each that does not count: it starts the workers
        before = {child.pid for child in multiprocessing.active_children()}
        measure(epoch, 0, [])
        workers = {child.pid for child in multiprocessing.active_children()} - before
        processes[name] = [os.getpid(), *workers]
    results = {name: [] for name in loaders}
    for seed in range(1, args.repetitions + 1):
        for name, epoch in loaders.items():
            images, seconds, used = measure(epoch, seed, processes[name])
            results[name].append((images / seconds, images / used, 1000 * used / images))

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    gpu = f", {torch.cuda.get_device_name()}" if args.device == "cuda" else ""
    print(
        f"{files} images, {repeats} times an epoch; {args.size} pixels, batches of {args.batch_size}, "
        f"{args.workers} workers; {args.repetitions} epochs of each in turns, medians (lowest to highest). "
        f"{os.cpu_count()} x {cpu.partition(': ')[2]}{gpu}, device {args.device}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"Pillow {PIL.__version__}.\n"
    )
    print("| loader | images/s | images/s per core | processor ms per image | per core, of the example's |")
    print("| --- | ---: | ---: | ---: | ---: |")
    reference = [per_core for _, per_core, _ in results["PyTorch example"]]
    for name, rows in results.items():
        ratios = [per_core / other for (_, per_core, _), other in zip(rows, reference, strict=True)]
        cells = [spread(column, digits) for column, digits in zip(zip(*rows, strict=True), (0, 0, 2), strict=True)]
        print("|", " | ".join([name, *cells, spread(ratios, 2)]), "|")


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


if __name__ == "__main__":
    main()
