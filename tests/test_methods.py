"""The CIFAR script's rivals of grafting, other scions, own models and the recipe's flags, where each takes effect."""

import argparse
import re
import sys
from pathlib import Path

import pytest
import torch
from processes import read_table
from torch import nn

from filter_grafting.information import invalid_filters
from grafting_cifar import grafting
from grafting_cifar.flags import parse
from training.models import own_model
from training.process import UsageError


def rates(line, epochs):
    """The learning rate at the beginning of each epoch."""
    rate = grafting.schedule(parse(line.split()))
    return [rate(epoch) for epoch in range(epochs)]


def test_stochastic_weight_averaging_ends_at_a_constant_rate():
    expected = [0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.01, 0.01]
    assert rates("--method swa --num 1 --epochs 8 --step_epochs 2", 8) == pytest.approx(expected)
    assert rates("--num 1 --epochs 8 --step_epochs 2", 8) == pytest.approx([*expected[:6], 1e-4, 1e-4])


def test_the_mean_of_stochastic_weight_averaging_begins_with_the_weights_before_the_constant_rate(make_run):
    run = make_run(1, 4, "--method", "swa", "--keep_all").finish()
    ends = [torch.load(run.checkpoint(1, epoch), weights_only=True) for epoch in (2, 3)]  # the last alone has that rate
    trained = [end["extra"]["trained"] for end in ends]
    for key, entry in ends[1]["net"].items():
        if "running" not in key and entry.is_floating_point():
            torch.testing.assert_close(entry, (trained[0][key] + trained[1][key]) / 2)


def test_papa_once_an_epoch_pulls_at_the_rate_of_the_epoch_that_is_done(monkeypatch):
    shares, args = [], parse(["--method", "papa", "--epochs", "4", "--step_epochs", "2"])
    monkeypatch.setattr(grafting.loop, "pull", lambda *given, pulls: shares.append(given[-1]))
    for epoch in (1, 2, 3):
        grafting.graft_neighbour(args, None, None, grafting.schedule(args), epoch, range(10))
    assert shares == pytest.approx([1, 1, 0.1])


def test_the_moving_average_remembers_a_twentieth_of_all_steps():
    model = nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    average, _ = grafting.averaged(parse(["--method", "ema", "--num", "1", "--epochs", "10"]), model, optimizer, 4)
    before = model.weight.item()
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert average.weight.item() == pytest.approx(before - 1 / (0.05 * 10 * 4))


def test_average_and_papa_share_weights(undisturbed):
    weights = {}
    for method in "papa", "average":
        ring = undisturbed(2, 2, "--method", method)
        weights[method] = [ring.outcome(network)["checkpoints"]["last"]["net"]["0.weight"] for network in (1, 2)]
    assert {row["coefficient"] for row in read_table(ring.directory / "coefficients1.csv")} == {"0.5"}
    distances = {method: (one - other).norm() for method, (one, other) in weights.items()}
    assert distances["papa"] > distances["average"]


def test_the_l1_norm_as_criterion_and_the_best_epoch_on_the_validation_images(undisturbed):
    ring = undisturbed(2, 3, "--criterion", "l1", "--val", "12")
    rows = read_table(ring.directory / "coefficients1.csv")
    assert all(float(row["own_entropy"]) > 2.303 for row in rows)  # no entropy of 10 bins is above ln 10
    shares = [float(row["own_entropy"]) > float(row["neighbour_entropy"]) for row in rows]
    assert shares == [float(row["coefficient"]) > 0.5 for row in rows]
    for network in (1, 2):
        rows = read_table(ring.directory / f"metrics{network}.csv")
        scores = [float(row["val_accuracy"]) for row in rows]
        outcome = ring.outcome(network)
        assert outcome["checkpoints"]["best"]["epoch"] == scores.index(max(scores))
        assert f"val:{scores[-1]:.3f}" in outcome["log"][-1]


@pytest.mark.parametrize("scion", ["noise", "internal"])
def test_scions_are_added_to_invalid_filters_alone(scion):
    model = with_dead_filters(3)
    before = model[0].weight.detach().clone()
    grafting.graft_scion(argparse.Namespace(scion=scion, seed=0, i=1), model, 0)
    assert (model[0].weight != before).flatten(1).any(1).tolist() == [True, True, False, False, False, False]


def test_scions_and_the_recipes_flags_in_a_run(make_run):
    flags = ["--momentum", "0.8", "--weight_decay", "0.01", "--nesterov"]
    single = make_run(1, 3, "--scion", "noise", "--model", "test_methods:with_dead_filters", *flags).finish()
    rows = read_table(single.directory / "metrics1.csv")
    assert [int(row["invalid_0.1"]) for row in rows] == [2, 0, 0]
    group = torch.load(single.checkpoint(1, 2), weights_only=True)["extra"]["optimizer"]["param_groups"][0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.8, 0.01, True)


def test_a_network_that_diverges_in_the_last_step_of_an_epoch_is_not_published(make_run):
    single = make_run(1, 1, "--lr", "1e38", "--batch_size", "32")  # a single step: its own loss is still good
    process = single.start(1)
    assert process.wait() == 1
    assert "the test loss became nan: training has diverged" in process.sentence()
    assert not list(single.directory.glob("*.t7"))


@pytest.mark.parametrize(
    ("model", "flags", "words"),
    [
        ("flat_layer", [], r"Sequential has no convolution .* \(in a script: another --model"),
        (
            "with_dead_filters",
            ["--level", "filter"],
            "0: level 'filter' needs a plain convolution .*, or --level layer",
        ),
    ],
)
def test_a_model_that_cannot_be_grafted_is_refused_before_it_trains(make_run, model, flags, words):
    run = make_run(2, 2, "--model", f"test_methods:{model}", *flags)
    process = run.start(1)
    assert process.wait() == 1 and re.search(words, process.sentence())
    assert not run.directory.exists()


@pytest.mark.slow
def test_compiled_it_trains_to_about_the_same(make_run, undisturbed):
    single = make_run(1, 2, "--compile")
    process = single.start(1)
    if process.wait(600) and "compiler" in process.sentence():
        pytest.skip("there is no compiler here")
    assert process.status == 0, process.output()
    tables = (read_table(run.directory / "metrics1.csv") for run in (single, undisturbed(1, 2)))
    for found, expected in zip(*tables, strict=True):
        assert float(found["train_loss"]) == pytest.approx(float(expected["train_loss"]), rel=0.02)


# Anyone's own model


def with_dead_filters(num_classes):
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, num_classes))
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[3].weight[:, :2] = 0
    return model


def flat_layer(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes))


def pair(num_classes):
    return nn.Identity(), num_classes


def flat(num_classes):
    return nn.Flatten()


@pytest.mark.parametrize("module", ["mine_alone", "models"])  # the script's folder has one of the second name
def test_a_model_by_the_name_of_its_function_is_looked_for_here_first(tmp_path, monkeypatch, module):
    (tmp_path / f"{module}.py").write_text("import test_methods\nbuild = test_methods.with_dead_filters\n")
    monkeypatch.setattr(sys, "path", [str(Path(grafting.__file__).parent), *sys.path])
    monkeypatch.chdir(tmp_path)
    model = own_model(f"{module}:build", 7, 32)
    del sys.modules[module]
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert invalid_filters(model, 0.1) == (2, 6)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "No module named 'no_such_module'; expected package.module:function"),
        ("test_methods:nothing", "has no attribute 'nothing'"),
        ("test_methods:pair", "returns a torch.nn.Module that gives"),
        ("test_methods:flat", r"its scores of 2 images have the shape \(2, 3072\), not \(2, 7\)"),
    ],
)
def test_what_is_no_model_is_said(name, words):
    with pytest.raises(UsageError, match=words):
        own_model(name, 7, 32)
