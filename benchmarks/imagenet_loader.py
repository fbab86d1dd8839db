#!/usr/bin/env python
"""Images per second and core: our loader against that of the PyTorch ImageNet example, on the same images.

    python benchmarks/imagenet_loader.py --data imagenet/train --workers 2
    python benchmarks/imagenet_loader.py --data imagenet/train --arch resnet50 --amp --batch-size 256

The example's is ImageFolder over Pillow with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, through a
DataLoader. Both make float32 batches on the device, in turns, timed over whole epochs once their workers are warm.
"Core" is a second of processor time, of the main process and its workers together: that stays comparable on a machine
that others use as well. With --arch, a network trains on what our loader gives, and on one batch again and again, which
says what the loader costs. Without --data, images of 500x375 pixels are made up.
"""

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from grafting_imagenet import data, models
from training.loop import train_one_epoch
from training.models import compiled
from training.process import amp_dtype, deterministic

Epoch = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


def example(folder: Path, repeats: int, args: argparse.Namespace, device: torch.device) -> Epoch:
    steps = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(folder, transforms.Compose([*steps, transforms.Normalize(data.MEAN, data.STD)]))
    images.samples *= repeats
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    on_gpu = device.type == "cuda"
    loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, pin_memory=on_gpu, **workers)

    def epoch(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        torch.manual_seed(seed)
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return epoch


def ours(folder: Path, repeats: int, args: argparse.Namespace, device: torch.device) -> data.Batches:
    paths, labels = zip(*ImageFolder(folder).samples * repeats, strict=True)  # the same list of files
    files, options = data.Files(list(paths), torch.tensor(labels)), {"image_size": args.size, "workers": args.workers}
    return data.Batches(files, args.batch_size, device, train=True, **options)


def processor_seconds(workers: set[int]) -> float:
    """User and system time of this process and of these; of this one alone where there is no /proc."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    total = usage.ru_utime + usage.ru_stime
    for worker in workers:
        try:
            fields = Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def compare_loaders(args, device: torch.device, loaders: dict[str, Epoch], table: tools.Table) -> None:
    images, rates, per_core, workers = {}, *({name: [] for name in loaders} for _ in range(2)), {}
    for seed in range(args.repetitions + 1):  # the first epoch starts the workers, and does not count
        for name, epoch in loaders.items():
            before, used = {child.pid for child in multiprocessing.active_children()}, 0.0
            used = processor_seconds(workers.get(name, set()))

            def run(name: str = name, epoch: Epoch = epoch, seed: int = seed) -> None:
                images[name] = sum(len(labels) for _, labels in epoch(seed))

            seconds = tools.timed(run, device)
            if seed:
                rates[name].append(images[name] / seconds)
                per_core[name].append(images[name] / (processor_seconds(workers[name]) - used))
            else:
                workers[name] = {child.pid for child in multiprocessing.active_children()} - before
    for name, sample in per_core.items():
        against = tools.ratio(sample, per_core["PyTorch example"])
        table.add(loader=name, **{"images/s": rates[name], "images/s per core": sample, ": example": against})


class Same:
    """The first batch of an epoch, as often as the epoch has batches."""

    def __init__(self, batches: data.Batches):
        self.batch, self.length = next(iter(batches.epoch(0))), len(batches)

    def __len__(self) -> int:
        return self.length

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        return (self.batch for _ in range(self.length))


def train(args: argparse.Namespace, device: torch.device, batches: data.Batches, table: tools.Table) -> None:
    model = models.build(args.arch, 1000, args.size).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    forward, (amp, notes) = compiled(model, device) if args.compile else model, amp_dtype(args.amp, device)
    print(*notes, sep="\n", end="\n" * bool(notes))
    rates = {"with the loader": (batches, []), "one batch": (Same(batches), [])}
    with deterministic(False):
        for seed in range(args.repetitions + 1):
            for given, rate in rates.values():
                options = {"seed": seed, "device": device, "amp": amp, "top5": True}
                epoch = partial(train_one_epoch, forward, given, optimizer, lambda progress: 0.01, **options)
                seconds = tools.timed(epoch, device)
                if seed:
                    rate.append(batches.samples / seconds)
    how = {"amp": bool(amp), "compile": args.compile}
    for name, (_, rate) in rates.items():
        table.add(arch=args.arch, images=name, **how, **{"batch": args.batch_size, "images/s": rate})


def main() -> None:
    parser = tools.parser(__doc__, repetitions=5)
    flag, cores = parser.add_argument, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    tools.add_device(parser)
    flag("--data", type=Path, metavar="DIR", help="folder of class folders (default: made-up images)")
    flag("--images", type=tools.count, default=2000, metavar="N", help="of an epoch: the list is repeated")
    flag("--size", type=tools.count, default=224, metavar="PIXELS", help="side of an image")
    flag("--batch-size", type=tools.count, default=64, metavar="B", help="images per batch")
    flag("--workers", type=tools.count, default=cores, metavar="W", help="processes of each loader")
    flag("--arch", metavar="NAME", help="also train this network, of torchvision's")
    flag("--amp", action="store_true", help="in bfloat16, where the hardware computes in it")
    flag("--compile", action="store_true", help="compile the network")
    args = parser.parse_args()
    device = tools.device_of(parser, args)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.data or tools.make_images(Path(made), min(args.images, 200), (500, 375), suffix="jpg") / "train"
        files = len(ImageFolder(folder))
        repeats = -(-args.images // files)
        what = f"{files} {'images' if args.data else 'made-up images'}, {repeats} times an epoch; {args.size} pixels"
        caption = f"{what}, batches of {args.batch_size}, {args.workers} workers; n = {args.repetitions}, in turns."
        table, batches = tools.Table("imagenet", caption, args.json, device), ours(folder, repeats, args, device)
        if args.arch:
            train(args, device, batches, table)
        else:
            other = example(folder, repeats, args, device)
            compare_loaders(args, device, {"PyTorch example": other, "ours": batches.epoch}, table)


if __name__ == "__main__":
    main()
