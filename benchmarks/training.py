#!/usr/bin/env python
"""Images per second of training: ours against plain.py, with the same model, images and batch size.

    python benchmarks/training.py --models resnet32 --images 50000 --variants plain amp --processes 1 2 4
    python benchmarks/training.py --models resnet32 --images 2560 --variants eager ours amp --profile
    python benchmarks/training.py --dataset imagenet --data imagenet/train --models resnet50 --variants amp --workers 16

Ours is what the scripts build and run, with the flags of the variant; "eager" is without the CUDA graph.
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
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch.autograd import DeviceType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import data, plain, tools
from training.flags import cores
from training.loop import TrainingStep, train_one_epoch
from training.models import compiled
from training.process import amp_dtype, deterministic

MODELS = ("resnet20", "resnet32", "resnet56", "resnet110", "mobilenetv2", "vgg16")
VARIANTS = ("plain", "eager", "amp+eager", "ours", "amp", "compile", "amp+compile")
RATE = 0.01  # low enough for random labels


def prepare(args: argparse.Namespace, name: str, variant: str) -> Callable[[int], object]:
    """What trains for one epoch, given its seed; 0 is that of the repetition which does not count."""
    task, words, device = data.make_task(args), variant.split("+"), args.device
    model, recipe = task.build(name).to(device).train(), {"lr": RATE, "momentum": 0.9, "weight_decay": 5e-4}
    if variant == "plain":
        optimizer = torch.optim.SGD(model.parameters(), **recipe)
        return lambda seed: plain.train(model, task.loader, optimizer, device)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), **recipe, fused=True)
    amp, notes = amp_dtype("amp" in words, device)
    print(*notes, sep="\n", end="\n" * bool(notes), flush=True)
    is_cifar = args.dataset == "cifar"
    graph = is_cifar and "eager" not in words
    forward = compiled(model, device, "compile" in words, graph)
    step = TrainingStep(forward, optimizer, device=device, amp=amp, top5=not is_cifar, graph=graph)

    def run(seed: int) -> None:
        # Of few images the repetition that does not count takes more than one epoch, to hold the capture of a graph.
        for _ in range(1 if seed else 1 + step.WARM_UP // len(task.ours)):
            train_one_epoch(step, task.ours, lambda progress: RATE, seed=seed)

    return run


train: Callable[[int], object]  # of a process that trains


def begin(args: argparse.Namespace, name: str, variant: str, threads: int) -> None:
    global train
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, for the loaders
    torch.set_num_threads(threads)
    train = prepare(args, name, variant)


def train_here(seed: int, device: torch.device) -> tuple[float, float]:
    """The megabytes, and those of the GPU, that this process has used at most."""
    with deterministic(False):
        train(seed)
        tools.wait_for(device)
    on_gpu = torch.cuda.max_memory_reserved() / 1e6 if device.type == "cuda" else 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, on_gpu


class Team:
    """N processes of one variant that train at the same time."""

    def __init__(self, args: argparse.Namespace, name: str, variant: str, size: int, stack: ExitStack):
        options = {"initializer": begin, "initargs": (args, name, variant, max(1, args.threads // size))}
        self.pools = [stack.enter_context(ProcessPoolExecutor(1, tools.processes(), **options)) for _ in range(size)]
        self.device, self.memory, self.error = args.device, [], None

    def train(self, seed: int) -> None:
        try:
            parts = [pool.submit(train_here, seed, self.device) for pool in self.pools]
            self.memory = [part.result() for part in parts]
        except RuntimeError as error:  # that of a process, or for its end
            self.error = error


def measure(args: argparse.Namespace, name: str, table: tools.Table) -> bool:
    """Adds a row for each variant and number of processes that could be measured; whether all could."""
    with ExitStack() as stack:
        keys = list(itertools.product(args.variants, args.processes))
        teams = {key: Team(args, name, *key, stack) for key in keys}
        samples = tools.in_turns({key: team.train for key, team in teams.items()}, args.repetitions, args.device)
    well = [key for key in keys if not teams[key].error]
    rates = {key: [key[1] * args.images / seconds for seconds in samples[key].wall] for key in well}
    for (variant, size), team in teams.items():
        if team.error:
            print(f"{name}, {variant}, {size} at once: {team.error}", file=sys.stderr)
            continue
        row = {"model": name, "variant": variant, "processes": size, "images/s": rates[variant, size]}
        for column, other in (": plain", ("plain", 1)), (": 1 process", (variant, 1)):
            row[column] = tools.ratio(rates[variant, size], rates[other]) if other in rates else ""
        row["memory (MB)"], row["GPU memory (MB)"] = map(max, zip(*team.memory, strict=True))
        table.add(**row, MPS=bool(os.environ.get("MPS")))
    return well == keys


def profile(args: argparse.Namespace, name: str, variant: str, table: tools.Table) -> None:
    way, steps = prepare(args, name, variant), -(-args.images // args.batch_size)
    wall = tools.in_turns({"": way}, 1, args.device)[""].wall[0]  # without the profiler, which slows the host down
    used = time.process_time()
    with torch.profiler.profile() as recorded:
        way(2)
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
    flag("--models", nargs="+", default=MODELS, metavar="NAME", help=f"such as {' '.join(MODELS)}")
    known = f"plain.py, or ours: {' '.join(VARIANTS)}"
    flag("--variants", nargs="+", choices=VARIANTS, default=["plain", "ours", "amp"], metavar="NAME", help=known)
    flag("--processes", nargs="+", type=tools.count, default=[1], metavar="N", help="at the same time")
    flag("--profile", action="store_true", help="a step of each variant instead")
    data.add_flags(parser, images=256, threads=cores())
    args = data.parse(parser, arguments)
    what = f"{args.images:,} images, batches of {args.batch_size}, on {args.device} with {args.threads} threads"
    if args.profile:
        table = tools.Table("profile", f"A step, mean of an epoch on {what}.", args)
        with deterministic(False):
            for name, variant in itertools.product(args.models, args.variants):
                profile(args, name, variant, table)
        return 0
    turns = f"and {args.workers} workers; n = {args.repetitions} each, in turns; medians (lowest to highest)."
    table = tools.Table("training", f"Training on {what} {turns}", args)
    whole = [measure(args, name, table) for name in args.models]
    return int(not all(whole))


if __name__ == "__main__":
    sys.exit(main())
