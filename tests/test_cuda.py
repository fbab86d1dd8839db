"""What only a GPU can show: skipped without one; benchmarks/gpu.py runs it where there is one."""

import io

import pytest
import torch
from test_graphs import CPU, CUDA, make_training

from filter_grafting import FileRing, graft, plain_state
from filter_grafting.scions import internal, noise
from grafting_cifar import models
from training.loop import TrainingStep, evaluate, train_one_epoch
from training.models import compiled
from training.process import deterministic, pick_device

pytestmark = pytest.mark.cuda


def test_the_gpu_can_be_used():
    assert pick_device(None) == CUDA


def test_scions_are_the_cpus():
    results = []
    for device in (CPU, CUDA):
        torch.manual_seed(2)
        model = models.build("resnet20", 10).to(device, memory_format=torch.channels_last)
        with torch.no_grad():
            model.conv1.weight[:8] *= 1e-4  # invalid filters
        noise(model, 0.5, generator=torch.Generator().manual_seed(3))
        internal(model)
        results.append(dict(model.state_dict()))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, check_device=False)


def test_what_is_published_from_the_gpu_is_loaded_there_without_a_map_location(tmp_path):
    model, neighbour = make_training(CUDA)[0], make_training(CUDA)[0]
    with FileRing(tmp_path, 1, 2) as ring, FileRing(tmp_path, 2, 2) as other:
        ring.publish(0, plain_state(model))
        loaded = torch.load(io.BytesIO(ring.path(0).read_bytes()))["net"]
        assert all(entry.device == CUDA for entry in loaded.values())
        torch.testing.assert_close(dict(loaded), dict(model.state_dict()), rtol=0, atol=0)
        assert graft(neighbour, other.wait(0))


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_step_is_the_cpus_within_rounding(amp, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    images, labels = next(iter(make_training()[2].epoch(0)))
    results = []
    for device in (CPU, CUDA):
        model, optimizer, _ = make_training(device)
        step = TrainingStep(model, optimizer, device=device, amp=amp if device == CUDA else None)
        step(images.to(device), labels.to(device), 0.1)
        results.append(dict(model.state_dict()))
    rtol, atol = (0.1, 3e-2) if amp else (1e-2, 1e-3)
    torch.testing.assert_close(*results, rtol=rtol, atol=atol, check_device=False)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_compiled_model_is_captured_and_trains_about_as_the_eager_one_with_a_graft(amp):
    outcomes = []
    for compiling in (False, True):
        with deterministic(True):
            model, optimizer, batches = make_training(CUDA, 64)
            neighbour = {key: entry.clone() for key, entry in model.state_dict().items()}
            step = TrainingStep(
                compiled(model, CUDA, compiling, True), optimizer, device=CUDA, amp=amp, graph=compiling
            )
            losses = [train_one_epoch(step, batches, lambda _: 0.01, seed=0).loss]
            graft(model, neighbour)  # in place: what was captured must see it
            losses += [train_one_epoch(step, batches, lambda _: 0.01, seed=seed).loss for seed in (1, 2)]
            outcomes.append([*losses, evaluate(step.model, batches, device=CUDA).loss])
            assert (step.graph is not None) == compiling
    assert outcomes[0] == pytest.approx(outcomes[1], rel=5e-2)
