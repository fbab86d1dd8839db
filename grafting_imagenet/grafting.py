#!/usr/bin/env python
"""Trains one network of a ring on ImageNet, or any folder of images, grafting its neighbour's weights.

python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 1 --gpu 0 >1.out &
python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 2 --gpu 1 >2.out &
"""

import argparse
import os
import sys
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_imagenet.flags import parse
from training.flags import settings_of

if __name__ == "__main__":
    ARGS = parse()  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once

import torch

from filter_grafting.errors import GraftingError
from filter_grafting.grafting import graft
from filter_grafting.membership import read_json
from filter_grafting.rings import Checkpoint
from filter_grafting.states import plain_state
from grafting_imagenet import data, models
from training import loop
from training.loop import evaluate, stream_seed, train_one_epoch
from training.models import compiled, restore, to_resume
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
    start_from = first_checkpoint(args)
    with (
        Ranks(device) as ranks,
        deterministic(args.deterministic),
        # The directory, the log and the grafting are rank 0's; the others have no ring.
        join(args, signals, start_from) if ranks.first else nullcontext() as ring,
    ):
        # Data
        images = data.load(args.data)
        train_batches = make_batches(args, device, ranks, images.train, train=True)
        test_batches = make_batches(args, device, ranks, images.test, train=False)
        val_batches = make_batches(args, device, ranks, images.val, train=False) if images.val else None

        # Model and optimizer
        torch.manual_seed(stream_seed(args.seed, args.i, "weights"))
        model = models.build(args.arch, len(images.classes), args.image_size, args.pretrained)
        if args.deterministic:
            models.make_deterministic(model, args.arch, args.image_size)
        if args.pretrained:
            notes.append(models.load_pretrained(model, args.arch, args.image_size))
        model.to(device, memory_format=torch.channels_last)
        recipe = {"momentum": args.momentum, "weight_decay": args.wd, "nesterov": args.nesterov}
        optimizer = torch.optim.SGD(model.parameters(), args.lr, **recipe, fused=True)
        schedule = {"epochs": args.epochs, "cosine": not args.steplr, "step_epochs": STEP_EPOCHS}
        rate = partial(loop.learning_rate, args.lr, **schedule, warmup=args.warmup)
        aux = models.AUXILIARY_WEIGHT.get(args.arch, 0)
        loss = partial(loop.cross_entropy, smoothing=args.label_smoothing, aux=aux)

        # Where it starts, or goes on
        checkpoint, start_from = ranks.tell(ring and (ring.newest(), start_from))
        start, lines = begin(args, checkpoint, start_from, model, optimizer)
        facts = {"classes": len(images.classes), "start_epoch": start, "data": data.checksum(images.train.labels)}
        settings = settings_of(args, SHARED + OWN) | facts | {"images": len(images.train), "amp": bool(amp)}
        if ranks.first:
            ring.agree(facts)
            about = {"model": args.arch, "data": facts["data"], "classes": images.classes}
            about |= {"image_size": args.image_size, "mean": data.MEAN, "std": data.STD}
            notes = [computer(device, ranks.size), *notes, *lines, *images.notes]
            records = Records(ring, model, settings, about, notes, args.tensorboard)
        first = start
        if checkpoint:
            first = checkpoint.round + 1
            recorded = restore(checkpoint, model, optimizer, settings)
            if ranks.first:
                records.resume(*recorded, checkpoint.state)
        forward = compiled(ranks.wrap(model), device, args.compile)
        forward_tested = compiled(model, device, args.compile)
        watch = partial(Progress, ring, signals.check, epochs=args.epochs, every=args.print_freq)
        where, rank = {"device": device, "amp": amp, "top5": True, "reduce": ranks.sum}, ranks.rank
        signals.finish_batch()

        for epoch in range(first, args.epochs):
            layers, seed = [], stream_seed(args.seed, args.i, epoch)
            if epoch > start and args.num > 1:
                if ranks.first:
                    with records.timing("wait"):
                        neighbour = ring.wait(epoch - 1)
                    with records.timing("graft"):
                        grafted = graft(model, neighbour, args.a, args.c, criterion=loop.CRITERIA[args.criterion])
                        layers = layer_rows(epoch - 1, grafted)
                ranks.broadcast(model)

            bar = watch(epoch, train_batches, rate(epoch))
            train = train_one_epoch(
                forward, train_batches, optimizer, rate, loss, epoch=epoch, seed=seed, rank=rank, progress=bar, **where
            )
            ranks.broadcast(model)  # each rank has batch-norm statistics of its own images

            test = evaluate(forward_tested, test_batches, progress=watch(epoch, test_batches), **where)
            val = None
            if val_batches is not None:  # though it may hold no images for this rank
                val = evaluate(forward_tested, val_batches, progress=watch(epoch, val_batches), **where)
            if ranks.first:
                row, state = records.row(epoch, rate(epoch), train, test, val, model), plain_state(model)
                ring.publish(epoch, state, to_resume(optimizer, row, layers, settings))
                records.epoch(row, layers, state)


def join(args: argparse.Namespace, signals: Signals, start_from: Path | None):
    files = {"name": "pth{index}_{round}.tar", "key": "state_dict"}
    details = {"start_from": start_from and str(start_from)}
    return join_ring(args, signals, SHARED, ("epochs",) if args.steplr else (), details=details, **files)


def make_batches(args: argparse.Namespace, device: torch.device, ranks: Ranks, files: data.Files, train: bool):
    options = {"image_size": args.image_size, "workers": args.workers, "skip_bad": args.skip_bad}
    share = {"rank": ranks.rank, "world_size": ranks.size}
    return data.Batches(files, args.batch_size, device, train=train, **options, **share)


def first_checkpoint(args: argparse.Namespace) -> Path | None:
    """The checkpoint that this network starts from: --resume PATH, or that of the start which --resume continues."""
    if args.resume and not args.start_from:
        with suppress(OSError, ValueError):
            recorded = read_json(args.s / f"network{args.i}.json").get("start_from")
            return Path(recorded) if isinstance(recorded, str) else None
    return args.start_from and Path(os.path.abspath(args.start_from))


def begin(
    args: argparse.Namespace,
    own: Checkpoint | None,
    path: Path | None,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[int, list[str]]:
    """The run's first epoch, and lines; a network without a checkpoint of its own is loaded from the path."""
    start, lines = 0, []
    if own is not None:
        start = ((own.extra or {}).get("settings") or {}).get("start_epoch", 0)
    elif path is not None:
        if args.start_from is None and not path.exists():
            raise GraftingError(
                f"network {args.i} has no checkpoint of its own yet, and {path}, from which it started, is gone: put "
                "it back, or say with --resume PATH --resume auto where it is now"
            )
        contents = models.read_checkpoint(path)
        lines = models.load_weights(model, contents, path, args.arch, args.image_size)
        models.load_momentum(optimizer, contents, path)
        if isinstance(contents.get("epoch"), int):
            # Ours say which epoch they come after, those of PyTorch's example which is to come.
            start = contents["epoch"] + ("settings" in contents)
    start = start if args.start_epoch is None else args.start_epoch
    if start >= args.epochs:
        raise GraftingError(f"nothing to train: the first epoch would be {start}, and --epochs is {args.epochs}")
    return start, ([f"started from {path}, at epoch {start}"] if path and own is None else []) + lines


def evaluate_only(args: argparse.Namespace, signals: Signals) -> None:
    """Prints the accuracy of a checkpoint, or of torchvision's weights, on the images to test on."""
    device = pick_device(args.device, args.gpu)
    amp, notes = amp_dtype(args.amp, device)
    with Ranks(device) as ranks:
        images = data.load(args.data)
        contents = models.read_checkpoint(args.start_from) if args.start_from else {"recorded": {}}
        args.image_size = args.image_size or contents["recorded"].get("image_size") or models.usual_size(args.arch)
        model = models.build(args.arch, len(images.classes), args.image_size, args.pretrained)
        if args.start_from:
            lines = models.load_weights(model, contents, args.start_from, args.arch, args.image_size)
            notes += [f"weights: {args.start_from}", *lines]
        else:
            notes.append(models.load_pretrained(model, args.arch, args.image_size))
        model.to(device, memory_format=torch.channels_last)
        batches = make_batches(args, device, ranks, images.test, train=False)
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
