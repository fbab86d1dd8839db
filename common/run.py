"""One network's run: train, test, save, graft, epoch after epoch, and an end that is clear whatever comes."""

import argparse
import copy
import math
import os
import platform
import re
import signal
import sys
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from common.distributed import End, RankLost, World
from common.records import Log, Table, on_terminal
from filter_grafting.checkpoint import load
from filter_grafting.errors import GraftingError, MismatchError, RefusedError
from filter_grafting.exchange import Ring, printable
from filter_grafting.grafting import blend, compare
from filter_grafting.information import invalid_filters
from filter_grafting.scions import graft_scions
from filter_grafting.training import (
    Batches,
    cross_entropy,
    deterministic,
    diverged,
    evaluate,
    initial_rate,
    learning_rate,
    stream_seed,
    train_one_epoch,
)

METRICS = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "best",
           "train_seconds", "test_seconds", "wait_seconds", "graft_seconds",
           "val_accuracy", "invalid_0.1", "invalid_0.01", "test_top5")  # fmt: skip
LOST_CONNECTION = re.compile("gloo|nccl|connection|socket|store", re.IGNORECASE)
ECHO_SECONDS = 2.0
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
    print_every: int = 0  # batches between two lines of progress; 0 prints one line an epoch
    start_epoch: int = 0
    val: Batches | None = None  # images to choose the best epoch on; without them it is chosen on the test images
    scion: str = "external"  # what is grafted, see filter_grafting.scions
    averaged: nn.Module | None = None  # follows the network, and is what is tested and saved
    key: str = "net"  # the entry of a checkpoint that holds the state dict
    data: str = ""  # tells the training images from others: see `checksum`
    notes: list[str] = field(default_factory=list)  # lines for the head of the log

    @property
    def tested(self) -> nn.Module:
        """The network whose accuracy is reported, and whose weights are published."""
        return self.network if self.averaged is None else self.averaged

    @property
    def shaped_by_epochs(self) -> str:
        """What would have gone otherwise from the beginning with more epochs; nothing, with steps alone."""
        if self.cosine:
            return "a cosine schedule"
        if self.averaged is not None:
            return "a moving average"
        return "the noise's decay" if self.scion == "noise" else ""


class Stopped(BaseException):
    """A signal asked this process to end; no `except Exception` on the way takes it for a failure of its own."""

    def __init__(self, number: int):
        super().__init__(f"by {signal.Signals(number).name}")
        self.exit_status = 128 + number


class Signals:
    """SIGTERM and Ctrl-C end the run after the current batch; a second one ends the process at once.

    Under torchrun each often comes twice: from whoever signals all processes of a job, and from torchrun, which passes
    on its own. There the second one within moments is taken for the echo of the first.
    """

    def __init__(self):
        self.received = self.when = None
        self.starting = True  # nothing to finish yet: leave from wherever we are
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as shells set it for background jobs
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        has_echo = "TORCHELASTIC_RUN_ID" in os.environ
        if self.received is not None and has_echo and time.monotonic() - self.when < ECHO_SECONDS:
            return
        if self.received is not None or not has_echo:
            for other in (signal.SIGTERM, signal.SIGINT):
                signal.signal(other, signal.SIG_DFL)
        if self.received is not None:
            os.kill(os.getpid(), number)
        self.received, self.when = number, time.monotonic()
        if self.starting:
            raise Stopped(number)

    def check(self) -> None:
        if self.received is not None:
            raise Stopped(self.received)


class Progress:
    """Follows the batches of one epoch: a bar on a terminal, lines every so many batches, an ear for signals."""

    def __init__(
        self, epoch: int, steps: int, check: Callable[[], None], log: Log | None, every: int = 0, topk: tuple = (1,)
    ):
        self.epoch, self.steps, self.check, self.log, self.every, self.topk = epoch, steps, check, log, every, topk
        self.data = self.data_total = 0.0
        self.last = self.began = time.perf_counter()

    def __call__(self, batches: Iterable) -> Iterable:
        bar = None
        if self.log is not None and not self.every and on_terminal():
            from tqdm import tqdm

            bar = tqdm(total=self.steps, desc=f"epoch {self.epoch}", leave=False, dynamic_ncols=True, file=sys.stdout)
        try:
            asked = time.perf_counter()
            for batch in batches:
                self.data = time.perf_counter() - asked
                self.data_total += self.data
                yield batch
                if bar is not None:
                    bar.update()
                self.check()
                asked = time.perf_counter()
        finally:
            if bar is not None:
                bar.close()

    def report(self, step: int, batch: Tensor, totals: Tensor) -> None:
        """A line as the PyTorch ImageNet example prints it: each figure of the last batch, then its mean so far."""
        now = time.perf_counter()
        seconds, self.last = now - self.last, now
        if self.log is None or not self.every or step % self.every:
            return
        loss, *correct, images = batch.tolist()  # the host waits for the device here, and in no other step
        mean_loss, *all_correct, all_images = totals.tolist()
        fields = [
            f"Epoch: [{self.epoch}][{step:{len(str(self.steps))}d}/{self.steps}]",
            f"Time {seconds:6.3f} ({(now - self.began) / (step + 1):6.3f})",
            f"Data {self.data:6.3f} ({self.data_total / (step + 1):6.3f})",
            f"Loss {loss / images:.4e} ({mean_loss / all_images:.4e})",
        ]
        for k, count, all_count in zip(self.topk, correct, all_correct, strict=True):
            fields.append(f"Acc@{k} {100 * count / images:6.2f} ({100 * all_count / all_images:6.2f})")
        self.log.say("    ".join(fields))


def main(args: argparse.Namespace, build: Callable[[argparse.Namespace, World], Task], **ring_options: Any) -> int:
    """Runs one network to its end, or one of the processes that train it together; returns the exit status."""
    signals = Signals()
    ring = log = world = None

    def check() -> None:
        signals.check()
        world.check()

    try:
        world = World(torch.device(args.device))
        if world.leads:
            log = Log(args.network, resumed=bool(args.resume))
            ring = Ring(args.directory, args.network, args.networks, timeout=60 * args.timeout, keep_all=args.keep_all,
                        say=log.say, check=check, **ring_options)  # fmt: skip
            world.last_words = lambda end: _say_farewell(args, ring, end, aloud=True)
            ring.join(bool(args.resume), [os.path.basename(sys.executable), *sys.argv])
        with deterministic(args.deterministic):
            task = build(args, world)
            if world.leads:
                if shaped := task.shaped_by_epochs:
                    ring.agree(task.shared, why_not=f"--epochs is fixed: it shapes the whole of {shaped}")
                else:
                    ring.agree(task.shared, may_raise=["epochs"])
            signals.starting = False
            check()
            train_network(args, task, world, ring, log, check)
        if world.leads:
            ring.leave("done")
        world.leave()
        return 0
    except BaseException as error:
        is_foreseen, may_follow = isinstance(error, (Stopped, GraftingError)), isinstance(error, (Stopped, RankLost))
        if isinstance(error, Stopped):
            own = End("stopped", str(error), error.exit_status)
        elif isinstance(error, GraftingError):
            own = End("failed", str(error), error.exit_status)
        elif isinstance(error, torch.cuda.OutOfMemoryError):
            is_foreseen, sentence = True, str(error).splitlines()[0]
            own = End("failed", f"{sentence} Fewer networks on this device, a smaller batch or --amp need less", 1)
        else:
            sentence = f"{type(error).__name__}: {' '.join(str(error).split())}"
            # Other ranks that are gone show as what torch says of connections.
            if world and world.size > 1 and isinstance(error, RuntimeError) and LOST_CONNECTION.search(str(error)):
                is_foreseen = may_follow = True
                sentence = f"the connection to a rank was lost: it or its machine died (killed?) ({sentence[:160]})"
            own = End("failed", sentence, 1)
        end = world.end(own, may_follow) if world else own
        _say_farewell(args, ring, end, aloud=end is own or ring is not None)
        if not is_foreseen and end is own:
            raise  # whoever mends it needs the traceback
        return end.status


def _say_farewell(args: argparse.Namespace, ring: Ring | None, end: End, aloud: bool) -> None:
    """Says how the network ended, in the status file and to the user."""
    sentence = end.sentence
    if ring is not None:
        ring.leave(end.state, sentence)
        if end.state == "stopped":
            epoch = f" at epoch {ring.epoch}" if ring.epoch is not None else " before its first epoch"
            sentence = f"network {args.network} stopped {sentence}{epoch}; --resume continues it"
    if aloud:
        with suppress(OSError):
            print(sentence, file=sys.stderr, flush=True)


def train_network(
    args: argparse.Namespace, task: Task, world: World, ring: Ring | None, log: Log | None, check: Callable[[], None]
) -> None:
    """The loop. With several ranks, all of them run it, and rank 0 alone has the ring and the log."""
    network, epochs, last_epoch = task.network, args.epochs, args.epochs - 1
    device = torch.device(args.device)
    forward, forward_training = task.tested, world.parallel(network)
    if args.compile:
        is_one = forward_training is forward
        forward = compiled(forward, device)
        forward_training = forward if is_one else compiled(forward_training, device)

    epoch, row = resume(task, world, ring, check) if args.resume else (task.start_epoch, None)
    if ring:
        metrics = Table(ring.directory / f"metrics{args.network}.csv", METRICS)
        coefficients = Table(ring.directory / f"coefficients{args.network}.csv", COEFFICIENTS)
        if args.networks > 1:
            coefficients.start(epoch)
        earlier = metrics.start(epoch)
        introduce(args, task, world, log, epoch if row else None)
        for values in earlier:
            with suppress(ValueError, KeyError):  # a row that someone has changed
                figures = {key: float(value) for key, value in values.items() if value}
                log.recall(int(values["epoch"]), log_fields(figures))
    best = row
    while True:
        if row is None:
            if ring:
                ring.update("training", epoch=epoch, epochs=epochs)
            row = train_and_test(args, task, world, log, check, epoch, forward_training, forward)
            improved = best is None or score(row) > best["best_score"]
            row["best_score"], row["best"] = (
                (score(row), row["test_accuracy"]) if improved else (best["best_score"], best["best"])
            )
            best = row
            if ring:
                publish(task, ring, row, improved)
                ring.update("training", accuracy=row["test_accuracy"], best=row["best"])
        if task.scion != "external" and epoch < last_epoch:
            row |= graft_scion(args, task, epoch)
        elif args.networks > 1 and epoch < last_epoch:
            if ring:
                row |= graft_once(args, task, ring, coefficients, epoch)
                world.tell(f"grafted {epoch}")
            else:
                world.hear(f"grafted {epoch}", check)
            world.align(network.state_dict())
        if ring:
            log.epoch(epoch, log_fields(row, task.topk[1:]))
            metrics.append([[format_metric(column, row.get(column)) for column in METRICS]])
        if epoch >= last_epoch:
            break
        epoch, row = epoch + 1, None
    if ring:
        ring.write(ring.file("final"), {ring.key: snapshot(task.tested.state_dict()), **result(task, row)})
        ring.flush()


def train_and_test(
    args: argparse.Namespace, task: Task, world: World, log: Log | None, check: Callable[[], None], epoch: int,
    forward_training: nn.Module, forward: nn.Module,
) -> dict[str, Any]:  # fmt: skip
    """Trains for one epoch, then tests; returns the epoch's metrics."""
    network, device = task.network, torch.device(args.device)

    def rate(part: float) -> float:
        return learning_rate(start_rate(args), epoch + part, args.epochs, task.cosine, task.step_epochs)

    began = time.perf_counter()
    network.train()
    progress = Progress(epoch, len(task.train), check, log, task.print_every, task.topk)
    train_loss, train_accuracies = train_one_epoch(
        forward_training, task.train, task.optimizer, rate, device=device, amp=args.amp, topk=task.topk,
        seed=stream_seed(args.seed, args.network, epoch), loss_function=task.loss_function,
        follow=progress, reduce=world.sum, report=progress.report, rank=world.rank,
    )  # fmt: skip
    trained = time.perf_counter()
    world.compare(dict(network.named_parameters()))
    world.align(dict(network.named_buffers()))  # each rank has batch-norm statistics of its own images

    def test(batches: Batches) -> tuple[float, list[float]]:
        follow = Progress(epoch, len(batches), check, log)
        return evaluate(forward, batches, device=device, amp=args.amp, topk=task.topk, reduce=world.sum, follow=follow)

    test_loss, accuracies = test(task.test)
    if not math.isfinite(test_loss):  # the last step's doing, whose loss nobody has seen
        raise diverged("test", test_loss, rate(0), args.amp)
    further = {f"invalid_{threshold}": invalid_filters(task.tested, threshold, False)[0] for threshold in (0.1, 0.01)}
    if 5 in task.topk:
        further["test_top5"] = accuracies[task.topk.index(5)]
    if task.val is not None:
        further["val_accuracy"] = test(task.val)[1][0]
    return {
        "epoch": epoch, "lr": rate(0), "train_loss": train_loss, "train_accuracy": train_accuracies[0],
        "test_loss": test_loss, "test_accuracy": accuracies[0], "accuracies": accuracies, **further,
        "train_seconds": trained - began, "test_seconds": time.perf_counter() - trained,
    }  # fmt: skip


def score(row: Mapping[str, Any]) -> float:
    """What the best epoch is chosen by."""
    return row.get("val_accuracy", row["test_accuracy"])


def start_rate(args: argparse.Namespace) -> float:
    return initial_rate(args.lr, args.network, args.networks, getattr(args, "difflr", False))


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    # One graph for each size of a batch: there are two, and a graph for any size would be slower. A small network on a
    # GPU is bound by its kernels' launches, which CUDA graphs ("reduce-overhead") save; they do not go with DDP.
    single = not isinstance(network, nn.parallel.DistributedDataParallel)
    return torch.compile(network, dynamic=False, mode="reduce-overhead" if device.type == "cuda" and single else None)


def graft_once(args: argparse.Namespace, task: Task, ring: Ring, coefficients: Table, epoch: int) -> dict[str, float]:
    """Waits for the neighbour's weights and grafts them on; returns the seconds that each took."""
    network, began = task.network, time.perf_counter()
    path, neighbour = ring.wait(epoch)
    arrived = time.perf_counter()
    try:
        neighbour = {key: entry.to(args.device, non_blocking=True) for key, entry in neighbour.items()}
        layers = compare(network, neighbour, args.amplitude, args.steepness, args.level)
    except (MismatchError, AttributeError) as error:
        raise MismatchError(f"{path} cannot be grafted onto network {args.network}: {printable(error)}") from error
    blend(network, neighbour, {name: layer.coefficient for name, layer in layers.items()}, args.level)
    coefficients.append(
        [epoch, name, f"{own_entropy:.6f}", f"{neighbour_entropy:.6f}", f"{torch.as_tensor(share).mean().item():.4g}"]
        for name, (own_entropy, neighbour_entropy, share) in layers.items()
    )
    return {"wait_seconds": arrived - began, "graft_seconds": time.perf_counter() - arrived}


def graft_scion(args: argparse.Namespace, task: Task, epoch: int) -> dict[str, float]:
    """Grafts what needs no neighbour; noise has the layer's standard deviation at first, and 1 % of it in the end."""
    began = time.perf_counter()
    noise = torch.Generator().manual_seed(stream_seed(args.seed, args.network, f"{epoch}, noise"))
    graft_scions(task.network, task.scion, scale=0.01 ** ((epoch + 1) / args.epochs), generator=noise)
    return {"graft_seconds": time.perf_counter() - began}


def publish(task: Task, ring: Ring, row: dict[str, Any], improved: bool) -> None:
    """Writes the epoch's checkpoint, which is both what the neighbour reads and all that a resumed run needs."""
    weights = {ring.key: snapshot(task.tested.state_dict())}
    if improved:  # before the checkpoint: a run that is resumed from it will not come by here again
        ring.write(ring.file("best"), {**weights, **result(task, row)})
    training = {"optimizer": snapshot(task.optimizer.state_dict()), "metrics": snapshot(row)}
    if task.averaged is not None:
        training["trained"] = snapshot(task.network.state_dict())
    location = "cuda:0" if next(task.network.parameters()).is_cuda else "cpu"  # a network's process has one GPU
    ring.publish(row["epoch"], {**weights, **result(task, row), **training}, location)


def result(task: Task, row: Mapping[str, Any]) -> dict[str, Any]:
    """What every checkpoint says about itself."""
    return {
        "epoch": row["epoch"], "accuracy": row["test_accuracy"], "best": row["best"],
        "settings": {**task.shared, **task.own}, "data": task.data,
    }  # fmt: skip


def checksum(labels: Tensor) -> str:
    """Of the labels (n,) of all training images, in order: other images have others, and no image need be read."""
    return f"{zlib.crc32(labels.numpy()):08x}"


def snapshot(state: Any) -> Any:
    """A copy on the CPU that nobody changes any more."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        copied = copy.copy(state)  # a state dict has attributes, too: the versions of its modules
        copied.update((key, snapshot(value)) for key, value in state.items())
        return copied
    return [snapshot(value) for value in state] if isinstance(state, (list, tuple)) else state


def load_state(network: nn.Module, state: Mapping[str, Any]) -> None:
    """`load_state_dict`; entries that do not say of which version their modules were are taken to be of the present."""
    labelled = OrderedDict(state)
    labelled._metadata = getattr(state, "_metadata", None) or network.state_dict()._metadata
    network.load_state_dict(labelled)


def resume(task: Task, world: World, ring: Ring | None, check: Callable[[], None]) -> tuple[int, dict[str, Any] | None]:
    """Puts the newest good checkpoint back in place: (its epoch, that epoch's metrics); no metrics if there is none."""
    if ring:
        found = ring.newest(task.start_epoch)
        world.tell("resume", str(ring.path(found[0])) if found else "")
    else:
        path = world.hear("resume", check)
        contents = load(path) if path else None
        found = (contents["epoch"], contents) if contents else None
    if found is None:
        return task.start_epoch, None
    epoch, contents = found
    try:
        recorded, settings = contents["settings"], {**task.shared, **task.own}
        differing = [key for key in settings if key != "epochs" and recorded.get(key) != settings[key]]
        if differing:
            rows = ", ".join(f"{key} is {settings[key]!r} here and was {recorded.get(key)!r}" for key in differing)
            raise RefusedError(f"the network cannot be continued with other settings: {rows}")
        if contents.get("data", task.data) != task.data:
            raise RefusedError(
                "the network cannot be continued with other images than it was trained on: give the --data of its start"
            )
        load_state(task.tested, contents[task.key])
        if task.averaged is not None:
            load_state(task.network, contents["trained"])
        task.optimizer.load_state_dict(contents["optimizer"])
        row = dict(contents["metrics"])
        score(row) + row["best_score"], log_fields(row, task.topk[1:])  # all that is read of it later is there
        return epoch, row
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RefusedError(f"the checkpoint of epoch {epoch} does not fit this network ({reason})") from error


def introduce(args: argparse.Namespace, task: Task, world: World, log: Log, resumed: int | None) -> None:
    """The head of the log: what runs, with which settings, on what."""
    settings = {**task.shared, **task.own, "start_lr": start_rate(args)}
    shown = [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()]
    parameters = sum(parameter.numel() for parameter in task.network.parameters())
    log.say(f"Network {args.network} of {args.networks} in {args.directory}: {parameters:,} parameters")
    log.say(f"settings: {' '.join(shown)}")
    on_cpu = args.device == "cpu"
    device = f"cpu, {torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(args.device)
    if world.size > 1:
        device = f"{world.size} processes, each on {device}"
    log.say(f"device: {device}; torch {torch.__version__}, Python {platform.python_version()}")
    for note in task.notes:
        log.say(note)
    if resumed is not None:
        log.say(f"continuing after epoch {resumed}")


def log_fields(row: Mapping[str, Any], topk: tuple[int, ...] = ()) -> str:
    """An epoch as a line of the log; topk: of which further accuracies."""
    fields = [f"accuracy:{row['test_accuracy']:.3f}", f"best:{row['best']:.3f}"]
    if "val_accuracy" in row:
        fields.append(f"val:{row['val_accuracy']:.3f}")
    fields += [f"accuracy@{k}:{value:.3f}" for k, value in zip(topk, row.get("accuracies", ())[1:], strict=True)]
    fields += [f"loss:{row['train_loss']:.4f}", f"lr:{row['lr']:.5g}"]
    fields += [f"{phase}:{row.get(f'{phase}_seconds', 0):.2f}s" for phase in ("train", "test", "wait", "graft")]
    return "    ".join(fields)


def format_metric(column: str, value: float | None) -> str:
    if column.endswith("_seconds"):
        return f"{value or 0:.3f}"
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    is_accuracy = column.endswith("accuracy") or column in ("best", "test_top5")
    return f"{value:.3f}" if is_accuracy else f"{value:.6g}"
