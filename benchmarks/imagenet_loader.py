#!/usr/bin/env python
"""Images per second and core: our loader against that of the PyTorch ImageNet example, on the same images.

    python benchmarks/imagenet_loader.py --data imagenet/train --workers 2
    python benchmarks/imagenet_loader.py --data imagenet/train --arch resnet50 --amp --batch-size 256

The example's is ImageFolder over Pillow with RandomResizedCrop, RandomHorizontalFlip, ToTensor and Normalize, through a
DataLoader. Both make float32 batches on the device, in turns, timed over whole epochs once their workers are warm.
"Core" is a second of processor time, of the main process and its workers together: that stays comparable on a machine
that others use as well. With --arch, a network trains on what our loader gives, instead. Without --data, images of
500x375 pixels are made up.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from grafting_imagenet import data, models
from training.flags import cores
from training.loop import train_one_epoch
from training.models import compiled
from training.process import amp_dtype, deterministic

Epoch = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


def make_images(folder: Path, images: int) -> Path:
    """Class folders of made-up pictures: soft shapes with some noise."""
    draw, (width, height) = np.random.default_rng(0), (500, 375)
    for k in range(images):
        path = folder / f"class{k % 10}" / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        shapes = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((width, height))
        noise = draw.integers(-8, 9, (height, width, 3))
        Image.fromarray((np.asarray(shapes) + noise).clip(0, 255).astype(np.uint8)).save(path)
    return folder


def example(samples: list[tuple[str, int]], folder: Path, args: argparse.Namespace) -> Epoch:
    steps = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    images = ImageFolder(folder, transforms.Compose([*steps, transforms.Normalize(data.MEAN, data.STD)]))
    images.samples = samples
    workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
    pin = args.device.type == "cuda"
    loader = torch.utils.data.DataLoader(images, args.batch_size, shuffle=True, pin_memory=pin, **workers)

    def epoch(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loader:
            yield images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)

    return epoch


def compare_loaders(loaders: dict[str, Epoch], args: argparse.Namespace, table: tools.Table) -> None:
    ways = {name: lambda seed, epoch=epoch: sum(1 for _ in epoch(seed)) for name, epoch in loaders.items()}
    samples = tools.in_turns(ways, args.repetitions, args.device)
    per_core = {name: [args.images / seconds for seconds in sample.processor] for name, sample in samples.items()}
    for name, sample in samples.items():
        row = {"loader": name, "images/s": [args.images / seconds for seconds in sample.wall]}
        row["images/s per core"] = per_core[name]
        table.add(**row, **{": example": tools.ratio(per_core[name], per_core["PyTorch example"])})


def train(batches: data.Batches, args: argparse.Namespace, table: tools.Table) -> None:
    device = args.device
    model = models.build(args.arch, 1000, args.size).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, fused=True)
    forward, (amp, notes) = compiled(model, device, args.compile), amp_dtype(args.amp, device)
    print(*notes, sep="\n", end="\n" * bool(notes))
    epoch = partial(train_one_epoch, forward, batches, optimizer, lambda progress: 0.01)
    with deterministic(False):
        way = {"training": lambda seed: epoch(seed=seed, device=device, amp=amp, top5=True)}
        sample = tools.in_turns(way, args.repetitions, device)["training"]
    row = {"arch": args.arch, "amp": bool(amp), "compile": args.compile, "batch": args.batch_size}
    table.add(**row, **{"images/s": [args.images / seconds for seconds in sample.wall]})


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=5)
    flag = parser.add_argument
    flag("--data", type=Path, metavar="DIR", help="folder of class folders (default: made-up images)")
    flag("--images", type=tools.count, default=2000, metavar="N", help="of an epoch: the list is repeated")
    flag("--size", type=tools.count, default=224, metavar="PIXELS", help="side of an image")
    flag("--batch-size", type=tools.count, default=64, metavar="B", help="images per batch")
    flag("--workers", type=int, default=cores(), metavar="W", help="processes of each loader")
    flag("--arch", metavar="NAME", help="train this network, of torchvision's")
    flag("--amp", action="store_true", help="in bfloat16, where the hardware computes in it")
    flag("--compile", action="store_true", help="compile the network")
    args = tools.parse(parser, arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        folder = args.data or make_images(Path(made), min(args.images, 200))
        found = ImageFolder(folder).samples
        samples = (found * -(-args.images // len(found)))[: args.images]
        what = (
            f"{args.images} images an epoch, of {len(found)}{'' if args.data else ' made-up ones'}; {args.size} pixels"
        )
        caption = f"{what}, batches of {args.batch_size}, {args.workers} workers; n = {args.repetitions}, in turns."
        table = tools.Table("imagenet", caption, args)
        paths, labels = zip(*samples, strict=True)
        options = {"image_size": args.size, "workers": args.workers}
        files = data.Files(list(paths), torch.tensor(labels))
        batches = data.Batches(files, args.batch_size, args.device, train=True, **options)
        if args.arch:
            train(batches, args, table)
        else:
            loaders = {"PyTorch example": example(samples, folder, args), "ours": batches.epoch}
            compare_loaders(loaders, args, table)


if __name__ == "__main__":
    main()
