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
from training.flags import command, settings_of

if __name__ == "__main__":
    ARGS = parse()  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once

import torch
from torch import nn

from filter_grafting.grafting import graft
from filter_grafting.information import entropy, l1_norm
from filter_grafting.scions import internal, noise
from filter_grafting.states import plain_state
from grafting_cifar import data, models
from training import loop
from training.loop import evaluate, stream_seed, train_one_epoch
from training.models import compiled, own_model, restore, to_resume
from training.process import Signals, amp_dtype, deterministic, ending, join_ring, pick_device
from training.records import Progress, Records, layer_rows, machine

# The flags that all networks of a ring have in common, and those that else change what comes out of a network.
SHARED = ("model", "num", "epochs", "a", "c", "level", "criterion", "method", "scion", "val")
OWN = ("lr", "cos", "step_epochs", "difflr", "warmup", "batch_size", "momentum", "nesterov", "weight_decay")
OWN += ("label_smoothing", "seed")
CRITERIA = {"entropy": entropy, "l1": l1_norm}
EMA_SHARE = 0.05  # of all steps: the time constant of the moving average
SWA_START, SWA_RATE = 0.75, 0.5  # of the epochs, of the first learning rate: as its authors trained their ResNets


def main(args: argparse.Namespace, signals: Signals) -> None:
    device = pick_device(args.device)
    amp, notes = amp_dtype(args.amp, device)
    may_raise = () if args.cos or args.method in ("ema", "swa") else ("epochs",)  # these shape the run from its start
    with join_ring(args, signals, SHARED, may_raise) as ring, deterministic(args.deterministic):
        # Data
        images = data.select(data.load(args.data, args.cifar), args.images, args.val, args.test_images)
        checksum = data.checksum(images.train.labels)
        agreed = {"classes": len(images.classes), "test_images": len(images.test.labels), "data": checksum}
        ring.agree(agreed)
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
        average = averaged(args, model, optimizer, steps)
        tested = model if average is None else average  # whose accuracy is reported, and whose weights are published
        forward = forward_tested = compiled(model, device) if args.compile else model
        if tested is not model:
            forward_tested = compiled(tested, device) if args.compile else tested

        # Where it starts, or goes on
        settings = settings_of(args, SHARED + OWN) | agreed | {"images": len(images.train.labels), "amp": bool(amp)}
        about = {"data": checksum, "model": args.model, "classes": images.classes, "image_size": data.SIZE}
        about |= {"mean": data.MEAN, "std": data.STD, "command": command()}
        records = Records(ring, settings, about, model, [machine(device), *notes, *images.notes], args.tensorboard)
        trained = None if tested is model else model
        first = 0
        if checkpoint := ring.newest():
            first, state = checkpoint.round + 1, checkpoint.state
            row, layers = restore(checkpoint, tested, optimizer, settings, trained)
            records.resume(row, layers, state)
        computing = {"device": device, "amp": amp}
        loss_function = partial(loop.cross_entropy, smoothing=args.label_smoothing)
        progress = partial(Progress, check=signals.check, ring=ring, every=args.print_frequence)
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
                        criterion = CRITERIA[args.criterion]
                        grafted = graft(model, neighbour, args.a, args.c, args.level, criterion=criterion)
                        layers = layer_rows(epoch - 1, grafted)
            elif epoch > 0 and args.scion != "external":
                with records.timing("graft"):
                    graft_scion(args, model, epoch - 1)

            ring.update("training", epoch=epoch, epochs=args.epochs, steps=steps, lr=rate(epoch))
            model.train()
            follow = progress(epoch, steps)
            options = {"loss_function": loss_function, "progress": follow, **computing}
            train = train_one_epoch(forward, train_batches, optimizer, rate, epoch=epoch, seed=seed, **options)
            if args.method == "swa":
                count = max(0, epoch - int(SWA_START * args.epochs))
                loop.add_to_mean(average, model, count, train_batches.epoch(seed))

            ring.update("testing")
            follow = partial(progress, epoch, testing=True)
            test = evaluate(forward_tested, test_batches, progress=follow(len(test_batches)), **computing)
            val = None
            if val_batches is not None:
                val = evaluate(forward_tested, val_batches, progress=follow(len(val_batches)), **computing)
            row, state = records.row(epoch, rate(epoch), train, test, val, tested), plain_state(tested)
            ring.publish(epoch, state, to_resume(optimizer, row, layers, settings, trained))
            records.epoch(row, layers, state)
        records.save("final", row, state)


def build_model(name: str, num_classes: int) -> nn.Module:
    return own_model(name, num_classes, data.SIZE) if ":" in name else models.build(name, num_classes)


def schedule(args: argparse.Namespace) -> Callable[[float], float]:
    """The learning rate as a function of the epochs that are done."""
    first = loop.initial_rate(args.lr, args.i, args.num, args.difflr)
    options = {"epochs": args.epochs, "cosine": args.cos, "step_epochs": args.step_epochs, "warmup": args.warmup}

    def rate(progress: float) -> float:
        if args.method == "swa" and progress >= int(SWA_START * args.epochs):
            return SWA_RATE * first
        return loop.learning_rate(first, progress, **options)

    return rate


def averaged(args, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> nn.Module | None:
    """For --method ema and swa: a copy of the model, for the average of its weights."""
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
