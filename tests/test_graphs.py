"""A step that is to be captured in a graph trains as any other does; and --compile compiles once."""

import copy

import pytest
import torch

from filter_grafting import graft
from grafting_cifar import data, models
from training.loop import TrainingStep, moving_average, train_one_epoch
from training.models import compiled, load_optimizer
from training.process import deterministic

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


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
    """One that is as exact in float32, in which a graph reads it."""
    return 2 ** -(3 + int(2 * progress))


def assert_trains_as_eager(step, model, batches, rtol, atol):
    """That a step of this model does, over three epochs, with a graft after each."""
    eager = copy.deepcopy(model)
    plain = TrainingStep(eager, make_optimizer(eager), device=step.device, amp=step.amp)
    for epoch in range(3):
        ours, expected = (train_one_epoch(one, batches, rate, seed=epoch, epoch=epoch) for one in (step, plain))
        assert ours.loss == pytest.approx(expected.loss, rel=rtol)
        torch.testing.assert_close(model.state_dict(), eager.state_dict(), rtol=rtol, atol=atol)
        neighbour = {key: entry.flip(0) if entry.dim() else entry for key, entry in eager.state_dict().items()}
        assert graft(model, neighbour) and graft(eager, neighbour)


@pytest.mark.cuda
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_step_that_is_captured_trains_the_same_and_sees_rates_and_grafts(amp):
    model, optimizer, batches = make_training(CUDA)
    step = TrainingStep(model, optimizer, device=CUDA, amp=amp, graph=True)
    with deterministic(True):
        assert_trains_as_eager(step, model, batches, 0, 0)
    assert step.graph is not None


@pytest.mark.cuda
def test_a_captured_step_goes_on_from_a_checkpoint_and_its_average_follows():
    outcomes = []
    for resumed in (False, True):
        with deterministic(True):
            step, average, batches = make_averaged()
            for epoch in range(2):
                if epoch == 1 and resumed:
                    saved = copy.deepcopy((step.model.state_dict(), average.state_dict(), step.optimizer.state_dict()))
                    step, average, _ = make_averaged()
                    step.model.load_state_dict(saved[0])
                    average.load_state_dict(saved[1])
                    load_optimizer(step.optimizer, saved[2])
                train_one_epoch(step, batches, rate, seed=epoch, epoch=epoch)
        outcomes.append([*step.model.state_dict().values(), *average.state_dict().values()])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def make_averaged():
    model, optimizer, batches = make_training(CUDA)
    average = moving_average(model, optimizer, 0.9)
    return TrainingStep(model, optimizer, device=CUDA, graph=True), average, batches


def test_a_compiled_model_is_compiled_once_for_all_rates_and_grafts(monkeypatch):
    graphs, compile_as_it_is = [], torch.compile

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compile_counted(model, dynamic, mode):
        return compile_as_it_is(model, dynamic=dynamic, backend=counted, fullgraph=True)  # raises on a graph break

    monkeypatch.setattr(torch, "compile", compile_counted)
    torch._dynamo.reset()
    model, optimizer, batches = make_training(images=40)
    step = TrainingStep(compiled(model, CPU), optimizer, device=CPU)
    assert_trains_as_eager(step, model, batches, 1e-3, 1e-4)
    assert len(graphs) == 2, "one graph for the whole batches and one for the last"
