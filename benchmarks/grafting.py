#!/usr/bin/env python
"""Seconds of one grafting step (entropies, coefficients, blend): ours against a loop over layers, bins and entries.

    python benchmarks/grafting.py
    python benchmarks/grafting.py --models resnet32 torchvision:resnet50 --repetitions 21 --device cuda

The loop is written the way the method reads: each bin of each layer is counted on its own, each entry blended on its
own. Both work on the same two networks, in turns. The neighbour's weights come from the CPU, as out of a file.
"""

import copy
import math
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting import graft
from filter_grafting.information import convolutions
from grafting_cifar import models

MODELS = ("resnet32", "resnet110", "mobilenetv2", "torchvision:resnet50", "torchvision:vgg16")


def build(name: str) -> nn.Module:
    family, _, rest = name.rpartition(":")
    if family == "torchvision":
        import torchvision  # here, as only these need it

        return torchvision.models.get_model(rest, weights=None)
    return models.build(name, 10)


def looped_entropy(weight: Tensor, bins: int = 10) -> float:
    values = weight.reshape(-1)
    scale = (values.max() - values.min()) / bins
    entropy = 0.0
    for k in range(bins):
        is_in_bin = (values >= values.min() + k * scale) & (values < values.min() + (k + 1) * scale)
        share = is_in_bin.sum() / len(values)
        if share > 0:
            entropy -= (share * share.log()).item()
    return entropy


@torch.no_grad()
def looped_graft(network: nn.Module, neighbour: Mapping[str, Tensor], a: float = 0.4, c: float = 500) -> None:
    state, layers = network.state_dict(), convolutions(network)
    share = 0.5
    for key, own in state.items():
        other = neighbour[key].to(own.device)
        if key.removesuffix(".weight") in layers:
            share = round(a / math.pi * math.atan(c * (looped_entropy(own) - looped_entropy(other))) + 0.5, 2)
        if own.is_floating_point():
            state[key] = share * own + (1 - share) * other
    network.load_state_dict(state)


def main() -> None:
    parser = tools.parser(__doc__, repetitions=9)
    tools.add_device(parser)
    names = "of grafting_cifar, or torchvision:NAME"
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=names)
    parser.add_argument("--threads", type=tools.count, default=1, help="of the CPU")
    args = parser.parse_args()
    device = tools.device_of(parser, args)
    torch.set_num_threads(args.threads)
    where = "on the GPU" if device.type == "cuda" else f"on {args.threads} thread{'s' * (args.threads > 1)}"
    caption = f"One grafting step {where}; n = {args.repetitions} each, in turns; medians (lowest to highest)."
    table = tools.Table("grafting", caption, args.json, device)
    for name in args.models:
        ours, neighbour = build(name).to(device), build(name).state_dict()
        loop = copy.deepcopy(ours)
        steps = {"ours": lambda: graft(ours, neighbour), "loop": lambda: looped_graft(loop, neighbour)}  # noqa: B023
        wall, processor = ({way: [] for way in steps} for _ in range(2))
        for repetition in range(args.repetitions + 1):  # the first one does not count: it touches all memory
            for way, step in steps.items():
                used = time.process_time()
                taken = tools.timed(step, device)
                if repetition:
                    wall[way].append(1000 * taken)
                    processor[way].append(1000 * (time.process_time() - used))
        million = sum(entry.numel() for entry in neighbour.values()) / 1e6
        row = {"model": name, "million weights": million, "convolutions": len(convolutions(ours))}
        row |= {"ours (ms)": wall["ours"], "loop (ms)": wall["loop"]}
        row |= {"loop : ours": tools.ratio(wall["loop"], wall["ours"])}
        table.add(**row, **{"ours, processor (ms)": statistics.median(processor["ours"])})


if __name__ == "__main__":
    main()
