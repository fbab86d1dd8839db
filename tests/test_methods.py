"""Grafting's rivals and other scions, and the images that a fair comparison holds out."""

import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import assert_same_runs, make_images, read_table
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common import run
from filter_grafting.errors import DataError, MismatchError
from filter_grafting.scions import graft_scions, internal, noise
from filter_grafting.training import train_one_epoch
from grafting_cifar import grafting
from grafting_cifar.data import Split, select
from grafting_cifar.runs import read_run

# ---- Images


def make_split(count):
    """Image k has the value k everywhere, and the label k."""
    values = torch.arange(count)
    return Split(values[:, None, None, None].expand(-1, 32, 32, 3).to(torch.uint8), values)


def numbers(split):
    assert torch.equal(split.images[:, 3, 5, 1].long(), split.labels)
    return split.labels.tolist()


def test_all_images_are_used_as_they_are():
    train, test = make_split(40), make_split(10)
    kept, held_out, tested = select((train, test, 10))
    assert kept is train and held_out is None and tested is test


def test_training_and_validation_images_are_apart_and_the_same_for_everyone():
    kept, held_out, tested = select((make_split(40), make_split(10), 10), None, 15, 4)
    order = np.random.RandomState(2020).permutation(40)
    assert numbers(kept) == sorted(order[:25]) and numbers(held_out) == sorted(order[25:])
    assert numbers(tested) == sorted(np.random.RandomState(2020).permutation(10)[:4])


def test_holding_images_out_changes_no_smaller_training_set():
    loaded = make_split(40), make_split(10), 10
    assert numbers(select(loaded, 20)[0]) == numbers(select(loaded, 20, 15)[0])


@pytest.mark.parametrize(
    ("choice", "words"),
    [((30, 11), "--images 30 and --val 11, but there are 40"), ((None, 40), "--val 40"), ((None, 0, 11), "10 such")],
)
def test_more_images_than_there_are(choice, words):
    with pytest.raises(DataError, match=words):
        select((make_split(40), make_split(10), 10), *choice)


def test_the_best_epoch_is_chosen_on_the_validation_images(undisturbed):
    ring = undisturbed(2, 4, "--val", "12")
    for network in (1, 2):
        rows = read_table(ring.directory / f"metrics{network}.csv")
        for epoch, row in enumerate(rows):
            scores = [float(row["val_accuracy"]) for row in rows[: epoch + 1]]
            assert row["best"] == rows[scores.index(max(scores))]["test_accuracy"]
        outcome = ring.outcome(network)
        best = outcome["checkpoints"]["best"]["epoch"]
        assert f"accuracy:{outcome['checkpoints']['best']['accuracy']:.3f}" in outcome["log"][best]
        assert float(rows[best]["val_accuracy"]) == max(float(row["val_accuracy"]) for row in rows)
        assert f"val:{float(rows[-1]['val_accuracy']):.3f}" in outcome["log"][-1]
        assert read_run(ring.directory, "").networks[network - 1].best == float(rows[-1]["best"])


# ---- Methods


def task_of(images, *flags):
    common = ["--data", str(images), "--model", "resnet20", "--device", "cpu", "--batch_size", "8"]
    args = grafting.parse([*common, *flags])
    return args, grafting.build(args, world=None)


def test_average_gives_every_layer_half_of_its_neighbour(images):
    args, task = task_of(images, "--method", "average")
    own = {key: entry.clone() for key, entry in task.network.state_dict().items()}
    torch.manual_seed(1)
    neighbour = {key: torch.rand_like(entry) if entry.is_floating_point() else entry for key, entry in own.items()}
    rows = []
    ring = SimpleNamespace(wait=lambda epoch: ("its file", neighbour))
    run.graft_once(args, task, ring, SimpleNamespace(append=rows.extend), 3)
    for key, entry in task.network.state_dict().items():
        if entry.is_floating_point():
            torch.testing.assert_close(entry, (own[key] + neighbour[key]) / 2)
    assert len(rows) == 19 and {row[-1] for row in rows} == {"0.5"}


def test_ema_tests_the_moving_average_of_the_weights(images):
    _, task = task_of(images, "--method", "ema", "--num", "1", "--epochs", "10")
    steps, weights = [], list(task.network.parameters())
    expected = [weight.double().clone() for weight in weights]
    task.optimizer.register_step_post_hook(lambda *_: steps.append([weight.double().clone() for weight in weights]))
    train_one_epoch(task.network, task.train, task.optimizer, lambda _: 0.1, seed=0, device=torch.device("cpu"))
    assert len(steps) == len(task.train) == 4
    share = 1 / (0.05 * 10 * 4)  # of the newest weights: the time constant is 5 % of the steps of 10 epochs
    for weights in steps:
        expected = [(1 - share) * mean + share * new for mean, new in zip(expected, weights, strict=True)]
    for found, mean, last in zip(task.tested.parameters(), expected, steps[-1], strict=True):
        torch.testing.assert_close(found, mean.float())
        assert not torch.allclose(found, last.float())
    statistics = [task.tested.bn1.running_mean, task.network.bn1.running_mean]
    assert statistics[0].any() and not torch.allclose(*statistics)
    assert task.tested.bn1.num_batches_tracked == 4


def test_the_standard_data_sets_have_a_directory_each_wherever_they_lie(tmp_path):
    def directory(*flags):
        return grafting.parse(["--data", *flags]).directory

    standard, mine = str(tmp_path / "standard"), tmp_path / "mine"
    (mine / "train").mkdir(parents=True)
    assert directory(standard) == "checkpoint/grafting_cifar10_resnet32"
    assert directory(standard, "--cifar", "100") == "checkpoint/grafting_cifar100_resnet32"
    assert directory(str(mine)) == "checkpoint/grafting_mine_resnet32"
    assert directory("glyphs", "--method", "average") == "checkpoint/grafting_glyphs_resnet32_average"


@pytest.mark.parametrize("flags", [("--method", "ema"), ("--scion", "noise"), ("--val", "12")], ids=" ".join)
def test_killed_and_resumed_it_ends_with_the_same_bits(make_run, undisturbed, flags):
    single = make_run(1, 3, *flags)
    process = single.start(1, plan=[["at", "after rename ckpt0_1.t7", 1, "kill"]])
    assert process.wait() == -signal.SIGKILL
    single.finish("--resume")
    assert_same_runs(single, undisturbed(1, 3, *flags))


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--cos"], "a cosine schedule"),
        (["--method", "ema"], "a moving average"),
        (["--scion", "noise"], "the noise's decay"),
    ],
)
def test_epochs_that_shape_the_whole_run_cannot_be_raised(make_run, flags, what):
    single = make_run(1, 1, *flags).finish()
    single.epochs = 2
    process = single.start(1, "--resume")
    assert process.wait() == 1
    assert f"(--epochs is fixed: it shapes the whole of {what})" in process.sentence()


def test_other_images_are_no_continuation(make_run, tmp_path):
    single = make_run(1, 1).finish()
    folder = make_images(tmp_path / "images")
    (folder / "train" / "one" / "0.png").rename(folder / "train" / "two" / "a.png")  # as many images as before
    single.epochs, single.flags[1] = 2, str(folder)
    process = single.start(1, "--resume")
    assert process.wait() == 1
    assert "with other images than it was trained on: give the --data of its start" in process.sentence()


def test_a_network_that_diverges_in_the_last_step_of_an_epoch_is_not_published(make_run):
    single = make_run(1, 1, "--lr", "1e38", "--batch_size", "32")  # a single step: its own loss is still good
    process = single.start(1)
    assert process.wait() == 1
    assert "the test loss became nan at a learning rate of 1e+38: training has diverged" in process.sentence()
    assert not list(single.directory.glob("*.t7"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--method ema", "--method: ema needs no neighbour: got --num 2, expected --num 1"),
        ("--method average --num 1", "average needs a neighbour: got --num 1"),
        ("--scion noise", "--scion: noise needs no neighbour: got --num 2, expected --num 1"),
        ("--scion internal --num 1 --method ema", "--method: ema does not go with --scion"),
        ("--method average --level filter --model vgg16", "average does not go with --level"),
        ("--method average --a 0.2", "average does not go with --a"),
        ("--level filter --model vgg16 --c 5", "--level: filter does not go with --c"),
        ("--scion noise --num 1 --level filter --model vgg16", "--scion: noise does not go with --level"),
    ],
)
def test_flags_that_do_not_go_together(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        grafting.parse(flags.split())
    assert end.value.code == 2 and words in capsys.readouterr().err


# ---- Scions


def make_network():
    """Filters 1 and 3 of the first layer are invalid; of the second, all but filter 0."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Conv2d(5, 4, 1, bias=False), nn.Linear(4, 2))
    with torch.no_grad():
        network[0].weight[[1, 3]] *= 1e-4
        network[1].weight[1:] *= 1e-4
    return network


def test_noise_has_the_layers_standard_deviation():
    weight = torch.randn(64, 32, 3, 3) * 3 + 1
    scion = noise(weight, 50, 0.5, torch.Generator().manual_seed(0))
    assert scion.shape == (50, 32, 3, 3)
    assert abs(scion.mean()) < 0.05
    assert math.isclose(scion.std(), 0.5 * float(np.std(weight.numpy())), rel_tol=0.02)


def test_internal_scions_are_the_most_informative_filters_and_never_invalid():
    weight = torch.tensor([0.5, 0.01, -3.0, 0.02, 1.0])[:, None]
    scion = internal(weight, weight.abs().flatten(), 4, 0.1)
    assert scion.flatten().tolist() == [-3, 1, 0.5, -3]


@pytest.mark.parametrize("kind", ["noise", "internal"])
def test_scions_are_added_to_invalid_filters_alone(kind):
    network, before = make_network(), make_network().state_dict()
    assert graft_scions(network, kind, generator=torch.Generator().manual_seed(0)) == 5
    after = network.state_dict()
    for key, entry in after.items():
        changed = (entry != before[key]).flatten(1).any(1).nonzero().flatten().tolist() if entry.dim() > 1 else []
        assert changed == {"0.weight": [1, 3], "1.weight": [1, 2, 3]}.get(key, []), key
    if kind == "internal":
        ranked = before["0.weight"].abs().sum((1, 2, 3)).argsort(descending=True)
        torch.testing.assert_close(after["0.weight"][3], before["0.weight"][3] + before["0.weight"][ranked[1]])
        torch.testing.assert_close(after["1.weight"][2], before["1.weight"][2] + before["1.weight"][0])


def test_a_layer_without_an_informative_filter_is_left_alone():
    network = make_network()
    nn.init.zeros_(network[0].weight)
    assert graft_scions(network, "internal") == 3
    assert not network[0].weight.any()


def test_scions_that_cannot_be():
    with pytest.raises(ValueError, match="expected one of noise, internal"):
        graft_scions(make_network(), "external")
    with pytest.raises(MismatchError, match="0 is a transposed convolution"):
        graft_scions(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), "noise")
    with pytest.raises(MismatchError, match="0 is parametrized"):
        graft_scions(nn.Sequential(weight_norm(nn.Conv2d(3, 4, 2))), "noise")
