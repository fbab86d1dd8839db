"""The flags of grafting.py, and which of them go together. No torch here: --help and a wrong flag answer at once."""

import argparse
from pathlib import Path

from grafting_cifar.models import NAMES
from training.flags import ROOT, Parser, add_recipe_flags, add_run_flags, checked, number, one_of, path, run_name, world

DESCRIPTION = """\
Trains one network of a ring on CIFAR-10, CIFAR-100 or any folder of images, grafting its neighbour's weights.

A ring of two ResNet-32s on CIFAR-10, one process each (grafting.sh starts all of them):

    python grafting.py --s checkpoint/two --model resnet32 --num 2 --i 1 >1.log &
    python grafting.py --s checkpoint/two --model resnet32 --num 2 --i 2 >2.log &
"""
# The flags that all networks of a ring have in common, and those that else change what comes out of a network.
SHARED = ("model", "num", "epochs", "a", "c", "level", "criterion", "method", "scion", "val")
OWN = ("lr", "cos", "step_epochs", "difflr", "warmup", "batch_size", "momentum", "nesterov", "weight_decay")
OWN += ("label_smoothing", "seed")
ALONE = ("ema", "swa", "noise", "internal")  # methods and scions without a neighbour
DEFAULT_DATA = ROOT / "data"


def parser() -> Parser:
    parser = Parser(description=DESCRIPTION)
    group = parser.add_argument_group("training")
    flag = group.add_argument
    own = "or package.module:function, which is called with num_classes"
    flag("--model", metavar="NAME", type=one_of(NAMES), default="resnet32", help=f"{', '.join(NAMES)}; {own}")
    flag("--cifar", type=int, choices=(10, 100), default=10, help="which of the standard data sets")
    sources = (
        "the folder of the standard CIFAR files (an empty one gets them), or one with train/<class>/ and test/<class>/ "
        "images (resized to 32x32; a val/<class>/ beside them chooses the best epoch), or the word glyphs: a data set "
        "made on the spot"
    )
    flag("--data", metavar="DIR", type=path, default=DEFAULT_DATA, help=sources)
    some = "{} on N of the {} images, the same for all (default: all)".format
    flag("--images", metavar="N", type=number(int, 1), help=some("train", "training"))
    flag("--test_images", metavar="N", type=number(int, 1), help=some("test", "test"))
    hold_out = (
        "hold N training images out, the same for all, and choose the best epoch on them; 0: on those of val/ beside "
        "test/, or else on the test images, as the paper did"
    )
    flag("--val", metavar="N", type=number(int, 0), default=0, help=hold_out)
    flag("--epochs", metavar="E", type=number(int, 1), default=200, help="epochs to train")
    flag("--batch_size", metavar="B", type=number(int, 1), default=128, help="images per step")
    flag("--lr", type=number(float, 0, low_open=True), default=0.1, help="first learning rate")
    flag("--cos", action="store_true", help="a cosine from the first rate to 0, per step, instead of x0.1 now and then")
    steps = "without --cos: the learning rate falls x0.1 every E epochs"
    flag("--step_epochs", metavar="E", type=number(int, 1), default=60, help=steps)
    flag("--difflr", action="store_true", help="network I starts at lr*(1+cos(pi*(N-I)/N))/2 instead of lr")
    flag("--weight_decay", metavar="W", type=number(float, 0), default=5e-4, help="weight decay")
    add_recipe_flags(group)
    level = "one coefficient for a layer, or for each filter (chains such as vgg16 only)"
    flag("--level", choices=("layer", "filter"), default="layer", help=level)
    methods = (
        "grafting, or a rival. With a neighbour: average (coefficient 1/2 everywhere) or papa (a pull towards it that "
        "falls with the learning rate). With --num 1: ema (the exponential moving average of the weights is tested) or "
        "swa (the mean of the weights at the end of the third quarter of the epochs and of each later one; these have "
        "a constant rate, a tenth of the first)"
    )
    flag("--method", choices=("grafting", "average", "ema", "swa", "papa"), default="grafting", help=methods)
    scions = (
        "the neighbour's weights; or, with --num 1 and onto filters of an L1 norm below 0.1: noise times 0.975^epoch, "
        "or the largest filters of the layer itself"
    )
    flag("--scion", choices=("external", "noise", "internal"), default="external", help=scions)
    lines = "print loss and accuracy every K batches; 0 prints one line an epoch"
    flag("--print_frequence", metavar="K", type=number(int, 0), default=0, help=lines)
    add_run_flags(parser, "the run's directory, shared by its networks (default: checkpoint/ and a name of settings)")
    newest = "continue from this network's newest good checkpoint, if there is one"
    parser.add_argument("--resume", action="store_true", help=newest)
    eager = "on a GPU, launch every kernel by itself, not the step as one CUDA graph: slower, to look for faults"
    parser.add_argument("--eager", action="store_true", help=eager)
    return parser


def parse(argv: list[str] | None = None, flags: Parser | None = None) -> argparse.Namespace:
    """The flags, checked; a wrong one ends the program with one line and exit status 2.

    A program with further ones gives a parser of its own, made by `parser`.
    """
    flags = flags or parser()
    args = checked(flags, argv)
    check(flags, args)
    args.s = args.s or default_directory(flags, args)
    if args.method == "average":
        args.a = 0.0  # the same exchange, but blind to what the layers hold
    return args


def check(flags: Parser, args: argparse.Namespace) -> None:
    """Refuses flags that make no sense together."""
    if world()[1] > 1:
        flags.error("a CIFAR network trains in one process; torchrun is for grafting_imagenet")
    if args.level == "filter" and args.model in NAMES and not args.model.startswith("vgg"):
        flags.error(f"argument --level: filter needs a chain of layers (--model vgg16), got --model {args.model}")
    if args.difflr and args.num == 1:
        flags.error("argument --difflr: rates differ between networks: got --num 1, expected --num 2 or more")
    for name in ("method", "scion"):
        value = getattr(args, name)
        if value in ALONE and args.num > 1:
            flags.error(f"argument --{name}: {value} needs no neighbour: got --num {args.num}, expected --num 1")
    if args.method in ("average", "papa") and args.num == 1:
        flags.error(f"argument --method: {args.method} needs a neighbour: got --num 1, expected --num 2 or more")
    curve = ("a", "c", "criterion")
    for which, unused in (
        ("--method: " + args.method, ("scion", "level", *curve) if args.method != "grafting" else ()),
        ("--level: " + args.level, curve if args.level == "filter" else ()),
    ):
        for name in unused:
            if getattr(args, name) != flags.get_default(name):
                flags.error(f"argument {which} does not go with --{name}")


def default_directory(flags: Parser, args: argparse.Namespace) -> Path:
    """checkpoint/grafting_cifar10_resnet32, with the settings that differ from the defaults appended."""
    has_name = str(args.data) == "glyphs" or (args.data / "train").is_dir()
    images = args.data.resolve().name if has_name else f"cifar{args.cifar}"
    shown = [name for name in (*SHARED, *OWN, "images", "test_images", "amp") if name != "model"]
    return Path("checkpoint", run_name(flags, args, f"{images}_{args.model.replace(':', '.')}", shown))
