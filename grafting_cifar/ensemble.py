"""Tests the networks of one or several runs: each alone, their ensemble, and the average of their weights.

    python ensemble.py checkpoint/two
    python ensemble.py checkpoint/seed0 checkpoint/seed1 --which best --json ensemble.json

Model and images are those that the checkpoints record; --data must be what it was in training. The ensemble is the
average of the networks' softmax, and costs as much as all of them. The average of the weights is one network again;
its batch norm gets statistics of its own, from a pass over the training images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags
from common.manage import networks_of, observe
from filter_grafting.checkpoint import write_atomically
from filter_grafting.errors import CheckpointError, DataError, GraftingError
from filter_grafting.exchange import printable
from filter_grafting.training import Batches, count_correct
from grafting_cifar import data, models
from grafting_cifar.report import labels, markdown, mean
from grafting_cifar.runs import read_checkpoint

BATCH = 1000  # images whose statistics count alike
CHOICE = ("images", "val", "test_images")  # the settings that say which of the images a run used
MISSING = {
    "final": "wait until it is done, continue it with --resume, or test the best epoch so far with --which best",
    "best": "no epoch of it has ended; start it, or continue it with --resume",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    add = parser.add_argument
    add("directories", metavar="DIR", nargs="+", type=Path, help="save directory of a run")
    add("--which", choices=MISSING, default="final", help="the last epoch's networks, or the best ones")
    add("--data", metavar="DIR", default=data.DEFAULT_FOLDER, help="the images, as given to grafting.py")
    add("--cifar", type=int, choices=(10, 100), help="which of the standard data sets (default: by the classes)")
    add("--device", choices=("cuda", "cpu"), help="where to test (default: cuda where there is one)")
    add("--json", metavar="FILE", type=Path, help="a file for the accuracies, in percent")
    args = parser.parse_args(arguments)
    flags.check_device(parser, args)
    if args.json and not args.json.absolute().parent.is_dir():  # before the minutes that testing takes
        parser.error(f"argument --json: there is no folder {args.json.absolute().parent}")
    return args


# ---- The mathematics


def average_softmax(scores: Sequence[Tensor]) -> Tensor:
    """The ensemble's probabilities (n, classes), from each network's class scores (n, classes)."""
    return torch.stack([score.softmax(1) for score in scores]).mean(0)


def average_weights(states: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The uniform average of state dicts that are alike; integer entries are the first one's."""
    return {
        key: torch.stack([state[key] for state in states]).double().mean(0).to(entry.dtype)
        if entry.is_floating_point()
        else entry
        for key, entry in states[0].items()
    }


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """In percent."""
    return 100 * count_correct(scores, labels, (1,)).item() / len(labels)


@torch.inference_mode()
def predict(network: nn.Module, batches: Batches, device: torch.device, amp: bool) -> Tensor:
    """Class scores (n, classes) of all images, in order; the network is left in evaluation mode."""
    network.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        return torch.cat([network(images).float() for images, _ in batches.epoch(0)])


def reestimate(network: nn.Module, images: data.Split, device: torch.device, amp: bool) -> None:
    """Gives the batch norm of a network the mean and variance of what it sees now, averaged over all batches.

    The images are cropped and mirrored as in training, since such are the statistics that every other network is
    tested with; and shuffled, as class folders come sorted. Batches are of one size, as each counts the same.
    """
    n = len(images.labels)
    batches = data.Batches(images, -(-n // -(-n // BATCH)), device, augment=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        update_bn(batches.epoch(0), network)


# ---- The runs


class Member(NamedTuple):
    """A network of a run, as its checkpoint has it."""

    path: Path
    state: dict[str, Tensor]
    settings: dict[str, Any]
    epoch: int
    recorded: float  # accuracy on the test images in percent, when it was saved


def find(directory: Path, which: str) -> list[Path]:
    """The checkpoints of all networks of a run. Raises GraftingError if one is missing."""
    numbers = networks_of(directory)
    if not numbers:
        raise GraftingError(f"{directory} is not the save directory of a run: nothing has started there")
    paths = [directory / f"{which}{number}.t7" for number in numbers]
    for number, path in zip(numbers, paths, strict=True):
        if path.with_suffix(".tar").exists():
            raise GraftingError(f"{directory} is a run on ImageNet: only those of grafting_cifar can be tested here")
        if not path.exists():
            (seen,) = observe(directory, range(number, number + 1))
            raise GraftingError(f"{path} is missing (network {number}: {seen}): {MISSING[which]}")
    return paths


def read(path: Path) -> Member:
    """Raises CheckpointError if a checkpoint lacks what is read of it later, or has it of another type."""
    state, contents = read_checkpoint(path)
    settings, epoch, recorded = (contents.get(key) for key in ("settings", "epoch", "accuracy"))
    if isinstance(settings, dict) and isinstance(epoch, int) and isinstance(recorded, float):
        numbers = [settings.get("classes"), *(settings[key] for key in CHOICE if key in settings)]
        if isinstance(settings.get("model"), str) and all(isinstance(number, int) for number in numbers):
            return Member(path, state, settings, epoch, recorded)
    raise CheckpointError(f"{path} does not say what it holds: expected a checkpoint of grafting_cifar/grafting.py")


def build(member: Member, device: torch.device) -> nn.Module:
    model, classes = member.settings["model"], member.settings["classes"]
    try:
        network = models.build(model, classes)
        network.load_state_dict(member.state)
    except (ValueError, RuntimeError) as error:
        reason = printable(" ".join(str(error).split()), 200)
        raise CheckpointError(f"{member.path} cannot be built as {model} with {classes} classes: {reason}") from error
    return network.to(device, memory_format=torch.channels_last)


def different(members: Sequence[Member], *keys: str) -> str:
    """`the model (resnet20, resnet32)`: the first of the settings that the networks do not share, or nothing."""
    for key in keys:
        values = list(dict.fromkeys(str(member.settings.get(key)) for member in members))
        if len(values) > 1:
            return f"{key} ({', '.join(values)})"
    return ""


def load_images(members: Sequence[Member], source: str | Path, cifar: int | None) -> tuple[data.Split, data.Split]:
    """The images that the first network was trained on, and those that all were tested on."""
    path, _, settings, *_ = members[0]
    classes = settings["classes"]
    loaded = data.load(source, cifar or (100 if classes == 100 else 10))
    if loaded[2] != classes:
        raise DataError(f"{source} has {loaded[2]} classes, {path} has {classes}: give the --data of its training")
    try:
        chosen = {key: settings[key] for key in CHOICE if key in settings}
        train, _, test = data.select(loaded, **chosen)
    except DataError as error:
        raise DataError(f"{source} is not what {path} was trained on: {error}") from error
    return train, test


# ---- What is said of them


def table(members: Sequence[Member], accuracies: Sequence[float], ensemble: float, average: float | None) -> list[str]:
    rows = [["network", "model", "epoch", "accuracy (%)", "when saved (%)"]]
    for label, member, value in zip(labels([member.path for member in members]), members, accuracies, strict=True):
        rows.append([label, member.settings["model"], member.epoch, f"{value:.2f}", f"{member.recorded:.2f}"])
    rows.append([f"mean of {len(members)}", "", "", mean(accuracies, 2), ""])
    rows.append(["ensemble", "", "", f"{ensemble:.2f}", ""])
    rows.append(["weight average", "", "", "–" if average is None else f"{average:.2f}", ""])
    return markdown(rows, right=(2, 3, 4))


def caption(members: Sequence[Member], which: str, train: data.Split, test: data.Split) -> list[str]:
    lines = [f"Accuracy on {len(test.labels):,} test images. Ensemble: the networks' softmax, averaged."]
    if reason := unaverageable(members):
        lines.append(f"Weight average: there is none, as the networks differ in {reason}.")
    else:
        lines.append(
            "Weight average: one network of averaged weights, with batch-norm statistics of its own, taken on the"
        )
        lines.append(f"{len(train.labels):,} training images as in training (cropped, mirrored).")
    if which == "best":
        held_out = dict.fromkeys(member.settings.get("val") for member in members)
        sets = [f"{val:,} images held out of training" if val else "these test images themselves" for val in held_out]
        lines.append(f"The best epoch of each network was chosen on {' or '.join(sets)}.")
    return lines


def unaverageable(members: Sequence[Member]) -> str:
    return different(members, "model", "images", "val")


def main() -> int:
    args = parse()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "–" is no reason to fail
    try:
        run(args)
    except GraftingError as error:
        print(printable(error), file=sys.stderr)
        return error.exit_status
    return 0


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    device = torch.device(args.device)
    directories = {directory.resolve(): directory for directory in args.directories}
    paths = [path for directory in directories.values() for path in find(directory, args.which)]
    members = [read(path) for path in paths]
    if reason := different(members, "classes", "test_images"):
        raise GraftingError(f"the networks cannot be tested together: they differ in {reason}")
    train, test = load_images(members, args.data, args.cifar)
    batches = data.Batches(test, data.TEST_BATCH[device.type], device, augment=False)

    scores = []
    for member in tqdm(members, unit="network", leave=False, disable=None):  # None: no bar in a log
        # In bfloat16 where training was: as it was tested then.
        scores.append(predict(build(member, device), batches, device, bool(member.settings.get("amp"))))
    accuracies = [accuracy(score, batches.labels) for score in scores]
    ensemble = accuracy(average_softmax(scores), batches.labels)
    average = None
    if not unaverageable(members):
        amp = any(member.settings.get("amp") for member in members)
        weights = average_weights([member.state for member in members])
        network = build(members[0]._replace(state=weights), device)
        reestimate(network, train, device, amp)
        average = accuracy(predict(network, batches, device, amp), batches.labels)

    print(*table(members, accuracies, ensemble, average), "", sep="\n")
    print(*caption(members, args.which, train, test), sep="\n", flush=True)
    for member, value in zip(members, accuracies, strict=True):
        if abs(value - member.recorded) > 1:
            print(f"{member.path} had {member.recorded:.2f} % when it was saved, and has {value:.2f} % here: is --data "
                  "what it was in training?", file=sys.stderr)  # fmt: skip
    if args.json:
        results = {"members": [str(path) for path in paths], "networks": accuracies, "ensemble": ensemble,
                   "weight_average": average}  # fmt: skip
        write_atomically(args.json, json.dumps(results, indent=1).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
