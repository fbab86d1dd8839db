"""The ensemble program: its averages by another route, which images it uses, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from saved import call, rows_of, save_imagenet_model, save_model, trained_like
from torch import nn

from analysis import ensemble
from analysis.loading import load_images, load_trained
from grafting_cifar import data, models

CPU = torch.device("cpu")


def write_run(directory, states, **changes):
    """What a finished run leaves that is read here: a checkpoint per network, and run.json."""
    directory.mkdir()
    (directory / "run.json").write_text(json.dumps({"run": "x", "settings": {"num": len(states)}}))
    for i, state in enumerate(states, 1):
        save_model(directory / f"final{i}.t7", state, settings={"images": 32, "test_images": 6}, **changes)
    return directory


@pytest.fixture
def run(images, tmp_path):
    """Runs the program on the CPU: (exit status, the JSON file, all it printed, its errors)."""

    def run(*arguments):
        path = tmp_path / "out.json"
        status, *printed = call(ensemble, *arguments, "--data", images, "--device", "cpu", "--json", path)
        return status, json.loads(path.read_text()) if path.exists() else None, *printed

    return run


def test_batch_norm_gets_the_statistics_of_the_training_images(tmp_path, images):
    trained = load_trained(save_model(tmp_path / "a.t7", settings={"model": "resnet20", "images": 32}))
    split = load_images(trained, images)
    model = trained.model
    model.bn1.running_mean += 100  # of what has been before, nothing is left
    ensemble.reestimate(trained, split, CPU)

    ((pixels, _),) = data.Batches(split.train, 32, CPU, augment=True).epoch(0)
    padded = np.pad(pixels.numpy().astype(float), ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (n, 3, 32, 32, 3, 3)
    outputs = np.einsum("nchwij,fcij->fnhw", windows, model.conv1.weight.detach().numpy()).reshape(16, -1)
    np.testing.assert_allclose(model.bn1.running_mean, outputs.mean(1), rtol=0, atol=1e-5)
    np.testing.assert_allclose(model.bn1.running_var, outputs.var(1, ddof=1), rtol=1e-4)


def naive(state, split):
    """Probabilities (n, classes), image by image."""
    model = models.build("resnet20", 2).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        scores = [model(data.normalise(image[None]))[0].double().numpy() for image in split.images]
    return np.stack([np.exp(score) / np.exp(score).sum() for score in scores])


def test_all_three_accuracies_of_two_runs(tmp_path, images, run):
    images = data.select(data.load(images), test_images=6)

    def percent(probabilities):
        return 100 * np.mean(probabilities.argmax(1) == images.test.labels.numpy())

    states = [trained_like(seed) for seed in range(3)]
    for state in states:  # a bias that makes it take half of the images for each class, which random weights do not
        odds = np.log(naive(state, images.test))
        state["linear.bias"][1] -= np.median(odds[:, 1] - odds[:, 0])
    runs = [write_run(tmp_path / "one", states[:1]), write_run(tmp_path / "two", states[1:])]
    status, found, output, _ = run(*runs, tmp_path / "one")
    assert status == 0

    each = [naive(state, images.test) for state in states]
    assert found["members"] == [str(tmp_path / name) for name in ("one/final1.t7", "two/final1.t7", "two/final2.t7")]
    assert found["networks"] == [percent(probabilities) for probabilities in each]
    assert found["ensemble"] == percent(sum(each))

    averaged = models.build("resnet20", 2)
    averaged.load_state_dict({k: sum(s[k].double() for s in states).to(states[0][k].dtype) / 3 for k in states[0]})
    for module in averaged.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the statistics of the last batch, which holds all images
    ((pixels, _),) = data.Batches(images.train, 32, CPU, augment=True).epoch(0)
    averaged(pixels)
    assert found["weight_average"] == percent(naive(averaged.state_dict(), images.test))

    rows = {row["network"]: row["accuracy (%)"] for row in rows_of(output)}
    assert rows["one/final1.t7"] == f"{found['networks'][0]:.2f}" and rows["ensemble"] == f"{found['ensemble']:.2f}"


def test_the_best_networks_of_different_models_have_an_ensemble_but_no_average(tmp_path, run):
    runs = [write_run(tmp_path / "a", [trained_like(0)]), write_run(tmp_path / "b", [trained_like(0)])]
    save_model(runs[0] / "best1.t7")
    save_model(runs[1] / "best1.t7", trained_like(0, "resnet32"), model="resnet32")
    status, found, output, _ = run(*runs, "--which", "best")
    assert status == 0
    assert found["weight_average"] is None and 0 <= found["ensemble"] <= 100
    assert rows_of(output)[-1]["accuracy (%)"] == "–"


def test_imagenet_networks_have_an_ensemble_and_an_average(tmp_path, run):
    directory = write_run(tmp_path / "run", [trained_like(0)])
    save_imagenet_model(directory / "best1.tar")
    status, found, output, _ = run(directory, "--which", "best")
    assert status == 0 and "8 test images" in output
    assert found["ensemble"] == found["networks"][0] and 0 <= found["weight_average"] <= 100


@pytest.mark.parametrize(
    ("classes", "missing", "reason"),
    [
        (["a", "b"], None, "b/final1.t7 have other classes or image sizes"),
        (["one", "two"], "final1.t7", "b/final1 is missing (network 1: not started): wait until it is done"),
        (["one", "two"], "run.json", "b is not the save directory of a run"),
    ],
)
def test_what_cannot_be_tested_is_one_line_and_exit_status_1(tmp_path, run, classes, missing, reason):
    runs = [write_run(tmp_path / "a", [trained_like(0)])]
    runs.append(write_run(tmp_path / "b", [trained_like(0)], classes=classes))
    if missing:
        (runs[1] / missing).unlink()
    status, found, output, errors = run(*runs)
    assert (status, found, output) == (1, None, "")
    assert errors.count("\n") == 1 and reason in errors
