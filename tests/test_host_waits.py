"""In the batch loop the host never waits for the device: on "meta", where tensors have no values, such a wait fails."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from grafting_cifar import data, models
from grafting_imagenet import models as imagenet_models
from grafting_imagenet.data import normalise
from training import images, loop

META = torch.device("meta")
# Operations of two steps, about: as many as with torch 2.14, and 2 % for other versions. More of them make a small
# network slower on a fast GPU, which is bound by their launches.
CEILINGS = {"resnet20": 835, "mobilenetv2": 2110, "vgg16": 676}


class Count(TorchDispatchMode):
    """Counts the operations that are work for a device."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation)
        self.operations += name.startswith("aten.") and not operation.is_view and "empty" not in name
        return operation(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def meta(monkeypatch):
    """What torch lacks on "meta": autocast, and generators, whose numbers have no values there anyway."""
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: torch.enable_grad())
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": SimpleNamespace(manual_seed=lambda seed: None))
    images._scale_and_shift.cache_clear()
    yield
    images._scale_and_shift.cache_clear()


def cifar_batches():
    split = data.Split(torch.empty(256, 32, 32, 3, dtype=torch.uint8), torch.zeros(256, dtype=torch.int64))
    return data.Batches(split, 128, META, augment=True)


def at_the_end(totals):
    """Stands in for the sum over ranks, after which the host may wait."""
    return torch.ones(len(totals))


def train(model, batches, loss=loop.cross_entropy, top5=False):
    """The number of operations in an epoch of training, after which it is tested."""
    model.to(META, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    options = {"device": META, "reduce": at_the_end, "top5": top5}
    with Count() as count:
        loop.train_one_epoch(model, batches, optimizer, lambda progress: 0.1, loss, seed=0, **options)
    loop.evaluate(model, batches, **options)
    return count.operations


@pytest.mark.parametrize("name", CEILINGS)
def test_a_cifar_step_does_no_more_than_it_did(name):
    assert train(models.build(name, 10), cifar_batches()) <= CEILINGS[name]


def test_a_step_of_torchvisions_models():
    class Batches(list):
        def epoch(self, seed):
            pixels = torch.empty(4, 64, 64, 3, dtype=torch.uint8, device=META)
            yield normalise(pixels), torch.zeros(4, dtype=torch.int64, device=META)

    train(imagenet_models.build("mobilenet_v3_small", 10), Batches([0]), top5=True)


@pytest.mark.parametrize("wait", [Tensor.item, Tensor.cpu, Tensor.tolist, bool, lambda loss: loss.isnan().nonzero()])
def test_a_wait_that_someone_adds_to_the_step_is_found(wait):
    def planted(outputs, labels):
        loss = loop.cross_entropy(outputs, labels)
        wait(loss.detach())
        return loss

    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), cifar_batches(), planted)
