"""Using a trained model: evaluate.py and predict.py on files of both scripts, and what they say of others."""

import shlex

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from analysis import evaluate, predict
from analysis.runs import program
from grafting_cifar import models
from grafting_cifar.data import MEAN, STD

NAMES = ["dark", "light"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Class folders of dark and of light images, 32 and 8 of each in train/ and test/."""
    folder, random = tmp_path_factory.mktemp("folders"), np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for k, name in enumerate(NAMES):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(100 * k, 100 * k + 155, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def trained_like(seed, name="resnet20", classes=2):
    """The weights of a model whose batch norm has seen something."""
    torch.manual_seed(seed)
    model = models.build(name, classes)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32))
    return model.state_dict()


def write_checkpoint(path, state=None, key="net", **changes):
    """A file as grafting.py leaves it; what is changed to None is left out."""
    contents = {
        key: trained_like(0) if state is None else state,
        "epoch": 3,
        "accuracy": 50.0,
        "settings": {"model": "resnet20", "num": 2, "lr": 0.1, "val": 0},
        "model": "resnet20",
        "classes": NAMES,
        "mean": list(MEAN),
        "std": list(STD),
        "image_size": 32,
        "command": ["python", "grafting.py"],
    } | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: value for name, value in contents.items() if value is not None}, path)
    return path


def write_imagenet(path, size=64):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    for _ in range(3):
        model(torch.randn(8, 3, size, size))
    settings = {"arch": "resnet18", "num": 1, "image_size": size}
    write_checkpoint(
        path,
        model.state_dict(),
        "state_dict",
        model="resnet18",
        image_size=size,
        settings=settings,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    return path, model.eval()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program in this process, on the CPU: (exit status, what it printed, its errors)."""

    def run(module, *arguments, device=("--device", "cpu")):
        monkeypatch.setattr("sys.argv", ["program.py", *map(str, arguments), *device])
        return program(module.main), *capsys.readouterr()

    return run


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
        return model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float())[0].softmax(0)


def test_accuracies_are_those_of_a_loop_over_the_images(tmp_path, folders, run):
    model = models.build("resnet20", 2).eval()
    model.load_state_dict(trained_like(0))
    file = write_checkpoint(tmp_path / "best1.t7", command=f"python grafting.py --data {shlex.quote(str(folders))}")
    hits = {}
    for k, name in enumerate(NAMES):
        images = (folders / "test" / name).iterdir()
        hits[name] = [int(probabilities(model, path, 32, MEAN, STD).argmax()) == k for path in images]
    plot = tmp_path / "confusion.png"
    status, output, errors = run(evaluate, file, "--plot", plot)  # the images are those of the recorded command
    assert status == 0 and f"- {plot}" in output and plot.read_bytes().startswith(b"\x89PNG")
    for name, own in hits.items():
        assert f"| {name:5} |      8 | {100 * np.mean(own):12.2f} |" in output
    accuracy = 100 * np.mean([*hits["dark"], *hits["light"]])
    assert f"accuracy: {accuracy:.3f} % of 16 test images" in output
    assert ("It had 50.00 % when it was saved" in errors) == (accuracy != 50)


def test_confusions_are_counted_by_class_and_prediction():
    predicted, labels = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 1, 0, 2, 2])
    assert evaluate.confusion_matrix(predicted, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_images_of_the_run_are_selected(tmp_path, folders, run):
    settings = {"model": "resnet20", "test_images": 5, "images": 20, "val": 2}
    status, output, _ = run(evaluate, write_checkpoint(tmp_path / "a.t7", settings=settings), "--data", folders)
    assert status == 0 and " of 5 test images" in output


def test_older_files_say_less_and_what_is_taken_instead_is_said(tmp_path, folders, run):
    left_out = dict.fromkeys(("model", "classes", "mean", "std", "image_size", "command"))
    file = write_checkpoint(tmp_path / "best1.t7", **left_out)
    status, output, _ = run(evaluate, file, "--data", folders)
    assert status == 0
    assert "The file does not say: classes, mean, std, image_size." in output


@pytest.mark.parametrize("size", [32, 64])
def test_predictions_are_those_of_the_model(tmp_path, folders, run, size):
    image = folders / "test" / "light" / "0.png"
    if size == 32:
        file, model = write_checkpoint(tmp_path / "best1.t7"), models.build("resnet20", 2).eval()
        model.load_state_dict(trained_like(0))
        expected = probabilities(model, image, 32, MEAN, STD)
    else:
        file, model = write_imagenet(tmp_path / "best1.tar")
        expected = probabilities(model, image, 64, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    status, output, errors = run(predict, file, image, tmp_path / "none.png")
    assert status == 1, "one of the images cannot be read"
    assert f"{tmp_path / 'none.png'} cannot be read as an image" in errors
    found = dict(part.rsplit(" ", 2)[:2] for part in output.strip().split(": ")[1].split(", "))
    assert list(found) == [NAMES[k] for k in expected.argsort(descending=True)]
    for name, value in found.items():
        assert float(value) == pytest.approx(100 * expected[NAMES.index(name)].item(), abs=0.5)


def test_imagenet_files_are_evaluated(tmp_path, folders, run):
    file, _ = write_imagenet(tmp_path / "best1.tar")
    status, output, _ = run(evaluate, file, "--data", folders)
    assert status == 0 and "of 16 test images" in output and "(resnet18, " in output


def test_wrapped_weights_and_models_of_ones_own_are_read(tmp_path, monkeypatch, folders, run):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten()\n"
        "    return nn.Sequential(nn.Conv2d(3, 4, 3), *pooled, nn.Linear(4, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from mine import net

    state = {f"module.{key}": entry for key, entry in net(2).state_dict().items()}
    status, output, _ = run(evaluate, write_checkpoint(tmp_path / "a.t7", state, model="mine:net"), "--data", folders)
    assert status == 0 and "(mine:net, " in output


def test_a_device_that_is_not_there_is_one_sentence(tmp_path, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, errors = run(evaluate, "--device", "cuda", write_checkpoint(tmp_path / "a.t7"), device=())
    assert status == 2 and errors.startswith("argument --device: no GPU can be used here") and errors.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None, "settings": None}, "does not say which model it holds: give it with --model"),
        ({"model": "resnet32"}, "does not fit resnet32 with 2 classes: "),
        ({"model": "resnet21"}, "cannot be built as resnet21 with 2 classes: unknown model"),
        ({"classes": ["cat", "dog"]}, "has 2 classes (dark, light…), "),
        ({"net": None}, "holds no state dict: it has the keys epoch, "),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(tmp_path, folders, run, changes, reason):
    file = write_checkpoint(tmp_path / "file.t7", **changes)
    status, _, errors = run(evaluate, file, "--data", folders)
    assert status == 1 and reason in errors and str(file) in errors and errors.count("\n") == 1
