#!/usr/bin/env python
"""Trains one network of a ring on ImageNet, or any folder of images, grafting its neighbour's weights.

python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 1 --gpu 0 >1.out &
python grafting.py --data imagenet -a resnet18 --s two --num 2 --i 2 --gpu 1 >2.out &
"""

import argparse
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_imagenet.flags import OWN, SHARED, parse
from training.flags import settings_of

if __name__ == "__main__":
    ARGS = parse()  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once

import torch
from torch import nn

from filter_grafting.errors import GraftingError
from filter_grafting.grafting import compute, graft
from filter_grafting.information import CRITERIA
from filter_grafting.membership import read_status
from filter_grafting.rings import Checkpoint, FileRing
from filter_grafting.states import plain_state
from grafting_imagenet import data, models
from training import loop
from training.loop import TrainingStep, evaluate, sgd, stream_seed, train_one_epoch
from training.models import compiled, read_checkpoint, restore, to_resume
from training.process import Signals, amp_dtype, computer, deterministic, ending, join_ring, pick_device
from training.ranks import Ranks
from training.records import Records, follow, layer_rows, say

STEP_EPOCHS = 30
PIXELS = {"mean": data.MEAN, "std": data.STD}


def main(args: argparse.Namespace, signals: Signals) -> None:
    device = pick_device(args.device, args.gpu)
    amp, notes = amp_dtype(args.amp, device)
    args.image_size = args.image_size or models.usual_size(args.arch, args.pretrained)
    with Ranks(device) as ranks, join(args, signals, ranks.rank) as ring, deterministic(args.deterministic):
        args.start_from = ranks.tell(args.start_from)  # that each has read for itself, from a file that may change
        images = data.load(args.data)
        train_batches, test_batches, val_batches = make_batches(args, images, device, ranks)
        torch.manual_seed(stream_seed(args.seed, args.i, "weights"))
        model = models.build(args.arch, len(images.classes), args.image_size, args.pretrained)
        checkpoint = ranks.tell(ring and ring.newest())
        if args.pretrained and checkpoint is None:
            notes.append(models.load_pretrained(model, args.arch))
        model.to(device, memory_format=torch.channels_last)
        optimizer, rate = sgd(args, model, args.wd), schedule(args)
        aux, criterion = models.AUXILIARY_WEIGHT.get(args.arch, 0), CRITERIA[args.criterion]
        loss = partial(loop.cross_entropy, smoothing=args.label_smoothing, aux=aux)
        start = first_epoch(args, checkpoint, model, optimizer, notes)
        facts = {"classes": len(images.classes), "start_epoch": start, "data": data.checksum(images.train.labels)}
        settings = settings_of(args, SHARED + OWN) | facts | {"images": len(images.train), "amp": bool(amp)}
        first = restore(checkpoint, model, optimizer, settings, may_raise=may_raise(args)) if checkpoint else start
        if ring:
            ring.agree(facts)
            if args.num > 1:  # a model that cannot be grafted is refused before it trains
                compute(model, plain_state(model), args.a, args.c, criterion=criterion)
            pixels, notes = PIXELS | {"image_size": args.image_size}, [computer(device, ranks.size), *notes]
            records = Records(ring, model, settings, images, pixels, notes, args.tensorboard)
            records.resume(checkpoint)
        forward = compiled(ranks.wrap(model), device, args.compile)
        computing = {"device": device, "amp": amp, "top5": True}
        step = TrainingStep(forward, optimizer, loss, **computing)
        options = {"progress": partial(follow, ring, signals.check, args.print_freq), "reduce": ranks.sum}
        signals.finish_batch()

        for epoch in range(first, args.epochs):
            layers = []
            if ring and epoch > start and args.num > 1:
                neighbour = records.timed("wait", ring.wait, epoch - 1)
                grafted = records.timed("graft", graft, model, neighbour, args.a, args.c, criterion=criterion)
                layers = layer_rows(epoch - 1, grafted)
            ranks.broadcast(model)  # what rank 0 has grafted
            seed = stream_seed(args.seed, args.i, epoch)
            train = train_one_epoch(step, train_batches, rate, epoch=epoch, seed=seed, rank=ranks.rank, **options)
            ranks.broadcast(model)  # each rank has batch-norm statistics of its own images
            test = evaluate(forward, test_batches, epoch=epoch, **computing, **options)
            val = None
            if val_batches is not None:  # though it may hold no images for this rank
                val = evaluate(forward, val_batches, epoch=epoch, **computing, **options)
            if ring:
                row, state = records.row(epoch, rate(epoch), train, test, val, model), plain_state(model)
                ring.publish(epoch, state, to_resume(optimizer, row, layers, settings))
                records.epoch(row, layers, state)


def join(args: argparse.Namespace, signals: Signals, rank: int) -> AbstractContextManager[FileRing | None]:
    """The network's place in the ring: the directory, the log and the grafting are rank 0's, the others have none."""
    if args.resume and not args.start_from:  # then it counts where an earlier start began
        args.start_from = read_status(args.s, args.i).get("start_from")
    args.start_from = args.start_from and Path(args.start_from).absolute()
    if rank > 0:
        return nullcontext()
    details = {"start_from": args.start_from and str(args.start_from)}
    files = {"name": "pth{index}_{round}.tar", "key": "state_dict"}
    return join_ring(args, signals, SHARED, may_raise(args), details=details, **files)


def may_raise(args: argparse.Namespace) -> tuple[str, ...]:
    """The settings that a resumed run may raise: its epochs, unless a cosine depends on them."""
    return ("epochs",) if args.steplr else ()


def make_batches(
    args: argparse.Namespace, images: data.Images, device: torch.device, ranks: Ranks
) -> tuple[data.Batches, data.Batches, data.Batches | None]:
    """Of the images to train on, to test on, and to choose the best epoch on, if there are any."""
    options = {"image_size": args.image_size, "workers": args.workers, "skip_bad": args.skip_bad}
    options |= {"rank": ranks.rank, "world_size": ranks.size}
    make = partial(data.Batches, batch_size=args.batch_size, device=device, **options)
    test, val = (files and make(files, train=False) for files in (images.test, images.val))
    return make(images.train, train=True), test, val


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
        if args.arch in models.AUXILIARY_WEIGHT and contents["settings"].get("pretrained"):
            problem = f"{args.start_from} is of a {args.arch} that began with --pretrained, on inputs of another scale"
            raise GraftingError(f"{problem}: only its own run can go on with it (--resume auto)")
        models.load_weights(model, state, args.start_from, contents, args.arch)
        if "optimizer" in contents:
            models.load_momentum(optimizer, contents["optimizer"])
        # Ours, as those of the published script, say after which epoch they are; PyTorch's example, which is to come.
        published = re.fullmatch(r"pth\d*_\d+\.tar|model_best\d+\.pth\.tar", args.start_from.name)
        start = contents.get("epoch", 0) + bool(contents["settings"] or published)
    start = start if args.start_epoch is None else args.start_epoch
    if start >= args.epochs:
        raise GraftingError(f"nothing to train: the first epoch would be {start}, and --epochs is {args.epochs}")
    if args.start_from and own is None:
        notes.append(f"started from {args.start_from}, at epoch {start}")
    return start


def evaluate_only(args: argparse.Namespace) -> None:
    """Prints the accuracy of a checkpoint, or of torchvision's weights, on the images to test on."""
    device = pick_device(args.device, args.gpu)
    amp, notes = amp_dtype(args.amp, device)
    with Ranks(device) as ranks:
        if args.start_from and not args.start_from.exists():
            raise GraftingError(f"there is no checkpoint {args.start_from} (--resume)")
        state, contents = read_checkpoint(args.start_from) if args.start_from else ({}, {"settings": {}})
        images = data.load(args.data)
        settings = contents["settings"]
        recorded = contents.get("image_size") or settings.get("image_size")
        args.image_size = args.image_size or recorded or models.usual_size(args.arch, args.pretrained)
        pretrained = args.pretrained or settings.get("pretrained", False)  # on which the form of some models depends
        model = models.build(args.arch, len(images.classes), args.image_size, pretrained)
        if args.start_from:
            models.load_weights(model, state, args.start_from, contents, args.arch)
            notes.append(f"weights: {args.start_from}")
        else:
            notes.append(models.load_pretrained(model, args.arch))
        model.to(device, memory_format=torch.channels_last)
        _, batches, _ = make_batches(args, images, device, ranks)
        options = {"device": device, "amp": amp, "top5": True, "reduce": ranks.sum}
        test = evaluate(compiled(model, device, args.compile), batches, **options)
        left_out = int(ranks.sum(torch.tensor(len(batches.bad), device=device)))
        count = len(images.test) - left_out
        found = f"* Acc@1 {test.accuracy:.3f}    Acc@5 {test.top5:.3f}    Loss {test.loss:.4f}    Images {count}"
        for line in [*notes, *images.notes, found] if ranks.rank == 0 else []:
            say(line)


if __name__ == "__main__":
    with ending(ARGS) as signals:
        if ARGS.evaluate:
            evaluate_only(ARGS)
        else:
            main(ARGS, signals)
