"""What happens on CUDA, without a GPU: devices, memory layouts, the number of operations, and no wait in a step."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from fake_cuda import CUDA, HostWaits, fake_cuda, through_a_file, to_fake_cuda
from torch import Tensor

from filter_grafting import graft, plain_state
from filter_grafting.rings import Checkpoint
from filter_grafting.states import State
from grafting_cifar import data, models
from grafting_imagenet import models as imagenet_models
from grafting_imagenet.data import normalise
from training import loop
from training.models import restore, to_resume

# Kernels of a step in fp32 and with amp, about: as many as with torch 2.14, and 2 % for other versions. More of them
# make a small network slower on a fast GPU.
CEILINGS = {
    "resnet20": (222, 265),
    "resnet32_leaky": (333, 400),
    "wrn28_10": (275, 340),
    "mobilenetv2": (492, 595),
    "vgg16": (152, 212),
}
TORCHVISION = "shufflenet_v2_x0_5"
precisions = pytest.mark.parametrize("amp", (None, torch.bfloat16), ids=("fp32", "amp"))


class Steps:
    """Watches the batch loop, from its first batch to the end of its last; counts the operations of each step."""

    def __init__(self, watch):
        self.watch, self.counts = watch, []

    def __call__(self, batches, *_):
        self.watch.strict, before = True, self.watch.launches
        for batch in batches:
            yield batch
            now = self.watch.launches
            self.counts.append(now - before)
            before = now


def after(watch):
    """Stands in for the sum over ranks, after which the host may wait."""

    def reduce(totals):
        watch.strict = False
        return SimpleNamespace(tolist=lambda: [1.0] * len(totals))

    return reduce


class Random:
    """Batches of ImageNet, as the device gets them."""

    def __len__(self):
        return 1

    def epoch(self, seed):
        images = torch.empty(4, 224, 224, 3, dtype=torch.uint8, device=CUDA)
        yield normalise(images), torch.zeros(4, dtype=torch.int64, device=CUDA)


def cifar_batches(augment=True, steps=1):
    images = 128 * steps
    split = data.Split(torch.empty(images, 32, 32, 3, dtype=torch.uint8), torch.zeros(images, dtype=torch.int64))
    return data.Batches(split, 128, CUDA, augment)


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)


def train(watch, model, optimizer, batches, **options):
    """The number of operations of the last step of an epoch."""
    steps = Steps(watch)
    step = loop.TrainingStep(model, optimizer, device=CUDA, **options)
    loop.train_one_epoch(step, batches, lambda progress: 0.1, seed=0, progress=steps, reduce=after(watch))
    return steps.counts[-1]


def go_on(watch, model, optimizer, batches, amp):
    """Evaluates, publishes, resumes in another process, grafts, and trains on."""
    options = {"device": CUDA, "amp": amp, "progress": Steps(watch), "reduce": after(watch)}
    loop.evaluate(model, batches, **options)
    row, settings = {"epoch": 0}, {"lr": 0.1}
    state, extra = through_a_file((plain_state(model), to_resume(optimizer, row, [], settings)))
    assert restore(Checkpoint(0, State(state), extra, Path("file")), model, optimizer, settings) == 1
    layers = graft(model, {key: entry.clone() for key, entry in state.items()})
    tensors = [*model.state_dict().values(), *(one["momentum_buffer"] for one in optimizer.state.values())]
    assert layers and all(entry.device == CUDA for entry in tensors)


@precisions
@pytest.mark.parametrize("name", [*CEILINGS, TORCHVISION])
def test_a_step_never_makes_the_host_wait_and_does_no_more_than_it_did(name, amp):
    top5 = name == TORCHVISION
    model = (imagenet_models if top5 else models).build(name, 10).to(memory_format=torch.channels_last)
    with fake_cuda() as watch:
        optimizer, batches = make_optimizer(to_fake_cuda(model)), Random() if top5 else cifar_batches(steps=2)
        launches = train(watch, model, optimizer, batches, amp=amp, top5=top5)
        assert top5 or launches <= CEILINGS[name][amp is not None]
        go_on(watch, model, optimizer, Random() if top5 else cifar_batches(augment=False), amp)
        train(watch, model, optimizer, batches, amp=amp, top5=top5)


@precisions
def test_nor_does_a_step_that_is_to_be_captured_in_a_graph(monkeypatch, amp):
    made = []  # streams, which need a GPU
    monkeypatch.setattr(torch.cuda, "Stream", lambda: made.append(Mock()) or made[-1])
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    model = models.build("resnet20", 10).to(memory_format=torch.channels_last)
    with fake_cuda() as watch:
        train(watch, model, make_optimizer(to_fake_cuda(model)), cifar_batches(steps=3), amp=amp, graph=True)
    assert len(made) == 1, "the allocator would keep memory for each"


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.nonzero, Tensor.cpu, bool])
def test_a_wait_that_someone_adds_to_the_step_is_found(wait):
    def planted(outputs, labels):
        loss = loop.cross_entropy(outputs, labels)
        wait(loss.detach())
        return loss

    model = models.build("resnet20", 10)
    with fake_cuda() as watch, pytest.raises(HostWaits):
        train(watch, model, make_optimizer(to_fake_cuda(model)), cifar_batches(), loss_function=planted)
