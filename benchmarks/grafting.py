#!/usr/bin/env python
"""Milliseconds of one grafting step: entropies, coefficients, blend. The neighbour's weights come from the CPU.

python benchmarks/grafting.py
python benchmarks/grafting.py --models resnet32 torchvision:resnet50 --repetitions 21 --device cuda
"""

import sys
from pathlib import Path

import torch
import torchvision
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from filter_grafting import graft
from grafting_cifar import models

MODELS = ("resnet32", "resnet110", "mobilenetv2", "torchvision:resnet50", "torchvision:vgg16")


def build(name: str) -> nn.Module:
    family, _, rest = name.rpartition(":")
    return torchvision.models.get_model(rest, weights=None) if family == "torchvision" else models.build(name, 10)


def main(arguments: list[str] | None = None) -> None:
    parser = tools.parser(__doc__, repetitions=9)
    names = "of grafting_cifar, or torchvision:NAME"
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME", help=names)
    parser.add_argument("--threads", type=tools.count, default=1, help="of the CPU")
    args = tools.parse(parser, arguments)
    torch.set_num_threads(args.threads)
    caption = f"One grafting step on {args.device} ({args.threads} threads); n = {args.repetitions}."
    table = tools.Table("grafting", caption, args)
    for name in args.models:
        model, neighbour = build(name).to(args.device), build(name).state_dict()
        way = {name: lambda turn: graft(model, neighbour)}  # noqa: B023
        sample = tools.in_turns(way, args.repetitions, args.device)[name]
        million = sum(entry.numel() for entry in neighbour.values()) / 1e6
        table.add(**{"model": name, "million weights": million, "ms": [1000 * seconds for seconds in sample.wall]})


if __name__ == "__main__":
    main()
