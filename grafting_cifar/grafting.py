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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from grafting_cifar.flags import parse
from training.flags import settings_of

if __name__ == "__main__":
    ARGS = parse()  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once

import torch
from torch import nn

from filter_grafting.grafting import graft
from filter_grafting.scions import internal, noise
from filter_grafting.states import plain_state
from grafting_cifar import data, models
from training import loop
from training.loop import evaluate, stream_seed, train_one_epoch
from training.models import compiled, own_model, restore, to_resume
from training.process import Signals, amp_dtype, computer, deterministic, ending, join_ring, pick_device
from training.records import Progress, Records, layer_rows

# The flags that all networks of a ring have in common, and those that else change what comes out of a network.
SHARED = ("model", "num", "epochs", "a", "c", "level", "criterion", "method", "scion", "val")
OWN = ("lr", "cos", "step_epochs", "difflr", "warmup", "batch_size", "momentum", "nesterov", "weight_decay")
OWN += ("label_smoothing", "seed")
EMA_SHARE = 0.05  # of all steps: the time constant of the moving average
SWA_START, SWA_RATE = 0.75, 0.5  # of the epochs, of the first learning rate: as its authors trained their ResNets


def main(args: argparse.Namespace, signals: Signals) -> None:
    device = pick_device(args.device)
    amp, notes = amp_dtype(args.amp, device)
    may_raise = () if args.cos or args.method in ("ema", "swa") else ("epochs",)  # these shape the run from its start
    with join_ring(args, signals, SHARED, may_raise) as ring, deterministic(args.deterministic):
        # Data, on which the networks of a ring must agree
        images = data.select(data.load(args.data, args.cifar), args.images, args.val, args.test_images)
        facts = {"classes": len(images.classes), "test_images": len(images.test.labels)}
        facts["data"] = data.checksum(images.train.labels)
        ring.agree(facts)
        test_batch = data.TEST_BATCH[device.type]
        train_batches = data.Batches(images.train, args.batch_size, device, augment=True)
        test_batches = data.Batches(images.test, test_batch, device, augment=False)
        val_batches = data.Batches(images.val, test_batch, device, augment=False) if images.val else None

        # Model and optimizer
        torch.manual_seed(stream_seed(args.seed, args.i, "weights"))
        model = build_model(args.model, len(images.classes)).to(device, memory_format=torch.channels_last)
        recipe = {"momentum": args.momentum, "weight_decay": args.weight_decay, "nesterov": args.nesterov}
        optimizer = torch.optim.SGD(model.parameters(), args.lr, **recipe, fused=True)
        rate, steps = schedule(args), len(train_batches)
        loss = partial(loop.cross_entropy, smoothing=args.label_smoothing)
        average = averaged(args, model, optimizer, steps)
        published, trained = (model, None) if average is None else (average, model)
        forward, forward_tested = (compiled(each, device, args.compile) for each in (model, published))

        # Where it starts, or goes on
        settings = settings_of(args, SHARED + OWN) | facts | {"images": len(images.train.labels), "amp": bool(amp)}
        about = {"model": args.model, "data": facts["data"], "classes": images.classes}
        about |= {"image_size": data.SIZE, "mean": data.MEAN, "std": data.STD}
        records = Records(ring, model, settings, about, [computer(device), *notes, *images.notes], args.tensorboard)
        first = 0
        if checkpoint := ring.newest():
            first = checkpoint.round + 1
            records.resume(*restore(checkpoint, published, optimizer, settings, trained), checkpoint.state)
        watch = partial(Progress, ring, signals.check, epochs=args.epochs, every=args.print_frequence)
        where = {"device": device, "amp": amp}
        signals.finish_batch()

        for epoch in range(first, args.epochs):
            layers, seed = [], stream_seed(args.seed, args.i, epoch)
            if epoch > 0 and args.num > 1:
                with records.timing("wait"):
                    neighbour = ring.wait(epoch - 1)
                with records.timing("graft"):
                    if args.method == "papa":
                        loop.pull(model, neighbour, rate(epoch) / rate(args.warmup), exchanges=steps / 10)
                    else:
                        criterion = loop.CRITERIA[args.criterion]
                        grafted = graft(model, neighbour, args.a, args.c, args.level, criterion=criterion)
                        layers = layer_rows(epoch - 1, grafted)
            elif epoch > 0 and args.scion != "external":
                with records.timing("graft"):
                    graft_scion(args, model, epoch - 1)

            bar = watch(epoch, train_batches, rate(epoch))
            train = train_one_epoch(
                forward, train_batches, optimizer, rate, loss, epoch=epoch, seed=seed, progress=bar, **where
            )
            if args.method == "swa":
                count = max(0, epoch - int(SWA_START * args.epochs))
                loop.add_to_mean(average, model, count, train_batches.epoch(seed))

            test = evaluate(forward_tested, test_batches, progress=watch(epoch, test_batches), **where)
            val = None
            if val_batches is not None:
                val = evaluate(forward_tested, val_batches, progress=watch(epoch, val_batches), **where)
            row, state = records.row(epoch, rate(epoch), train, test, val, published), plain_state(published)
            ring.publish(epoch, state, to_resume(optimizer, row, layers, settings, trained))
            records.epoch(row, layers, state)


def build_model(name: str, num_classes: int) -> nn.Module:
    return own_model(name, num_classes) if ":" in name else models.build(name, num_classes)


def schedule(args: argparse.Namespace) -> Callable[[float], float]:
    """The learning rate as a function of the epochs that are done."""
    first = loop.initial_rate(args.lr, args.i, args.num, args.difflr)

    def rate(progress: float) -> float:
        if args.method == "swa" and progress >= int(SWA_START * args.epochs):
            return SWA_RATE * first
        return loop.learning_rate(first, progress, args.epochs, args.cos, args.step_epochs, args.warmup)

    return rate


def averaged(args, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module | None:
    """For --method ema and swa: a copy of the model, for the average of its weights, which is tested and published."""
    if args.method == "ema":
        return loop.moving_average(model, optimizer, 1 - 1 / max(1, EMA_SHARE * args.epochs * steps))
    return copy.deepcopy(model) if args.method == "swa" else None


def graft_scion(args: argparse.Namespace, model: nn.Module, epoch: int) -> None:
    """What --scion grafts onto invalid filters after an epoch, as published."""
    if args.scion == "internal":
        internal(model)
    else:
        generator = torch.Generator().manual_seed(stream_seed(args.seed, args.i, f"{epoch}, noise"))
        noise(model, 0.975**epoch, generator=generator)


if __name__ == "__main__":
    with ending(ARGS) as signals:
        main(ARGS, signals)
