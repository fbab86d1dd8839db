"""The ImageNet script: every model of torchvision, runs of real processes, what does not fit and is said."""

import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error

import pytest
import torch
import torchvision.models as zoo
from imagenet import ImageRun
from processes import ROOT, assert_same, assert_same_runs, until
from torch import nn

from common.run import load_state, snapshot
from filter_grafting import graft, invalid_filters
from filter_grafting.checkpoint import load, save
from filter_grafting.errors import GraftingError
from grafting_imagenet import grafting

NETWORK = "shufflenet_v2_x0_5"  # the smallest of torchvision's with batch norm


def finish(process):
    process.wait()
    return process


# Every model


QUICK = {
    "densenet121", "efficientnet_b0", "googlenet", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1",
}  # fmt: skip
QUICK_ON_META = {"convnext_tiny", "inception_v3", "maxvit_t", "resnext50_32x4d", "swin_t", "vit_b_32"}
SIZES = {"inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}  # pixels; the others take 64
TOO_BIG = 250e6  # parameters, for the memory of a small machine


def build(name, size, *flags, classes=7, meta=False):
    """A network as the script builds it, but with uniform weights: torchvision's initialisation takes minutes."""
    args = grafting.parse(["-a", name, "--image_size", str(size), *flags])
    initialisers = [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]
    with pytest.MonkeyPatch.context() as patch:
        for initialiser in initialisers:
            patch.setattr(nn.init, initialiser, lambda tensor, *arguments, **options: tensor)
        network, _ = grafting.build_network(args, classes)
    if meta or sum(entry.numel() for entry in network.parameters()) > TOO_BIG:
        return network.to("meta")  # where nothing is computed but shapes
    with torch.no_grad():
        for entry in network.state_dict().values():
            if entry.is_floating_point():
                entry.uniform_(0.01, 0.05)
    return network


@pytest.mark.parametrize(
    ("name", "shortcuts"), [("regnet_y_400mf", 48 + 104 + 208 + 440), ("resnet18", 128 + 256 + 512), ("vgg11", 0)]
)
def test_shortcut_convolutions_are_found_by_torchvisions_names(name, shortcuts):
    assert invalid_filters(build(name, 64, meta=name == "vgg11").state_dict(), 0, True)[1] == shortcuts


@pytest.mark.parametrize("form", ["ours", "plain"])
def test_a_network_that_asks_for_the_version_of_its_weights_is_continued(tmp_path, form):
    network, other = build("mnasnet0_5", 64), build("mnasnet0_5", 64)
    state = snapshot(network.state_dict())
    save(tmp_path / "x", {"state_dict": state if form == "ours" else dict(state)})
    state = load(tmp_path / "x")["state_dict"]
    if form == "ours":
        other.load_state_dict(state)  # as anyone would
    load_state(other, state)
    assert_same(dict(other.state_dict()), dict(network.state_dict()))


def train_a_step(network, name, size):
    weight = next(network.parameters())
    outputs = network.train()(torch.rand(2, 3, size, size, device=weight.device))
    labels = torch.tensor([1, 5], device=weight.device)
    grafting.with_auxiliary_heads(grafting.AUXILIARY_WEIGHT.get(name, 0))(outputs, labels).backward()
    # DistributedDataParallel waits for the gradient of every parameter.
    assert [key for key, entry in network.named_parameters() if entry.grad is None] == []


@pytest.mark.parametrize("name", sorted(QUICK_ON_META))
def test_every_kind_of_model_trains(name):
    size = SIZES.get(name, 64)
    train_a_step(build(name, size, meta=True), name, size)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in grafting.NAMES]
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


def test_the_loss_of_each_auxiliary_head_counts_by_its_weight():
    scores, labels = torch.randn(3, 5, 4), torch.tensor([0, 3, 1, 1, 2])
    one, two, three = (nn.functional.cross_entropy(each, labels) for each in scores)
    loss = grafting.with_auxiliary_heads(0.3)
    torch.testing.assert_close(loss((*scores,), labels), one + 0.3 * two + 0.3 * three)
    torch.testing.assert_close(loss(scores[0], labels), one)
    assert grafting.AUXILIARY_WEIGHT["inception_v3"] == 0.4


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 64), ("alexnet", 32), ("vit_b_16", 65), ("maxvit_t", 64)])
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
        (NETWORK, "fc"),
        ("densenet121", "classifier"),
        ("googlenet", "aux1.fc2, aux2.fc2, fc"),
    ],
)
def test_pretrained_weights_but_for_the_classes(monkeypatch, tmp_path, name, head):
    state, path = put_weights(monkeypatch, tmp_path, name)
    if name == "densenet121":  # whose files have the names of its first release
        torch.save({re.sub(r"(layer\d+\.(norm|conv))(\d)", r"\1.\3", key): entry for key, entry in state.items()}, path)
        assert "features.denseblock1.denselayer1.norm.1.weight" in load(path)
    args = grafting.parse(["-a", name, "--pretrained"])
    network, (line,) = grafting.build_network(args, 7)
    assert line.endswith(f"they know 1000 classes and the data has 7: {head} starts anew")
    heads = head.split(", ")
    for key, entry in network.state_dict().items():
        assert key.rpartition(".")[0] in heads or torch.equal(entry, state[key]), key
    network, (line,) = grafting.build_network(args, 1000)
    assert "starts anew" not in line
    assert_same(dict(network.state_dict()), state)


def test_pretrained_weights_that_do_not_fit_are_refused(monkeypatch, tmp_path):
    put_weights(monkeypatch, tmp_path, "squeezenet1_1", **{"features.0.bias": torch.zeros(3)})
    with pytest.raises(GraftingError, match=r"do not fit at --image_size 64: .*features\.0\.bias"):
        grafting.build_network(grafting.parse(["-a", "squeezenet1_1", "--pretrained", "--image_size", "64"]), 7)


def test_pretrained_without_a_network_or_with_a_damaged_file(monkeypatch, tmp_path):
    def download(*arguments, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    args = grafting.parse(["-a", "resnet18", "--pretrained"])
    with pytest.raises(GraftingError, match=r"cannot be downloaded .*no route.*, put https://.*\.pth at ") as error:
        grafting.build_network(args, 7)
    assert "\n" not in str(error.value)
    place = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert str(error.value).endswith(str(place))
    for damage in (b"", b"PK rubbish", b"\x80\x02c__builtin__\neval\n."):
        place.write_bytes(damage)
        with pytest.raises(GraftingError, match="is damaged; delete it"):
            grafting.build_network(args, 7)


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
        assert (contents["epoch"], contents["settings"]["arch"]) == (2, NETWORK)
        grafting.zoo.get_model(NETWORK, num_classes=4).load_state_dict(contents["state_dict"])
    names = {path.name for path in run.directory.glob("*.tar")}
    assert {"pth0_2.tar", "pth1_2.tar", "best1.tar", "best2.tar"} <= names
    states = [load(run.directory / f"final{network}.tar")["state_dict"] for network in (1, 2)]
    assert not torch.equal(states[0]["conv1.0.weight"], states[1]["conv1.0.weight"])


@pytest.mark.parametrize(
    "event",
    ["after train", "before rename pth1_1.tar", "after rename pth1_1.tar", "after blend", "after line 1"],
)
def test_killed_and_resumed_it_ends_as_if_undisturbed(make_image_run, undisturbed_run, event):
    run = make_image_run(2, 3, "-a", NETWORK)
    count = 2 if event in ("after train", "after blend") else 1
    first, second = run.start(1, plan=[["at", event, count, "kill"]]), run.start(2)
    assert first.wait() == -signal.SIGKILL
    assert finish(run.start(1, "--resume", "auto")).status == 0, run.log(1)
    assert second.wait() == 0
    assert_same_runs(run, undisturbed_run)


def test_lines_of_progress(make_image_run):
    run = make_image_run(1, 1, "-p", "2").finish()
    fields = "    ".join(f"{name} .*" for name in ("Time", "Data", "Loss", "Acc@1", "Acc@5"))
    lines = re.findall(rf"^Epoch: \[0\]\[(\d)/4\]    {fields}$", run.log(1), re.MULTILINE)
    assert lines == ["0", "2"]


def test_evaluate_prints_the_accuracy_and_changes_nothing(make_image_run, undisturbed_run):
    run = make_image_run(1, 1, "-a", NETWORK)
    best = undisturbed_run.directory / "best1.tar"
    process = finish(run.start(1, "-e", "--resume", best))
    assert process.status == 0, process.output()
    found = re.search(r"^\* Acc@1 (\S+)    Acc@5 100\.000    Loss \S+    Images 20$", run.log(1), re.M)
    assert float(found[1]) == pytest.approx(load(best)["accuracy"], abs=1e-3)
    assert not run.directory.exists()


def test_a_run_starts_from_a_file(make_image_run, undisturbed_run, tmp_path):
    ours = load(undisturbed_run.checkpoint(1, 1))
    start = ours["epoch"] + 1
    # As PyTorch's example writes it, of a network in DistributedDataParallel.
    state = {f"module.{key}": entry for key, entry in ours["state_dict"].items()}
    example = {"epoch": start, "arch": NETWORK, "state_dict": state, "optimizer": ours["optimizer"]}
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
        assert [group["momentum"] for group in last["optimizer"]["param_groups"]] == [0.5]
    assert_same(finals[0]["state_dict"], finals[1]["state_dict"])
    run = make_image_run(1, 2, "-a", NETWORK, "--resume", str(tmp_path / "ours.tar"), "--start-epoch", "0")
    assert finish(run.start(1)).status == 0
    assert re.findall(r"epoch:(\d+)", run.log(1)) == ["0", "1"]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--resume", "nowhere.tar"], "--resume: there is no file nowhere.tar"),
        (["-a", "squeezenet1_1", "--resume", "{best}"], "best1.tar does not fit this network: "),
        (["--start-epoch", "5"], "nothing to train: the first epoch would be 5, and --epochs is 2"),
        (["-e", "--resume", "nowhere.tar"], "--resume: there is no file nowhere.tar"),
    ],
)
def test_what_cannot_be_started_from_ends_in_a_sentence(make_image_run, undisturbed_run, flags, sentence):
    run = make_image_run(1, 2)
    flags = [flag.format(best=undisturbed_run.directory / "best1.tar") for flag in flags]
    process = finish(run.start(1, *flags))
    assert (process.status, process.sentence().count("\n")) == (1, 1), process.output()
    assert sentence in process.sentence()


def test_networks_that_start_at_different_epochs_are_refused(make_image_run, undisturbed_run):
    run = make_image_run(2, 3, "-a", NETWORK)
    first = run.start(1)
    run.reaches(1, "waiting")
    second = finish(run.start(2, "--start-epoch", "1"))
    assert second.status == 1
    assert "start-epoch is 1 here and 0 in the run" in second.sentence()
    first.kill()


# Flags and folders


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["-a", "resnet19"], "torchvision has no model 'resnet19'; did you mean resnet1"),
        (["-a", "fasterrcnn_resnet50_fpn"], "torchvision has no model"),
        (["-b", "0"], "argument -b/--batch-size: got '0', expected an integer at least 1"),
        (["--lr", "nan"], "argument --lr/--learning-rate: got 'nan'"),
        (["--wd", "-1"], "argument --wd/--weight-decay: got '-1'"),
        (["--a", "1.5"], "argument --a: got '1.5'"),
        (["--image_size", "8"], "argument --image_size: got '8'"),
        (["--i", "3"], "argument --i: got 3, expected 1 to 2 (--num)"),
        (["--gpu", "0"], "argument --gpu: needs --device cuda"),
        (["--decode", "gpu"], "argument --decode: gpu needs --device cuda"),
        (["-e"], "argument -e: expected --resume PATH or --pretrained"),
        (["-e", "--resume", "auto"], "argument -e: expected --resume PATH or --pretrained"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)
def test_a_wrong_flag_ends_in_one_line(capsys, flags, words):
    with pytest.raises(SystemExit) as end:
        grafting.parse(["--device", "cpu", *flags])
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert words in said


def test_a_batch_that_ranks_cannot_share_is_a_wrong_flag(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        grafting.parse(["-b", "256"])
    assert "argument -b: got 256, expected a multiple of 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: shutil.rmtree(data), "does not exist"),
        (lambda data: shutil.rmtree(data / "train"), "has no folder train/"),
        (lambda data: shutil.rmtree(data / "val"), "has no folder val/"),
        (lambda data: shutil.rmtree(data / "val" / "cat"), "only train/ has cat"),
        (lambda data: shutil.rmtree(data / "train" / "bird"), "only val/ has bird"),
        (lambda data: [path.unlink() for path in (data / "train" / "bird").iterdir()], "bird has no image"),
    ],
)
def test_a_bad_folder_ends_in_a_sentence(make_image_run, class_folders, tmp_path, spoil, words):
    data = shutil.copytree(class_folders, tmp_path / "images")
    spoil(data)
    run = make_image_run(1, 1, data=data)
    for flags in ([], ["-e", "--resume", "any.tar"]):
        process = finish(run.start(1, *flags))
        assert (process.status, process.sentence().count("\n")) == (1, 1), process.output()
        assert words in process.sentence()


# The launcher


def test_the_launcher_gives_each_network_its_ranks(class_folders, tmp_path):
    flags = ["--data", class_folders, "-a", "squeezenet1_1", "--image_size", "32", "-b", "12", "-j", "0",
             "--epochs", "1", "--num", "1", "--s", tmp_path / "run", "--gpus-per-network", "2"]  # fmt: skip
    launcher = ROOT / "grafting_imagenet" / "grafting.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    result = subprocess.run([launcher, *flags], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--nproc-per-node 2 -- " in result.stderr
    until((tmp_path / "run" / "final1.tar").exists, what=(tmp_path / "run" / "1.out").read_text)
    assert "2 processes" in (tmp_path / "run" / "1.out").read_text()
