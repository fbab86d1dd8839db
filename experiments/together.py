#!/usr/bin/env python
"""Trains N networks in one process that meet at every few steps: rivals of grafting, at the cost of N networks.

    python experiments/together.py --together papa --num 2 --model resnet20 --cos --s checkpoint/papa
    python experiments/together.py --together mutual --num 2 --model resnet20 --cos --s checkpoint/mutual

papa (Jolicoeur-Martineau et al. 2024): every 10 steps each network goes a little way towards the mean of all,
W <- (1 - beta) * W + beta * mean, with beta = 0.01 * lr_t / lr_0, over all floating-point entries. Each has its own
order and augmentation. Tested and kept is the mean of all.

mutual (mutual learning, Zhang et al. 2018): to the loss of a network is added the mean Kullback-Leibler divergence of
its predictions from those of each other network. All see the same batches. Tested and kept is the first network.

The log, the files and all flags that are not about grafting are those of a single network of
grafting_cifar/grafting.py. The training loss is the sum over the networks, the training accuracy their mean.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from filter_grafting.states import plain_state
from grafting_cifar import data, flags, models
from grafting_cifar import grafting as cifar
from training import loop
from training.flags import settings_of
from training.loop import TrainingStep, evaluate, sgd, stream_seed, train_one_epoch
from training.models import compiled, restore, to_resume
from training.process import Signals, amp_dtype, computer, deterministic, ending, join_ring, pick_device
from training.records import Records, follow


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.parser()
    parser.description = __doc__
    parser.add_argument("--together", choices=("papa", "mutual"), required=True, help="how the networks meet")
    args = parser.parse_args(argv)  # first without the checks of a single network, whose advice is no good here
    for name in ("i", "a", "c", "level", "criterion", "method", "scion", "difflr"):
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"argument --together does not go with --{name}")
    if args.num == 1:
        parser.error(f"argument --together: {args.together} needs two networks or more: got --num 1")
    args = flags.parse(argv, parser)
    if args.s == flags.default_directory(parser, args):
        args.s = args.s.with_name(args.s.name.replace("grafting", args.together, 1))
    args.networks, args.num = args.num, 1  # for the log and the files they are one
    return args


class Together(nn.Module):
    """N networks side by side: (N*b, ...) images, b for each in turn, to their scores (N*b, classes)."""

    def __init__(self, networks: list[nn.Module]):
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        parts = images.chunk(len(self.networks))
        return torch.cat([network(part) for network, part in zip(self.networks, parts, strict=True)])

    def entries(self) -> Iterator[tuple[Tensor, ...]]:
        """Each entry of the state dict, of all networks."""
        return zip(*(network.state_dict().values() for network in self.networks), strict=True)

    @torch.no_grad()
    def pull(self, beta: float) -> None:
        for entries in self.entries():
            if entries[0].is_floating_point():
                mean = torch.stack(entries).mean(0)
                for entry in entries:
                    entry.lerp_(mean, beta)

    @torch.no_grad()
    def mean_into(self, model: nn.Module) -> None:
        """Makes a model the mean of all; what has none, as the number of batches, is the first network's."""
        for own, entries in zip(model.state_dict().values(), self.entries(), strict=True):
            own.copy_(torch.stack(entries).mean(0) if own.is_floating_point() else entries[0])


class SideBySide:
    """Batches for N networks, one after the other in one tensor: of a stream for each network, or N times of one."""

    def __init__(self, batches: data.Batches, seeds: list[int], copies: int):
        self.batches, self.seeds, self.copies = batches, seeds, copies

    def __len__(self) -> int:
        return len(self.batches)

    def epoch(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The streams follow from the seeds that were given, as they do where each network trains alone."""
        for parts in zip(*map(self.batches.epoch, self.seeds), strict=True):
            images, labels = zip(*parts, strict=True)
            yield torch.cat(images * self.copies), torch.cat(labels * self.copies)


def summed_loss(scores: Tensor, labels: Tensor, networks: int, smoothing: float, mutual: bool) -> Tensor:
    """The sum of the networks' losses, each the mean over its own images: so each has the gradient of its own loss."""
    loss = networks * loop.cross_entropy(scores, labels, smoothing)
    if mutual:
        parts = F.log_softmax(scores.float(), 1).chunk(networks)
        for own, other in itertools.permutations(parts, 2):
            divergence = F.kl_div(own, other.detach(), log_target=True, reduction="batchmean")
            loss = loss + divergence / (networks - 1)
    return loss


def build(args: argparse.Namespace, num_classes: int, device: torch.device) -> tuple[Together, nn.Module]:
    """(the networks, each with weights of its own, and the model that is tested and kept)."""
    networks = []
    for k in range(1, args.networks + 1):
        torch.manual_seed(stream_seed(args.seed, k, "weights"))
        networks.append(models.build(args.model, num_classes))
    together = Together(networks).to(device, memory_format=torch.channels_last)
    first = together.networks[0]
    return together, copy.deepcopy(first) if args.together == "papa" else first


def main(args: argparse.Namespace, signals: Signals) -> None:
    device, is_papa = pick_device(args.device), args.together == "papa"
    amp, notes = amp_dtype(args.amp, device)
    with join_ring(args, signals, flags.SHARED, cifar.may_raise(args)) as ring, deterministic(args.deterministic):
        images = data.select(data.load(args.data, args.cifar), args.images, args.val, args.test_images)
        facts = cifar.facts_of(images)
        ring.agree(facts)
        batches, test_batches, val_batches = cifar.make_batches(args, images, device)

        together, kept = build(args, len(images.classes), device)
        optimizer, rate = sgd(args, together, args.weight_decay), cifar.schedule(args)
        loss = partial(summed_loss, networks=args.networks, smoothing=args.label_smoothing, mutual=not is_papa)
        # PAPA counts its steps on the host, which a graph would not repeat.
        graph = args.model in models.NAMES and not (args.eager or is_papa)
        forward, forward_tested = (compiled(each, device, args.compile, graph) for each in (together, kept))

        settings = settings_of(args, (*flags.SHARED, *flags.OWN, "together", "networks")) | facts
        settings |= {"images": len(images.train.labels), "amp": bool(amp)}
        checkpoint = ring.newest()
        first = restore(checkpoint, kept, optimizer, settings, together, cifar.may_raise(args)) if checkpoint else 0
        records = Records(ring, together, settings, images, cifar.PIXELS, [computer(device), *notes], args.tensorboard)
        records.resume(checkpoint)
        steps = itertools.count(first * len(batches) + 1)

        def pull(*_: object) -> None:
            if next(steps) % loop.PAPA_STEPS == 0:
                together.pull(loop.PAPA_PULL * optimizer.param_groups[0]["lr"] / args.lr)

        if is_papa:
            optimizer.register_step_post_hook(pull)
        step = TrainingStep(forward, optimizer, loss, device=device, amp=amp, graph=graph)
        progress = partial(follow, ring, signals.check, args.print_frequence)
        options: dict[str, Any] = {"device": device, "amp": amp, "progress": progress}
        signals.finish_batch()

        for epoch in range(first, args.epochs):
            seeds = [stream_seed(args.seed, k, epoch) for k in range(1, args.networks + 1)]
            train_batches = SideBySide(batches, seeds, 1) if is_papa else SideBySide(batches, seeds[:1], args.networks)
            train = train_one_epoch(step, train_batches, rate, epoch=epoch, seed=seeds[0], progress=progress)
            if is_papa:
                together.mean_into(kept)
            test = evaluate(forward_tested, test_batches, epoch=epoch, **options)
            val = evaluate(forward_tested, val_batches, epoch=epoch, **options) if val_batches else None
            row, state = records.row(epoch, rate(epoch), train, test, val, kept), plain_state(kept)
            ring.publish(epoch, state, to_resume(optimizer, row, [], settings, together))
            records.epoch(row, [], state)


if __name__ == "__main__":
    ARGS = parse()
    with ending(ARGS) as signals:
        main(ARGS, signals)
