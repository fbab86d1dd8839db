"""Networks that meet every few steps in one process: PAPA and mutual learning."""

import math
import types

import pytest
import torch
import torch.nn.functional as F
from processes import read_table
from torch import nn

from experiments import together
from filter_grafting.checkpoint import load
from filter_grafting.errors import SettingsError
from grafting_cifar import flags as cifar_flags
from grafting_cifar import grafting as cifar

HEARS_NOTHING = types.SimpleNamespace(check=lambda: None, finish_batch=lambda: None)


def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, num_classes))


@pytest.fixture
def train(images, tmp_path):
    def train(how, name, *flags, schedule="--cos"):
        line = f"--together {how} --num 3 --model test_together:small --batch_size 2 --epochs 3 --device cpu {schedule}"
        args = together.parse([*line.split(), "--data", str(images), "--s", str(tmp_path / name), *flags])
        together.main(args, HEARS_NOTHING)
        return load(tmp_path / name / "final1.t7")["net"]

    return train


def test_papa_pulls_every_entry_towards_the_mean_of_all():
    torch.manual_seed(0)
    networks = [small(2) for _ in range(3)]
    before = [{key: entry.clone() for key, entry in network.state_dict().items()} for network in networks]
    several, mean = together.Together(networks), small(2)
    several.mean_into(mean)
    several.pull(0.25)
    for key, entry in mean.state_dict().items():
        if entry.is_floating_point():
            expected = (before[0][key] + before[1][key] + before[2][key]) / 3
            torch.testing.assert_close(entry, expected)
            for own, network in zip(before, networks, strict=True):
                torch.testing.assert_close(network.state_dict()[key], 0.75 * own[key] + 0.25 * expected)


@pytest.mark.parametrize("mutual", [False, True])
def test_each_network_has_the_gradient_of_its_own_loss(mutual):
    torch.manual_seed(0)
    networks, images, labels = [nn.Linear(6, 4) for _ in range(3)], torch.randn(15, 6), torch.randint(4, (15,))
    several = together.Together(networks)
    together.summed_loss(several(images), labels, 3, 0.1, mutual).backward()
    for k, network in enumerate(networks):
        part = slice(5 * k, 5 * k + 5)
        scores = network(images[part])
        loss = F.cross_entropy(scores, labels[part], label_smoothing=0.1)
        for j, other in enumerate(networks):
            if mutual and j != k:
                theirs = other(images[5 * j : 5 * j + 5]).softmax(1).detach()
                loss = loss + (theirs * (theirs / scores.softmax(1)).log()).sum(1).mean() / 2
        (expected,) = torch.autograd.grad(loss, [network.weight])
        torch.testing.assert_close(network.weight.grad, expected)


def test_batches_of_several_networks_lie_one_after_the_other():
    class Numbers:
        def epoch(self, seed):
            return [(torch.tensor([[seed]]), torch.tensor([-seed]))]

    for seeds, copies, expected in ([7, 8, 9], 1, [7, 8, 9]), ([7], 3, [7, 7, 7]):
        ((images, labels),) = together.SideBySide(Numbers(), seeds, copies).epoch(0)
        assert images.flatten().tolist() == (-labels).tolist() == expected


def test_without_pulls_each_network_is_trained_as_if_it_were_alone(train, monkeypatch, images, tmp_path):
    monkeypatch.setattr(together.loop, "PAPA_PULL", 0.0)
    mean = train("papa", "three", "--epochs", "1")
    alone = []
    for network in (1, 2, 3):
        flags = f"--num 3 --i {network} --model test_together:small --batch_size 2 --cos --epochs 1 --device cpu"
        args = cifar_flags.parse([*flags.split(), "--data", str(images), "--s", str(tmp_path / f"{network}")])
        cifar.main(args, HEARS_NOTHING)
        alone.append(load(tmp_path / f"{network}" / f"final{network}.t7")["net"])
    for key, entry in mean.items():
        torch.testing.assert_close(entry.float(), sum(state[key].float() for state in alone) / 3)


@pytest.mark.parametrize("how", ["papa", "mutual"])
def test_interrupted_in_an_epoch_it_ends_with_the_same_bits(how, train, monkeypatch, tmp_path):
    betas = []
    pull = together.Together.pull
    monkeypatch.setattr(together.Together, "pull", lambda self, beta: (betas.append(beta), pull(self, beta)))
    expected = train(how, "undisturbed")
    shares = [(1 + math.cos(math.pi * (step - 1) / 48)) / 2 for step in (10, 20, 30, 40)]  # of 3 epochs of 16 steps
    assert betas == pytest.approx([0.01 * share for share in shares] if how == "papa" else [])

    evaluate = together.evaluate
    results = iter([evaluate, None])  # the first epoch is tested, the second is not
    monkeypatch.setattr(together, "evaluate", lambda *args, **options: next(results)(*args, **options))
    with pytest.raises(TypeError):
        train(how, "resumed")
    monkeypatch.setattr(together, "evaluate", evaluate)
    found = train(how, "resumed", "--resume")
    assert all(torch.equal(entry, expected[key]) for key, entry in found.items())
    assert [row["epoch"] for row in read_table(tmp_path / "resumed" / "metrics1.csv")] == ["0", "1", "2"]


def test_with_the_step_schedule_epochs_may_be_raised(train):
    expected = train("papa", "undisturbed", schedule="")
    train("papa", "raised", "--epochs", "2", schedule="")
    found = train("papa", "raised", "--resume", schedule="")
    assert all(torch.equal(entry, expected[key]) for key, entry in found.items())
    train("papa", "cosine", "--epochs", "2")
    with pytest.raises(SettingsError, match="epochs is 3 here and 2 in the run"):
        train("papa", "cosine", "--resume")


@pytest.mark.parametrize("flags", ["--num 1", "--method ema", "--scion noise", "--difflr --num 1", "--a 0.2", "--i 3"])
def test_what_makes_no_sense_together_is_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        together.parse(["--together", "papa", *flags.split()])
    assert "argument --together" in capsys.readouterr().err


def test_its_directory_is_not_that_of_a_ring():
    assert together.parse(["--together", "papa", "--cos"]).s.name == "papa_cifar10_resnet32_cos"
    assert together.parse(["--together", "papa", "--s", "mine"]).s.name == "mine"
