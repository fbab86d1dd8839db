"""One epoch of training, evaluation, learning rates and seeds: the same for every data set."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


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


def train_one_epoch(
    network: Callable[[Tensor], Tensor],
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[float], float],
    *,
    seed: int,
    device: torch.device,
    amp: bool = False,
    loss_function: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    follow: Callable[[Iterable], Iterable] = iter,
) -> tuple[float, float]:
    """Trains for one epoch, in which the host never waits for the device: (mean loss, accuracy in percent).

    Args:
        network: called with images, in training mode.
        rate: learning rate as a function of the fraction of this epoch that is done, in [0, 1).
        seed: of the order, the augmentation and dropout.
        amp: bfloat16 autocast.
        follow: wraps the iteration over batches (a progress bar, a check for signals).

    Raises:
        GraftingError: if the loss was not finite.
    """
    torch.manual_seed(seed)
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    samples = 0
    for step, (images, labels) in enumerate(follow(batches.epoch(seed))):
        current = rate(step / len(batches))
        for group in optimizer.param_groups:
            group["lr"] = current
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = network(images)
            loss = loss_function(outputs, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        samples += len(labels)
        total_loss += loss.detach() * len(labels)
        correct += (main_output(outputs).argmax(1) == labels).sum()
    mean_loss = total_loss.item() / samples
    if not math.isfinite(mean_loss):
        raise GraftingError(
            f"the training loss became {mean_loss} at learning rate {current:.4g}: training has diverged. Nothing of this "
            f"epoch was published; try a lower --lr" + (", or without --amp" if amp else "")
        )
    return mean_loss, 100 * correct.item() / samples


def main_output(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The class scores; networks with auxiliary heads (Inception, GoogLeNet) give several in training."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@torch.inference_mode()
def evaluate(
    network: nn.Module,
    batches: Batches,
    *,
    device: torch.device,
    amp: bool = False,
    topk: tuple[int, ...] = (1,),
    follow: Callable[[Iterable], Iterable] = iter,
) -> tuple[float, list[float]]:
    """(mean cross-entropy loss, accuracy in percent for each k of topk); the network is left in evaluation mode.

    Accuracy at k counts the images whose label is among the k highest scores (all of them if there are fewer classes).
    """
    network.eval()
    total_loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros(len(topk), dtype=torch.int64, device=device)
    samples = 0
    for images, labels in follow(batches.epoch(0)):
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            outputs = network(images)
        outputs = outputs.float()
        total_loss += F.cross_entropy(outputs, labels, reduction="sum")
        highest = outputs.topk(min(max(topk), outputs.shape[1])).indices == labels[:, None]
        correct += torch.stack([highest[:, :k].sum() for k in topk])
        samples += len(labels)
    mean_loss, *counts = torch.cat([total_loss[None], correct.double()]).tolist()
    return mean_loss / samples, [100 * count / samples for count in counts]


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within it, operations without a deterministic implementation raise, and cuDNN does not choose by timing."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
