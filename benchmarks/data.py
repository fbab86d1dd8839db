#!/usr/bin/env python
"""How fast images are cropped, mirrored, normalised and batched: ours against torchvision's PIL transforms.

    python benchmarks/data.py
    python benchmarks/data.py --data path/to/class/folders --images 50000 --repetitions 7

Ours runs on 2 threads of the training process (or on the GPU), torchvision's in a DataLoader with 2 workers, which are
started before the clock. Both get the same images and take turns.
"""

import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import plain, tools
from grafting_cifar import data

CORES, BATCH_SIZE = 2, 128


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=5)
    parser.add_argument("--data", default="glyphs", help="as for grafting_cifar/grafting.py")
    parser.add_argument("--images", type=tools.count, default=10_000, help="of the training set")
    args = tools.parse(parser, arguments)

    torch.set_num_threads(CORES)
    split = data.select(data.load(args.data), args.images).train
    batches = data.Batches(split, BATCH_SIZE, args.device, augment=True)
    loader = plain.make_loader(split, BATCH_SIZE, CORES)
    epochs = {"ours": batches.epoch, "torchvision": lambda seed: loader}
    ways = {
        name: lambda seed, epoch=epoch: sum(len(labels) for _, labels in epoch(seed)) for name, epoch in epochs.items()
    }
    samples = tools.in_turns(ways, args.repetitions, args.device)

    caption = f"{args.images:,} images, batches of {BATCH_SIZE}; n = {args.repetitions} each, in turns."
    table = tools.Table("data", caption, args)
    for way, sample in samples.items():
        row = {"pipeline": way, "seconds": sample.wall, "images/s": args.images / statistics.median(sample.wall)}
        table.add(**row, **{": torchvision": tools.ratio(samples["torchvision"].wall, sample.wall)})


if __name__ == "__main__":
    main()
