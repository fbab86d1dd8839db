"""The ImageNet script: every model of torchvision, runs of real processes, what does not fit and is said."""

import os
import re
import shutil
import signal
import urllib.error

import pytest
import torch
import torchvision.models as zoo
from imagenet import ImageRun
from processes import assert_same, assert_same_runs
from torch import nn

from filter_grafting import graft
from filter_grafting.checkpoint import load, save
from filter_grafting.errors import CheckpointError, GraftingError
from filter_grafting.information import invalid_filters
from grafting_imagenet import flags, models
from training.loop import cross_entropy
from training.models import load_state

NETWORK = "shufflenet_v2_x0_5"  # the smallest of torchvision's with batch norm


def finish(process):
    process.wait()
    return process


# Every model


QUICK = {"googlenet", "mnasnet0_5", "shufflenet_v2_x0_5"}
QUICK_ON_META = {"inception_v3", "resnext50_32x4d", "vit_b_32"}
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}  # pixels; the others take 64
TOO_BIG = 250e6  # parameters, for the memory of a small machine


def build(name, size, classes=7, pretrained=False, meta=False):
    """A model as the script builds it, but with uniform weights: torchvision's initialisation takes minutes."""
    initialisers = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with pytest.MonkeyPatch.context() as patch:
        for initialiser in initialisers:
            patch.setattr(nn.init, initialiser, lambda tensor, *arguments, **options: tensor)
        model = models.build(name, classes, size, pretrained)
    if meta or sum(entry.numel() for entry in model.parameters()) > TOO_BIG:
        return model.to("meta")  # where nothing is computed but shapes
    with torch.no_grad():
        for entry in model.state_dict().values():
            if entry.is_floating_point():
                entry.uniform_(0.01, 0.05)
    return model


@pytest.mark.parametrize(
    ("name", "shortcuts"), [("regnet_y_400mf", 48 + 104 + 208 + 440), ("resnet18", 128 + 256 + 512)]
)
def test_shortcut_convolutions_are_found_by_torchvisions_names(name, shortcuts):
    assert invalid_filters(build(name, 64).state_dict(), 0, True)[1] == shortcuts


@pytest.mark.parametrize("wrap", [lambda state: state, dict], ids=["ours", "plain"])
def test_a_network_that_asks_for_the_version_of_its_weights_is_continued(wrap):
    network, other = build("mnasnet0_5", 64), build("mnasnet0_5", 64)
    load_state(other, wrap(network.state_dict()))
    assert_same(dict(other.state_dict()), dict(network.state_dict()))


def train_a_step(network, name, size):
    weight = next(network.parameters())
    outputs = network.train()(torch.rand(2, 3, size, size, device=weight.device))
    labels = torch.tensor([1, 5], device=weight.device)
    cross_entropy(outputs, labels, aux=models.AUXILIARY_WEIGHT.get(name, 0)).backward()
    # DistributedDataParallel waits for the gradient of every parameter.
    assert [key for key, entry in network.named_parameters() if entry.grad is None] == []


@pytest.mark.parametrize("name", sorted(QUICK_ON_META))
def test_every_kind_of_model_trains(name):
    size = SIZES.get(name, 64)
    train_a_step(build(name, size, meta=True), name, size)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in flags.names()]
)
def test_every_model_trains_is_grafted_and_saved(name, tmp_path):
    size = SIZES.get(name, 64)
    network = build(name, size)
    train_a_step(network, name, size)
    weight = next(network.parameters())
    if weight.is_meta:
        return
    neighbour = {key: entry.flip(0) if entry.dim() else entry for key, entry in network.state_dict().items()}
    before = weight.detach().clone()
    assert graft(network, neighbour)
    assert not torch.equal(weight, before)
    save(tmp_path / "network.tar", {"state_dict": network.state_dict()})
    state = load(tmp_path / "network.tar")["state_dict"]
    other = build(name, size)
    other.load_state_dict(state)
    assert_same(dict(other.state_dict()), dict(network.state_dict()))


@pytest.mark.parametrize(("name", "size"), [("alexnet", 32), ("vit_b_16", 65)])
def test_a_size_that_does_not_fit_is_said(name, size):
    with pytest.raises(GraftingError, match=f"{name} does not work on images of {size} pixels .*--image_size"):
        build(name, size)


# Torchvision's weights


def put_weights(monkeypatch, folder, name, **changes):
    """Made-up weights, where torch would have put those that it had downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    state = {**build(name, 64, classes=1000).state_dict(), **changes}
    path = folder / "hub" / "checkpoints" / os.path.basename(zoo.get_model_weights(name).DEFAULT.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return state, path


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("squeezenet1_1", "classifier.1"),
        pytest.param("densenet121", "classifier", marks=pytest.mark.slow),
        ("googlenet", "aux1.fc2, aux2.fc2, fc"),
    ],
)
def test_pretrained_weights_but_for_the_classes(monkeypatch, tmp_path, name, head):
    state, path = put_weights(monkeypatch, tmp_path, name)
    if name == "densenet121":  # whose files have the names of its first release
        torch.save({re.sub(r"(layer\d+\.(norm|conv))(\d)", r"\1.\3", key): entry for key, entry in state.items()}, path)
        assert "features.denseblock1.denselayer1.norm.1.weight" in load(path)
    network = build(name, 224, pretrained=True)
    line = models.load_pretrained(network, name, 224)
    assert line.endswith(f"they know 1000 classes and the data has 7: {head} starts anew")
    heads = head.split(", ")
    for key, entry in network.state_dict().items():
        assert key.rpartition(".")[0] in heads or torch.equal(entry, state[key]), key
    network = build(name, 224, 1000, pretrained=True)
    assert "starts anew" not in models.load_pretrained(network, name, 224)
    assert_same(dict(network.state_dict()), state)


def test_pretrained_weights_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    put_weights(monkeypatch, tmp_path, "squeezenet1_1", **{"features.0.bias": torch.zeros(3)})
    with pytest.raises(GraftingError, match=r"do not fit at --image_size 64: .*features\.0\.bias"):
        models.load_pretrained(build("squeezenet1_1", 64), "squeezenet1_1", 64)


def test_pretrained_without_a_network_or_with_a_damaged_file(monkeypatch, tmp_path):
    def download(*arguments, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = build("resnet18", 64)
    with pytest.raises(GraftingError, match=r"cannot be downloaded .*no route.*, put https://.*\.pth at ") as error:
        models.load_pretrained(network, "resnet18", 64)
    assert "\n" not in str(error.value)
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert str(error.value).endswith(str(place))
    for damage in (b"", b"PK rubbish", b"\x80\x02c__builtin__\neval\n."):
        place.write_bytes(damage)
        with pytest.raises(GraftingError, match="is damaged; delete it"):
            models.load_pretrained(network, "resnet18", 64)


# What --deterministic does to pooling that has no deterministic gradient on CUDA


def test_pooling_that_does_nothing_goes():
    model, images = build("alexnet", 224), torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        before = model.eval()(images)
        models.make_deterministic(model, "alexnet", 224)
        torch.testing.assert_close(model(images), before)


# Checkpoints of others


def wrapped(state):
    """As PyTorch's example saves AlexNet and VGG, whose features alone it puts into DataParallel; compiled, too."""
    return {f"_orig_mod.{key.replace('features.', 'features.module.')}": entry for key, entry in state.items()}


@pytest.mark.parametrize("contents", [lambda state: state, lambda state: {"state_dict": wrapped(state)}])
def test_weights_are_loaded_whatever_wrapped_them(tmp_path, contents):
    source, target = build("squeezenet1_1", 64), build("squeezenet1_1", 64)
    save(tmp_path / "x", contents(source.state_dict()))
    models.load_weights(target, models.read_checkpoint(tmp_path / "x"), tmp_path / "x", "squeezenet1_1", 64)
    assert_same(dict(target.state_dict()), dict(source.state_dict()))


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"model": {}, "optimizer": {}}, "holds the keys model, optimizer; expected state_dict, or a state dict alone"),
        ({"state_dict": {"a": 1}, "epoch": 2}, "holds the keys state_dict, epoch; expected state_dict"),
        ({"state_dict": {}, "arch": "resnet18"}, "it is of a resnet18, and -a says squeezenet1_1"),
        ({"state_dict": {}, "settings": {"arch": "resnet18"}}, "it is of a resnet18, and -a says squeezenet1_1"),
        ({"state_dict": {}}, r"features.0.weight: in the network \(64, 3, 3, 3\) float32"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_named_for_what_it_is(tmp_path, contents, words):
    save(tmp_path / "x", contents)
    with pytest.raises(CheckpointError, match=words):
        models.load_weights(
            build("squeezenet1_1", 64), models.read_checkpoint(tmp_path / "x"), tmp_path / "x", "squeezenet1_1", 64
        )


# Runs


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory, class_folders):
    return ImageRun(tmp_path_factory.mktemp("undisturbed") / "run", class_folders, 2, 3, ("-a", NETWORK)).finish()


def test_a_ring_of_two(undisturbed_run):
    run = undisturbed_run
    for network in (1, 2):
        lines = [line for line in run.log(network).splitlines() if line.startswith(f"Network:{network}")]
        pattern = r"Network:%d    epoch:%d    accuracy:\d+\.\d{3}    best:\d+\.\d{3}    accuracy@5:100\.000    loss:.*"
        assert [bool(re.fullmatch(pattern % (network, epoch), line)) for epoch, line in enumerate(lines)] == [True] * 3
        contents = load(run.directory / f"final{network}.tar")
        found = [contents[key] for key in ("epoch", "model", "image_size", "mean")]
        assert found == [2, NETWORK, 32, (0.485, 0.456, 0.406)]
        zoo.get_model(NETWORK, num_classes=4).load_state_dict(contents["state_dict"])
    names = {path.name for path in run.directory.glob("*.tar")}
    assert {"pth0_2.tar", "pth1_2.tar", "best1.tar", "best2.tar"} <= names
    states = [load(run.directory / f"final{network}.tar")["state_dict"] for network in (1, 2)]
    assert not torch.equal(states[0]["conv1.0.weight"], states[1]["conv1.0.weight"])


EVENTS = ["after train", "before rename pth1_1.tar", "after line 1"]


@pytest.mark.parametrize(
    "event",
    ["after rename pth1_1.tar", "after graft", *(pytest.param(event, marks=pytest.mark.slow) for event in EVENTS)],
)
def test_killed_and_resumed_it_ends_as_if_undisturbed(make_image_run, undisturbed_run, event):
    run = make_image_run(2, 3, "-a", NETWORK)
    count = 2 if event in ("after train", "after graft") else 1
    first, second = run.start(1, plan=[["at", event, count, "kill"]]), run.start(2)
    assert first.wait() == -signal.SIGKILL
    assert finish(run.start(1, "--resume", "auto")).status == 0, run.log(1)
    assert second.wait() == 0
    assert_same_runs(run, undisturbed_run)


def test_evaluate_prints_the_accuracy_at_the_recorded_size_and_changes_nothing(make_image_run, undisturbed_run):
    best = undisturbed_run.directory / "best1.tar"
    for size in None, "40":
        run = make_image_run(1, 1, "-a", NETWORK)
        place = run.flags.index("--image_size")
        run.flags[place : place + 2] = ["--image_size", size] if size else []
        process = finish(run.start(1, "-e", "--resume", best))
        assert process.status == 0, process.output()
        found = re.search(r"^\* Acc@1 (\S+)    Acc@5 100\.000    Loss \S+    Images 20$", run.log(1), re.M)
        assert size or float(found[1]) == pytest.approx(load(best)["accuracy"], abs=1e-3)
        assert (f"{best} is of images of 32 pixels, here they have 40" in run.log(1)) == bool(size)
        assert not run.directory.exists()


def test_a_run_starts_from_a_file(make_image_run, undisturbed_run, tmp_path):
    ours = load(undisturbed_run.checkpoint(1, 1))
    start = ours["epoch"] + 1
    # As PyTorch's example writes it, of a network in DistributedDataParallel.
    state = {f"module.{key}": entry for key, entry in ours["state_dict"].items()}
    example = {"epoch": start, "arch": NETWORK, "state_dict": state, "optimizer": ours["extra"]["optimizer"]}
    save(tmp_path / "example.tar", example)
    save(tmp_path / "ours.tar", ours)
    finals = []
    for file in ("example.tar", "ours.tar"):
        run = make_image_run(1, start + 1, "-a", NETWORK, "--resume", str(tmp_path / file), "--momentum", "0.5")
        assert finish(run.start(1)).status == 0, run.started[-1].output()
        assert f"started from {tmp_path / file}, at epoch {start}" in run.log(1)
        assert re.findall(r"epoch:(\d+)", run.log(1)) == [str(start)]
        finals.append(load(run.directory / "final1.tar"))
        finals[-1].pop("run", None)
        last = load(run.checkpoint(1, start))
        assert [group["momentum"] for group in last["extra"]["optimizer"]["param_groups"]] == [0.5]
    assert_same(finals[0]["state_dict"], finals[1]["state_dict"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--resume", "nowhere.tar"], "/nowhere.tar; expected a checkpoint, or the word auto"),
        (["-a", "squeezenet1_1", "--resume", "{best}"], f"it is of a {NETWORK}, and -a says squeezenet1_1"),
        (["--start-epoch", "5"], "nothing to train: the first epoch would be 5, and --epochs is 2"),
    ],
)
def test_what_cannot_be_started_from_ends_in_a_sentence(make_image_run, undisturbed_run, flags, sentence):
    run = make_image_run(1, 2)
    flags = [flag.format(best=undisturbed_run.directory / "best1.tar") for flag in flags]
    process = finish(run.start(1, *flags))
    assert (process.status, process.sentence().count("\n")) == (1, 1), process.output()
    assert sentence in process.sentence()


# Folders


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: shutil.rmtree(data), "does not exist"),
        (lambda data: shutil.rmtree(data / "val" / "cat"), "only train/ has cat"),
    ],
)
def test_a_bad_folder_ends_in_a_sentence_and_leaves_no_trace(make_image_run, class_folders, tmp_path, spoil, words):
    data = shutil.copytree(class_folders, tmp_path / "images")
    spoil(data)
    run = make_image_run(1, 1, data=data)
    process = finish(run.start(1))
    assert (process.status, process.sentence().count("\n")) == (1, 1), process.output()
    assert words in process.sentence()
    assert not run.directory.exists()


def test_with_val_and_test_the_one_chooses_and_the_other_is_reported(make_image_run, class_folders, tmp_path):
    data = shutil.copytree(class_folders, tmp_path / "images")
    shutil.copytree(data / "val", data / "test")
    for path in (data / "test").rglob("*.*"):
        path.unlink() if "1" in path.stem and len(list(path.parent.iterdir())) > 1 else None
    run = make_image_run(1, 3, "-p", "2", data=data).finish()
    rows = run.outcome(1)["tables"]["metrics"]
    scores = [float(row["val_accuracy"]) for row in rows]
    assert rows[-1]["best"] == rows[scores.index(max(scores))]["test_accuracy"]
    assert "    val:" in run.log(1)
    fields = "    ".join(f"{name} .*" for name in ("Time", "Data", "Loss", "Acc@1", "Acc@5"))
    lines = re.findall(rf"^Epoch: \[0\]\[(\d)/4\]    {fields}$", run.log(1), re.MULTILINE)
    assert lines == ["0", "2"]
