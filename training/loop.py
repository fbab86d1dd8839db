"""One epoch of training, evaluation, learning rates, seeds and averages: the same for both data sets.

What `TrainingStep`, `train_one_epoch` and `evaluate` have in common:
    batches: with `len`, and `epoch(seed)`, which yields (images (b, c, h, w), labels (b,)) on the device.
    amp: the type for autocast; None computes in that of the weights.
    top5: whether to count the labels that are among the five highest scores, too.
    progress: called with the batches of an epoch, the totals, the number of batches, the epoch and the learning rate
        (None when testing); yields the batches. See `records.follow`.
    reduce: sums the totals over all processes that train this network.
"""

import argparse
import copy
import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from filter_grafting.errors import GraftingError
from filter_grafting.states import paired

PAPA_STEPS, PAPA_PULL = 10, 0.01  # from one pull to the next; how far one goes at the first rate


class Diverged(GraftingError):
    """The loss is no number any more."""


class Result(NamedTuple):
    """What came of an epoch over some images."""

    loss: float  # mean over the images: when training of what is minimised, when testing of the cross-entropy
    accuracy: float  # %
    top5: float | None  # %: the label is among the five highest scores (all, if the classes are fewer); if asked for
    seconds: float


# Seeds and rates


def stream_seed(seed: int, i: int, epoch: int | str) -> int:
    """Seed of everything that is random for network i in one epoch; words name what else is random, as "weights".

    As nothing random outlives an epoch, a resumed network needs no generator's state to go on exactly.
    """
    text = f"filter grafting, seed {seed}, network {i}, epoch {epoch}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def initial_rate(lr: float, i: int, num: int, difflr: bool) -> float:
    """The rate that network i of num starts at: `lr`, or with difflr `lr * (1 + cos(pi * (num - i) / num)) / 2`."""
    return lr * (1 + math.cos(math.pi * (num - i) / num)) / 2 if difflr else lr


def learning_rate(
    initial: float, progress: float, epochs: int, cosine: bool, step_epochs: int, warmup: float = 0
) -> float:
    """The rate after `progress` epochs: half a cosine from `initial` to 0, or times 0.1 every `step_epochs` epochs.

    In the first `warmup` epochs it rises in a line from 0 to `initial`; the cosine begins after them.
    """
    if progress < warmup:
        return initial * progress / warmup
    if cosine:
        return initial * (1 + math.cos(math.pi * (progress - warmup) / (epochs - warmup))) / 2
    return initial * 0.1 ** (int(progress) // step_epochs)


def sgd(args: argparse.Namespace, model: nn.Module, weight_decay: float) -> torch.optim.Optimizer:
    recipe = {"momentum": args.momentum, "nesterov": args.nesterov, "weight_decay": weight_decay}
    return torch.optim.SGD(model.parameters(), args.lr, **recipe, fused=True)


# One epoch


def cross_entropy(outputs: Tensor | tuple[Tensor, ...], labels: Tensor, smoothing: float = 0, aux: float = 0) -> Tensor:
    """Mean cross-entropy of the scores (b, classes), plus `aux` times that of each auxiliary head."""
    scores, *others = (outputs,) if isinstance(outputs, Tensor) else outputs
    loss = F.cross_entropy(scores.float(), labels, label_smoothing=smoothing)
    return loss + aux * sum(F.cross_entropy(other.float(), labels, label_smoothing=smoothing) for other in others)


class TrainingStep:
    """Forward, loss, backward and update on one batch; with `graph`, on a GPU, as one CUDA graph.

    A step of a small network is bound by the launches of its some 300 kernels, between which a fast GPU idles; a graph
    is launched once. The first steps launch each kernel, and cuDNN chooses its algorithms; then one is captured, and
    replayed for each batch of that size. Weights, buffers and momentum may be changed in place between steps, as
    grafting does. Whatever the host decides is decided once: a model or a hook whose step depends on the host, as on
    Python's random numbers or on how many steps are done, cannot be captured.

    Args:
        optimizer: with `graph` a fused one, which reads the rate on the device.
        loss_function: of what the model returns and the labels; the mean over the batch.
    """

    WARM_UP = 3  # steps ahead of the capture

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_function: Callable[[Any, Tensor], Tensor] = cross_entropy,
        *,
        device: torch.device,
        amp: torch.dtype | None = None,
        top5: bool = False,
        graph: bool = False,
    ):
        self.model, self.optimizer, self.loss_function = model, optimizer, loss_function
        self.device, self.amp, self.top5 = device, amp, top5
        self.totals = torch.zeros(3 + top5, dtype=torch.float64, device=device)  # of all batches since they were zeroed
        self.rate = torch.zeros((), device=device) if graph and device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: tuple[Tensor, ...] = ()  # what the graph reads
        self.stream: torch.cuda.Stream | None = None  # of the first steps; the allocator keeps memory for each stream
        self.warm = 0

    def __call__(self, images: Tensor, labels: Tensor, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate if self.rate is None else self.rate.fill_(rate)
        if self.rate is None or (self.batch and self.batch[0].shape != images.shape):
            self.compute(images, labels)
        elif self.warm < self.WARM_UP:
            self.compute_aside(images, labels)
        else:
            self.replay(images, labels)

    def compute(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            outputs = self.model(images)
            loss = self.loss_function(outputs, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.totals += _totals(loss.detach() * len(labels), outputs, labels, self.top5)

    def compute_aside(self, images: Tensor, labels: Tensor) -> None:
        """On a stream of its own, as steps ahead of a capture have to be."""
        self.batch = self.batch or (images.clone(), labels.clone())
        self.warm += 1
        self.stream = self.stream or torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.compute(images, labels)
        torch.cuda.current_stream().wait_stream(self.stream)

    def replay(self, images: Tensor, labels: Tensor) -> None:
        if self.graph is None:
            self.optimizer.zero_grad(set_to_none=True)  # the gradients are to lie in the graph's memory
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # notes the step, and does not run it
                self.compute(*self.batch)
        for own, given in zip(self.batch, (images, labels), strict=True):
            own.copy_(given)
        self.graph.replay()


def train_one_epoch(
    step: TrainingStep,
    batches: Any,
    rate: Callable[[float], float],
    *,
    seed: int,
    epoch: int = 0,
    progress: Callable[..., Iterable[Any]] = lambda batches, *_: batches,
    reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
    rank: int = 0,
) -> Result:
    """Trains for one epoch. Raises Diverged if the loss was not finite.

    The host waits for the device at the end alone, and where `progress` shows figures. `rate` is a function of the
    epochs that are done, with the fraction of this one. The seed is that of the order, the augmentation and dropout, of
    which each rank has its own.
    """
    began, steps = time.perf_counter(), len(batches)
    torch.manual_seed(seed + rank)
    step.model.train()
    step.totals.zero_()
    for k, (images, labels) in enumerate(progress(batches.epoch(seed), step.totals, steps, epoch, rate(epoch))):
        step(images, labels, rate(epoch + k / steps))
    result = means(reduce(step.totals), began)
    check_finite(result.loss, "training", max(rate(epoch), rate(epoch + 1 - 1 / steps)))  # a warm-up begins at 0
    return result


def check_finite(loss: float, which: str, lr: float | None = None) -> None:
    """Raises Diverged, before anything of an epoch is published whose loss is no number."""
    if not math.isfinite(loss):
        found = f"the {which} loss became {loss}" + (f" at a learning rate of {lr:.4g}" if lr else "")
        raise Diverged(f"{found}: training has diverged; try a lower rate")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Any,
    *,
    device: torch.device,
    epoch: int = 0,
    amp: torch.dtype | None = None,
    top5: bool = False,
    progress: Callable[..., Iterable[Any]] = lambda batches, *_: batches,
    reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> Result:
    """Loss and accuracy of a model, which is left in evaluation mode."""
    began = time.perf_counter()
    model.eval()
    totals = torch.zeros(3 + top5, dtype=torch.float64, device=device)
    for images, labels in progress(batches.epoch(0), totals, len(batches), epoch, None):
        with torch.autocast(device.type, amp, enabled=amp is not None):
            scores = model(images)
        totals += _totals(F.cross_entropy(scores.float(), labels, reduction="sum"), scores, labels, top5)
    return means(reduce(totals), began)


def _totals(loss: Tensor, outputs: Tensor | tuple[Tensor, ...], labels: Tensor, top5: bool) -> Tensor:
    """(summed loss, images, correct, correct among five if asked for) of a batch, float64 on the device."""
    scores = (outputs if isinstance(outputs, Tensor) else outputs[0]).detach()
    images = torch.full((), len(labels), dtype=torch.float64, device=labels.device)
    if not top5:
        return torch.stack([loss.double(), images, (scores.argmax(1) == labels).sum().double()])
    hits = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return torch.stack([loss.double(), images, hits[:, 0].sum().double(), hits.sum().double()])


def means(totals: Tensor, began: float = math.nan) -> Result:
    """The figures of what has been summed, and the seconds since it began, by `time.perf_counter`."""
    loss, images, *correct = totals.tolist()  # waits for the device: only then is the work done
    seconds = time.perf_counter() - began
    accuracy, *top5 = (100 * count / images for count in correct)
    return Result(loss / images, accuracy, top5[0] if top5 else None, seconds)


# Rivals of grafting: averages of weights


def moving_average(model: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> nn.Module:
    """A copy that follows a model: `copy <- decay * copy + (1 - decay) * model` after each step of the optimizer.

    Batch-norm statistics are averaged as the weights are; integer entries are the model's.
    """
    average = copy.deepcopy(model)
    # Not those of their state dicts, in which a tied weight is twice.
    tensors = [(*each.parameters(), *each.buffers()) for each in (average, model)]
    pairs = list(zip(*tensors, strict=True))
    averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    integers = [pair for pair in pairs if not pair[0].is_floating_point()]
    update = get_ema_multi_avg_fn(decay)

    def follow(*_: object) -> None:
        update(averages, values, None)
        for own, other in integers:
            own.copy_(other)

    optimizer.register_step_post_hook(follow)
    return average


def add_to_mean(average: nn.Module, model: nn.Module, count: int, batches: Iterable) -> None:
    """Makes `average` the running mean of the weights at the ends of epochs (SWA, Izmailov et al. 2018, section 3.2).

    It is the mean of `count` epoch ends already; at 0, or below, it becomes the model itself. On the batches, images
    to train on, the mean's batch-norm statistics are computed anew.
    """
    get_swa_multi_avg_fn()(list(average.parameters()), list(model.parameters()), max(0, count))
    for own, other in zip(average.buffers(), model.buffers(), strict=True):
        own.copy_(other)
    if count > 0:
        update_bn(batches, average)


@torch.no_grad()
def pull(model: nn.Module, neighbour: Mapping[str, Tensor], networks: int, rate: float, pulls: float) -> None:
    """Pulls every floating-point entry towards the neighbour's, once an epoch (PAPA, Jolicoeur-Martineau et al. 2024).

    PAPA pulls each of N networks towards the mean of all every 10 steps, by `beta = 0.01 * lr_t / lr_0`: a number of
    pulls leaves `(1 - beta)^pulls` of its distance to the mean. For two networks the same comes of
    `W <- (1 - b) * W + b * W_neighbour` with `b = (1 - 1/N) * (1 - (1 - beta)^pulls)`; of more networks, the neighbour
    stands for all others.

    Args:
        rate: lr_t / lr_0.
        pulls: in an epoch.

    Raises MismatchError, naming the first entry that differs.
    """
    share = (1 - 1 / networks) * (1 - (1 - PAPA_PULL * rate) ** pulls)
    entries, _, others = paired(model, neighbour, ())
    for key, entry in entries.items():
        entry.lerp_(others[key].to(entry), share)
