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
from filter_grafting.scions import SCIONS
from filter_grafting.training import moving_average, stream_seed
from grafting_cifar import data, models

METHODS = ("grafting", "average", "ema")
EMA_SHARE = 0.05  # of all steps: the time constant of the moving average


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
    group.add_argument("--images", metavar="N", type=flags.number(int, 1),
                       help="train on N of the training images, the same for all (default: all)")  # fmt: skip
    group.add_argument("--test_images", metavar="N", type=flags.number(int, 1),
                       help="test on N of the test images, the same for all (default: all)")  # fmt: skip
    group.add_argument("--val", metavar="N", type=flags.number(int, 0), default=0,
                       help="hold N training images out, the same for all, and choose the best epoch on them; 0: on "
                            "the test images, as the paper did")  # fmt: skip
    group.add_argument("--epochs", metavar="E", type=flags.number(int, 1), default=200, help="epochs to train")
    group.add_argument("--batch_size", metavar="B", type=flags.number(int, 1), default=128, help="images per step")
    group.add_argument("--lr", type=flags.number(float, 0, low_open=True), default=0.1, help="first learning rate")
    group.add_argument("--cos", action="store_true",
                       help="cosine from the first rate to 0, per step, instead of x0.1 now and then")  # fmt: skip
    group.add_argument("--step_epochs", metavar="E", type=flags.number(int, 1), default=60,
                       help="without --cos: the learning rate falls x0.1 every E epochs")  # fmt: skip
    group.add_argument("--difflr", action="store_true",
                       help="network I starts at lr*(1+cos(pi*(N-I)/N))/2 instead of lr")  # fmt: skip
    group.add_argument("--level", choices=LEVELS, default="layer",
                       help="one coefficient for a layer, or for each filter (vgg16 only)")  # fmt: skip
    group.add_argument("--method", choices=METHODS, default="grafting",
                       help="grafting; or a rival: average (coefficient 1/2 in every layer), or ema (with --num 1; "
                            "tests the exponential moving average of the weights, with a time constant of "
                            f"{100 * EMA_SHARE:g} %% of all steps)")  # fmt: skip
    group.add_argument("--scion", choices=SCIONS, default="external",
                       help="the neighbour's weights; or, with --num 1 and onto filters of an L1 norm below 0.1: noise "
                            "of the layer's standard deviation, falling to 1 %% of it; or the most informative filters "
                            "of the layer itself")  # fmt: skip
    group.add_argument("--print_frequence", metavar="K", type=flags.number(int, 0), default=0,
                       help="print loss and accuracy every K batches; 0 prints one line an epoch")  # fmt: skip
    flags.add_ring_flags(parser, "the save directory, shared by all networks of the run "
                         "(default: checkpoint/ and a name made of the settings)")  # fmt: skip
    parser.add_argument("--resume", action="store_true",
                        help="continue from this network's newest good checkpoint, if there is one")  # fmt: skip
    flags.add_machine_flags(parser)
    args = parser.parse_args(arguments)
    flags.check_common(parser, args)
    if args.level == "filter" and not args.model.startswith("vgg"):
        parser.error(f"argument --level: filter needs a chain of layers (--model vgg16), got --model {args.model}")
    for flag, value in ("method", args.method), ("scion", args.scion):
        if value in ("ema", "noise", "internal") and args.networks > 1:
            parser.error(f"argument --{flag}: {value} needs no neighbour: got --num {args.networks}, expected --num 1")
    if args.method == "average" and args.networks == 1:
        parser.error("argument --method: average needs a neighbour: got --num 1, expected --num 2 or more")
    if args.scion != "external" and args.level != "layer":
        parser.error(f"argument --scion: {args.scion} does not go with --level")
    curve = ("amplitude", "a"), ("steepness", "c")
    for is_given, what, without in (
        (args.method != "grafting", f"--method: {args.method}", (("scion", "scion"), ("level", "level"), *curve)),
        (args.level == "filter", "--level: filter", curve),
    ):
        for name, flag in without:
            if is_given and getattr(args, name) != parser.get_default(name):
                parser.error(f"argument {what} does not go with --{flag}")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("a CIFAR network trains in one process; torchrun is for grafting_imagenet")
    args.directory = args.directory or default_directory(parser, args)
    args.data = args.data or data.DEFAULT_FOLDER
    if args.method == "average":
        args.amplitude = 0.0  # the same exchange, but blind to what the layers hold
    return args


def default_directory(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """checkpoint/grafting_cifar10_resnet32, with the settings that differ from the defaults appended."""
    has_name = args.data and (args.data == "glyphs" or Path(args.data, "train").is_dir())
    images = Path(args.data).resolve().name if has_name else f"cifar{args.cifar}"
    shown = {"method": "", "scion": "", "images": "images", "test_images": "test", "val": "val", "epochs": "epochs",
             "step_epochs": "step", "batch_size": "batch", "lr": "lr", "cos": "cos", "difflr": "difflr",
             "level": "level", "networks": "num", "amplitude": "a", "steepness": "c", "seed": "seed",
             "amp": "amp"}  # fmt: skip
    return f"checkpoint/{flags.run_name(parser, args, f'{images}_{args.model}', shown)}"


def build(args: argparse.Namespace, world: run.World) -> run.Task:
    loaded = data.load(args.data, args.cifar)
    train, val, test = data.select(loaded, args.images, args.val, args.test_images)
    classes = loaded[2]
    torch.manual_seed(stream_seed(args.seed, args.network, "weights"))
    network = models.build(args.model, classes).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), args.lr, momentum=0.9, weight_decay=5e-4, fused=True)
    batches = data.Batches(train, args.batch_size, args.device, augment=True)
    test_batch = data.TEST_BATCH[args.device]
    averaged, own = None, {}
    if args.method == "ema":
        averaged = moving_average(network, optimizer, 1 - 1 / max(1, EMA_SHARE * args.epochs * len(batches)))
        own["ema"] = EMA_SHARE
    return run.Task(
        network=network,
        train=batches,
        val=data.Batches(val, test_batch, args.device, augment=False) if val else None,
        test=data.Batches(test, test_batch, args.device, augment=False),
        optimizer=optimizer,
        averaged=averaged,
        scion=args.scion,
        shared={"model": args.model, "classes": classes, "num": args.networks, "epochs": args.epochs,
                "a": args.amplitude, "c": args.steepness, "level": args.level, "method": args.method,
                "scion": args.scion, "val": args.val, "test_images": len(test.labels)},
        own={"lr": args.lr, "cos": args.cos, "difflr": args.difflr, "batch_size": args.batch_size, "amp": args.amp,
             "seed": args.seed, "step_epochs": args.step_epochs, "images": len(train.labels), **own},
        data=run.checksum(train.labels),
        cosine=args.cos,
        step_epochs=args.step_epochs,
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
