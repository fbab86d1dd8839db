#!/usr/bin/env python
"""Trains one network of a ring on CIFAR-10, CIFAR-100 or any folder of images, grafting its neighbour's weights.

A ring of two ResNet-32s on CIFAR-10, one process each (grafting.sh starts all of them):

    python grafting.py --s checkpoint/two --model resnet32 --num 2 --i 1 >1.log &
    python grafting.py --s checkpoint/two --model resnet32 --num 2 --i 2 >2.log &
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags, run
from filter_grafting.grafting import LEVELS
from filter_grafting.training import stream_seed
from grafting_cifar import data, models


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--model", choices=models.NAMES, default="resnet32", metavar="NAME",
                       help=", ".join(models.NAMES))  # fmt: skip
    group.add_argument("--cifar", type=int, choices=(10, 100), default=10, help="which of the standard data sets")
    group.add_argument("--data", metavar="DIR",
                       help="the folder of the standard CIFAR files (downloaded if absent), or one with train/<class>/ "
                            "and test/<class>/ images, or the word glyphs: a data set made on the spot (default: data/ "
                            "beside README.md)")  # fmt: skip
    group.add_argument("--epochs", metavar="E", type=flags.number(int, 1), default=200, help="epochs to train")
    group.add_argument("--batch_size", metavar="B", type=flags.number(int, 1), default=128, help="images per step")
    group.add_argument("--lr", type=flags.number(float, 0, low_open=True), default=0.1, help="first learning rate")
    group.add_argument("--cos", action="store_true",
                       help="cosine from the first rate to 0, per step, instead of x0.1 every 60 epochs")  # fmt: skip
    group.add_argument("--difflr", action="store_true",
                       help="network I starts at lr*(1+cos(pi*(N-I)/N))/2 instead of lr")  # fmt: skip
    group.add_argument("--level", choices=LEVELS, default="layer",
                       help="one coefficient for a layer, or for each filter (vgg16 only)")  # fmt: skip
    group.add_argument("--print_frequence", metavar="K", type=flags.number(int, 0), default=0,
                       help="print loss and accuracy every K batches; 0 prints one line an epoch")  # fmt: skip
    flags.add_ring_flags(parser, None, "the save directory, shared by all networks of the run "
                         "(default: checkpoint/ and a name made of the settings)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="continue from this network's newest good checkpoint, if there is one")  # fmt: skip
    flags.add_machine_flags(parser)
    args = parser.parse_args(arguments)
    flags.check_common(parser, args)
    if args.level == "filter" and not args.model.startswith("vgg"):
        parser.error(f"argument --level: filter needs a chain of layers (--model vgg16), got --model {args.model}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("a CIFAR network trains in one process; torchrun is for grafting_imagenet")
    args.directory = args.directory or default_directory(parser, args)
    args.data = args.data or data.DEFAULT_FOLDER
    return args


def default_directory(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """checkpoint/grafting_cifar10_resnet32, with the settings that differ from the defaults appended."""
    images = Path(args.data).resolve().name if args.data else f"cifar{args.cifar}"
    shown = {"epochs": "epochs", "batch_size": "batch", "lr": "lr", "cos": "cos", "difflr": "difflr", "level": "level",
             "networks": "num", "amplitude": "a", "steepness": "c", "seed": "seed", "amp": "amp"}  # fmt: skip
    return f"checkpoint/{flags.run_name(parser, args, f'{images}_{args.model}', shown)}"


def build(args: argparse.Namespace, world: run.World) -> run.Task:
    train, test, classes = data.load(args.data, args.cifar)
    torch.manual_seed(stream_seed(args.seed, args.network, "weights"))
    network = models.build(args.model, classes).to(args.device, memory_format=torch.channels_last)
    return run.Task(
        network=network,
        train=data.Batches(train, args.batch_size, args.device, augment=True),
        test=data.Batches(test, 1000, args.device, augment=False),
        optimizer=torch.optim.SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, fused=True),
        shared={"model": args.model, "classes": classes, "num": args.networks, "epochs": args.epochs,
                "a": args.amplitude, "c": args.steepness, "level": args.level},
        own={"lr": args.lr, "cos": args.cos, "difflr": args.difflr, "batch_size": args.batch_size, "amp": args.amp,
             "seed": args.seed, "images": len(train.labels)},
        cosine=args.cos,
        step_epochs=60,
        print_every=args.print_frequence,
    )  # fmt: skip


def main() -> int:
    args = parse()
    if args.plan:
        print(args.directory, args.networks, torch.cuda.device_count() if args.device == "cuda" else 0, sep="\n")
        return 0
    return run.main(args, build)


if __name__ == "__main__":
    sys.exit(main())
