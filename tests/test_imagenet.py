"""The ImageNet script: torchvision's models and weights, checkpoints of others, runs of real processes."""

import contextlib
import os
import re
import shutil
import signal
import urllib.error
from pathlib import Path

import pytest
import ranks
import torch
import torchvision.models as zoo
from imagenet import ImageRun
from processes import assert_same, until
from torch import nn

from filter_grafting.checkpoint import load, save
from filter_grafting.errors import GraftingError, MismatchError
from grafting_imagenet import flags, grafting, models
from training.loop import cross_entropy
from training.models import read_checkpoint
from training.process import Signals

# Every model

QUICK = {"googlenet", "mnasnet0_5", "inception_v3", "vit_b_32"}
SIZES = {"alexnet": 224, "inception_v3": 299, "maxvit_t": 224, "vit_h_14": 56}  # pixels; the others take 64


def bare(name, size, classes=7, pretrained=False):
    """A model as the script builds it, but for its weights: torchvision's initialisation takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        for initialiser in [name for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")]:
            patch.setattr(nn.init, initialiser, lambda tensor, *arguments, **options: tensor)
        return models.build(name, classes, size, pretrained)


def build(*arguments, **options):
    model = bare(*arguments, **options)
    with torch.no_grad():
        for entry in model.state_dict().values():
            if entry.is_floating_point():
                entry.uniform_(0.01, 0.05)
    return model


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in flags.names()]
)
def test_every_model_trains(name):
    size = SIZES.get(name, 64)
    network = bare(name, size).to("meta").train()  # where nothing is computed but shapes
    outputs, labels = network(torch.rand(2, 3, size, size, device="meta")), torch.tensor([1, 5], device="meta")
    cross_entropy(outputs, labels, aux=models.AUXILIARY_WEIGHT.get(name, 0)).backward()
    # DistributedDataParallel waits for the gradient of every parameter.
    assert [key for key, entry in network.named_parameters() if entry.grad is None] == []


def test_pooling_that_does_nothing_goes_for_it_has_no_deterministic_gradient():
    assert isinstance(bare("vgg16", 224).avgpool, nn.Identity)
    assert isinstance(bare("vgg16", 64).avgpool, nn.AdaptiveAvgPool2d)


# Torchvision's weights


def put_weights(monkeypatch, folder, name):
    """Made-up weights, where torch would have put those that it had downloaded; as old files, without counts."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    state = build(name, 64, classes=1000).state_dict()
    old = {key: entry for key, entry in state.items() if not key.endswith("num_batches_tracked")}
    if name == "densenet121":  # whose files have the names of its first release
        old = {re.sub(r"(layer\d+\.(norm|conv))(\d)", r"\1.\3", key): entry for key, entry in old.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in old
    path = folder / "hub" / "checkpoints" / os.path.basename(zoo.get_model_weights(name).DEFAULT.url)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(old, path)
    return state


@pytest.mark.parametrize(("name", "head"), [("densenet121", "classifier"), ("googlenet", "aux1.fc2, aux2.fc2, fc")])
def test_pretrained_weights_but_for_the_classes(monkeypatch, tmp_path, name, head):
    state = put_weights(monkeypatch, tmp_path, name)
    network = build(name, 224, pretrained=True)
    line = models.load_pretrained(network, name)
    assert line.endswith(f"; for other classes: {head} starts anew")
    tested = r"\(IMAGENET1K_V1; resized to 256, bilinear, torchvision measured Acc@1 \d\d\.\d+\);"
    assert re.search(f"weights of {name} {tested}", line)
    for key, entry in network.state_dict().items():
        assert key.rpartition(".")[0] in head.split(", ") or torch.equal(entry, state[key]), key
    network = build(name, 224, 1000, pretrained=True)
    assert "starts anew" not in models.load_pretrained(network, name)
    assert_same(dict(network.state_dict()), dict(state))


def test_pretrained_weights_that_expect_other_pixels_are_refused():
    with pytest.raises(GraftingError, match=r"efficientnet_v2_l expect images of mean \[0.5, 0.5, 0.5\] and standard"):
        models.load_pretrained(nn.Identity(), "efficientnet_v2_l")


def test_the_usual_size_is_that_of_torchvisions_weights_where_these_are_wanted():
    sizes = {"resnet50": (224, 224), "efficientnet_b3": (224, 300), "vit_h_14": (224, 518), "inception_v3": (299, 299)}
    for name, expected in sizes.items():
        assert (models.usual_size(name), models.usual_size(name, pretrained=True)) == expected


def test_pretrained_without_a_network_or_with_a_damaged_file(monkeypatch, tmp_path):
    def download(*arguments, **options):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network, place = build("resnet18", 64), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    for contents in (None, b"PK rubbish", b"\x80\x02c__builtin__\neval\n."):
        if contents is not None:
            place.write_bytes(contents)
        with pytest.raises(GraftingError, match=f"no weights of resnet18 .*: put https://.*pth at {place}"):
            models.load_pretrained(network, "resnet18")


def test_a_resumed_network_needs_torchvisions_weights_no_more(class_folders, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(models, "load_pretrained", lambda *form: loaded.append(form) or "started from weights")
    words = (
        f"--data {class_folders} -a shufflenet_v2_x0_5 -b 12 -j 0 --image_size 32 --device cpu --steplr --pretrained"
    )
    words += f" --num 1 --s {tmp_path / 'run'} --resume --epochs"
    for epochs in (1, 2):
        grafting.main(flags.parse([*words.split(), str(epochs)]), Signals())
        assert len(loaded) == 1 and (tmp_path / "run" / f"pth0_{epochs - 1}.tar").exists()


# Checkpoints of others


def test_weights_are_loaded_whatever_wrapped_them_and_a_misfit_is_named(tmp_path):
    source = build("mnasnet0_5", 64).state_dict()  # which asks for its version, that of the network and not the file's
    # As PyTorch's example saves AlexNet and VGG, parts of which it puts into DataParallel; compiled, too.
    wrapped = {f"_orig_mod.{key.replace('layers.', 'layers.module.')}": entry for key, entry in source.items()}
    for contents in (source, {"state_dict": wrapped}):
        save(tmp_path / "x", contents)
        target = build("mnasnet0_5", 64)
        models.load_weights(target, read_checkpoint(tmp_path / "x")[0], tmp_path / "x")
        assert_same(dict(target.state_dict()), dict(source))
    with pytest.raises(MismatchError, match=r"x: features.0.weight: in the network \(64, 3, .* float32, there missing"):
        models.load_weights(build("squeezenet1_1", 64), source, tmp_path / "x")


# Runs


@pytest.fixture(scope="session")
def undisturbed_run(tmp_path_factory, class_folders):
    return ImageRun(tmp_path_factory.mktemp("undisturbed") / "run", class_folders, 2, 3).finish()


def test_a_ring_of_two(undisturbed_run):
    states = []
    for network in (1, 2):
        log = undisturbed_run.log(network)
        lines = [line for line in log.splitlines() if line.startswith(f"Network:{network}")]
        pattern = r"Network:%d    epoch:%d    accuracy:\d+\.\d{3}    best:\d+\.\d{3}    accuracy@5:100\.000    loss:.*"
        assert [bool(re.fullmatch(pattern % (network, epoch), line)) for epoch, line in enumerate(lines)] == [True] * 3
        contents = load(undisturbed_run.directory / f"final{network}.tar")
        found = [contents[key] for key in ("epoch", "model", "image_size", "mean")]
        assert found == [2, "ranks:tiny", 32, (0.485, 0.456, 0.406)]
        states.append(contents["state_dict"])
        ranks.tiny(4).load_state_dict(states[-1])
    assert not torch.equal(states[0]["0.weight"], states[1]["0.weight"])


def test_evaluate_prints_the_accuracy_at_the_recorded_size_and_changes_nothing(make_image_run, undisturbed_run):
    best = undisturbed_run.directory / "best1.tar"
    run = make_image_run(1, 1)
    place = run.flags.index("--image_size")
    del run.flags[place : place + 2]
    assert run.start(1, "-e", "--resume", best).wait() == 0, run.started[-1].output()
    found = re.search(r"^\* Acc@1 (\S+)    Acc@5 100\.000    Loss \S+    Images 20$", run.log(1), re.M)
    assert float(found[1]) == pytest.approx(load(best)["accuracy"], abs=1e-3)
    assert not run.directory.exists()


def test_evaluate_builds_the_model_in_the_form_that_it_was_trained_in(class_folders, tmp_path, monkeypatch):
    """GoogLeNet and Inception, once started from torchvision's weights, convert their input."""
    model, built = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)), []
    monkeypatch.setattr(models, "build", lambda *form: built.append(form) or model)
    settings = {"pretrained": True, "image_size": 32}
    save(tmp_path / "final1.tar", {"state_dict": dict(model.state_dict()), "settings": settings})
    words = ["-e", "--resume", tmp_path / "final1.tar", "-a", "googlenet", "--data", class_folders, "-j", "0"]
    grafting.evaluate_only(flags.parse([*map(str, words), "--device", "cpu"]))
    assert built == [("googlenet", 4, 32, True)]


def test_no_run_starts_from_a_network_that_converts_its_input(tmp_path):
    model, args = nn.Linear(1, 1), flags.parse(["-a", "googlenet", "--resume", str(tmp_path / "final1.tar")])
    save(args.start_from, {"state_dict": model.state_dict(), "settings": {"pretrained": True}})
    with pytest.raises(GraftingError, match=r"final1.tar is of a googlenet that began with --pretrained"):
        grafting.first_epoch(args, None, model, None, [])


def test_a_run_starts_from_a_file(make_image_run, undisturbed_run, tmp_path):
    ours = load(undisturbed_run.checkpoint(1, 1))
    start = ours["epoch"] + 1
    # As PyTorch's example writes it, of a network in DistributedDataParallel.
    state = {f"module.{key}": entry for key, entry in ours["state_dict"].items()}
    example = {"epoch": start, "arch": "ranks:tiny", "state_dict": state, "optimizer": ours["extra"]["optimizer"]}
    published = {"epoch": start - 1, "arch": "ranks:tiny", "state_dict": ours["state_dict"]}
    published |= {"best_acc1": torch.tensor(1.0), "optimizer": ours["extra"]["optimizer"]}
    finals = []
    for name, contents in (("example.tar", example), ("ours.tar", ours), (f"pth1_{start - 1}.tar", published)):
        save(tmp_path / name, contents)
        run = make_image_run(1, start + 1, "--resume", str(tmp_path / name), "--momentum", "0.5")
        assert run.start(1).wait() == 0, run.started[-1].output()
        assert f"started from {tmp_path / name}, at epoch {start}" in run.log(1)
        assert re.findall(r"epoch:(\d+)", run.log(1)) == [str(start)]
        finals.append(load(run.directory / "final1.tar")["state_dict"])
        last = load(run.checkpoint(1, start))
        assert [group["momentum"] for group in last["extra"]["optimizer"]["param_groups"]] == [0.5]
    assert_same(finals[0], finals[1])
    assert_same(finals[0], finals[2])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["-a", "squeezenet1_1", "--resume", "{best}"], "is of a ranks:tiny, and -a says squeezenet1_1\n"),
        (["-a", "test_methods:flat_layer", "--num", "2"], "Sequential has no convolution"),
        (["--start-epoch", "5"], "nothing to train: the first epoch would be 5, and --epochs is 2"),
        (["--data", "nowhere"], "/nowhere does not exist"),
        (["-e", "--data", "nowhere", "--resume", "typo.tar"], "there is no checkpoint typo.tar (--resume)"),
    ],
)
def test_what_cannot_start_ends_in_a_sentence_and_leaves_no_trace(make_image_run, undisturbed_run, flags, sentence):
    run = make_image_run(1, 2)
    assert sentence in run.refused(1, *(flag.format(best=undisturbed_run.directory / "best1.tar") for flag in flags))
    assert not run.directory.exists()


def test_with_val_and_test_the_one_chooses_and_the_other_is_reported(make_image_run, class_folders, tmp_path):
    data = shutil.copytree(class_folders, tmp_path / "images")
    shutil.copytree(data / "val", data / "test")
    for path in (data / "test" / "0").glob("[1-9].png"):
        path.unlink()  # 16 images of the 20 are left
    run = make_image_run(1, 3, "-a", "shufflenet_v2_x0_5", "-p", "2", data=data).finish()
    rows = run.outcome(1)["tables"]["metrics"]
    scores, reported = ([float(row[name]) for row in rows] for name in ("val_accuracy", "test_accuracy"))
    assert float(rows[-1]["best"]) == reported[scores.index(max(scores))]
    assert {score % (100 / 20) for score in scores} == {score % (100 / 16) for score in reported} == {0}
    assert "    val:" in run.log(1)
    fields = "    ".join(f"{name} .*" for name in ("Time", "Data", "Loss", "Acc@1", "Acc@5"))
    lines = re.findall(rf"^Epoch: \[0\]\[(\d)/4\]    {fields}$", run.log(1), re.MULTILINE)
    assert lines == ["0", "2"]


# Runs that start from a checkpoint of another one: killed at any moment, they go on from there

JOINED = r"after rename network\d\.json"


@pytest.fixture
def files(undisturbed_run):
    """Checkpoints to start from, of two networks; the epoch after theirs is 2."""
    return [undisturbed_run.checkpoint(network, 1) for network in (1, 2)]


def assert_ends_as_undisturbed(run, undisturbed, files):
    """Both runs start from the files; the other one, which nothing disturbs, is started here."""
    for process in [undisturbed.start(network, "--resume", file) for network, file in enumerate(files, 1)]:
        assert process.wait() == 0, process.output()
    for network in range(1, run.networks + 1):
        outcome = run.outcome(network)
        assert [row["epoch"] for row in outcome["tables"]["metrics"]] == ["2", "3"]
        assert_same(outcome, undisturbed.outcome(network), f"network {network}")


def test_killed_it_goes_on_from_its_file_which_counts_only_until_it_has_a_checkpoint_of_its_own(
    make_image_run, files, tmp_path
):
    file, moved = shutil.copy(files[0], tmp_path / "start.tar"), tmp_path / "moved.tar"
    run = make_image_run(1, 4)
    run.killed(1, JOINED, "--resume", file)
    os.rename(file, moved)
    gone = f"network 1 has no checkpoint of its own yet, and {file}, from which it starts, is not there: "
    assert gone in run.refused(1, "--resume")
    both = ["--resume", os.path.relpath(moved), "--resume", "auto"]
    run.killed(1, "after train", *both)
    run.killed(1, "after line 2", "--resume", moved)
    assert "network 1 has already run in" in run.refused(1, "--resume", moved)
    moved.unlink()
    assert run.start(1, *both).wait() == 0, run.started[-1].output()
    assert_ends_as_undisturbed(run, make_image_run(1, 4), files[:1])


def test_networks_of_a_ring_each_go_on_from_their_own_file_and_none_is_guessed(make_image_run, files):
    run = make_image_run(2, 4)
    run.killed(1, JOINED, "--resume", files[0])
    first = run.start(1, "--resume", "auto")
    run.reaches(1, "waiting", 2)
    assert "start_epoch is 0 here and 2 in the run" in run.refused(2, "--resume")
    run.killed(2, JOINED, "--resume", files[1])
    for process in run.start(2, "--resume"), first:
        assert process.wait() == 0, process.output()
    assert_ends_as_undisturbed(run, make_image_run(2, 4), files)


# Processes that decode images


def alive(group):
    """The processes of a group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, members = path.read_text().rpartition(")")[2].split()[:3]
            if int(members) == group and state != "Z":
                found.append(path.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc")
def test_workers_end_with_their_network_however_it_ends(make_image_run):
    stopped, killed = (make_image_run(1, 1000, "-j", "1") for _ in range(2))
    processes = [run.start(1) for run in (stopped, killed)]
    for run, process in zip((stopped, killed), processes, strict=True):
        run.reaches(1, "training", 1)
        assert len(alive(process.pid)) >= 3  # itself, a worker, the fork server
    os.killpg(processes[0].pid, signal.SIGTERM)
    os.kill(processes[1].pid, signal.SIGKILL)
    assert [process.wait() for process in processes] == [143, -signal.SIGKILL]
    assert "network 1 stopped by SIGTERM; --resume continues it" in processes[0].sentence()
    assert stopped.status(1)["state"] == "stopped"
    until(lambda: not any(alive(process.pid) for process in processes))
