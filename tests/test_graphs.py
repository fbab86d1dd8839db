"""A step that is to be captured in a graph trains as any other does; and --compile compiles once."""

import copy

import pytest
import torch

from benchmarks.graphs import GraphedTraining
from filter_grafting import graft
from grafting_cifar import data, models
from training.loop import train_one_epoch
from training.models import compiled
from training.process import deterministic

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
KINDS = [(CPU, None)] + [pytest.param(CUDA, amp, marks=pytest.mark.cuda) for amp in (None, torch.bfloat16)]


def make_training(device=CPU, images=104):
    """(model, optimizer, batches): six batches of 16, and one of 8."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(pixels, torch.randint(10, (images,), generator=generator))
    torch.manual_seed(1)
    model = models.build("resnet20", 10).to(device, memory_format=torch.channels_last).train()
    return model, make_optimizer(model), data.Batches(split, 16, device, augment=True)


def make_optimizer(model):
    return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)


def rate(progress):
    return 0.1 / (1 + progress)


def assert_trains_as_eager(model, train, batches, device, amp, rtol, atol):
    """Over three epochs, with a graft after each."""
    eager = copy.deepcopy(model)
    optimizer = make_optimizer(eager)
    for epoch in range(3):
        ours = train(epoch)
        options = {"seed": epoch, "device": device, "epoch": epoch, "amp": amp}
        expected = train_one_epoch(eager, batches, optimizer, rate, **options)
        assert ours.loss == pytest.approx(expected.loss, rel=rtol)
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=rtol, atol=atol)
        neighbour = {key: entry.flip(0) if entry.dim() else entry for key, entry in eager.state_dict().items()}
        assert graft(model, neighbour) and graft(eager, neighbour)


@pytest.mark.parametrize(("device", "amp"), KINDS)
def test_an_epoch_that_is_augmented_at_once_and_captured_trains_the_same_and_sees_grafts(device, amp):
    model, optimizer, batches = make_training(device)
    graphed = GraphedTraining(model, batches, optimizer, device=device, amp=amp)
    tolerance = (1e-4, 1e-5) if device == CPU else (2e-2, 2e-3)
    with deterministic(device == CUDA):
        assert_trains_as_eager(
            model, lambda epoch: graphed.epoch(rate, seed=epoch, epoch=epoch), batches, device, amp, *tolerance
        )
    assert (graphed.graph is not None) == (device == CUDA)


def test_a_compiled_model_is_compiled_once_for_all_rates_and_grafts(monkeypatch):
    graphs, compile_as_it_is = [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_counted(model, dynamic, mode):
        return compile_as_it_is(model, dynamic=dynamic, backend=counted, fullgraph=True)  # raises on a graph break

    def train(epoch):
        result = train_one_epoch(forward, batches, optimizer, rate, seed=epoch, device=CPU, epoch=epoch)
        assert len(graphs) == 2, "one graph for the whole batches and one for the last"
        return result

    monkeypatch.setattr(torch, "compile", compile_counted)
    torch._dynamo.reset()
    model, optimizer, batches = make_training(images=40)
    forward = compiled(model, CPU)
    assert_trains_as_eager(model, train, batches, CPU, None, 1e-3, 1e-4)
