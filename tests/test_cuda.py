"""What only a GPU can show: skipped without one; benchmarks/gpu.py runs it on the first machine with one."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_graphs import make_training, rate

from benchmarks.graphs import GraphedTraining
from filter_grafting import FileRing, entropy, graft, plain_state
from filter_grafting.scions import internal, noise
from grafting_cifar import data, models
from training.loop import evaluate, train_one_epoch
from training.models import compiled
from training.process import amp_dtype, deterministic, pick_device

pytestmark = pytest.mark.cuda
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
ROOT = Path(__file__).resolve().parent.parent


def pair(name, device):
    torch.manual_seed(2)
    first, second = models.build(name, 10), models.build(name, 10)
    with torch.no_grad():
        for model in (first, second):
            for entry in model.state_dict().values():
                if entry.is_floating_point() and entry.dim() == 1:
                    entry.uniform_(0.5, 1.5)
    return (model.to(device, memory_format=torch.channels_last) for model in (first, second))


def on_cuda(images=400, name="resnet20"):
    """(model, optimizer, batches) as in test_graphs, on the GPU."""
    model, _, batches = make_training(images, name)
    model.to(CUDA)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    return model, optimizer, data.Batches(data.Split(batches.images, batches.labels), 16, CUDA, augment=True)


def train(model, optimizer, batches, epochs=2, forward=None, amp=None):
    for epoch in range(epochs):
        options = {"seed": epoch, "device": CUDA, "epoch": epoch, "amp": amp}
        result = train_one_epoch(forward or model, batches, optimizer, rate, **options)
    return result


def test_the_gpu_can_be_used():
    assert pick_device(None) == CUDA
    assert amp_dtype(True, CUDA)[0] in (torch.bfloat16, None)


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv2", "vgg16"])
def test_entropies_are_the_cpus(name):
    for weight in next(pair(name, CPU)).parameters():
        assert entropy(weight.to(CUDA)) == pytest.approx(entropy(weight), abs=1e-12)


@pytest.mark.parametrize(("name", "level"), [("resnet20", "layer"), ("mobilenetv2", "layer"), ("vgg16", "filter")])
def test_a_graft_is_the_cpus(name, level):
    results = []
    for device in (CPU, CUDA):
        model, neighbour = pair(name, device)
        layers = graft(model, neighbour.state_dict(), level=level)
        shares = {key: torch.as_tensor(layer.coefficient).cpu() for key, layer in layers.items()}
        results.append((shares, {key: entry.cpu() for key, entry in model.state_dict().items()}))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_scions_are_the_cpus():
    results = []
    for device in (CPU, CUDA):
        model, _ = pair("resnet20", device)
        with torch.no_grad():
            model.conv1.weight[:8] *= 1e-4  # invalid filters
        noise(model, 0.5, generator=torch.Generator().manual_seed(3))
        internal(model)
        results.append({key: entry.cpu() for key, entry in model.state_dict().items()})
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_what_is_published_from_the_gpu_is_loaded_there_without_a_map_location(tmp_path):
    model, neighbour = pair("resnet20", CUDA)
    with FileRing(tmp_path, 1, 2) as ring, FileRing(tmp_path, 2, 2) as other:
        ring.publish(0, plain_state(model))
        loaded = torch.load(io.BytesIO(ring.path(0).read_bytes()))["net"]
        assert all(entry.device == CUDA for entry in loaded.values())
        torch.testing.assert_close(dict(loaded), dict(model.state_dict()), rtol=0, atol=0)
        assert graft(neighbour, other.wait(0))


def test_deterministic_training_comes_out_the_same_twice():
    outcomes = []
    with deterministic(True):
        for _ in range(2):
            model, optimizer, batches = on_cuda()
            train(model, optimizer, batches)
            outcomes.append(model.state_dict())
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_training_is_the_cpus_within_rounding(amp):
    model, optimizer, _ = on_cuda(32)
    other, others, on_cpu = make_training(32)
    weights = {"rtol": 1e-2, "atol": 1e-3} if amp is None else {"rtol": 0.1, "atol": 3e-2}
    whole = next(iter(data.Batches(data.Split(on_cpu.images, on_cpu.labels), 16, CPU, augment=False).epoch(0)))
    for one, own in ((model, optimizer), (other, others)):
        images, labels = (tensor.to(next(one.parameters()).device) for tensor in whole)
        with torch.autocast(images.device.type, amp, enabled=amp is not None and images.is_cuda):
            loss = torch.nn.functional.cross_entropy(one(images).float(), labels)
        loss.backward()
        own.step()
    torch.testing.assert_close({k: v.cpu() for k, v in model.state_dict().items()}, other.state_dict(), **weights)


def test_a_compiled_model_is_the_eager_one_within_rounding_after_a_graft():
    outcomes = []
    for compiling in (False, True):
        with deterministic(True):
            model, optimizer, batches = on_cuda(64)
            neighbour = {key: entry.clone() for key, entry in model.state_dict().items()}
            forward = compiled(model, CUDA) if compiling else model
            train(model, optimizer, batches, 1, forward)
            graft(model, neighbour)  # in place: what was compiled must see it
            outcomes.append(evaluate(forward, batches, device=CUDA)[:2])
    assert outcomes[0] == pytest.approx(outcomes[1], rel=5e-2)


@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_a_graphed_step_is_the_eager_one_within_rounding_and_sees_a_graft(amp):
    with deterministic(True):
        model, optimizer, batches = on_cuda(104)  # six whole batches and half a one
        other = copy.deepcopy(model)
        others = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, fused=True)
        neighbour = {key: entry.clone() for key, entry in model.state_dict().items()}
        graphed = GraphedTraining(model, batches, optimizer, device=CUDA, amp=amp)
        for epoch in range(3):
            ours = graphed.epoch(rate, seed=epoch, epoch=epoch)
            options = {"seed": epoch, "device": CUDA, "epoch": epoch, "amp": amp}
            expected = train_one_epoch(other, batches, others, rate, **options)
            assert ours.loss == pytest.approx(expected.loss, rel=2e-2)
            torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=2e-2, atol=2e-3)
            graft(model, neighbour)
            graft(other, neighbour)
        assert graphed.graph is not None


def test_a_killed_network_goes_on_bit_for_bit(tmp_path):
    """As the benchmark does it, with processes on the GPU."""
    command = [sys.executable, str(ROOT / "benchmarks" / "ring.py"), "--device", "cuda", "--model", "resnet20"]
    command += ["--images", "1000", "--epochs", "3", "--flags=--deterministic", "--same", "--killed"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=550)
    assert result.returncode == 0, result.stdout + result.stderr
