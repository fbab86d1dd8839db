#!/usr/bin/env python
"""How fast images are read, cropped, mirrored, normalised and batched: ours against torchvision's, of the same images.

    python benchmarks/data.py --data path/to/class/folders --images 50000 --repetitions 7
    python benchmarks/data.py --dataset imagenet --data imagenet/train --images 2000 --batch_size 64

Torchvision's is a data set of PIL images in a DataLoader with workers; ours for CIFAR needs none. Both make float32
batches on the device, in turns, timed over whole epochs once their workers are warm. "Core" is a second of processor
time, of the main process and its workers together: that stays comparable on a machine that others use as well. Without
--data, the images are made up.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import plain, tools
from grafting_cifar import data as cifar
from grafting_cifar import models as cifar_models
from grafting_imagenet import data as imagenet
from grafting_imagenet import models as imagenet_models
from training.flags import Parser
from training.images import Files


class Task(NamedTuple):
    build: Callable[[str], nn.Module]  # the model of a name
    ours: Any  # batches, with `epoch(seed)`
    loader: torch.utils.data.DataLoader  # torchvision's, of the same images


def add_flags(parser: Parser, images: int, threads: int) -> None:
    flag = parser.add_argument
    flag("--dataset", choices=("cifar", "imagenet"), default="cifar", help="whose pipeline and models")
    flag("--data", metavar="DIR", help="as for grafting_cifar/grafting.py; ImageNet: a folder of class folders")
    flag("--images", type=tools.count, default=images, metavar="N", help="of an epoch (ImageNet: the list is repeated)")
    flag("--size", type=tools.count, default=224, metavar="PIXELS", help="side of ImageNet's images")
    flag("--batch_size", type=tools.count, default=128, metavar="B", help="images per batch")
    flag("--workers", type=int, default=2, metavar="W", help="processes of each DataLoader")
    flag("--threads", type=tools.count, default=threads, metavar="T", help="of the CPU")


def parse(parser: Parser, arguments: list[str] | None) -> argparse.Namespace:
    args = tools.parse(parser, arguments)
    if args.dataset == "imagenet" and not args.data:
        args.data = made_up(min(args.images, 200)).name
    return args


@cache
def made_up(images: int) -> tempfile.TemporaryDirectory:
    """Class folders of pictures of 500x375 pixels, soft shapes with some noise; deleted as this process ends."""
    folder, draw = tempfile.TemporaryDirectory(), np.random.default_rng(0)
    for k in range(images):
        path = Path(folder.name) / f"class{k % 10}" / f"{k}.jpg"
        path.parent.mkdir(exist_ok=True)
        shapes = Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((500, 375))
        noisy = np.asarray(shapes) + draw.integers(-8, 9, (375, 500, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path)
    return folder


def make_task(args: argparse.Namespace) -> Task:
    options = {"batch_size": args.batch_size, "device": args.device}
    if args.dataset == "imagenet":
        found = torchvision.datasets.ImageFolder(args.data).samples
        paths, labels = zip(*(found[k % len(found)] for k in range(args.images)), strict=True)
        files = Files(list(paths), torch.tensor(labels))
        ours = imagenet.Batches(files, train=True, image_size=args.size, workers=args.workers, **options)
        crop = transforms.RandomResizedCrop(args.size)
        images = plain.Images(paths, labels, crop, imagenet.MEAN, imagenet.STD)
    else:
        split = cifar.select(cifar.load(args.data), args.images).train if args.data else noise(args.images)
        ours = cifar.Batches(split, augment=True, **options)
        crop = transforms.RandomCrop(cifar.SIZE, padding=4)
        images = plain.Images(split.images.numpy(), split.labels.tolist(), crop, cifar.MEAN, cifar.STD)

    def build(name: str) -> nn.Module:
        return cifar_models.build(name, 10) if args.dataset == "cifar" else imagenet_models.build(name, 1000, args.size)

    return Task(build, ours, plain.make_loader(images, workers=args.workers, **options))


def noise(images: int) -> cifar.Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, cifar.SIZE, cifar.SIZE, 3), dtype=torch.uint8, generator=generator)
    return cifar.Split(pixels, torch.randint(10, (images,), generator=generator))


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=5)
    add_flags(parser, images=10_000, threads=2)
    args = parse(parser, arguments)
    torch.set_num_threads(args.threads)
    task = make_task(args)

    def torchvisions(seed: int) -> None:
        for images, labels in task.loader:
            images.to(args.device, non_blocking=True), labels.to(args.device, non_blocking=True)

    ways = {"ours": lambda seed: sum(len(labels) for _, labels in task.ours.epoch(seed)), "torchvision": torchvisions}
    samples = tools.in_turns(ways, args.repetitions, args.device)
    what = f"{args.dataset}: {args.images:,} images, batches of {args.batch_size}"
    caption = f"{what}; {args.threads} threads, {args.workers} workers; n = {args.repetitions} each, in turns."
    table = tools.Table("data", caption, args)
    other = samples["torchvision"]
    for way, sample in samples.items():
        row = {"pipeline": way, "seconds": sample.wall}
        row["images/s"] = [args.images / seconds for seconds in sample.wall]
        row["images/s per core"] = [args.images / seconds for seconds in sample.processor]
        row[": torchvision"] = tools.ratio(other.wall, sample.wall)
        row["per core : torchvision"] = tools.ratio(other.processor, sample.processor)
        table.add(**row, dataset=args.dataset)


if __name__ == "__main__":
    main()
