"""One epoch of training with the whole step in one CUDA graph. It has not run on CUDA yet; no script uses it so far.

A step of a small network is bound by the launches of its some 300 kernels, between which a fast GPU idles. A graph is
launched once. It starts within a second and needs no compiler, where torch.compile takes a minute and needs one.
"""

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.loop import Result, _totals, check_finite, cross_entropy, means

WARM_UP = 3  # steps before the capture, in which cuDNN chooses its algorithms; they train, as all others do


class GraphedTraining:
    """Trains as `loop.train_one_epoch` does, with the same numbers where the kernels are the same.

    Forward, loss, backward, optimizer (a fused one, which reads the rate on the device) and totals are captured. An
    epoch's images (of `grafting_cifar.data`) are augmented at once: 1.5 GB of memory for 50,000. A last batch that is
    smaller is trained eagerly, on the CPU all are. Weights may be changed in place between epochs, as grafting does.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Any],
        batches: Any,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        amp: torch.dtype | None = None,
    ):
        self.model, self.optimizer, self.device, self.amp = model, optimizer, device, amp
        self.steps, self.batch_size = len(batches), batches.batch_size
        self.whole = copy.copy(batches)
        self.whole.batch_size = batches.samples
        self.rate = torch.zeros((), device=device)
        for group in optimizer.param_groups:
            group["lr"] = self.rate
        self.totals = torch.zeros(3, dtype=torch.float64, device=device)
        self.graph, self.inputs, self.warm = None, (), 0

    def step(self, images: Tensor, labels: Tensor) -> None:
        with torch.autocast(self.device.type, self.amp, enabled=self.amp is not None):
            outputs = self.model(images)
            loss = cross_entropy(outputs, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.totals += _totals(loss.detach() * len(labels), outputs, labels, top5=False)

    def epoch(self, rate: Callable[[float], float], *, seed: int, epoch: int = 0) -> Result:
        """The arguments are those of `train_one_epoch`; raises Diverged as well."""
        began = time.perf_counter()
        torch.manual_seed(seed)
        self.totals.zero_()
        images, labels = (tensor.split(self.batch_size) for tensor in next(iter(self.whole.epoch(seed))))
        for step, batch in enumerate(zip(images, labels, strict=True)):
            self.rate.fill_(rate(epoch + step / self.steps))
            if self.device.type != "cuda" or len(batch[1]) < self.batch_size:
                self.step(*batch)
            elif self.warm < WARM_UP:
                self.warm += 1
                self._aside(batch)
            else:
                self._replay(batch)
        result = means(self.totals, began)
        check_finite(result.loss, "training", rate(epoch))
        return result

    def _aside(self, batch: tuple[Tensor, Tensor]) -> None:
        """A step on a stream of its own, as steps before a capture have to be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.step(*batch)
        torch.cuda.current_stream().wait_stream(stream)

    def _replay(self, batch: tuple[Tensor, Tensor]) -> None:
        if self.graph is None:
            self.inputs = tuple(tensor.clone() for tensor in batch)
            self.optimizer.zero_grad(set_to_none=True)  # the gradients are to lie in the graph's memory
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # notes the step, and does not run it
                self.step(*self.inputs)
        for own, tensor in zip(self.inputs, batch, strict=True):
            own.copy_(tensor)
        self.graph.replay()
