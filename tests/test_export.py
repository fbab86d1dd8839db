"""The exported folder: it loads without this project, gives the model's scores, and says what the file says."""

import contextlib
import io
import json
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from test_evaluate import NAMES, trained_like, write_checkpoint, write_imagenet

from analysis import export
from analysis.runs import program
from grafting_cifar import models


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the program in this process: (exit status, what it printed, its errors)."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, arguments)])
        return program(export.main), *capsys.readouterr()

    return run


@pytest.fixture
def without_onnx(monkeypatch):
    """Which takes half of a minute."""
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == "onnx" else find_spec(name))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder that was written without onnx, and what was printed."""
    folder, printed = tmp_path_factory.mktemp("exported"), io.StringIO()
    command = ["python", "grafting.py", "--data", "my images"]
    file = write_checkpoint(folder / "best1.t7", command=command)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(export, "find_spec", lambda name: None if name == "onnx" else find_spec(name))
        patch.setattr("sys.argv", ["export.py", str(file), str(folder / "out"), "--name", "my-model"])
        assert export.main() == 0
    return folder / "out", printed.getvalue()


def test_one_line_loads_the_model_where_this_project_is_not(tmp_path, exported):
    line = (exported[0] / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    model, images = models.build("resnet20", 2).eval(), torch.randn(3, 3, 32, 32)
    model.load_state_dict(trained_like(0))
    torch.save(images, tmp_path / "images.pt")
    scores = f"torch.save(model(torch.load({str(tmp_path / 'images.pt')!r})), {str(tmp_path / 'scores.pt')!r})"
    # -I: neither this checkout nor any environment variable is on the path.
    code = ["-I", "-c", f"import torch; {line.partition('  #')[0]}; {scores}"]
    subprocess.run([sys.executable, *code], cwd=exported[0], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "scores.pt"), model(images).detach())


def test_the_weights_are_those_of_the_file(exported):
    safetensors = pytest.importorskip("safetensors.torch")
    loaded, state = safetensors.load_file(exported[0] / "model.safetensors"), trained_like(0)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)
    assert "no model.onnx: the package onnx is not installed" in exported[1]


def test_config_and_card_say_what_the_file_says(exported):
    config = json.loads((exported[0] / "config.json").read_text())
    assert (config["architecture"], config["classes"], config["image_size"]) == ("resnet20", NAMES, 32)
    assert (config["accuracy"], config["epoch"], config["settings"]["lr"]) == (50.0, 3, 0.1)
    assert config["filters"] == 688 and config["invalid_filters"].keys() == {"0.1", "0.01"}
    card = (exported[0] / "README.md").read_text()
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
def test_imagenet_models_are_exported_with_onnx(tmp_path, run):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnx.reference")
    file, model = write_imagenet(tmp_path / "best1.tar")
    status, output, _ = run(file, tmp_path / "out")
    assert status == 0 and "- model.onnx" in output.splitlines()
    images = torch.randn(3, 3, 64, 64)
    (scores,) = runtime.ReferenceEvaluator(str(tmp_path / "out" / "model.onnx")).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(scores), model(images).detach(), rtol=1e-3, atol=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'torchvision.models.get_model("resnet18", num_classes=2)' in card
    assert "shorter side resized to 73 pixels" in card and "trained by itself" in card


def test_values_that_differ_are_refused_and_nothing_is_left(tmp_path, run, monkeypatch, without_onnx):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    status, _, errors = run(write_checkpoint(tmp_path / "best1.t7"), tmp_path / "out")
    assert status == 1 and "gives other values than the model" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["best1.t7"]


def test_a_folder_in_use_is_left_alone(tmp_path, run):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    status, _, errors = run(write_checkpoint(tmp_path / "best1.t7"), tmp_path / "out")
    assert (status, errors) == (1, f"{tmp_path / 'out'} is there already: give another folder, or remove it\n")
