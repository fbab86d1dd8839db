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


def main() -> None:
    parser = tools.parser(__doc__, repetitions=5)
    tools.add_device(parser)
    parser.add_argument("--data", default="glyphs", help="as for grafting_cifar/grafting.py")
    parser.add_argument("--images", type=tools.count, default=10_000, help="of the training set")
    args = parser.parse_args()
    device = tools.device_of(parser, args)

    torch.set_num_threads(CORES)
    split = data.select(data.load(args.data), args.images).train
    batches = data.Batches(split, BATCH_SIZE, device, augment=True)
    loader = plain.make_loader(split, BATCH_SIZE, CORES, train=True)
    ways = {"ours": lambda seed: batches.epoch(seed), "torchvision": lambda seed: iter(loader)}
    seconds = {way: [] for way in ways}
    for seed in range(args.repetitions + 1):  # the first epoch starts workers and fills caches: it is not counted
        for way, epoch in ways.items():
            taken = tools.timed(lambda epoch=epoch, seed=seed: [len(labels) for _, labels in epoch(seed)], device)
            if seed:
                seconds[way].append(taken)

    caption = f"{len(split.labels):,} images, batches of {BATCH_SIZE}; n = {args.repetitions} each, in turns."
    table = tools.Table("data", caption, args.json, device)
    for way, sample in seconds.items():
        rate = len(split.labels) / statistics.median(sample)
        speed = {"images/s": rate, ": torchvision": tools.ratio(seconds["torchvision"], sample)}
        table.add(pipeline=way, **{"seconds": sample, "standard deviation": deviation(sample)}, **speed)


def deviation(sample: list[float]) -> float:
    return statistics.stdev(sample) if len(sample) > 1 else 0.0


if __name__ == "__main__":
    main()
