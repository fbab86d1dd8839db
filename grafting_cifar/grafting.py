#!/usr/bin/env python
"""Trains one network of a ring on CIFAR-10, CIFAR-100 or any folder of images, grafting its neighbour's weights.

python grafting.py --s checkpoint/two --model resnet32 --num 2 --i 1 >1.log &
python grafting.py --s checkpoint/two --model resnet32 --num 2 --i 2 >2.log &
"""

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_cifar.flags import OWN, SHARED, parse
from training.flags import settings_of

if __name__ == "__main__":
    ARGS = parse()  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once

import torch
from torch import nn

from filter_grafting.grafting import compute, graft
from filter_grafting.information import CRITERIA
from filter_grafting.scions import internal, noise
from filter_grafting.states import State, plain_state
from grafting_cifar import data, models
from training import loop
from training.loop import TrainingStep, add_to_mean, evaluate, sgd, stream_seed, train_one_epoch
from training.models import compiled, restore, to_resume
from training.process import Signals, amp_dtype, computer, deterministic, ending, join_ring, pick_device
from training.records import Records, follow, layer_rows

PIXELS = {"image_size": data.SIZE, "mean": data.MEAN, "std": data.STD}
EMA_SHARE = 0.05  # of all steps: the time constant of the moving average
# Of the epochs, of the first learning rate: as SWA's authors trained on CIFAR-10 (on CIFAR-100 at half the first rate).
SWA_START, SWA_RATE = 0.75, 0.1


def main(args: argparse.Namespace, signals: Signals) -> None:
    device = pick_device(args.device)
    amp, notes = amp_dtype(args.amp, device)
    with join_ring(args, signals, SHARED, may_raise(args)) as ring, deterministic(args.deterministic):
        images = data.select(data.load(args.data, args.cifar), args.images, args.val, args.test_images)
        facts = facts_of(images)
        ring.agree(facts)
        train_batches, test_batches, val_batches = make_batches(args, images, device)

        torch.manual_seed(stream_seed(args.seed, args.i, "weights"))
        model = models.build(args.model, len(images.classes)).to(device, memory_format=torch.channels_last)
        optimizer, rate = sgd(args, model, args.weight_decay), schedule(args)
        loss = partial(loop.cross_entropy, smoothing=args.label_smoothing)
        published, trained = averaged(args, model, optimizer, len(train_batches))
        # Anyone's own model may do on the host what a graph would not repeat.
        graph = args.model in models.NAMES and not args.eager
        forward, forward_tested = (compiled(each, device, args.compile, graph) for each in (model, published))
        step = TrainingStep(forward, optimizer, loss, device=device, amp=amp, graph=graph)

        settings = settings_of(args, SHARED + OWN) | facts | {"images": len(images.train.labels), "amp": bool(amp)}
        checkpoint = ring.newest()  # there is none without --resume: a network that has run before was refused
        first = restore(checkpoint, published, optimizer, settings, trained, may_raise(args)) if checkpoint else 0
        records = Records(ring, model, settings, images, PIXELS, [computer(device), *notes], args.tensorboard)
        records.resume(checkpoint)
        progress = partial(follow, ring, signals.check, args.print_frequence)
        options = {"device": device, "amp": amp, "progress": progress}
        if args.num > 1 and args.method != "papa":  # a model that cannot be grafted is refused before it trains
            compute(model, plain_state(model), args.a, args.c, args.level, criterion=CRITERIA[args.criterion])
        signals.finish_batch()
        for epoch in range(first, args.epochs):
            layers = []
            if epoch > 0 and args.num > 1:
                neighbour = records.timed("wait", ring.wait, epoch - 1)
                layers = records.timed("graft", graft_neighbour, args, model, neighbour, rate, epoch, train_batches)
            elif epoch > 0:
                records.timed("graft", graft_scion, args, model, epoch - 1)
            seed = stream_seed(args.seed, args.i, epoch)
            train = train_one_epoch(step, train_batches, rate, epoch=epoch, seed=seed, progress=progress)
            if args.method == "swa":
                first_end = max(0, int(SWA_START * args.epochs) - 1)  # of an epoch, at which the mean begins
                add_to_mean(published, model, epoch - first_end, train_batches.epoch(seed))
            test = evaluate(forward_tested, test_batches, epoch=epoch, **options)
            val = evaluate(forward_tested, val_batches, epoch=epoch, **options) if val_batches else None
            row, state = records.row(epoch, rate(epoch), train, test, val, published), plain_state(published)
            ring.publish(epoch, state, to_resume(optimizer, row, layers, settings, trained))
            records.epoch(row, layers, state)


def may_raise(args: argparse.Namespace) -> tuple[str, ...]:
    """The settings that a resumed run may raise: its epochs, unless a schedule or an average depends on them."""
    return () if args.cos or args.method in ("ema", "swa") else ("epochs",)


def facts_of(images: data.Images) -> dict[str, Any]:
    """What the networks of a ring must find alike in their data."""
    checksum = data.checksum(images.train.labels)
    return {"classes": len(images.classes), "test_images": len(images.test.labels), "data": checksum}


def make_batches(
    args: argparse.Namespace, images: data.Images, device: torch.device
) -> tuple[data.Batches, data.Batches, data.Batches | None]:
    """Of the images to train on, to test on, and to choose the best epoch on, if there are any."""
    size = data.TEST_BATCH[device.type]
    test, val = (split and data.Batches(split, size, device, augment=False) for split in (images.test, images.val))
    return data.Batches(images.train, args.batch_size, device, augment=True), test, val


def schedule(args: argparse.Namespace) -> Callable[[float], float]:
    """The learning rate as a function of the epochs that are done."""
    first = loop.initial_rate(args.lr, args.i, args.num, args.difflr)

    def rate(progress: float) -> float:
        if args.method == "swa" and progress >= int(SWA_START * args.epochs):
            return SWA_RATE * first
        return loop.learning_rate(first, progress, args.epochs, args.cos, args.step_epochs, args.warmup)

    return rate


def averaged(
    args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> tuple[nn.Module, nn.Module | None]:
    """(the model to test and publish, the one to train if it is another): with --method ema and swa, an average."""
    if args.method == "ema":
        return loop.moving_average(model, optimizer, 1 - 1 / max(1, EMA_SHARE * args.epochs * steps)), model
    return (copy.deepcopy(model), model) if args.method == "swa" else (model, None)


def graft_neighbour(
    args: argparse.Namespace,
    model: nn.Module,
    neighbour: State,
    rate: Callable[[float], float],
    epoch: int,
    batches: data.Batches,
) -> list[list]:
    """Grafts the neighbour's weights onto the model, or does what --method says; returns what came of each layer."""
    if args.method == "papa":
        middle = rate(epoch - 0.5)  # of the epoch that is done
        share_of_rate = middle / loop.initial_rate(args.lr, args.i, args.num, args.difflr)
        loop.pull(model, neighbour, args.num, share_of_rate, pulls=len(batches) / loop.PAPA_STEPS)
        return []
    layers = graft(model, neighbour, args.a, args.c, args.level, criterion=CRITERIA[args.criterion])
    return layer_rows(epoch - 1, layers)


def graft_scion(args: argparse.Namespace, model: nn.Module, epoch: int) -> None:
    """What --scion grafts onto invalid filters after an epoch, as published."""
    if args.scion == "internal":
        internal(model)
    elif args.scion == "noise":
        generator = torch.Generator().manual_seed(stream_seed(args.seed, args.i, f"{epoch}, noise"))
        noise(model, 0.975**epoch, generator=generator)


if __name__ == "__main__":
    with ending(ARGS) as signals:
        main(ARGS, signals)
