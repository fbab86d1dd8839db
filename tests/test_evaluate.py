"""Using a trained model: evaluate.py, predict.py and export.py on files of both scripts, and what they refuse."""

import json
import shutil

import numpy as np
import pytest
import ranks
import torch
import torchvision
from PIL import Image
from saved import CLASSES, IMAGENET, call, save_imagenet_model, save_model, trained_like

from analysis import evaluate, export, predict
from analysis.loading import load_trained
from grafting_cifar import models
from grafting_cifar.data import MEAN, STD


def probabilities(model, path, size, mean, std):
    """Of a resized and cropped image, with torchvision's transforms."""
    image = Image.open(path).convert("RGB")
    if size == 32:
        image = image.resize((32, 32), Image.Resampling.BILINEAR)
    else:
        steps = [torchvision.transforms.Resize(size * 256 // 224), torchvision.transforms.CenterCrop(size)]
        image = torchvision.transforms.Compose(steps)(image)
    pixels = (np.asarray(image) / 255 - mean) / std
    with torch.no_grad():
        return model.eval()(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float())[0].softmax(0)


# ---- Evaluation and prediction


def test_accuracies_are_those_of_a_loop_over_the_images(tmp_path, images):
    model = models.build("resnet20", 2)
    model.load_state_dict(trained_like(0))
    hits = {}
    for k, name in enumerate(CLASSES):
        paths = (images / "test" / name).iterdir()
        hits[name] = [int(probabilities(model, path, 32, MEAN, STD).argmax()) == k for path in paths]
    accuracy = 100 * np.mean([*hits["one"], *hits["two"]])
    # Whose images they are.
    command = ["python", "-m", "torch.distributed.run", "--", "grafting.py", "--data", str(images), "--amp"]
    file, plot = save_model(tmp_path / "best1.t7", command=command), tmp_path / "confusion.png"
    status, output, _ = call(evaluate, file, "--plot", plot, "--device", "cpu")
    assert status == 0 and f"- {plot}" in output and plot.read_bytes().startswith(b"\x89PNG")
    for name, own in hits.items():
        assert f"| {name:5} |      4 | {100 * np.mean(own):12.2f} |" in output
    assert f"accuracy: {accuracy:.3f} % of 8 test images (50.000 when it was saved)" in output


def test_files_that_say_less_are_read_and_what_is_taken_instead_is_said(tmp_path, images):
    left_out = dict.fromkeys(("model", "classes", "mean", "std", "image_size", "command", "settings"))
    state = {f"module.{key}": entry for key, entry in trained_like(0).items()}  # as the authors' script saves it
    file = save_model(tmp_path / "ckpt1_0.t7", state, **left_out)
    status, output, errors = call(evaluate, file, "--model", "resnet20", "--data", images)
    assert status == 0 and "of 8 test images" in output
    assert f"{file} does not say: classes, image_size, mean, std; " in errors


@pytest.mark.parametrize("size", [32, 64])
def test_predictions_are_those_of_the_model(tmp_path, images, size):
    image = images / "test" / "two" / "0.png"
    if size == 32:
        file, model = save_model(tmp_path / "best1.t7"), models.build("resnet20", 2)
        model.load_state_dict(trained_like(0))
        expected = probabilities(model, image, 32, MEAN, STD)
    else:
        file, model = save_imagenet_model(tmp_path / "best1.tar")
        expected = probabilities(model, image, 64, IMAGENET["mean"], IMAGENET["std"])
    status, output, errors = call(predict, file, image, tmp_path / "none.png")
    assert status == 1, "one of the images cannot be read"
    assert f"{tmp_path / 'none.png'} cannot be read as an image" in errors
    found = dict(part.rsplit(" ", 2)[:2] for part in output.strip().split(": ")[1].split(", "))
    assert list(found) == [CLASSES[k] for k in expected.argsort(descending=True)]
    for name, value in found.items():
        assert float(value) == pytest.approx(100 * expected[CLASSES.index(name)].item(), abs=0.5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None, "settings": None}, "does not say which model it holds: give it with --model"),
        ({"model": "resnet32"}, "is no resnet32 with 2 classes: "),
        ({"classes": ["cat", "dog"]}, "has 2 classes (one, two…), "),
        ({"net": None}, "holds no state dict: it has the keys epoch, "),
        ({"settings": {"images": 999}}, "images to train on: ask for fewer): give the --data of its training"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(tmp_path, images, changes, reason):
    file = save_model(tmp_path / "file.t7", **changes)
    status, _, errors = call(evaluate, file, "--data", images)
    assert status == 1 and reason in errors and str(file) in errors and errors.count("\n") == 1


def test_images_that_are_no_longer_where_they_were_are_asked_for(tmp_path):
    file = save_model(tmp_path / "best1.t7", command=["python", "grafting.py", "--data", "mine"])
    status, _, errors = call(evaluate, file)
    sentence = f"{file} was trained on mine, which is not a folder here: say with --data where they are\n"
    assert (status, errors) == (1, sentence)


def test_images_that_cannot_be_read_are_left_out_as_in_training(tmp_path, images):
    data = shutil.copytree(images, tmp_path / "images")
    (data / "test" / "two" / "0.png").write_text("rubbish")
    for flags, expected in (["--skip_bad"], (0, "of 7 test images")), ([], (1, "")):
        command = ["python", "grafting.py", "--data", str(data), *flags]
        file, _ = save_imagenet_model(tmp_path / "best1.tar", command=command)
        status, output, errors = call(evaluate, file)
        assert status == expected[0] and expected[1] in output and ("cannot be read" in errors) == bool(status)


# ---- Export


def test_the_files_hold_the_model_and_what_the_checkpoint_says(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    monkeypatch.delitem(export.FILES, "model.onnx")  # which takes half of a minute
    command, model = ["python", "grafting.py", "--data", "my images"], ranks.tiny(2).eval()
    file = save_model(tmp_path / "best1.t7", model.state_dict(), model="ranks:tiny", command=command)
    status, _, _ = call(export, file, tmp_path / "out", "--name", "my-model")
    assert status == 0
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()

    names = {"torch": torch}
    exec(card.split("```python\n")[1].split("\n```")[0], names)  # the line that loads the model
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(names["model"](images), model(images))
    loaded, state = safetensors.load_file("model.safetensors"), model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["classes"], config["image_size"]) == ("ranks:tiny", CLASSES, 32)
    assert (config["accuracy"], config["epoch"], config["settings"]["lr"]) == (50.0, 3, 0.1)
    assert config["filters"] == 24 and config["invalid_filters"].keys() == {"0.1", "0.01"}
    for words in (
        "# my-model\n",
        "Test accuracy: 50.00 % after epoch 3",
        "as one of 2 networks",
        "| lr | 0.1 |",
        "    python grafting.py --data 'my images'\n",
        "resized to 32×32",
    ):
        assert words in card


@pytest.mark.parametrize(
    ("settings", "how"),
    [
        ({"num": 3}, "with filter grafting, as one of 3"),
        ({"num": 2, "method": "average"}, "with a rival of filter grafting (average), 2 networks"),
        ({"num": 1, "together": "mutual", "networks": 2}, "with a rival of filter grafting (mutual), 2 networks"),
        ({"num": 1, "method": "grafting"}, "by itself"),
    ],
)
def test_the_card_says_how_the_model_was_trained(tmp_path, settings, how):
    config = export.config_of(load_trained(save_model(tmp_path / "best1.t7", settings=settings)))
    assert f" classes, trained {how}" in export.card(config, "name")


@pytest.mark.slow
def test_imagenet_models_are_exported_with_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnx.reference")
    file, model = save_imagenet_model(tmp_path / "best1.tar")
    status, output, _ = call(export, file, tmp_path / "out")
    assert status == 0 and "- model.onnx" in output.splitlines()
    images = torch.randn(3, 3, 64, 64)
    (scores,) = runtime.ReferenceEvaluator(str(tmp_path / "out" / "model.onnx")).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), model.eval()(images).detach(), rtol=1e-3, atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "shorter side resized to 73 pixels" in card and "trained by itself" in card


def test_what_cannot_be_written_is_said_and_a_folder_in_use_is_left_alone(tmp_path, monkeypatch):
    def fail(model, example, path):
        raise ImportError("No module named 'onnx'")

    monkeypatch.setattr(export, "FILES", {"model.onnx": fail, "model.safetensors": export.write_weights})
    status, output, _ = call(export, save_model(tmp_path / "best1.t7"), tmp_path / "out")
    assert status == 0 and "- no model.onnx: No module named 'onnx'\n- model.safetensors\n" in output
    status, _, errors = call(export, tmp_path / "best1.t7", tmp_path / "out")
    assert (status, errors) == (1, f"{tmp_path / 'out'}: File exists\n")


def test_values_that_differ_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    wrong = {"model.pt2": lambda model, example, path: model(example) + 0.1}
    monkeypatch.setattr(export, "FILES", wrong)
    status, _, errors = call(export, save_model(tmp_path / "best1.t7"), tmp_path / "out")
    assert status == 1 and "gives other values than the model" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["best1.t7"]
