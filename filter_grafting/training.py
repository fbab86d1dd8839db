"""One epoch of training, evaluation, learning rates and seeds: the same for every data set."""

import copy
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .errors import GraftingError


class Batches(Protocol):
    """The images of one data set, a batch at a time, on the training device."""

    def __len__(self) -> int:
        """Batches per epoch."""

    def epoch(self, seed: int) -> Iterable[tuple[Tensor, Tensor]]:
        """(images (b, c, h, w), labels (b,)) of one epoch; all that is random in it follows from the seed."""


def stream_seed(seed: int, network: int, epoch: int | str) -> int:
    """Seed of everything that is random for one network in one epoch; "weights" for its initial weights.

    As nothing random outlives an epoch, a resumed network needs no generator's state to go on exactly.
    """
    text = f"filter grafting, seed {seed}, network {network}, epoch {epoch}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def initial_rate(lr: float, network: int, networks: int, difflr: bool) -> float:
    """Learning rate that network i starts at: `lr`, or with difflr `lr * (1 + cos(pi * (N - i) / N)) / 2`."""
    return lr * (1 + math.cos(math.pi * (networks - network) / networks)) / 2 if difflr else lr


def learning_rate(initial: float, progress: float, epochs: int, cosine: bool, step_epochs: int) -> float:
    """Learning rate at a moment of training.

    Args:
        progress: epochs trained so far, with the fraction of the current one.
        cosine: half a cosine from `initial` to 0 over all epochs; otherwise times 0.1 every `step_epochs` epochs.
    """
    if cosine:
        return initial * (1 + math.cos(math.pi * progress / epochs)) / 2
    return initial * 0.1 ** (int(progress) // step_epochs)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.float(), labels)


def main_output(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The class scores; networks with auxiliary heads (Inception, GoogLeNet) give several outputs in training."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


def count_correct(scores: Tensor, labels: Tensor, topk: tuple[int, ...]) -> Tensor:
    """How many of the labels (b,) are among the k highest scores (b, classes), for each k: int64 (len(topk),)."""
    if topk == (1,):
        return (scores.argmax(1) == labels).sum()[None]
    hits = scores.topk(min(max(topk), scores.shape[1])).indices == labels[:, None]
    return torch.stack([hits[:, :k].sum() for k in topk])


def train_one_epoch(
    network: Callable[[Tensor], Tensor],
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[float], float],
    *,
    seed: int,
    device: torch.device,
    amp: bool = False,
    topk: tuple[int, ...] = (1,),
    loss_function: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    follow: Callable[[Iterable], Iterable] = iter,
    reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
    report: Callable[[int, Tensor, Tensor], None] | None = None,
    rank: int = 0,
) -> tuple[float, list[float]]:
    """Trains for one epoch, in which the host never waits for the device: (mean loss, accuracy in percent for each k).

    Args:
        network: called with images, in training mode.
        rate: learning rate as a function of the fraction of this epoch that is done, in [0, 1).
        seed: of the order, the augmentation and dropout.
        amp: bfloat16 autocast.
        follow: wraps the iteration over batches (a progress bar, a check for signals).
        reduce: sums the totals over all processes that train this network.
        report: called after each step with its number, the batch's totals and the epoch's so far, as tensors on the
            device: (loss, images correct for each k, images).
        rank: of the processes that train this network; each has its own dropout.

    Raises:
        GraftingError: if the loss was not finite.
    """
    torch.manual_seed(seed + rank)
    totals = torch.zeros(len(topk) + 2, dtype=torch.float64, device=device)
    steps = len(batches)
    for step, (images, labels) in enumerate(follow(batches.epoch(seed))):
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = network(images)
            loss = loss_function(outputs, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        batch = _totals(loss.detach() * len(labels), main_output(outputs).detach(), labels, topk)
        totals += batch
        if report is not None:
            report(step, batch, totals)
    loss, accuracies = _means(reduce(totals))
    if not math.isfinite(loss):
        raise diverged("training", loss, rate(0), amp)
    return loss, accuracies


def diverged(which: str, loss: float, rate: float, amp: bool) -> GraftingError:
    return GraftingError(
        f"the {which} loss became {loss} at a learning rate of {rate:.4g}: training has diverged. Nothing of "
        f"this epoch was published; try a lower --lr" + (", or do without --amp" if amp else "")
    )


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Batches,
    *,
    device: torch.device,
    amp: bool = False,
    topk: tuple[int, ...] = (1,),
    follow: Callable[[Iterable], Iterable] = iter,
    reduce: Callable[[Tensor], Tensor] = lambda totals: totals,
) -> tuple[float, list[float]]:
    """(mean cross-entropy loss, accuracy in percent for each k); the network is left in evaluation mode.

    Accuracy at k counts the images whose label is among the k highest scores (all of them if there are fewer classes).
    """
    network.eval()
    totals = torch.zeros(len(topk) + 2, dtype=torch.float64, device=device)
    for images, labels in follow(batches.epoch(0)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            scores = network(images)
        totals += _totals(F.cross_entropy(scores.float(), labels, reduction="sum"), scores, labels, topk)
    return _means(reduce(totals))


def _totals(loss: Tensor, scores: Tensor, labels: Tensor, topk: tuple[int, ...]) -> Tensor:
    """(summed loss, images correct for each k, images) of a batch, float64 on the device."""
    images = torch.full((1,), len(labels), dtype=torch.float64, device=labels.device)
    return torch.cat([loss.double()[None], count_correct(scores, labels, topk).double(), images])


def _means(totals: Tensor) -> tuple[float, list[float]]:
    loss, *correct, images = totals.tolist()
    return loss / images, [100 * count / images for count in correct]


def moving_average(network: nn.Module, optimizer: torch.optim.Optimizer, decay: float) -> nn.Module:
    """A copy that follows a network: `copy <- decay * copy + (1 - decay) * network` after each step of the optimizer.

    Batch-norm statistics are averaged as the weights are; integer entries are the network's.
    """
    average = copy.deepcopy(network).requires_grad_(False)
    pairs = list(zip(average.state_dict().values(), network.state_dict().values(), strict=True))
    means, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    integers = [pair for pair in pairs if not pair[0].is_floating_point()]
    update = get_ema_multi_avg_fn(decay)

    def follow(*_: object) -> None:
        update(means, values, None)
        for own, other in integers:
            own.copy_(other)

    optimizer.register_step_post_hook(follow)
    return average


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within it, operations without a deterministic implementation raise, and cuDNN does not choose by timing."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch multiplies no matrices without it
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
