"""The exported folder: its files give the model's scores, and say what the checkpoint says."""

import json

import pytest
import torch
from saved import CLASSES, call, own_model, save_imagenet_model, save_model

from analysis import export


def test_the_files_hold_the_model_and_what_the_checkpoint_says(tmp_path, monkeypatch):
    safetensors, own = pytest.importorskip("safetensors.torch"), own_model(tmp_path, monkeypatch)
    monkeypatch.delitem(export.FILES, "model.onnx")  # which takes half of a minute
    command = ["python", "grafting.py", "--data", "my images"]
    file = save_model(tmp_path / "best1.t7", own.state_dict(), model="mine:net", command=command)
    status, _, _ = call(export, file, tmp_path / "out", "--name", "my-model")
    assert status == 0
    monkeypatch.chdir(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()

    names = {"torch": torch}
    exec(card.split("```python\n")[1].split("\n```")[0], names)  # the line that loads the model
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(names["model"](images), own(images))
    loaded, state = safetensors.load_file("model.safetensors"), own.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)

    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architecture"], config["classes"], config["image_size"]) == ("mine:net", CLASSES, 32)
    assert (config["accuracy"], config["epoch"], config["settings"]["lr"]) == (50.0, 3, 0.1)
    assert config["filters"] == 4 and config["invalid_filters"].keys() == {"0.1", "0.01"}
    for words in (
        "# my-model\n",
        "Test accuracy: 50.00 % after epoch 3",
        "as one of 2 networks",
        "| lr | 0.1 |",
        "    python grafting.py --data 'my images'\n",
        "resized to 32×32",
    ):
        assert words in card


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


def test_what_cannot_be_written_is_said_and_the_rest_is_there(tmp_path, monkeypatch):
    def fail(model, example, path):
        raise ImportError("No module named 'onnx'")

    monkeypatch.setattr(export, "FILES", {"model.onnx": fail, "model.safetensors": export.write_weights})
    status, output, _ = call(export, save_model(tmp_path / "best1.t7"), tmp_path / "out")
    assert status == 0 and "- no model.onnx: No module named 'onnx'\n- model.safetensors\n" in output


def test_values_that_differ_are_refused_and_nothing_is_left(tmp_path, monkeypatch):
    wrong = {"model.pt2": lambda model, example, path: model(example) + 0.1}
    monkeypatch.setattr(export, "FILES", wrong)
    status, _, errors = call(export, save_model(tmp_path / "best1.t7"), tmp_path / "out")
    assert status == 1 and "gives other values than the model" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["best1.t7"]


def test_a_folder_in_use_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    status, _, errors = call(export, save_model(tmp_path / "best1.t7"), tmp_path / "out")
    assert (status, errors) == (1, f"{tmp_path / 'out'}: File exists\n")
