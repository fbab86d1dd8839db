#!/usr/bin/env python
"""Images per second of training: ours against plain.py, with the same model, images and batch size.

    python benchmarks/training.py --models resnet20 --images 512
    python benchmarks/training.py --models resnet32 --device cuda --images 50000 --variants plain amp amp+compile
    python benchmarks/training.py --models resnet32 --device cuda --images 50000 --variants amp --processes 1 2 4

Ours is what grafting_cifar/grafting.py builds and runs, with the flags of the variant. Every variant lives in a process
of its own, so that its peak memory is its own; they take turns, and one repetition each is not counted, in which they
compile, choose algorithms and start workers. With --processes N, N of them train at the same time on the same device,
as the networks of a ring do; the figure is what they do together. Prints a Markdown table.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import plain, tools
from common import run
from filter_grafting.training import deterministic, train_one_epoch
from grafting_cifar import data, models
from grafting_cifar import grafting as script

MODELS = ("resnet20", "resnet32", "resnet56", "resnet110", "mobilenetv2", "vgg16")
VARIANTS = {
    "plain": None,
    "ours": [],
    "amp": ["--amp"],
    "compile": ["--compile"],
    "amp+compile": ["--amp", "--compile"],
}
LEARNING_RATE = 0.01  # low enough for random labels
WORKERS = 2


def images_of(args: argparse.Namespace) -> data.Split:
    if args.data:
        return data.select(data.load(args.data), args.images)[0]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (args.images, data.SIZE, data.SIZE, 3), dtype=torch.uint8, generator=generator)
    return data.Split(pixels, torch.randint(10, (args.images,), generator=generator))


def prepare_plain(args: argparse.Namespace, model: str) -> Callable[[int], object]:
    network, criterion, optimizer = plain.make_training(model, 10, args.device)
    optimizer.param_groups[0]["lr"] = LEARNING_RATE
    loader = plain.make_loader(images_of(args), args.batch_size, WORKERS, train=True)
    return lambda repetition: plain.train(network, loader, criterion, optimizer, args.device)


def prepare_ours(args: argparse.Namespace, model: str, flags: list[str]) -> Callable[[int], object]:
    split = images_of(args)
    data.load = lambda source, cifar: (split, split, 10)
    flags = ["--model", model, "--device", args.device, "--batch_size", str(args.batch_size), *flags]
    settings, device = script.parse(flags), torch.device(args.device)
    task = script.build(settings, run.World(device))
    network = run.compiled(task.network, device) if settings.compile else task.network
    return lambda repetition: train_one_epoch(
        network,
        task.train,
        task.optimizer,
        lambda part: LEARNING_RATE,
        seed=repetition,
        device=device,
        amp=settings.amp,
    )


def work(args: argparse.Namespace, model: str, variant: str, threads: int, line: Connection) -> None:
    """One process: trains for a repetition whenever it is told its number; then tells what it has used."""
    multiprocessing.set_start_method(None, force=True)  # the platform's own again, for the loader of plain.py
    torch.set_num_threads(threads)
    flags = VARIANTS[variant]
    train = prepare_plain(args, model) if flags is None else prepare_ours(args, model, flags)
    line.send("ready")
    with deterministic(False):
        while (repetition := line.recv()) is not None:
            tools.wait_for(args.device)
            began = time.monotonic()
            train(repetition)
            tools.wait_for(args.device)
            line.send((began, time.monotonic()))
    line.send((megabytes_used(), torch.cuda.max_memory_allocated() / 1e6 if args.device == "cuda" else 0))


def megabytes_used() -> float:
    """Peak of this process, and what its loader's workers hold beside what they share with it."""
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for child in multiprocessing.active_children():
        for row in Path(f"/proc/{child.pid}/smaps_rollup").read_text().splitlines():
            if row.startswith(("Private_Clean:", "Private_Dirty:")):
                kilobytes += int(row.split()[1])
    return kilobytes * 1024 / 1e6


class Team:
    """N processes of one variant that train at the same time."""

    def __init__(self, args: argparse.Namespace, model: str, variant: str, size: int):
        context = multiprocessing.get_context("spawn")
        threads = max(1, args.threads // size)
        self.lines, self.members, self.name = [], [], f"{model}, {variant}"
        for _ in range(size):
            line, other_end = context.Pipe()
            member = context.Process(target=work, args=(args, model, variant, threads, other_end))
            member.start()
            other_end.close()  # so that the end of the process is the end of the line
            self.lines.append(line)
            self.members.append(member)
        self.hear()

    def tell(self, message: int | None) -> None:
        for line in self.lines:
            line.send(message)

    def hear(self) -> list:
        try:
            return [line.recv() for line in self.lines]
        except EOFError:
            raise SystemExit(f"{self.name}: a process ended early; its message is above") from None

    def train(self, repetition: int) -> float:
        """Seconds in which all have done a repetition."""
        self.tell(repetition)
        begins, ends = zip(*self.hear(), strict=True)
        return max(ends) - min(begins)

    def leave(self) -> tuple[float, float]:
        """Megabytes (of a process, of it on the GPU) at its peak; the largest of the team."""
        self.tell(None)
        return tuple(map(max, zip(*self.hear(), strict=True)))

    def end(self) -> None:
        for line, member in zip(self.lines, self.members, strict=True):
            line.close()
            member.join(timeout=60)
            member.terminate()


def measure(args: argparse.Namespace, model: str) -> list[dict[str, object]]:
    teams = {}
    try:
        for variant in args.variants:
            for size in args.processes:
                teams[variant, size] = Team(args, model, variant, size)
        rates = {key: [] for key in teams}
        for repetition in range(args.repetitions + 1):
            for key, team in teams.items():
                seconds = team.train(repetition)
                if repetition:
                    rates[key].append(len(team.members) * args.images / seconds)
        memory = {key: team.leave() for key, team in teams.items()}
    finally:
        for team in teams.values():
            team.end()
    rows = []
    for (variant, size), rate in rates.items():
        reference = rates.get(("plain", size)) or rates.get(("plain", 1))
        row = {
            "model": model,
            "variant": variant,
            "processes": size,
            "images/s": rate,
            ": plain": tools.ratio(rate, reference) if reference else "",
            "s per 50,000 images": 50_000 / statistics.median(rate),
            "memory (MB)": memory[variant, size][0],
        }
        if args.device == "cuda":
            row["GPU memory (MB)"] = memory[variant, size][1]
        if len(args.processes) > 1:
            row[f": {args.processes[0]} process"] = tools.ratio(rate, rates[variant, args.processes[0]])
        rows.append(row)
    return rows


def main() -> None:
    parser = tools.parser(__doc__, repetitions=3)
    tools.add_device(parser)
    parser.add_argument(
        "--models", nargs="+", choices=models.NAMES, default=MODELS, metavar="NAME",
        help=f"(default: {' '.join(MODELS)})",
    )  # fmt: skip
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["plain", "ours", "amp"],
        help="plain.py, or ours with flags (default: plain ours amp)",
    )  # fmt: skip
    parser.add_argument(
        "--processes", nargs="+", type=tools.at_least(1), default=[1], metavar="N", help="at the same time (default: 1)"
    )
    parser.add_argument("--images", type=tools.at_least(1), default=256, help="of a repetition (default: 256)")
    parser.add_argument("--data", help="as for grafting_cifar/grafting.py (default: images of noise)")
    parser.add_argument("--batch_size", type=tools.at_least(1), default=128, help="(default: 128)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=tools.at_least(1), default=cores, help=f"of the CPU (default: {cores})")
    args = parser.parse_args()
    rows = [row for model in args.models for row in measure(args, model)]
    tools.report(
        "training",
        f"Training on {args.images:,} images, batches of {args.batch_size}, on {args.device} with {args.threads} "
        f"threads (plain: and {WORKERS} workers); n = {args.repetitions} each, in turns; medians (lowest to highest).",
        rows,
        args.json,
        args.device,
    )


if __name__ == "__main__":
    main()
