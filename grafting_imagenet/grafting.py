#!/usr/bin/env python
"""Trains one network of a ring on ImageNet, or any folder of images, grafting its neighbour's weights.

python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 1 --gpu 0 >1.out &
python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 2 --gpu 1 >2.out &
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_imagenet.flags import parse
from training.flags import settings_of

if __name__ == "__main__":
    ARGS = parse()  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once

import torch
from torch import nn

from filter_grafting.errors import GraftingError
from filter_grafting.grafting import graft
from filter_grafting.membership import read_status
from filter_grafting.rings import Checkpoint, FileRing
from filter_grafting.states import plain_state
from grafting_imagenet import data, models
from training import loop
from training.loop import evaluate, stream_seed, train_one_epoch
from training.models import compiled, read_checkpoint, restore, to_resume
from training.process import Signals, amp_dtype, computer, deterministic, ending, join_ring, pick_device
from training.ranks import Ranks
from training.records import Progress, Records, layer_rows, say

# The flags that all networks of a ring have in common, and those that else change what comes out of a network.
SHARED = ("arch", "num", "epochs", "a", "c", "criterion")
OWN = ("lr", "steplr", "warmup", "batch_size", "momentum", "nesterov", "wd", "label_smoothing", "image_size")
OWN += ("pretrained", "seed")
STEP_EPOCHS = 30


def main(args: argparse.Namespace, signals: Signals) -> None:
    device = pick_device(args.device, args.gpu)
    amp, notes = amp_dtype(args.amp, device)
    args.image_size = args.image_size or models.usual_size(args.arch)
    args.start_from = start_of(args)
    with Ranks(device) as ranks, join(args, signals, ranks) as ring, deterministic(args.deterministic):
        images = data.load(args.data)
        train_batches = make_batches(args, images.train, device, ranks, train=True)
        test_batches = make_batches(args, images.test, device, ranks)
        val_batches = make_batches(args, images.val, device, ranks) if images.val else None

        torch.manual_seed(stream_seed(args.seed, args.i, "weights"))
        model = build_model(args, len(images.classes), notes).to(device, memory_format=torch.channels_last)
        optimizer, rate = make_optimizer(args, model), schedule(args)
        aux = models.AUXILIARY_WEIGHT.get(args.arch, 0)
        loss = partial(loop.cross_entropy, smoothing=args.label_smoothing, aux=aux)

        checkpoint = ranks.tell(ring and ring.newest())
        start = first_epoch(args, checkpoint, model, optimizer, notes)
        facts = {"classes": len(images.classes), "start_epoch": start, "data": data.checksum(images.train.labels)}
        settings = settings_of(args, SHARED + OWN) | facts | {"images": len(images.train), "amp": bool(amp)}
        if ring:
            ring.agree(facts)
            records = make_records(args, ring, model, settings, images, [computer(device, ranks.size), *notes])
        first = start
        if checkpoint:
            first = checkpoint.round + 1
            recorded = restore(checkpoint, model, optimizer, settings)
            if ring:
                records.resume(*recorded, checkpoint.state)
        forward = compiled(ranks.wrap(model), device, args.compile)
        watch = partial(Progress, ring, signals.check, epochs=args.epochs, every=args.print_freq)
        where, rank = {"device": device, "amp": amp, "top5": True, "reduce": ranks.sum}, ranks.rank
        signals.finish_batch()

        for epoch in range(first, args.epochs):
            layers, seed = [], stream_seed(args.seed, args.i, epoch)
            if ring and epoch > start and args.num > 1:
                with records.timing("wait"):
                    neighbour = ring.wait(epoch - 1)
                with records.timing("graft"):
                    grafted = graft(model, neighbour, args.a, args.c, criterion=loop.CRITERIA[args.criterion])
                    layers = layer_rows(epoch - 1, grafted)
            ranks.broadcast(model)  # what rank 0 has grafted
            bar = watch(epoch, train_batches, rate(epoch))
            train = train_one_epoch(
                forward, train_batches, optimizer, rate, loss, epoch=epoch, seed=seed, rank=rank, progress=bar, **where
            )
            ranks.broadcast(model)  # each rank has batch-norm statistics of its own images
            test = evaluate(forward, test_batches, progress=watch(epoch, test_batches), **where)
            val = None
            if val_batches is not None:  # though it may hold no images for this rank
                val = evaluate(forward, val_batches, progress=watch(epoch, val_batches), **where)
            if ring:
                row, state = records.row(epoch, rate(epoch), train, test, val, model), plain_state(model)
                ring.publish(epoch, state, to_resume(optimizer, row, layers, settings))
                records.epoch(row, layers, state)


def start_of(args: argparse.Namespace) -> Path | None:
    """The checkpoint that this network starts from: --resume PATH, or that of the start which --resume continues."""
    path = args.start_from or (read_status(args.s, args.i).get("start_from") if args.resume else None)
    return Path(path).absolute() if path else None


def join(args: argparse.Namespace, signals: Signals, ranks: Ranks) -> AbstractContextManager[FileRing | None]:
    """The network's place in the ring: the directory, the log and the grafting are rank 0's, the others have none."""
    if not ranks.first:
        return nullcontext()
    files = {"name": "pth{index}_{round}.tar", "key": "state_dict"}
    details = {"start_from": args.start_from and str(args.start_from)}
    return join_ring(args, signals, SHARED, ("epochs",) if args.steplr else (), details=details, **files)


def make_batches(
    args: argparse.Namespace, files: data.Files, device: torch.device, ranks: Ranks, train: bool = False
) -> data.Batches:
    options = {"image_size": args.image_size, "workers": args.workers, "skip_bad": args.skip_bad}
    share = {"rank": ranks.rank, "world_size": ranks.size}
    return data.Batches(files, args.batch_size, device, train=train, **options, **share)


def build_model(args: argparse.Namespace, num_classes: int, notes: list[str]) -> nn.Module:
    model = models.build(args.arch, num_classes, args.image_size, args.pretrained)
    if args.pretrained:
        notes.append(models.load_pretrained(model, args.arch))
    return model


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    recipe = {"momentum": args.momentum, "weight_decay": args.wd, "nesterov": args.nesterov}
    return torch.optim.SGD(model.parameters(), args.lr, **recipe, fused=True)


def schedule(args: argparse.Namespace) -> Callable[[float], float]:
    """The learning rate as a function of the epochs that are done."""
    options = {"epochs": args.epochs, "cosine": not args.steplr, "step_epochs": STEP_EPOCHS, "warmup": args.warmup}
    return partial(loop.learning_rate, args.lr, **options)


def first_epoch(
    args: argparse.Namespace, own: Checkpoint | None, model: nn.Module, optimizer: torch.optim.Optimizer, notes: list
) -> int:
    """The run's first epoch; a network without a checkpoint of its own is loaded from that which it starts from."""
    start = 0
    if own is not None:
        start = (own.extra or {}).get("settings", {}).get("start_epoch", 0)
    elif args.start_from:
        if not args.start_from.exists():
            raise GraftingError(
                f"network {args.i} has no checkpoint of its own yet, and {args.start_from}, from which it starts, is "
                "not there: say with --resume PATH --resume auto where it is"
            )
        state, contents = read_checkpoint(args.start_from)
        models.load_weights(model, state, args.start_from, contents.get("arch") or contents.get("model"), args.arch)
        if "optimizer" in contents:
            models.load_momentum(optimizer, contents["optimizer"])
        # Ours say which epoch they come after, those of PyTorch's example which is to come.
        start = contents.get("epoch", 0) + bool(contents["settings"])
    start = start if args.start_epoch is None else args.start_epoch
    if start >= args.epochs:
        raise GraftingError(f"nothing to train: the first epoch would be {start}, and --epochs is {args.epochs}")
    if args.start_from and own is None:
        notes.append(f"started from {args.start_from}, at epoch {start}")
    return start


def make_records(args, ring: FileRing, model: nn.Module, settings: dict, images: data.Images, notes: list) -> Records:
    """The log, tables and files of this network, which say what whoever uses it needs to know."""
    about = {"model": args.arch, "data": settings["data"], "classes": images.classes}
    about |= {"image_size": args.image_size, "mean": data.MEAN, "std": data.STD}
    return Records(ring, model, settings, about, [*notes, *images.notes], args.tensorboard)


def evaluate_only(args: argparse.Namespace, signals: Signals) -> None:
    """Prints the accuracy of a checkpoint, or of torchvision's weights, on the images to test on."""
    device = pick_device(args.device, args.gpu)
    amp, notes = amp_dtype(args.amp, device)
    with Ranks(device) as ranks:
        images = data.load(args.data)
        state, contents = read_checkpoint(args.start_from) if args.start_from else ({}, {"settings": {}})
        recorded = contents.get("image_size") or contents["settings"].get("image_size")
        args.image_size = args.image_size or recorded or models.usual_size(args.arch)
        model = build_model(args, len(images.classes), notes)
        if args.start_from:
            models.load_weights(model, state, args.start_from, contents.get("arch") or contents.get("model"), args.arch)
            notes.append(f"weights: {args.start_from}")
        model.to(device, memory_format=torch.channels_last)
        batches = make_batches(args, images.test, device, ranks)
        forward, progress = compiled(model, device, args.compile), Progress(None, signals.check, 0, batches)
        options = {"device": device, "amp": amp, "top5": True, "reduce": ranks.sum}
        test = evaluate(forward, batches, progress=progress, **options)
        left_out = int(ranks.sum(torch.tensor(len(batches.bad), device=device)))
        if ranks.first:
            for line in [*notes, *images.notes]:
                say(line)
            count = len(images.test) - left_out
            say(f"* Acc@1 {test.accuracy:.3f}    Acc@5 {test.top5:.3f}    Loss {test.loss:.4f}    Images {count}")


if __name__ == "__main__":
    with ending(ARGS) as signals:
        (evaluate_only if ARGS.evaluate else main)(ARGS, signals)
