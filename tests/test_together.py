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

HEARS_NOTHING = types.SimpleNamespace(check=lambda: None, finish_batch=lambda: None)


def small(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(3600, num_classes))


@pytest.fixture
def train(images, tmp_path):
    def train(how, name, *flags):
        line = f"--together {how} --num 3 --model test_together:small --batch_size 2 --cos --epochs 3 --device cpu"
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


def test_only_papa_gives_each_network_an_order_of_its_own():
    class Numbers:
        def epoch(self, seed):
            return [(torch.tensor([seed]), torch.tensor([seed]))]

    ((images, _),) = together.SideBySide(Numbers(), 3, same=False).epoch(7)
    assert len(set(images.tolist())) == 3
    ((images, labels),) = together.SideBySide(Numbers(), 3, same=True).epoch(7)
    assert images.tolist() == labels.tolist() == [7, 7, 7]


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


@pytest.mark.parametrize("flags", ["--num 1", "--method ema --num 1", "--difflr"])
def test_what_makes_no_sense_together_is_refused(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        together.parse(["--together", "papa", *flags.split()])
    assert "give --num N, and no --method or --difflr" in capsys.readouterr().err
