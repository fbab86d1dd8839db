#!/usr/bin/env python
"""Images per second of training: ours against plain.py, with the same model, images and batch size.

    python benchmarks/training.py --models resnet20 --images 512
    python benchmarks/training.py --models resnet32 --device cuda --images 50000 --variants plain amp amp+compile graph
    python benchmarks/training.py --models resnet32 --device cuda --images 50000 --variants amp --processes 1 2 4

Ours is what grafting_cifar/grafting.py builds and runs, with the flags of the variant; "graph" is benchmarks/graphs.py.
Every variant lives in a process of its own, so that its peak memory is its own; they take turns, and one repetition
each is not counted, in which they compile, choose algorithms and start workers. With --processes N, N of them train at
the same time on the same device, as the networks of a ring do; the figure is what they do together.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import plain, tools
from benchmarks.graphs import GraphedTraining
from grafting_cifar import data, models
from training.loop import train_one_epoch
from training.models import compiled
from training.process import amp_dtype, deterministic

MODELS = ("resnet20", "resnet32", "resnet56", "resnet110", "mobilenetv2", "vgg16")
VARIANTS = ("plain", "ours", "amp", "compile", "amp+compile", "graph", "amp+graph")
RATE = 0.01  # low enough for random labels
WORKERS = 2


def images_of(args: argparse.Namespace) -> data.Split:
    if args.data:
        return data.select(data.load(args.data), args.images).train
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (args.images, data.SIZE, data.SIZE, 3), dtype=torch.uint8, generator=generator)
    return data.Split(pixels, torch.randint(10, (args.images,), generator=generator))


def prepare(args: argparse.Namespace, name: str, variant: str, device: torch.device) -> Callable[[int], object]:
    """What trains for one epoch, given its seed."""
    words, split = variant.split("+"), images_of(args)
    if variant == "plain":
        network, criterion, optimizer = plain.make_training(name, 10, device)
        optimizer.param_groups[0]["lr"] = RATE
        loader = plain.make_loader(split, args.batch_size, WORKERS, train=True)
        return lambda seed: plain.train(network, loader, criterion, optimizer, device)
    model = models.build(name, 10).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, fused=True)
    batches = data.Batches(split, args.batch_size, device, augment=True)
    amp, notes = amp_dtype("amp" in words, device)
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    if "graph" in words:
        graphed = GraphedTraining(model, batches, optimizer, device=device, amp=amp)
        return lambda seed: graphed.epoch(lambda progress: RATE, seed=seed)
    forward, options = compiled(model, device) if "compile" in words else model, {"device": device, "amp": amp}
    return lambda seed: train_one_epoch(forward, batches, optimizer, lambda progress: RATE, seed=seed, **options)


def work(args: argparse.Namespace, name: str, variant: str, device: torch.device, threads: int, line: Connection):
    """One process: trains for an epoch whenever it is told a seed; then tells the megabytes that it has used."""
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, for the loader of plain.py
    torch.set_num_threads(threads)
    train = prepare(args, name, variant, device)
    line.send("ready")
    with deterministic(False), suppress(EOFError):  # the end of the line: whoever measures has gone
        while (seed := line.recv()) is not None:
            tools.wait_for(device)
            began = time.monotonic()
            train(seed)
            tools.wait_for(device)
            line.send((began, time.monotonic()))
        on_gpu = torch.cuda.max_memory_reserved() / 1e6 if device.type == "cuda" else 0.0
        line.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, on_gpu))


class Team:
    """N processes of one variant that train at the same time."""

    def __init__(self, args: argparse.Namespace, name: str, variant: str, size: int, device: torch.device):
        context, self.rates, self.memory = multiprocessing.get_context("spawn"), [], (0.0, 0.0)
        self.name, self.images = f"{name}, {variant}, {size} at once", size * args.images
        self.members = []
        for _ in range(size):
            line, other_end = context.Pipe()
            given = (args, name, variant, device, max(1, args.threads // size), other_end)
            process = context.Process(target=work, args=given)
            process.start()
            other_end.close()  # so that the end of the process is the end of the line
            self.members.append((process, line))
        self.is_well = self.ask() is not None

    def ask(self, *message: int | None) -> list | None:
        """What the members answer; None, with a word about it, if one has ended."""
        try:
            for _, line in self.members:
                for word in message:
                    line.send(word)
            return [line.recv() for _, line in self.members]
        except (EOFError, OSError):
            print(f"{self.name}: a process ended early; its message is above", file=sys.stderr, flush=True)
            self.is_well = False
            return None

    def train(self, seed: int) -> None:
        if self.is_well and (times := self.ask(seed)) and seed:
            begins, ends = zip(*times, strict=True)
            self.rates.append(self.images / (max(ends) - min(begins)))

    def leave(self) -> None:
        if self.is_well and (used := self.ask(None)):
            self.memory = tuple(map(max, zip(*used, strict=True)))

    def end(self) -> None:
        for process, line in self.members:
            line.close()
            process.join(timeout=10)
            process.kill()


def measure(args: argparse.Namespace, name: str, device: torch.device, table: tools.Table) -> bool:
    """Adds a row for each variant and number of processes, of as much as could be measured; whether that was all."""
    teams: dict[tuple[str, int], Team] = {}
    try:
        for variant in args.variants:
            for size in args.processes:
                teams[variant, size] = Team(args, name, variant, size, device)
        for repetition in range(args.repetitions + 1):
            for team in teams.values():
                team.train(repetition)
        for team in teams.values():
            team.leave()
    finally:
        for team in teams.values():
            team.end()
        rates = {key: team.rates for key, team in teams.items() if team.rates}
        for (variant, size), rate in rates.items():
            plains = rates.get(("plain", size)) or rates.get(("plain", 1))
            alone = rates.get((variant, 1))
            row = {"model": name, "variant": variant, "processes": size, "images/s": rate}
            row |= {": plain": tools.ratio(rate, plains) if plains else ""}
            row |= {": 1 process": tools.ratio(rate, alone) if alone else ""}
            row |= {"s per 50,000 images": 50_000 / statistics.median(rate)}
            memory, on_gpu = teams[variant, size].memory
            table.add(**row, **{"memory (MB)": memory, "GPU memory (MB)": on_gpu, "MPS": bool(os.environ.get("MPS"))})
    return len(rates) == len(teams) and all(team.is_well for team in teams.values())


def main() -> int:
    parser = tools.parser(__doc__, repetitions=3)
    flag, cores = parser.add_argument, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    tools.add_device(parser)
    flag("--models", nargs="+", choices=models.NAMES, default=MODELS, metavar="NAME", help=f"of {' '.join(MODELS)}")
    known = f"plain.py, or ours: {' '.join(VARIANTS)}"
    flag("--variants", nargs="+", choices=VARIANTS, default=["plain", "ours", "amp"], metavar="NAME", help=known)
    flag("--processes", nargs="+", type=tools.count, default=[1], metavar="N", help="at the same time")
    flag("--images", type=tools.count, default=256, metavar="N", help="of an epoch")
    flag("--data", metavar="DIR", help="as for grafting_cifar/grafting.py (default: images of noise)")
    flag("--batch_size", type=tools.count, default=128, metavar="B", help="images per step")
    flag("--threads", type=tools.count, default=cores, metavar="N", help="of the CPU")
    args = parser.parse_args()
    device = tools.device_of(parser, args)
    what = f"{args.images:,} images, batches of {args.batch_size}, on {device.type} with {args.threads} threads"
    turns = f"(plain: and {WORKERS} workers); n = {args.repetitions} each, in turns; medians (lowest to highest)."
    table = tools.Table("training", f"Training on {what} {turns}", args.json, device)
    failed = [name for name in args.models if not measure(args, name, device, table)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
