#!/usr/bin/env python
"""Trains one network of a ring on ImageNet, or any folder of images, grafting its neighbour's weights.

A ring of two ResNet-18s, one GPU each (grafting.sh starts all networks of a ring):

    python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 1 --gpu 0 >1.out &
    python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 2 --gpu 1 >2.out &

Several GPUs for one network: torchrun --standalone --nproc-per-node 4 -- grafting.py ... (mind the two dashes).
"""

import argparse
import difflib
import json
import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torchvision.models as zoo
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags, run
from common.records import on_terminal
from filter_grafting.checkpoint import load, write_atomically
from filter_grafting.errors import CheckpointError, GraftingError, RefusedError
from filter_grafting.exchange import Ring, printable, read_json
from filter_grafting.training import cross_entropy, evaluate, stream_seed
from grafting_imagenet import data

NAMES = zoo.list_models(module=zoo)
CHECKPOINTS = {"name": "pth{index}_{epoch}.tar", "key": "state_dict"}
AUXILIARY_WEIGHT = {"inception_v3": 0.4, "googlenet": 0.3}  # of the loss of each auxiliary head, as in their papers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    group = parser.add_argument_group("training")
    group.add_argument("--data", metavar="DIR", type=Path, default=Path("imagenet"),
                       help="folder with train/<class>/ and val/<class>/ images")  # fmt: skip
    group.add_argument("-a", "--arch", metavar="NAME", default="resnet18",
                       help=f"a model of torchvision: {', '.join(NAMES)}")  # fmt: skip
    group.add_argument("-j", "--workers", metavar="W", type=flags.number(int, 0), default=4,
                       help="processes that decode images, for each process that trains")  # fmt: skip
    group.add_argument("--epochs", metavar="E", type=flags.number(int, 1), default=90, help="epochs to train")
    group.add_argument("--start-epoch", metavar="E", type=flags.number(int, 0),
                       help="the first epoch's number (default: 0, or the one after --resume PATH's)")  # fmt: skip
    group.add_argument("-b", "--batch-size", metavar="B", type=flags.number(int, 1), default=256,
                       help="images per step, in total over the GPUs of this network")  # fmt: skip
    group.add_argument("--lr", "--learning-rate", metavar="LR", type=flags.number(float, 0, low_open=True), default=0.1,
                       help="learning rate at the start")  # fmt: skip
    group.add_argument("--steplr", action="store_true",
                       help="x0.1 every 30 epochs instead of a cosine from the first rate to 0, per step")  # fmt: skip
    group.add_argument("--momentum", metavar="M", type=flags.number(float, 0, 1), default=0.9, help="of SGD")
    group.add_argument("--wd", "--weight-decay", dest="weight_decay", metavar="W", type=flags.number(float, 0),
                       default=1e-4, help="weight decay")  # fmt: skip
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
    flags.add_ring_flags(parser, "the run's folder under checkpoint/, shared by all its networks "
                         "(default: a name made of the settings)")  # fmt: skip
    parser.add_argument("--resume", metavar="PATH", nargs="?", const="auto", action="append",
                        help="a checkpoint to start from, or the word auto, which may be left out: continue this "
                             "network's run, if it has begun, from its newest good checkpoint; with both (--resume "
                             "PATH --resume auto) a network without one starts from PATH")  # fmt: skip
    flags.add_machine_flags(parser)
    args = parser.parse_args(arguments)
    flags.check_common(parser, args)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if args.arch not in NAMES:
        near = difflib.get_close_matches(args.arch, NAMES, 3, 0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        parser.error(f"argument -a: torchvision has no model {args.arch!r}{hint}")
    if args.device == "cuda":
        if ranks > 1 and args.gpu is not None:
            parser.error("argument --gpu: torchrun's processes have a GPU each; CUDA_VISIBLE_DEVICES says which")
        gpu, count = int(os.environ.get("LOCAL_RANK", 0)) if args.gpu is None else args.gpu, torch.cuda.device_count()
        if gpu >= count:
            expected = f"0 to {count - 1}" if ranks == 1 else f"at most {count} of torchrun's processes on this machine"
            parser.error(f"argument --gpu: got {gpu}, expected {expected}")
        args.device = f"cuda:{gpu}"
    elif args.gpu is not None:
        parser.error("argument --gpu: needs --device cuda")
    elif args.decode == "gpu":
        parser.error("argument --decode: gpu needs --device cuda")
    if args.batch_size % ranks:
        parser.error(f"argument -b: got {args.batch_size}, expected a multiple of {ranks}, the number of ranks")
    args.image_size = args.image_size or usual_size(args.arch)
    args.level = "layer"
    args.directory = Path("checkpoint") / (args.directory or default_name(parser, args)).removeprefix("checkpoint/")
    given = args.resume or []
    args.start_from = next((Path(path) for path in reversed(given) if path != "auto"), None)
    args.resume = "auto" in given
    if args.start_from and args.start_from.resolve().parent == args.directory.resolve() and not args.evaluate:
        # A checkpoint of this very run is not where a new one starts: it means "go on".
        args.start_from, args.resume = None, True
    if args.evaluate and not (args.start_from or args.pretrained):
        parser.error("argument -e: expected --resume PATH or --pretrained, to say what is evaluated")
    return args


def default_name(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """grafting_imagenet_resnet18, with the settings that differ from the defaults appended."""
    shown = {"epochs": "epochs", "batch_size": "batch", "lr": "lr", "steplr": "steplr", "pretrained": "pretrained",
             "networks": "num", "amplitude": "a", "steepness": "c", "seed": "seed", "amp": "amp"}  # fmt: skip
    return flags.run_name(parser, args, f"imagenet_{args.arch}", shown)


def usual_size(arch: str) -> int:
    """Side of the images that a model is trained on, in pixels."""
    return 299 if arch == "inception_v3" else 224


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
    try:
        network = zoo.get_model(args.arch, weights=None, num_classes=classes, **options)
        if args.image_size != usual_size(args.arch):
            # On the meta device nothing is computed but shapes: says what the first batch would.
            state = {key: entry.to("meta") for key, entry in network.state_dict().items()}
            images = torch.empty(2, 3, args.image_size, args.image_size, device="meta")
            with torch.no_grad():
                torch.func.functional_call(network, state, images)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise GraftingError(
            f"{args.arch} does not work on images of {args.image_size} pixels ({reason}); try another --image_size"
        ) from error
    return network, [start_from_pretrained(network, args)] if args.pretrained else []


def start_from_pretrained(network: nn.Module, args: argparse.Namespace) -> str:
    """Loads torchvision's weights, but for the layers that give the classes if their number differs; returns a line."""
    weights = zoo.get_model_weights(args.arch).DEFAULT
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        pretrained = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except OSError as error:
        raise GraftingError(
            f"--pretrained: the weights of {args.arch} cannot be downloaded ({error}); on a machine without a network, "
            f"put {weights.url} at {place}"
        ) from error
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise GraftingError(f"--pretrained: {place} is damaged; delete it, to have it downloaded again") from error
    # In the files of the DenseNets, layers still have the names of their first release: norm.1 for norm1.
    old_name = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(\d)")
    pretrained = {old_name.sub(r"\1\2", key): entry for key, entry in pretrained.items()}
    own, known = network.state_dict(), len(weights.meta["categories"])
    heads = {
        key for key in own.keys() & pretrained.keys()
        if own[key].shape != pretrained[key].shape == (known, *own[key].shape[1:])
    }  # fmt: skip
    try:
        run.load_state(network, {key: own[key] if key in heads else entry for key, entry in pretrained.items()})
    except RuntimeError as error:
        raise GraftingError(
            f"--pretrained: the weights of {args.arch} ({weights.name}) do not fit at --image_size {args.image_size}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    line = f"started from torchvision's weights of {args.arch} ({weights.name})"
    if heads:
        layers = ", ".join(sorted({key.rpartition(".")[0] for key in heads}))
        classes = next(iter(own[key].shape[0] for key in heads))
        line += f"; they know {known} classes and the data has {classes}: {layers} starts anew"
    return line


def with_auxiliary_heads(weight: float) -> Callable[[Tensor | tuple[Tensor, ...], Tensor], Tensor]:
    """Cross-entropy of the class scores, plus that of each auxiliary head times the weight."""

    def loss(outputs: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        scores, *auxiliary = (outputs,) if isinstance(outputs, Tensor) else outputs
        return cross_entropy(scores, labels) + weight * sum(cross_entropy(other, labels) for other in auxiliary)

    return loss


def load_weights(network: nn.Module, path: Path) -> dict:
    """Loads the weights of a checkpoint of ours, the published script's or PyTorch's example's; returns all of it."""
    try:
        contents = load(path)
    except FileNotFoundError:
        raise GraftingError(f"--resume: there is no file {path}; expected a checkpoint, or the word auto") from None
    state = contents.get("state_dict", contents)
    try:
        run.load_state(network, {key.removeprefix("module."): entry for key, entry in state.items()})
    except (RuntimeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path} does not fit this network: {' '.join(str(error).split())[:300]}") from error
    return contents


def load_momentum(optimizer: torch.optim.Optimizer, contents: dict, path: Path) -> None:
    """Loads a checkpoint's optimizer state, where it has one, but not its settings: those are the flags'."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        if "optimizer" in contents:
            optimizer.load_state_dict(contents["optimizer"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"the optimizer's state in {path} does not fit this network: {error}") from error
    for group, values in zip(optimizer.param_groups, settings, strict=True):
        group.update(values)


def batches(args: argparse.Namespace, world: run.World, files: data.Files, train: bool) -> data.Batches:
    return data.Batches(
        files, args.batch_size, args.device, train=train, image_size=args.image_size, workers=args.workers,
        decode=args.decode, skip_bad=args.skip_bad, rank=world.rank, world_size=world.size,
    )  # fmt: skip


def starting_point(args: argparse.Namespace, world: run.World) -> tuple[Path | None, int | None]:
    """(the checkpoint that this network has to start from, the run's first epoch): None where there is none to know.

    Until a network has a checkpoint of its own, whoever continues it needs the one that it started from. Which that is
    stands in the save directory; each network of a ring may start from another.
    """
    path, record = args.start_from, args.directory / f"start{args.network}.json"
    if args.resume:
        begun = sorted(args.directory.glob("start*.json"))
        if not path and not begun:
            return None, None
        ring = Ring(args.directory, args.network, args.networks, **CHECKPOINTS)
        settings = ring.recorded()
        if settings and ring.has_checkpoint():
            return None, settings.get("start-epoch")
        if not path and record in begun:
            path = recorded_start(record)
            if not os.path.exists(path):
                raise GraftingError(
                    f"network {args.network} has no checkpoint of its own yet, and {printable(path)}, from which it "
                    "started, is gone: put it back, or say with --resume PATH --resume auto where it is now"
                )
        elif not path and not (args.directory / f"metrics{args.network}.csv").exists():
            raise RefusedError(
                f"network {args.network} has not begun, and others of its ring start from a checkpoint "
                f"({begun[0]}): give --resume PATH, or, to start from none, no --resume"
            )
    elif world.leads:
        record.unlink(missing_ok=True)  # of a start that came to nothing
    if path and world.leads and os.path.exists(path):
        write_atomically(record, json.dumps({"start_from": os.path.abspath(path)}).encode())
    return path, None


def recorded_start(record: Path) -> Path:
    try:
        return Path(read_json(record)["start_from"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusedError(f"{record} is damaged: say with --resume PATH --resume auto what it was") from error


def build(args: argparse.Namespace, world: run.World) -> run.Task:
    # First of all: listing the images may take minutes, and who is killed meanwhile is to be continued, too.
    start_from, start_epoch = starting_point(args, world)
    if args.start_epoch is not None:
        start_epoch = args.start_epoch
    train, val, classes = data.load(args.data)
    torch.manual_seed(stream_seed(args.seed, args.network, "weights"))
    network, notes = build_network(args, len(classes))
    network.to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        network.parameters(), args.lr, momentum=args.momentum, weight_decay=args.weight_decay, fused=True
    )
    if start_from:
        contents = load_weights(network, start_from)
        load_momentum(optimizer, contents, start_from)
        if start_epoch is None and isinstance(contents.get("epoch"), int):
            # Ours say which epoch they come after, those of PyTorch's example which is to come.
            start_epoch = contents["epoch"] + ("settings" in contents)
        notes.append(f"started from {start_from}, at epoch {start_epoch or 0}")
    start_epoch = start_epoch or 0
    if start_epoch >= args.epochs:
        raise GraftingError(f"nothing to train: the first epoch would be {start_epoch}, and --epochs is {args.epochs}")
    return run.Task(
        network=network,
        train=batches(args, world, train, train=True),
        test=batches(args, world, val, train=False),
        optimizer=optimizer,
        shared={"arch": args.arch, "classes": len(classes), "num": args.networks, "epochs": args.epochs,
                "start-epoch": start_epoch, "a": args.amplitude, "c": args.steepness, "level": args.level},
        own={"lr": args.lr, "steplr": args.steplr, "momentum": args.momentum, "wd": args.weight_decay,
             "batch-size": args.batch_size, "image_size": args.image_size, "pretrained": args.pretrained,
             "amp": args.amp, "seed": args.seed, "images": len(train)},
        data=run.checksum(train.labels),
        cosine=not args.steplr,
        step_epochs=30,
        loss_function=with_auxiliary_heads(AUXILIARY_WEIGHT.get(args.arch, 0)),
        topk=(1, 5),
        print_every=args.print_freq,
        start_epoch=start_epoch,
        key=CHECKPOINTS["key"],
        notes=notes,
    )  # fmt: skip


def evaluate_only(args: argparse.Namespace) -> int:
    """Prints the accuracy of a checkpoint, or of torchvision's weights; returns the exit status."""
    world = run.World(torch.device(args.device))
    try:
        _, val, classes = data.load(args.data)
        network, notes = build_network(args, len(classes))
        if args.start_from:
            load_weights(network, args.start_from)
            notes = [f"weights: {args.start_from}"]
        network.to(args.device, memory_format=torch.channels_last)
        test = batches(args, world, val, train=False)
        follow = iter
        if world.leads:
            print(*notes, sep="\n", flush=True)
            if on_terminal():
                from tqdm import tqdm

                follow = partial(tqdm, total=len(test), desc="test", leave=False, dynamic_ncols=True)
        loss, (top1, top5) = evaluate(
            torch.compile(network) if args.compile else network, test, device=torch.device(args.device), amp=args.amp,
            topk=(1, 5), follow=follow, reduce=world.sum,
        )  # fmt: skip
        left_out = int(world.sum(torch.tensor([len(test.bad)], device=args.device)))
    except GraftingError as error:
        end = world.end(run.End("failed", str(error), error.exit_status), may_follow=False)
        print(end.sentence, file=sys.stderr)
        return end.status
    if world.leads:
        print(f"* Acc@1 {top1:.3f}    Acc@5 {top5:.3f}    Loss {loss:.4f}    Images {len(val) - left_out}")
    world.leave()
    return 0


def main() -> int:
    args = parse()
    # Of 1x1 convolutions in channels_last format, whose gradients are the same numbers in the same places either way.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides", UserWarning)
    if args.plan:
        print(args.directory, args.networks, torch.cuda.device_count() if args.device != "cpu" else 0, sep="\n")
        return 0
    if args.evaluate:
        return evaluate_only(args)
    return run.main(args, build, **CHECKPOINTS)


if __name__ == "__main__":
    sys.exit(main())
