#!/usr/bin/env python
"""Images per second of training: ours against plain.py, with the same model, images and batch size.

    python benchmarks/training.py --models resnet20 --images 512
    python benchmarks/training.py --models resnet32 --device cuda --images 50000 --variants plain amp amp+compile graph
    python benchmarks/training.py --models resnet32 --device cuda --images 50000 --variants amp --processes 1 2 4
    python benchmarks/training.py --models resnet32 --device cuda --images 2560 --variants ours amp graph --profile

Ours is what grafting_cifar/grafting.py builds and runs, with the flags of the variant; "graph" is benchmarks/graphs.py.
Every variant lives in a process of its own, so that its peak memory is its own; they take turns, and one repetition
each is not counted, in which they compile, choose algorithms and start workers. With --processes N, N of them train at
the same time on the same device, as the networks of a ring do; the figure is what they do together.

With --profile, torch.profiler says where a step's time goes: kernels, and milliseconds of the host and of the device. A
step is bound by the host where the host's time is that of the wall, and the device's is well below it.
"""

import argparse
import itertools
import multiprocessing
import operator
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import plain, tools
from benchmarks.graphs import GraphedTraining
from grafting_cifar import data, models
from training.flags import cores
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


def prepare(args: argparse.Namespace, name: str, variant: str) -> Callable[[int], object]:
    """What trains for one epoch, given its seed."""
    words, split, device = variant.split("+"), images_of(args), args.device
    if variant == "plain":
        network, criterion, optimizer = plain.make_training(name, 10, device)
        optimizer.param_groups[0]["lr"] = RATE
        loader = plain.make_loader(split, args.batch_size, WORKERS)
        return lambda seed: plain.train(network, loader, criterion, optimizer, device)
    model = models.build(name, 10).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=5e-4, fused=True)
    batches = data.Batches(split, args.batch_size, device, augment=True)
    amp, notes = amp_dtype("amp" in words, device)
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    if "graph" in words:
        graphed = GraphedTraining(model, batches, optimizer, device=device, amp=amp)
        return lambda seed: graphed.epoch(lambda progress: RATE, seed=seed)
    forward, options = compiled(model, device, "compile" in words), {"device": device, "amp": amp}
    return lambda seed: train_one_epoch(forward, batches, optimizer, lambda progress: RATE, seed=seed, **options)


def work(args: argparse.Namespace, name: str, variant: str, threads: int, line: Connection) -> None:
    """One process: trains for an epoch whenever it is told a seed, and answers with the megabytes that it has used."""
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, for the loader of plain.py
    torch.set_num_threads(threads)
    train = prepare(args, name, variant)
    with deterministic(False):
        while True:
            train(line.recv())
            tools.wait_for(args.device)
            on_gpu = torch.cuda.max_memory_reserved() / 1e6 if args.device.type == "cuda" else 0.0
            line.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, on_gpu))


class Team:
    """N processes of one variant that train at the same time."""

    def __init__(self, args: argparse.Namespace, name: str, variant: str, size: int):
        context, self.members, self.memory, self.is_well = tools.processes(args.device), [], [], True
        for _ in range(size):
            line, other_end = context.Pipe()
            threads = max(1, args.threads // size)
            process = context.Process(target=work, args=(args, name, variant, threads, other_end))
            process.start()
            other_end.close()  # so that the end of the process is the end of the line
            self.members.append((process, line))

    def train(self, seed: int) -> None:
        """An epoch; nothing, once one of them has ended."""
        try:
            for _, line in self.members:
                line.send(seed)
            self.memory = [line.recv() for _, line in self.members]
        except (EOFError, OSError):
            self.is_well = False

    def end(self) -> None:
        for process, _ in self.members:
            process.terminate()
            process.join()


def measure(args: argparse.Namespace, name: str, table: tools.Table) -> bool:
    """Adds a row for each variant and number of processes that could be measured; whether all could."""
    teams: dict[tuple[str, int], Team] = {}
    try:
        for key in itertools.product(args.variants, args.processes):
            teams[key] = Team(args, name, *key)
        samples = tools.in_turns({key: team.train for key, team in teams.items()}, args.repetitions, args.device)
    finally:
        for team in teams.values():
            team.end()
    rates = {
        (variant, size): [size * args.images / seconds for seconds in samples[variant, size].wall]
        for (variant, size), team in teams.items()
        if team.is_well
    }
    for (variant, size), rate in rates.items():
        plains = rates.get(("plain", size)) or rates.get(("plain", 1))
        alone = rates.get((variant, 1))
        row = {"model": name, "variant": variant, "processes": size, "images/s": rate}
        row[": plain"] = tools.ratio(rate, plains) if plains else ""
        row[": 1 process"] = tools.ratio(rate, alone) if alone else ""
        row["s per 50,000 images"] = 50_000 / statistics.median(rate)
        row["memory (MB)"], row["GPU memory (MB)"] = map(max, zip(*teams[variant, size].memory, strict=True))
        table.add(**row, MPS=bool(os.environ.get("MPS")))
    for variant, size in teams.keys() - rates.keys():
        print(f"{name}, {variant}, {size} at once: a process ended; its message is above", file=sys.stderr)
    return len(rates) == len(teams)


def profile(args: argparse.Namespace, name: str, variant: str, table: tools.Table) -> None:
    train, steps = prepare(args, name, variant), -(-args.images // args.batch_size)
    for seed in range(2):
        train(seed)
    wall = tools.timed(partial(train, 2), args.device)  # without the profiler, which slows the host down
    used = time.process_time()
    with torch.profiler.profile() as recorded:
        train(3)
        tools.wait_for(args.device)
    used = time.process_time() - used

    events = recorded.key_averages()
    kernels = [event for event in events if event.device_type != DeviceType.CPU]
    operators = [event for event in events if event.device_type == DeviceType.CPU]
    own = operator.attrgetter("self_device_time_total" if kernels else "self_cpu_time_total")  # microseconds
    top = sorted(kernels or operators, key=own, reverse=True)[:8]
    totals = {
        "wall (ms)": 1000 * wall,
        "host, profiled (ms)": 1000 * used,
        "device (ms)": sum(map(own, kernels)) / 1000,
        "kernels": sum(event.count for event in kernels),
        "operators": sum(event.count for event in operators),
    }
    row = {"model": name, "variant": variant} | {column: total / steps for column, total in totals.items()}
    table.add(**row, top="; ".join(f"{event.key[:60]} {own(event) / 1000 / steps:.3g} ms" for event in top))


def main(arguments: list[str] | None = None) -> int:
    parser = tools.parser(__doc__, repetitions=3)
    flag = parser.add_argument
    flag("--models", nargs="+", choices=models.NAMES, default=MODELS, metavar="NAME", help=f"of {' '.join(MODELS)}")
    known = f"plain.py, or ours: {' '.join(VARIANTS)}"
    flag("--variants", nargs="+", choices=VARIANTS, default=["plain", "ours", "amp"], metavar="NAME", help=known)
    flag("--processes", nargs="+", type=tools.count, default=[1], metavar="N", help="at the same time")
    flag("--images", type=tools.count, default=256, metavar="N", help="of an epoch")
    flag("--data", metavar="DIR", help="as for grafting_cifar/grafting.py (default: images of noise)")
    flag("--batch_size", type=tools.count, default=128, metavar="B", help="images per step")
    flag("--threads", type=tools.count, default=cores(), metavar="N", help="of the CPU")
    flag("--profile", action="store_true", help="a step of each variant instead")
    args = tools.parse(parser, arguments)
    what = f"{args.images:,} images, batches of {args.batch_size}, on {args.device} with {args.threads} threads"
    turns = f"(plain: and {WORKERS} workers); n = {args.repetitions} each, in turns; medians (lowest to highest)."
    if args.profile:
        table = tools.Table("profile", f"A step, mean of an epoch on {what}.", args)
        with deterministic(False):
            for name, variant in itertools.product(args.models, args.variants):
                profile(args, name, variant, table)
        return 0
    table = tools.Table("training", f"Training on {what} {turns}", args)
    whole = [measure(args, name, table) for name in args.models]
    return int(not all(whole))


if __name__ == "__main__":
    sys.exit(main())
