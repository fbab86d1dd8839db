#!/usr/bin/env python
"""Where the time of a real run goes, by phase: data, forward, backward, optimizer, test, save, wait, graft.

    python benchmarks/phases.py
    python benchmarks/phases.py --model resnet32 --images 50000 --device cuda --amp --compile
    python benchmarks/phases.py --model resnet32 --images 50000 --epochs 200 --whole --s ring --device cuda --amp

Starts the networks of a ring as grafting_cifar/grafting.py, on images of noise or on --data, and times what each of
them does. Of three epochs or more the first is left out, since it compiles and chooses algorithms, and the last, since
nothing is grafted after it. On a GPU the clock waits for the device whenever a phase ends, which takes time of its own:
with --whole it does not, and the table has what the run itself notes (train, test, wait, graft). Checkpoints are
written in the background: "save" is what the network itself does for them. Prints a Markdown table.
"""

import argparse
import contextlib
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from common import run
from filter_grafting.exchange import Ring
from grafting_cifar import data, models
from grafting_cifar import grafting as script

PHASES = ("data", "forward", "backward", "optimizer", "test", "save", "wait", "graft", "other")
NOTED = ("train", "test", "wait", "graft")  # by the run, in its table of metrics


class Clock:
    """Every moment belongs to one phase."""

    def __init__(self, device: str):
        self.device = device
        self.is_held = False  # within `during`, where all that happens belongs to one phase; and after the end
        self.reset()

    def reset(self) -> None:
        tools.wait_for(self.device)
        self.seconds, self.phase, self.since = defaultdict(float), "other", time.perf_counter()

    def enter(self, phase: str) -> None:
        if not self.is_held:
            tools.wait_for(self.device)
            now = time.perf_counter()
            self.seconds[self.phase] += now - self.since
            self.phase, self.since = phase, now

    def stop(self) -> None:
        self.enter("other")
        self.is_held = True

    def during(self, phase: str, function: Callable) -> Callable:
        """The same function, all of whose time is of one phase."""

        def timed(*arguments, **options):
            if self.is_held:
                return function(*arguments, **options)
            before = self.phase
            self.enter(phase)
            self.is_held = True
            try:
                return function(*arguments, **options)
            finally:
                self.is_held = False
                self.enter(before)

        return timed


class TimedBatches:
    """Batches whose making is the phase "data"; what follows a batch is "forward"."""

    def __init__(self, batches: data.Batches, clock: Clock, epochs: int):
        self.batches, self.clock, self.epochs, self.begun = batches, clock, epochs, 0

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, seed: int) -> Iterator:
        self.begun += 1
        if self.epochs > 2 and self.begun == 2:
            self.clock.reset()
        if self.epochs > 2 and self.begun == self.epochs:
            self.clock.stop()
        batches = iter(self.batches.epoch(seed))
        while True:
            self.clock.enter("data")
            try:
                batch = next(batches)
            except StopIteration:
                self.clock.enter("other")
                return
            self.clock.enter("forward")
            yield batch


def put_under(clock: Clock) -> None:
    """Has the clock follow the functions that the run calls."""
    backward = torch.Tensor.backward

    def timed_backward(*arguments, **options) -> None:
        clock.enter("backward")
        backward(*arguments, **options)
        clock.enter("other")

    torch.Tensor.backward = timed_backward
    run.evaluate = clock.during("test", run.evaluate)
    run.publish = clock.during("save", run.publish)
    Ring.flush = clock.during("save", Ring.flush)
    Ring.wait = clock.during("wait", Ring.wait)
    run.compare = clock.during("graft", run.compare)
    run.blend = clock.during("graft", run.blend)


def train_network(args: argparse.Namespace, flags: list[str]) -> int:
    """Network i, in a process of its own."""
    if not args.data:
        train, test = noise(args.images), noise(max(1, args.images // 5))
        data.load = lambda source, cifar: (train, test, 10)
    clock = Clock(args.device)
    if not args.whole:
        put_under(clock)

    def build(settings: argparse.Namespace, world: run.World) -> run.Task:
        task = script.build(settings, world)
        if not args.whole:
            task.train = TimedBatches(task.train, clock, args.epochs)
            task.optimizer.register_step_pre_hook(lambda *step: clock.enter("optimizer"))
            task.optimizer.register_step_post_hook(lambda *step: clock.enter("other"))
        return task

    settings = script.parse(["--i", str(args.i), *flags])
    status = run.main(settings, build)
    clock.stop()
    epochs = args.epochs - 2 if args.epochs > 2 else args.epochs
    per_epoch = {phase: clock.seconds[phase] / epochs for phase in PHASES}
    Path(settings.directory, f"phases{args.i}.json").write_text(json.dumps(per_epoch))
    return status


def noise(count: int) -> data.Split:
    generator = torch.Generator().manual_seed(count)
    pixels = torch.randint(256, (count, data.SIZE, data.SIZE, 3), dtype=torch.uint8, generator=generator)
    return data.Split(pixels, torch.randint(10, (count,), generator=generator))


def train_ring(args: argparse.Namespace, directory: str) -> float:
    """Runs all networks to their end; wall seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, args.threads // args.num))}
    command = [sys.executable, __file__, *sys.argv[1:], "--s", directory]
    began = time.perf_counter()
    with contextlib.ExitStack() as stack:
        processes = []
        for network in range(1, args.num + 1):
            log = stack.enter_context(open(Path(directory, f"{network}.log"), "ab"))
            processes.append(subprocess.Popen([*command, "--i", str(network)], env=environment, stdout=log, stderr=log))
            stack.callback(processes[-1].kill)
        while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
            time.sleep(0.1)
    for network, process in enumerate(processes, 1):
        if process.wait():
            raise SystemExit(f"network {network} failed: {Path(directory, f'{network}.log').read_text()[-2000:]}")
    return time.perf_counter() - began


def read_phases(args: argparse.Namespace, directory: str) -> dict[str, list[float]]:
    """Seconds per epoch of each phase, one for each network."""
    seconds = defaultdict(list)
    for network in range(1, args.num + 1):
        if args.whole:
            with open(Path(directory, f"metrics{network}.csv"), newline="") as file:
                rows = list(csv.DictReader(file))
            rows = rows[1:-1] or rows
            found = {phase: sum(float(row[f"{phase}_seconds"]) for row in rows) / len(rows) for phase in NOTED}
        else:
            found = json.loads(Path(directory, f"phases{network}.json").read_text())
        for phase, value in found.items():
            seconds[phase].append(value)
    return seconds


def main() -> int:
    parser = tools.parser(__doc__)
    tools.add_device(parser)
    parser.add_argument("--model", default="resnet20", choices=models.NAMES, metavar="NAME", help="(default: resnet20)")
    parser.add_argument("--num", type=tools.at_least(1), default=2, metavar="N", help="networks (default: 2)")
    parser.add_argument("--epochs", type=tools.at_least(1), default=4, help="(default: 4)")
    parser.add_argument("--images", type=tools.at_least(1), default=1000, help="to train on (default: 1000)")
    parser.add_argument("--data", help="instead of noise, as for grafting_cifar/grafting.py")
    parser.add_argument("--batch_size", type=tools.at_least(1), default=128, help="(default: 128)")
    parser.add_argument("--amp", action="store_true", help="as for grafting_cifar/grafting.py")
    parser.add_argument("--compile", action="store_true", help="as for grafting_cifar/grafting.py")
    parser.add_argument("--whole", action="store_true", help="only what the run itself notes: see above")
    parser.add_argument("--s", metavar="DIR", help="save directory; with --whole an unfinished run is continued")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", type=tools.at_least(1), default=cores, help=f"of all together (default: {cores})")
    parser.add_argument("--i", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.i:
        flags = ["--model", args.model, "--num", str(args.num), "--epochs", str(args.epochs), "--device", args.device,
                 "--batch_size", str(args.batch_size), "--s", args.s, "--resume"]  # fmt: skip
        flags += ["--data", args.data, "--images", str(args.images)] if args.data else []
        flags += [f"--{name}" for name in ("amp", "compile") if getattr(args, name)]
        return train_network(args, flags)

    if args.s and not args.whole and Path(args.s, "run.json").exists():
        parser.error(f"argument --s: {args.s} holds a run, and only --whole continues one; give another folder")
    with contextlib.ExitStack() as stack:
        directory = args.s or stack.enter_context(tempfile.TemporaryDirectory())
        Path(directory).mkdir(parents=True, exist_ok=True)
        wall = train_ring(args, directory)
        seconds = read_phases(args, directory)
    total = sum(sum(values) for values in seconds.values())
    rows = [
        {"phase": phase, "s per epoch": values, "share (%)": 100 * sum(values) / total}
        for phase, values in seconds.items()
    ]
    rows.append({"phase": "all", "s per epoch": [sum(values) for values in zip(*seconds.values(), strict=True)],
                 "share (%)": 100})  # fmt: skip
    options = "".join(f" --{name}" for name in ("amp", "compile") if getattr(args, name))
    source = f"{args.images:,} images of {args.data or 'noise'}"
    tools.report(
        "phases",
        f"A ring of {args.num} x {args.model}{options} on {args.device}, {source}, {args.epochs} epochs, in "
        f"{wall:.0f} s with the start; n = {args.num} networks, medians (lowest to highest).",
        rows,
        args.json,
        args.device,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
