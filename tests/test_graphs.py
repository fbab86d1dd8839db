"""A step that is to be captured in a graph trains as any other does; and --compile compiles once."""

import copy

import pytest
import torch

from benchmarks.graphs import GraphedTraining
from filter_grafting import graft, plain_state
from grafting_cifar import data, models
from training.loop import train_one_epoch
from training.models import compiled

CPU = torch.device("cpu")


def make_training(images=40, name="resnet20"):
    """(model, optimizer, batches): two batches of 16, and one of 8."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    split = data.Split(pixels, torch.randint(10, (images,), generator=generator))
    torch.manual_seed(1)
    model = models.build(name, 10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    return model, optimizer, data.Batches(split, 16, CPU, augment=True)


def rate(progress):
    return 0.1 / (1 + progress)


def test_an_epoch_augmented_at_once_with_the_rate_as_a_tensor_trains_the_same():
    model, optimizer, batches = make_training()
    other = copy.deepcopy(model)
    graphed = GraphedTraining(model, batches, optimizer, device=CPU)
    others = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    for epoch in range(2):
        ours = graphed.epoch(rate, seed=epoch, epoch=epoch)
        expected = train_one_epoch(other, batches, others, rate, seed=epoch, device=CPU, epoch=epoch)
        assert ours[:2] == pytest.approx(expected[:2], rel=1e-5)
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-5)


def test_a_compiled_model_is_compiled_once_for_all_rates_and_grafts(monkeypatch):
    graphs, compile_as_it_is = [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_counted(model, dynamic, mode):
        return compile_as_it_is(model, dynamic=dynamic, backend=counted, fullgraph=True)  # raises on a graph break

    monkeypatch.setattr(torch, "compile", compile_counted)
    torch._dynamo.reset()
    model, optimizer, batches = make_training()
    eager = copy.deepcopy(model)
    others = torch.optim.SGD(eager.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    forward, made = compiled(model, CPU), []
    for epoch in range(3):
        options = {"seed": epoch, "device": CPU, "epoch": epoch}
        train_one_epoch(forward, batches, optimizer, rate, **options)
        train_one_epoch(eager, batches, others, rate, **options)
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=1e-3, atol=1e-4)
        neighbour = {key: entry.clone().flip(0) if entry.dim() else entry for key, entry in plain_state(model).items()}
        assert graft(model, neighbour) and graft(eager, neighbour)
        made.append(len(graphs))
    assert made == [2, 2, 2], "one graph for the whole batches and one for the last"
