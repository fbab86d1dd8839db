"""One network's run: train, test, save, graft, epoch after epoch, and an end that is clear whatever comes."""

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.records import Log, Table, on_terminal
from filter_grafting.errors import GraftingError, MismatchError, RefusedError
from filter_grafting.exchange import Ring
from filter_grafting.grafting import blend, compare
from filter_grafting.training import (
    Batches,
    cross_entropy,
    deterministic,
    evaluate,
    initial_rate,
    learning_rate,
    stream_seed,
    train_one_epoch,
)

METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "best",
           "train_seconds", "test_seconds", "wait_seconds", "graft_seconds")  # fmt: skip
COEFFICIENTS = ("epoch", "layer", "own_entropy", "neighbour_entropy", "coefficient")


@dataclass
class Task:
    """What a script trains: built from its flags, run by `main`."""

    network: nn.Module
    train: Batches
    test: Batches
    optimizer: torch.optim.Optimizer
    shared: dict[str, Any]  # the settings that all networks of the ring must agree on, by flag
    own: dict[str, Any]  # further settings that change the outcome: a resumed network must have the same
    cosine: bool
    step_epochs: int
    loss_function: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    topk: tuple[int, ...] = (1,)
    notes: list[str] = field(default_factory=list)  # lines for the head of the log


class Stopped(Exception):
    """A signal asked this process to end."""

    def __init__(self, number: int):
        super().__init__(f"by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Signals:
    """SIGTERM and Ctrl-C end the run after the current batch; a second one ends the process at once."""

    def __init__(self):
        self.received = None
        self.starting = True  # nothing to finish yet: leave from wherever we are
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as shells set it for background jobs
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, signal.SIG_DFL)
        self.received = number
        if self.starting:
            raise Stopped(number)

    def check(self) -> None:
        if self.received is not None:
            raise Stopped(self.received)

    def follow(self, description: str, total: int) -> Callable[[Iterable], Iterable]:
        """Wraps an iteration over batches: a bar on a terminal, and a signal ends it between two batches."""

        def iterate(batches: Iterable) -> Iterable:
            if on_terminal():
                from tqdm import tqdm

                batches = tqdm(batches, description, total, leave=False, dynamic_ncols=True, file=sys.stdout)
            for batch in batches:
                yield batch
                self.check()

        return iterate


def main(args: argparse.Namespace, build: Callable[[argparse.Namespace], Task], **ring_options: Any) -> int:
    """Runs one network to its end; returns the exit status."""
    signals = Signals()
    ring = None
    try:
        log = Log(args.network)
        ring = Ring(args.directory, args.network, args.networks, timeout=60 * args.timeout, keep_all=args.keep_all,
                    say=log.say, check=signals.check, **ring_options)  # fmt: skip
        ring.join(bool(args.resume), [os.path.basename(sys.executable), *sys.argv])
        with deterministic(args.deterministic):
            task = build(args)
            if task.cosine:
                ring.agree(task.shared, why_not="--epochs is fixed: it shapes the whole of a cosine schedule")
            else:
                ring.agree(task.shared, may_raise=["epochs"])
            signals.starting = False
            signals.check()
            train_network(args, task, ring, log, signals)
        ring.leave("done")
        return 0
    except (Stopped, GraftingError) as error:
        return _end(ring, "stopped" if isinstance(error, Stopped) else "failed", str(error), error.exit_status)
    except torch.OutOfMemoryError as error:
        sentence = f"{str(error).splitlines()[0]} Fewer networks on this device, a smaller batch or --amp need less"
        return _end(ring, "failed", sentence, 1)
    except BaseException as error:
        _end(ring, "failed", f"{type(error).__name__}: {error}", 1)
        raise  # not foreseen: whoever mends it needs the traceback


def _end(ring: Ring | None, state: str, sentence: str, status: int) -> int:
    epoch = ""
    if ring is not None:
        ring.leave(state, sentence)
        if state == "stopped":
            epoch = f" at epoch {ring.epoch}" if ring.epoch is not None else " before its first epoch"
            sentence = f"network {ring.network} stopped {sentence}{epoch}; --resume continues it"
    with suppress(OSError):
        print(sentence, file=sys.stderr, flush=True)
    return status


def train_network(args: argparse.Namespace, task: Task, ring: Ring, log: Log, signals: Signals) -> None:
    device = torch.device(args.device)
    network, epochs = task.network, args.epochs
    forward = torch.compile(network) if args.compile else network
    start_rate = initial_rate(args.lr, args.network, args.networks, getattr(args, "difflr", False))
    metrics = Table(ring.directory / f"metrics{args.network}.csv", METRICS)
    coefficients = Table(ring.directory / f"coefficients{args.network}.csv", COEFFICIENTS)

    epoch, row = resume(task, ring) if args.resume else (0, None)
    for table in (metrics, coefficients) if args.networks > 1 else (metrics,):
        table.start(epoch)
    introduce(args, task, log, start_rate, epoch if row else None)
    best = row["best"] if row else -1.0
    while True:
        if row is None:
            ring.update("training", epoch=epoch, epochs=epochs)

            def rate(part: float, epoch: int = epoch) -> float:
                return learning_rate(start_rate, epoch + part, epochs, task.cosine, task.step_epochs)

            began = time.perf_counter()
            network.train()
            train_loss, train_accuracy = train_one_epoch(
                forward, task.train, task.optimizer, rate, seed=stream_seed(args.seed, args.network, epoch), device=device,
                amp=args.amp, loss_function=task.loss_function,
                follow=signals.follow(f"epoch {epoch}", len(task.train)),
            )  # fmt: skip
            trained = time.perf_counter()
            test_loss, accuracies = evaluate(
                forward, task.test, device=device, amp=args.amp, topk=task.topk,
                follow=signals.follow("test", len(task.test)),
            )  # fmt: skip
            tested = time.perf_counter()
            row = {
                "epoch": epoch, "lr": rate(0), "train_loss": train_loss, "train_accuracy": train_accuracy,
                "test_loss": test_loss, "test_accuracy": accuracies[0], "best": max(best, accuracies[0]),
                "train_seconds": trained - began, "test_seconds": tested - trained, "accuracies": accuracies,
            }  # fmt: skip
            publish(task, ring, row, improved=accuracies[0] > best)
            best = row["best"]
            ring.update("training", accuracy=accuracies[0], best=best)
        began = time.perf_counter()
        grafted = began
        if args.networks > 1 and epoch + 1 < epochs:
            path, neighbour = ring.wait(epoch)
            grafted = time.perf_counter()
            coefficients.append(graft_once(args, network, path, neighbour, epoch))
        row |= {"wait_seconds": grafted - began, "graft_seconds": time.perf_counter() - grafted}
        log.epoch(epoch, log_fields(row))
        metrics.append([[format_metric(column, row[column]) for column in METRICS]])
        if epoch + 1 >= epochs:
            break
        epoch, row = epoch + 1, None
    ring.write(ring.file("final"), {ring.key: snapshot(network.state_dict()), **result(task, row)})
    ring.flush()


def graft_once(
    args: argparse.Namespace, network: nn.Module, path: os.PathLike, neighbour: Mapping[str, Tensor], epoch: int
) -> list[list[object]]:
    """Grafts the neighbour's weights on; returns the rows for the table of coefficients."""
    try:
        neighbour = {key: entry.to(args.device, non_blocking=True) for key, entry in neighbour.items()}
        layers = compare(network, neighbour, args.amplitude, args.steepness, args.level)
    except (MismatchError, AttributeError) as error:
        raise MismatchError(f"{path} cannot be grafted onto network {args.network}: {error}") from error
    blend(network, neighbour, {name: layer.coefficient for name, layer in layers.items()}, args.level)
    return [
        [epoch, name, f"{own_entropy:.6f}", f"{neighbour_entropy:.6f}", f"{torch.as_tensor(share).mean().item():.4g}"]
        for name, (own_entropy, neighbour_entropy, share) in layers.items()
    ]


def publish(task: Task, ring: Ring, row: dict[str, Any], improved: bool) -> None:
    """Writes the epoch's checkpoint, which is both what the neighbour reads and all that a resumed run needs."""
    weights = {ring.key: snapshot(task.network.state_dict())}
    if improved:  # before the checkpoint: a run that is resumed from it will not come by here again
        ring.write(ring.file("best"), {**weights, **result(task, row)})
    ring.publish(row["epoch"], {**weights, **result(task, row), "optimizer": snapshot(task.optimizer.state_dict()), "metrics": row})


def result(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """What every checkpoint says about itself."""
    return {
        "epoch": row["epoch"], "accuracy": row["test_accuracy"], "best": row["best"],
        "settings": {**task.shared, **task.own},
    }  # fmt: skip


def snapshot(state: Any) -> Any:
    """A copy on the CPU that nobody changes any more."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: snapshot(value) for key, value in state.items()}
    return [snapshot(value) for value in state] if isinstance(state, (list, tuple)) else state


def resume(task: Task, ring: Ring) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest good checkpoint back in place: (its epoch, that epoch's metrics); (0, None) if there is none."""
    found = ring.newest()
    if found is None:
        return 0, None
    epoch, contents = found
    try:
        recorded, settings = contents["settings"], {**task.shared, **task.own}
        differing = [key for key in settings if key != "epochs" and recorded.get(key) != settings[key]]
        if differing:
            rows = ", ".join(f"--{key} is {settings[key]!r} here and was {recorded.get(key)!r}" for key in differing)
            raise RefusedError(f"network {ring.network} cannot be continued with other settings: {rows}")
        task.network.load_state_dict(contents[ring.key])
        task.optimizer.load_state_dict(contents["optimizer"])
        return epoch, dict(contents["metrics"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RefusedError(f"the checkpoint of epoch {epoch} in {ring.directory} does not fit this network: {error}") from error


def introduce(args: argparse.Namespace, task: Task, log: Log, rate: float, resumed: int | None) -> None:
    """The head of the log: what runs, with which settings, on what."""
    settings = {**task.shared, **task.own, "start_lr": rate}
    log.say(f"Network {args.network} of {args.networks} in {args.directory}: {sum(p.numel() for p in task.network.parameters()):,} parameters")
    log.say("settings: " + " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()))
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    log.say(f"device: {device}; torch {torch.__version__}, Python {platform.python_version()}")
    for note in task.notes:
        log.say(note)
    if resumed is not None:
        log.say(f"continuing after epoch {resumed}")


def log_fields(row: Mapping[str, Any]) -> str:
    seconds = "    ".join(f"{phase}:{row[f'{phase}_seconds']:.2f}s" for phase in ("train", "test", "wait", "graft"))
    return (
        f"accuracy:{row['test_accuracy']:.3f}    best:{row['best']:.3f}    loss:{row['train_loss']:.4f}    "
        f"lr:{row['lr']:.5g}    {seconds}"
    )


def format_metric(column: str, value: float) -> str:
    if column == "epoch":
        return str(value)
    if column.endswith("_seconds"):
        return f"{value:.3f}"
    return f"{value:.3f}" if column.endswith("accuracy") or column == "best" else f"{value:.6g}"
