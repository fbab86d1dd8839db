"""The ensemble script: its averages by another route, which images it uses, and what it refuses."""

import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

from grafting_cifar import data, ensemble, models

CPU = torch.device("cpu")


def write_run(directory, states, which="final", epoch=3, accuracy=50.0, **settings):
    """What a finished run leaves that is read here: a checkpoint per network, and run.json."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"model": "resnet20", "classes": 2, "images": 32, "val": 0, "test_images": 8, **settings}
    (directory / "run.json").write_text(json.dumps({"run": "x", "settings": {"num": len(states)}}))
    for number, state in enumerate(states, 1):
        contents = {"net": state, "epoch": epoch, "accuracy": accuracy, "settings": settings}
        torch.save(contents, directory / f"{which}{number}.t7")
    return directory


def trained_like(seed, name="resnet20", classes=2):
    """The weights of a network whose batch norm has seen something."""
    torch.manual_seed(seed)
    network = models.build(name, classes)
    for _ in range(3):
        network(torch.randn(8, 3, 32, 32))
    return network.state_dict()


@pytest.fixture
def run_ensemble(monkeypatch, capsys, images, tmp_path):
    """Runs the script in this process, on the CPU: (exit status, the JSON file, all it printed, its errors)."""

    def run(*arguments):
        path = tmp_path / "out.json"
        flags = ["--data", images, "--device", "cpu", "--json", path]
        monkeypatch.setattr(sys, "argv", ["ensemble.py", *map(str, [*arguments, *flags])])
        status = ensemble.main()
        return status, json.loads(path.read_text()) if path.exists() else None, *capsys.readouterr()

    return run


# The mathematics


def test_the_ensemble_averages_probabilities_not_scores():
    random = np.random.default_rng(0)
    inputs = random.normal(size=(20, 4))
    weights = [random.normal(size=(4, 3)), 5 * random.normal(size=(4, 3))]
    expected = np.zeros((20, 3))
    for weight in weights:
        for n in range(20):
            exponentials = [math.exp(sum(inputs[n, i] * weight[i, k] for i in range(4))) for k in range(3)]
            for k in range(3):
                expected[n, k] += exponentials[k] / sum(exponentials) / 2
    networks = [nn.Linear(4, 3, bias=False).double() for _ in weights]
    for network, weight in zip(networks, weights, strict=True):
        network.weight.data = torch.from_numpy(weight.T)
    averaged = ensemble.average_softmax([network(torch.from_numpy(inputs)) for network in networks])
    np.testing.assert_allclose(averaged.detach().numpy(), expected, rtol=1e-12)


def test_accuracy_is_the_share_of_images_whose_label_has_the_highest_score():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.3, 0.3, 0.4]])
    assert ensemble.accuracy(scores, torch.tensor([1, 2, 2])) == pytest.approx(200 / 3)


def test_the_average_of_a_network_with_itself_is_that_network():
    state = trained_like(0)
    for count in (1, 2, 3):
        averaged = ensemble.average_weights([state] * count)
        assert averaged.keys() == state.keys()
        for key, entry in averaged.items():
            assert entry.dtype == state[key].dtype and torch.equal(entry, state[key]), key


def test_weights_are_averaged_uniformly():
    states = [trained_like(seed) for seed in range(3)]
    for key, entry in ensemble.average_weights(states).items():
        expected = sum(state[key].numpy().astype(float) for state in states) / 3
        np.testing.assert_allclose(entry.numpy(), expected, rtol=1e-6, atol=1e-12, err_msg=key)


@pytest.mark.parametrize(("size", "rows"), [(1000, 32), (10, 32), (10, 31)])
def test_batch_norm_gets_the_statistics_of_the_training_images(monkeypatch, images, size, rows):
    monkeypatch.setattr(ensemble, "BATCH", size)
    split = data.Split(*(tensor[:rows] for tensor in data.load(images)[0]))
    network = models.build("resnet20", 2)
    network.bn1.running_mean += 100  # of what has been before, nothing is left
    ensemble.reestimate(network, split, CPU, amp=False)

    ((pixels, _),) = data.Batches(split, rows, "cpu", augment=True).epoch(0)
    padded = np.pad(pixels.numpy().astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (n, 3, 32, 32, 3, 3)
    outputs = np.einsum("nchwij,fcij->fnhw", windows, network.conv1.weight.detach().numpy()).reshape(16, -1)
    # Over several batches the variance lacks that of their means, and 31 images make batches of 8, 8, 8 and 7.
    is_one, is_even = size >= rows, rows == 32
    np.testing.assert_allclose(network.bn1.running_mean, outputs.mean(1), rtol=0, atol=1e-5 if is_even else 0.02)
    np.testing.assert_allclose(network.bn1.running_var, outputs.var(1, ddof=1), rtol=1e-4 if is_one else 0.05)
    assert network.bn1.momentum == 0.1


# The script


def naive(state, split, name="resnet20", classes=2):
    """Probabilities (n, classes), image by image."""
    network = models.build(name, classes).eval()
    network.load_state_dict(state)
    with torch.no_grad():
        scores = [network(data.normalise(image[None]))[0].double().numpy() for image in split.images]
    return np.stack([np.exp(score) / np.exp(score).sum() for score in scores])


def percent(probabilities, split):
    return 100 * np.mean(probabilities.argmax(1) == split.labels.numpy())


def balanced(state, split):
    """The network with a bias that makes it take half of the images for each class, which random weights do not."""
    odds = np.log(naive(state, split))
    state["linear.bias"][1] -= np.median(odds[:, 1] - odds[:, 0])
    return state


def test_all_three_accuracies_of_two_runs(tmp_path, images, run_ensemble, monkeypatch):
    train, test, _ = data.load(images)
    states = [balanced(trained_like(seed), test) for seed in range(3)]
    runs = [write_run(tmp_path / "one", states[:1]), write_run(tmp_path / "two", states[1:])]
    predict, scores = ensemble.predict, []
    monkeypatch.setattr(ensemble, "predict", lambda *args: scores.append(predict(*args)) or scores[-1])
    status, found, output, _ = run_ensemble(*runs, tmp_path / "one")
    assert status == 0

    each = [naive(state, test) for state in states]
    assert len({tuple(probabilities.argmax(1)) for probabilities in [*each, sum(each)]}) > 2, "else nothing is tested"
    assert found["members"] == [str(tmp_path / name) for name in ("one/final1.t7", "two/final1.t7", "two/final2.t7")]
    assert found["networks"] == [percent(probabilities, test) for probabilities in each]
    assert found["ensemble"] == percent(sum(each), test)

    averaged = models.build("resnet20", 2)
    averaged.load_state_dict({k: sum(s[k].double() for s in states).to(states[0][k].dtype) / 3 for k in states[0]})
    for module in averaged.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the last batch, which holds all images
    ((pixels, _),) = data.Batches(train, 32, "cpu", augment=True).epoch(0)
    averaged(pixels)
    expected = naive(averaged.state_dict(), test)
    assert len(scores) == 4, "each network is evaluated once"
    np.testing.assert_allclose(scores[-1].softmax(1).numpy(), expected, atol=1e-4)
    assert found["weight_average"] == percent(expected, test)

    rows = {line.split("|")[1].strip(): line.split("|")[4].strip() for line in output.splitlines() if "|" in line}
    assert rows["one/final1.t7"] == f"{found['networks'][0]:.2f}"
    assert rows["ensemble"] == f"{found['ensemble']:.2f}"
    assert rows["weight average"] == f"{found['weight_average']:.2f}"
    assert max(map(len, output.splitlines())) <= 100


def test_images_are_those_that_the_run_used(tmp_path, images, run_ensemble, monkeypatch):
    seen = []
    monkeypatch.setattr(ensemble, "reestimate", lambda network, split, *_: seen.append(split))
    state = trained_like(0)
    run = write_run(tmp_path / "run", [state], "best", images=20, val=5, test_images=3)
    status, found, output, _ = run_ensemble(run, "--which", "best")
    train, _, test = data.select(data.load(images), images=20, val=5, test_images=3)
    assert status == 0
    assert torch.equal(seen[0].images, train.images) and len(train.labels) == 20
    assert found["networks"] == pytest.approx([percent(naive(state, test), test)]) and len(test.labels) == 3
    assert "3 test images" in output and "chosen on 5 images held out" in output


def test_networks_are_tested_as_in_training(run_ensemble, undisturbed):
    run = undisturbed(2, 3)
    for which in ("final", "best"):
        contents = [torch.load(run.directory / f"{which}{number}.t7") for number in (1, 2)]
        status, found, output, errors = run_ensemble(run.directory, "--which", which)
        assert (status, errors) == (0, "")
        assert found["networks"] == [network["accuracy"] for network in contents]
    assert "chosen on these test images" in output


def test_different_models_have_an_ensemble_but_no_average(tmp_path, run_ensemble):
    runs = [
        write_run(tmp_path / "a", [trained_like(0)]),
        write_run(tmp_path / "b", [trained_like(0, "vgg16")], model="vgg16"),
    ]
    status, found, output, _ = run_ensemble(*runs)
    assert status == 0
    assert found["weight_average"] is None and 0 <= found["ensemble"] <= 100
    assert "there is none, as the networks differ in model (resnet20, vgg16)" in output


def test_other_images_than_in_training_are_noticed(tmp_path, run_ensemble):
    run = write_run(tmp_path / "run", [trained_like(0)], accuracy=1.23)
    status, _, _, errors = run_ensemble(run)
    assert status == 0
    assert "final1.t7 had 1.23 % when it was saved" in errors and "--data" in errors


def mixed_classes(folder):
    write_run(folder / "run", [trained_like(0)])
    return [folder / "run", write_run(folder / "b", [trained_like(0, classes=3)], classes=3)]


def mixed_test_images(folder):
    write_run(folder / "run", [trained_like(0)])
    return [folder / "run", write_run(folder / "b", [trained_like(0)], test_images=4)]


def other_classes(folder):
    return [write_run(folder / "run", [trained_like(0, classes=3)], classes=3)]


def too_few_images(folder):
    return [write_run(folder / "run", [trained_like(0)], images=500)]


def unfinished(folder):
    (write_run(folder / "run", [trained_like(0)] * 2) / "final2.t7").unlink()
    return [folder / "run"]


def without_best(folder):
    return [write_run(folder / "run", [trained_like(0)]), "--which", "best"]


def imagenet(folder):
    path = write_run(folder / "run", [trained_like(0)]) / "final1.t7"
    path.rename(path.with_suffix(".tar"))
    return [folder / "run"]


def foreign(folder):
    write_run(folder / "run", [trained_like(0)])
    torch.save({"net": trained_like(0), "epoch": 3, "acc": 50.0}, folder / "run" / "final1.t7")
    return [folder / "run"]


def misfit(folder):
    return [write_run(folder / "run", [trained_like(0)], model="resnet32")]


def unknown_model(folder):
    return [write_run(folder / "run", [trained_like(0)], model="resnet21")]


def nothing(folder):
    return [folder / "run"]


REFUSED = {
    mixed_classes: "cannot be tested together: they differ in classes (2, 3)",
    mixed_test_images: "cannot be tested together: they differ in test_images (8, 4)",
    other_classes: "has 2 classes, {run}/final1.t7 has 3: give the --data of its training",
    too_few_images: "is not what {run}/final1.t7 was trained on: got --images 500",
    unfinished: "{run}/final2.t7 is missing (network 2: not started): wait until it is done, continue it with --resume",
    without_best: "{run}/best1.t7 is missing (network 1: not started): no epoch of it has ended",
    imagenet: "{run} is a run on ImageNet",
    foreign: "{run}/final1.t7 does not say what it holds",
    misfit: "{run}/final1.t7 cannot be built as resnet32 with 2 classes: Error(s) in loading state_dict",
    unknown_model: "{run}/final1.t7 cannot be built as resnet21 with 2 classes: unknown model",
    nothing: "{run} is not the save directory of a run",
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_what_cannot_be_tested_is_one_line_and_exit_status_1(tmp_path, run_ensemble, case):
    status, found, output, errors = run_ensemble(*case(tmp_path))
    assert (status, found, output) == (1, None, "")
    assert errors.count("\n") == 1
    assert REFUSED[case].format(run=tmp_path / "run") in errors


@pytest.mark.parametrize("flags", [[], ["run", "--which", "last"], ["run", "--json", "no such folder/out.json"]])
def test_a_wrong_flag_is_one_line_and_exit_status_2(capsys, flags):
    with pytest.raises(SystemExit) as end:
        ensemble.parse(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
