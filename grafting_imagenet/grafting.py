#!/usr/bin/env python
"""Trains one network of a ring on ImageNet, or any folder of images, grafting its neighbour's weights.

A ring of two ResNet-18s, one GPU each (grafting.sh starts all networks of a ring):

    python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 1 --gpu 0 >1.out &
    python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 2 --gpu 1 >2.out &

Several GPUs for one network: torchrun --standalone --nproc-per-node 4 -- grafting.py ... (mind the two dashes).
"""

import argparse
import difflib
import os
import sys
import urllib.error
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags, run
from filter_grafting.checkpoint import load
from filter_grafting.errors import CheckpointError, GraftingError
from filter_grafting.training import cross_entropy, evaluate, stream_seed
from grafting_imagenet import data

NAMES = zoo.list_models(module=zoo)
AUXILIARY_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # of the loss of each auxiliary head, as in their papers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--data", metavar="DIR", type=Path, default=Path("imagenet"),
                       help="folder with train/<class>/ and val/<class>/ images")  # fmt: skip
    group.add_argument("-a", "--arch", metavar="NAME", default="resnet18", help=f"a model of torchvision: {', '.join(NAMES)}")
    group.add_argument("-j", "--workers", metavar="W", type=flags.number(int, 0), default=4,
                       help="processes that decode images, for each process that trains")  # fmt: skip
    group.add_argument("--epochs", metavar="E", type=flags.number(int, 1), default=90, help="epochs to train")
    group.add_argument("--start-epoch", metavar="E", type=flags.number(int, 0),
                       help="number of the first epoch (default: 0, or the one after that of --resume PATH)")  # fmt: skip
    group.add_argument("-b", "--batch-size", metavar="B", type=flags.number(int, 1), default=256,
                       help="images per step, in total over the GPUs of this network")  # fmt: skip
    group.add_argument("--lr", "--learning-rate", metavar="LR", type=flags.number(float, 0, low_open=True), default=0.1,
                       help="learning rate at the start")  # fmt: skip
    group.add_argument("--steplr", action="store_true",
                       help="x0.1 every 30 epochs instead of a cosine from the first rate to 0, per step")  # fmt: skip
    group.add_argument("--momentum", metavar="M", type=flags.number(float, 0, 1), default=0.9, help="of SGD")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", metavar="W", type=flags.number(float, 0), default=1e-4,
                       help="weight decay")  # fmt: skip
    group.add_argument("--image_size", metavar="PIXELS", type=flags.number(int, 32),
                       help="side of a training and test image (default: 224; inception_v3: 299)")  # fmt: skip
    group.add_argument("--pretrained", action="store_true", help="start from torchvision's weights")
    group.add_argument("--decode", choices=("cpu", "gpu"), default="cpu", help="where JPEG files are decoded")
    group.add_argument("--skip_bad", action="store_true", help="leave out images that cannot be read, and name them")
    group.add_argument("-p", "--print-freq", metavar="K", type=flags.number(int, 0), default=10,
                       help="print a line every K batches; 0 prints one line an epoch")  # fmt: skip
    group.add_argument("--gpu", metavar="G", type=flags.number(int, 0), help="the GPU to use (default: the first)")
    group.add_argument("-e", "--evaluate", action="store_true",
                       help="print the accuracy of --resume PATH or --pretrained on val/, and exit")  # fmt: skip
    flags.add_ring_flags(parser, None, "the run's folder under checkpoint/, shared by all its networks "
                         "(default: a name made of the settings)")  # fmt: skip
    parser.add_argument("--resume", metavar="PATH",
                        help="a checkpoint to start from, or the word auto: continue this network's run, if it has "
                             "begun, from its newest good checkpoint")  # fmt: skip
    flags.add_machine_flags(parser)
    args = parser.parse_args(arguments)
    flags.check_common(parser, args)
    if args.arch not in NAMES:
        near = difflib.get_close_matches(args.arch, NAMES, 3, 0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        parser.error(f"argument -a: torchvision has no model {args.arch!r}{hint}")
    if args.device == "cuda":
        gpu = int(os.environ.get("LOCAL_RANK", 0)) if args.gpu is None else args.gpu
        if gpu >= torch.cuda.device_count():
            parser.error(f"argument --gpu: got {gpu}, expected 0 to {torch.cuda.device_count() - 1}")
        args.device = f"cuda:{gpu}"
    elif args.gpu is not None:
        parser.error("argument --gpu: needs --device cuda")
    elif args.decode == "gpu":
        parser.error("argument --decode: gpu needs --device cuda")
    args.image_size = args.image_size or (299 if args.arch == "inception_v3" else 224)
    args.level = "layer"
    args.directory = Path("checkpoint") / (args.directory or default_name(parser, args)).removeprefix("checkpoint/")
    args.start_from = None
    if args.resume not in (None, "auto"):
        args.start_from, args.resume = Path(args.resume), None
        if args.start_from.resolve().parent == args.directory.resolve() and not args.evaluate:
            # A checkpoint of this very run is not where a new one starts: it means "go on".
            args.start_from, args.resume = None, "auto"
    if args.evaluate and not (args.start_from or args.pretrained):
        parser.error("argument -e: expected --resume PATH or --pretrained, to say what is evaluated")
    return args


def default_name(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """grafting_imagenet_resnet18, with the settings that differ from the defaults appended."""
    shown = {"epochs": "epochs", "batch_size": "batch", "lr": "lr", "steplr": "steplr", "pretrained": "pretrained",
             "networks": "num", "amplitude": "a", "steepness": "c", "seed": "seed", "amp": "amp"}  # fmt: skip
    return flags.run_name(parser, args, f"imagenet_{args.arch}", shown)


def build_network(args: argparse.Namespace, classes: int) -> tuple[nn.Module, list[str]]:
    """The network, with torchvision's weights if asked for, and lines for the log."""
    options = {}
    if args.arch in AUXILIARY_WEIGHT:
        # torchvision's weights of these two were trained on inputs of another scale, to which the model then converts.
        options = {"init_weights": not args.pretrained, "aux_logits": True, "transform_input": args.pretrained}
    elif args.arch.startswith("vit_"):
        options = {"image_size": args.image_size}
    elif args.arch.startswith("maxvit"):
        options = {"input_size": (args.image_size, args.image_size)}
    network = zoo.get_model(args.arch, weights=None, num_classes=classes, **options)
    if not args.pretrained:
        return network, []
    weights = zoo.get_model_weights(args.arch).DEFAULT
    try:
        pretrained = weights.get_state_dict(progress=False, check_hash=True)
    except (urllib.error.URLError, OSError) as error:
        raise GraftingError(
            f"--pretrained: the weights of {args.arch} cannot be downloaded ({error}); on a machine without a network, "
            f"put {Path(weights.url).name} into {torch.hub.get_dir()}/checkpoints"
        ) from error
    own = network.state_dict()
    fitting = {key: entry for key, entry in pretrained.items() if key in own and own[key].shape == entry.shape}
    fresh = sorted({key.rpartition(".")[0] for key in own if key not in fitting})
    network.load_state_dict(fitting, strict=False)
    note = f"started from torchvision's weights of {args.arch}"
    return network, [note + (f"; new for {classes} classes: {', '.join(fresh)}" if fresh else "")]


def with_auxiliary_heads(weight: float) -> Callable[[Tensor | tuple[Tensor, ...], Tensor], Tensor]:
    """Cross-entropy of the class scores, plus that of each auxiliary head times the weight."""

    def loss(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        scores, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
        return cross_entropy(scores, labels) + weight * sum(cross_entropy(other, labels) for other in auxiliary)

    return loss


def load_weights(network: nn.Module, path: Path) -> dict:
    """Loads a checkpoint's weights, of ours or of the published script, into the network; returns the checkpoint."""
    try:
        contents = load(path)
    except FileNotFoundError:
        raise GraftingError(f"--resume: there is no file {path}; expected a checkpoint, or the word auto") from None
    state = contents.get("state_dict", contents)
    try:
        network.load_state_dict({key.removeprefix("module."): entry for key, entry in state.items()})
    except (RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}") from error
    return contents


def batches(args: argparse.Namespace, world: run.World, files: data.Files, train: bool) -> data.Batches:
    return data.Batches(
        files, args.batch_size, args.device, train=train, image_size=args.image_size, workers=args.workers,
        decode=args.decode, skip_bad=args.skip_bad, rank=world.rank, world_size=world.size,
    )  # fmt: skip


def build(args: argparse.Namespace, world: run.World) -> run.Task:
    train, val, classes = data.load(args.data)
    torch.manual_seed(stream_seed(args.seed, args.network, "weights"))
    network, notes = build_network(args, len(classes))
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True
    )
    start_epoch = args.start_epoch or 0
    if args.start_from:
        contents = load_weights(network, args.start_from)
        if "optimizer" in contents:
            optimizer.load_state_dict(contents["optimizer"])
        if args.start_epoch is None and isinstance(contents.get("epoch"), int):
            start_epoch = contents["epoch"] + 1
        notes.append(f"started from {args.start_from}, at epoch {start_epoch}")
    if start_epoch >= args.epochs:
        raise GraftingError(f"nothing to train: the first epoch would be {start_epoch}, and --epochs is {args.epochs}")
    return run.Task(
        network=network,
        train=batches(args, world, train, train=True),
        test=batches(args, world, val, train=False),
        optimizer=optimizer,
        shared={"arch": args.arch, "classes": len(classes), "num": args.networks, "epochs": args.epochs,
                "a": args.amplitude, "c": args.steepness, "level": args.level},
        own={"lr": args.lr, "steplr": args.steplr, "momentum": args.momentum, "wd": args.weight_decay,
             "batch-size": args.batch_size, "image_size": args.image_size, "pretrained": args.pretrained,
             "amp": args.amp, "seed": args.seed, "images": len(train.labels)},
        cosine=not args.steplr,
        step_epochs=30,
        loss_function=with_auxiliary_heads(AUXILIARY_WEIGHT[args.arch]) if args.arch in AUXILIARY_WEIGHT else cross_entropy,
        topk=(1, 5),
        print_every=args.print_freq,
        start_epoch=start_epoch,
        key="state_dict",
        notes=notes,
    )  # fmt: skip


def evaluate_only(args: argparse.Namespace) -> int:
    """Prints the accuracy of a checkpoint, or of torchvision's weights; returns the exit status."""
    try:
        world = run.World(torch.device(args.device))
        _, val, classes = data.load(args.data)
        network, _ = build_network(args, len(classes))
        if args.start_from:
            load_weights(network, args.start_from)
        network.to(args.device, memory_format=torch.channels_last)
        loss, (top1, top5) = evaluate(
            network, batches(args, world, val, train=False), device=torch.device(args.device), amp=args.amp, topk=(1, 5),
            reduce=world.sum,
        )  # fmt: skip
    except GraftingError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if world.leads:
        print(f"Acc@1 {top1:.3f}    Acc@5 {top5:.3f}    Loss {loss:.4f}    Images {len(val.labels)}")
    world.leave()
    return 0


def main() -> int:
    args = parse()
    if args.plan:
        print(args.directory, args.networks, torch.cuda.device_count() if args.device != "cpu" else 0, sep="\n")
        return 0
    if args.evaluate:
        return evaluate_only(args)
    return run.main(args, build, name="pth{index}_{epoch}.tar", key="state_dict")


if __name__ == "__main__":
    sys.exit(main())
