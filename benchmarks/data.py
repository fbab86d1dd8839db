#!/usr/bin/env python
"""How fast images are cropped, mirrored, normalised and batched: ours against torchvision's PIL transforms.

    python benchmarks/data.py
    python benchmarks/data.py --data path/to/class/folders --images 50000 --repetitions 7

Ours runs on 2 threads of the training process, torchvision's in a DataLoader with 2 workers, which are started
before the clock. Both get the same images and take turns. Prints a Markdown table.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_cifar import data

CORES = 2
BATCH_SIZE = 128


class Pictures(Dataset):
    """A split as torchvision's CIFAR10 gives it: a PIL image at a time, transformed."""

    def __init__(self, split: data.Split) -> None:
        self.images = split.images.numpy()
        self.labels = split.labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(data.SIZE, padding=data.PADDING),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(data.MEAN, data.STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, k: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.images[k])), self.labels[k]


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="glyphs", help="as for grafting_cifar/grafting.py (default: glyphs)")
    parser.add_argument("--images", type=int, default=10_000, help="of the training set (default: 10000)")
    parser.add_argument("--repetitions", type=int, default=5, help="epochs of each (default: 5)")
    args = parser.parse_args()

    torch.set_num_threads(CORES)
    split = data.select(data.load(args.data), args.images)[0]
    batches = data.Batches(split, BATCH_SIZE, "cpu", augment=True)
    loader = DataLoader(Pictures(split), BATCH_SIZE, shuffle=True, num_workers=CORES, persistent_workers=True)
    pipelines = {
        f"ours, {CORES} threads": lambda k: batches.epoch(seed=k),
        f"torchvision, {CORES} workers": lambda k: iter(loader),
    }
    seconds = {name: [] for name in pipelines}
    for k in range(-1, args.repetitions):  # the first epoch of each starts workers and fills caches: it is not counted
        for name, epoch in pipelines.items():
            begun = time.perf_counter()
            count = sum(len(labels) for _, labels in epoch(k + 1))
            if k >= 0:
                seconds[name].append(time.perf_counter() - begun)
            assert count == len(split.labels)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours, theirs = medians.values()
    versions = f"torch {torch.__version__}, torchvision {torchvision.__version__}, Python {platform.python_version()}"
    print(f"\n{processor()}; {versions}; {len(split.labels):,} images, batches of {BATCH_SIZE}, "
          f"n = {args.repetitions}\n")  # fmt: skip
    print("| pipeline | median | mean ± standard deviation | images per second | ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, values in seconds.items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"| {name} | {medians[name]:.3f} s | {statistics.mean(values):.3f} ± {deviation:.3f} s "
              f"| {len(split.labels) / medians[name]:,.0f} | {theirs / medians[name]:.1f} |")  # fmt: skip
    print(f"\nOurs is {theirs / ours:.1f} times as fast.")


if __name__ == "__main__":
    main()
