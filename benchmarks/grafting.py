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
from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting import graft
from filter_grafting.information import convolutions
from grafting_cifar import models

MODELS = ("resnet32", "resnet110", "mobilenetv2", "torchvision:resnet50", "torchvision:vgg16")


def build(name: str) -> nn.Module:
    family, _, rest = name.rpartition(":")
    return torchvision.models.get_model(rest, weights=None) if family == "torchvision" else models.build(name, 10)


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


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=9)
    names = "of grafting_cifar, or torchvision:NAME"
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=names)
    parser.add_argument("--threads", type=tools.count, default=1, help="of the CPU")
    args = tools.parse(parser, arguments)
    torch.set_num_threads(args.threads)
    where = "on the GPU" if args.device.type == "cuda" else f"on {args.threads} thread{'s' * (args.threads > 1)}"
    caption = f"One grafting step {where}; n = {args.repetitions} each, in turns; medians (lowest to highest)."
    table = tools.Table("grafting", caption, args)
    for name in args.models:
        model, neighbour = build(name).to(args.device), build(name).state_dict()
        other = copy.deepcopy(model)
        ways = {
            "ours": lambda turn: graft(model, neighbour),  # noqa: B023
            "loop": lambda turn: looped_graft(other, neighbour),  # noqa: B023
        }
        samples = tools.in_turns(ways, args.repetitions, args.device)
        million = sum(entry.numel() for entry in neighbour.values()) / 1e6
        row = {"model": name, "million weights": million, "convolutions": len(convolutions(model))}
        row |= {f"{way} (ms)": [1000 * seconds for seconds in sample.wall] for way, sample in samples.items()}
        row["loop : ours"] = tools.ratio(samples["loop"].wall, samples["ours"].wall)
        row["ours, processor (ms)"] = 1000 * statistics.median(samples["ours"].processor)
        table.add(**row)


if __name__ == "__main__":
    main()
