#!/usr/bin/env python
"""Where a training step's time goes: kernels, and milliseconds of the host and of the device, from torch.profiler.

    python benchmarks/profiling.py --model resnet32 --variants ours amp amp+compile graph --device cuda

A step is bound by the host where its time is that of the wall, and the device's is well below it.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools, training
from grafting_cifar import models
from training.process import deterministic


def measure(args: argparse.Namespace, variant: str, device: torch.device, table: tools.Table) -> None:
    train = training.prepare(args, args.model, variant, device)
    for seed in range(2):
        train(seed)
    tools.wait_for(device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    wall = tools.timed(lambda: train(2), device)  # without the profiler, which slows the host down
    used = time.process_time()
    with profile(activities=activities) as recorded:
        train(3)
        tools.wait_for(device)
    used = time.process_time() - used
    events = recorded.key_averages()
    kernels = [event for event in events if event.device_type != torch.autograd.DeviceType.CPU]
    operators = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    where = kernels or operators

    def own(event) -> float:
        return event.self_device_time_total if kernels else event.self_cpu_time_total

    top = sorted(where, key=own, reverse=True)[:8]
    row = {"model": args.model, "variant": variant, "wall (ms)": 1000 * wall / args.steps}
    row |= {"host, profiled (ms)": 1000 * used / args.steps}
    row |= {"device (ms)": sum(event.self_device_time_total for event in kernels) / 1000 / args.steps}
    row |= {"kernels": sum(event.count for event in kernels) / args.steps}
    row |= {"operators": sum(event.count for event in operators) / args.steps}
    table.add(**row, top="; ".join(f"{event.key[:60]} {own(event) / 1000 / args.steps:.3g} ms" for event in top))


def main() -> None:
    parser = tools.parser(__doc__)
    tools.add_device(parser)
    flag = parser.add_argument
    flag("--model", choices=models.NAMES, default="resnet32", metavar="NAME", help="which network")
    flag(
        "--variants", nargs="+", choices=training.VARIANTS, default=["ours", "amp"], metavar="NAME", help="see training"
    )
    flag("--steps", type=tools.count, default=20, help="of the profile")
    flag("--batch_size", type=tools.count, default=128, help="images per step")
    args = parser.parse_args()
    args.data, args.images = None, args.steps * args.batch_size
    device = tools.device_of(parser, args)
    caption = (
        f"A step of {args.batch_size} images on {device.type}, mean of {args.steps}; the rest of an epoch included."
    )
    table = tools.Table("profile", caption, args.json, device)
    with deterministic(False):
        for variant in args.variants:
            measure(args, variant, device, table)


if __name__ == "__main__":
    main()
