"""The flags of grafting.py, and which of them go together. No torch here: --help and a wrong flag answer at once."""

import argparse
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from training.flags import (
    Parser,
    add_recipe_flags,
    add_run_flags,
    checked,
    cores,
    number,
    one_of,
    path,
    ranks_here,
    run_name,
    world,
)

DESCRIPTION = """\
Trains one network of a ring on ImageNet, or any folder of images, grafting its neighbour's weights.

A ring of two ResNet-18s, one GPU each (grafting.sh starts all networks of a ring):

    python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 1 --gpu 0 >1.out &
    python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 2 --gpu 1 >2.out &

Several GPUs for one network:

    torchrun --standalone --nproc_per_node=4 grafting.py --data imagenet -a resnet50 --save_dir two --networks 2 --i 1
"""
# The flags that all networks of a ring have in common, and those that else change what comes out of a network.
SHARED = ("arch", "num", "epochs", "a", "c", "criterion")
OWN = ("lr", "steplr", "warmup", "batch_size", "momentum", "nesterov", "wd", "label_smoothing", "image_size")
OWN += ("pretrained", "seed")


def names() -> list[str]:
    """The classification models of the installed torchvision, out of its source: to import it takes seconds."""
    spec = find_spec("torchvision")
    files = sorted(Path(spec.origin).with_name("models").glob("*.py")) if spec else []
    found = (re.findall(r"^@register_model\(\)\n(?:@.*\n)*def (\w+)", file.read_text(), re.MULTILINE) for file in files)
    return sorted(name for each in found for name in each)


def parser() -> Parser:
    parser, known = Parser(description=DESCRIPTION), names()
    group = parser.add_argument_group("training")
    flag = group.add_argument
    folder = "folder with train/<class>/ and val/<class>/ images (and test/<class>/: then val/ chooses the best epoch)"
    flag("--data", metavar="DIR", type=path, default=Path("imagenet"), help=folder)
    own = "or package.module:function, which is called with num_classes (timm.models:resnet18)"
    models = f"a model of torchvision: {', '.join(known)}; {own}"
    flag("-a", "--arch", metavar="NAME", type=one_of(known), default="resnet18", help=models)
    workers = "processes that decode images, for each process that trains (default: its share of the cores)"
    flag("-j", "--workers", metavar="W", type=number(int, 0), help=workers)
    flag("--epochs", metavar="E", type=number(int, 1), default=90, help="epochs to train")
    start = "the first epoch's number (default: 0, or the one after --resume PATH's)"
    flag("--start-epoch", metavar="E", type=number(int, 0), help=start)
    batch = "images per step, in total over the GPUs of this network"
    flag("-b", "--batch-size", metavar="B", type=number(int, 1), default=256, help=batch)
    rate = "learning rate at the start"
    flag("--lr", "--learning-rate", metavar="LR", type=number(float, 0, low_open=True), default=0.1, help=rate)
    steps = "x0.1 every 30 epochs instead of a cosine from the first rate to 0, per step"
    flag("--steplr", action="store_true", help=steps)
    flag("--wd", "--weight-decay", metavar="W", type=number(float, 0), default=1e-4, help="weight decay")
    add_recipe_flags(group)
    size = (
        "side of a training and test image (default: 224; inception_v3: 299; with --pretrained that of its weights; "
        "with -e what the file records)"
    )
    flag("--image_size", metavar="PIXELS", type=number(int, 32), help=size)
    flag("--pretrained", action="store_true", help="start from torchvision's weights")
    flag("--skip_bad", action="store_true", help="leave out images that cannot be read, and name them")
    lines = "print a line every K batches; 0 prints one line an epoch"
    flag("-p", "--print-freq", metavar="K", type=number(int, 0), default=10, help=lines)
    flag("--gpu", metavar="G", type=number(int, 0), help="the GPU to use (default: the first); not under torchrun")
    only = "print the accuracy of --resume PATH or --pretrained on the images to test on, and exit"
    flag("-e", "--evaluate", action="store_true", help=only)
    add_run_flags(parser, "the run's folder under checkpoint/, shared by its networks (default: a name of settings)")
    resume = (
        "a checkpoint to start from, or the word auto, which may be left out: continue this network's run, if it has "
        "begun, from its newest good checkpoint; with both (--resume PATH --resume auto) a network without one starts "
        "from PATH. A PATH in the run's own folder means auto"
    )
    parser.add_argument("--resume", metavar="PATH", nargs="?", const="auto", action="append", help=resume)
    return parser


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, checked; a wrong one ends the program with one line and exit status 2.

    `resume` becomes whether to continue the run, `start_from` the checkpoint to start from, if one was given.
    """
    flags = parser()
    if not (find_spec("torchvision") or {"-h", "--help"} & set(sys.argv[1:] if argv is None else argv)):
        remedy = "source .venv/bin/activate, or pip install -r requirements.txt"
        flags.exit(1, f"this Python has no torchvision: {remedy}\n")
    args = checked(flags, argv)
    if args.workers is None:
        args.workers = max(1, cores() // ranks_here())
    args.s = Path("checkpoint", str(args.s or default_name(flags, args)).removeprefix("checkpoint/"))
    given = args.resume or []
    args.start_from = next((path(word) for word in reversed(given) if word != "auto"), None)
    args.resume = "auto" in given
    if args.start_from and args.start_from.resolve().parent == args.s.resolve() and not args.evaluate:
        args.start_from, args.resume = None, True  # a checkpoint of this very run: it means "go on"
    if args.batch_size % world()[1]:
        flags.error(f"argument -b: got {args.batch_size}, expected a multiple of {world()[1]}, the number of ranks")
    if args.gpu is not None and args.device == "cpu":
        flags.error("argument --gpu: needs --device cuda")
    if args.gpu is not None and ranks_here() > 1:
        flags.error("argument --gpu: under torchrun each process has a GPU of its own; CUDA_VISIBLE_DEVICES says which")
    if args.pretrained and args.start_from:
        flags.error("argument --pretrained: does not go with --resume PATH, which has weights of its own")
    if args.pretrained and ":" in args.arch:
        flags.error(f"argument --pretrained: torchvision has no weights of {args.arch}; expected one of its own models")
    if args.evaluate and not (args.start_from or args.pretrained):
        flags.error("argument -e: expected --resume PATH or --pretrained, to say what is evaluated")
    return args


def default_name(flags: Parser, args: argparse.Namespace) -> str:
    """grafting_imagenet_resnet18, with the settings that differ from the defaults appended."""
    shown = ("epochs", "batch_size", "lr", "steplr", "momentum", "wd", "nesterov", "label_smoothing", "warmup")
    shown += ("pretrained", "criterion", "num", "a", "c", "seed", "amp")
    return run_name(flags, args, f"imagenet_{args.arch.replace(':', '.')}", shown)
