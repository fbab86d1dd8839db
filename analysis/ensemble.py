"""Tests the networks of one or several runs: each alone, their ensemble, and the average of their weights.

    python analysis/ensemble.py checkpoint/two
    python analysis/ensemble.py checkpoint/seed0 checkpoint/seed1 --which best --json ensemble.json

Models and images are those that the files record. The ensemble is the average of the networks' softmax, and costs as
much as all of them. The average of the weights is one network again; its batch norm gets statistics of its own, from a
pass over the training images.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import Trained, autocast, batches_of, compare, load_images, load_trained, scores_of
from analysis.runs import ends, mean_and_deviation, program, table
from filter_grafting.checkpoint import write_atomically
from filter_grafting.errors import CheckpointError, GraftingError
from filter_grafting.membership import networks_of, observe
from training.flags import Parser, path
from training.images import Images
from training.process import pick_device

BATCH = {True: 1000, False: 128}  # images whose statistics count alike, of CIFAR's size or larger
MISSING = {
    "final": "wait until it is done, continue it with --resume, or test the best epoch so far with --which best",
    "best": "no epoch of it has ended; start it, or continue it with --resume",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("directories", metavar="DIR", nargs="+", type=path, help="save directory of a run")
    add("--which", choices=MISSING, default="final", help="the last epoch's networks, or the best ones")
    add("--data", metavar="DIR", help="the images, as given to grafting.py (default: as the files record)")
    add("--device", choices=("cuda", "cpu"), help="where to test (default: cuda where there is one)")
    add("--json", metavar="FILE", type=path, help="a file for the accuracies, in percent")
    return parser.parse_args(arguments)


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
    return 100 * (scores.argmax(1) == labels).double().mean().item()


def reestimate(trained: Trained, images: Images, device: torch.device) -> None:
    """Gives the batch norm of a model the mean and variance of what it sees now, averaged over all batches.

    The images are cropped and mirrored as in training, since such are the statistics that every other network is
    tested with; and shuffled, as class folders come sorted. Batches are of one size, as each counts the same.
    """
    n, most = len(images.train.labels), BATCH[trained.is_cifar]
    batches = batches_of(trained, images.train, device, size=-(-n // -(-n // most)), train=True)
    with autocast(trained, device):
        update_bn(batches.epoch(0), trained.model)


# ---- The runs


def find(directory: Path, which: str) -> list[Path]:
    """The checkpoints of all networks of a run. Raises GraftingError if one is missing."""
    numbers = networks_of(directory)
    if not numbers:
        raise GraftingError(f"{directory} is not the save directory of a run: nothing has started there")
    paths = []
    for number in numbers:
        paths += [path for suffix in (".t7", ".tar") if (path := directory / f"{which}{number}{suffix}").exists()]
        if len(paths) < number:
            (seen,) = observe(directory, [number])
            missing = f"{directory / f'{which}{number}'} is missing (network {number}: {seen})"
            raise GraftingError(f"{missing}: {MISSING[which]}")
    return paths


def read(path: Path, device: torch.device) -> Trained:
    trained = load_trained(path, device=device)
    if not isinstance(trained.contents.get("epoch"), int) or not isinstance(trained.contents.get("accuracy"), float):
        raise CheckpointError(f"{path} does not say its epoch and accuracy: expected a file of grafting.py")
    return trained


def different(members: Sequence[Trained], *keys: str) -> str:
    """`test_images (100, 200)`: the first of the settings that the networks do not share, or nothing."""
    for key in keys:
        values = dict.fromkeys(str(getattr(one, key, one.settings.get(key)))[:60] for one in members)
        if len(values) > 1:
            return f"{key} ({', '.join(values)})"
    return ""


def main() -> int:
    args = parse()
    device = pick_device(args.device)
    directories = {directory.resolve(): directory for directory in args.directories}
    members = [read(path, device) for directory in directories.values() for path in find(directory, args.which)]
    if reason := different(members, "is_cifar", "classes", "image_size", "test_images"):
        raise GraftingError(f"the networks cannot be tested together: they differ in {reason}")
    images = load_images(members[0], args.data)
    batches = batches_of(members[0], images.test, device)

    scores = []
    for one in tqdm(members, unit="network", leave=False, disable=None):  # None: no bar in a log
        own, labels = scores_of(one, batches.epoch(), device)
        scores.append(own)
    accuracies = [accuracy(own, labels) for own in scores]
    ensemble = accuracy(average_softmax(scores), labels)
    average, unlike = None, different(members, "name", "images", "val")
    if not unlike:
        model = members[0].model
        model.load_state_dict(average_weights([member.model.state_dict() for member in members]))
        reestimate(members[0], images, device)
        model.eval()
        average = accuracy(scores_of(members[0], batches.epoch(), device)[0], labels)

    rows = [
        [label, one.name, one.contents["epoch"], f"{value:.2f}", f"{one.contents['accuracy']:.2f}"]
        for label, one, value in zip(ends([one.path for one in members]), members, accuracies, strict=True)
    ]
    rows.append([f"mean of {len(members)}", "", "", mean_and_deviation(accuracies, 2), ""])
    rows.append(["ensemble", "", "", f"{ensemble:.2f}", ""])
    rows.append(["weight average", "", "", "–" if average is None else f"{average:.2f}", ""])
    frame = pd.DataFrame(rows, columns=["network", "model", "epoch", "accuracy (%)", "when saved (%)"])
    print(table(frame, right=list(frame)[2:]), "", *caption(args.which, members, images, unlike), sep="\n")
    for one, value in zip(members, accuracies, strict=True):
        compare(one, value)
    if args.json:
        found = {"members": [str(one.path) for one in members], "networks": accuracies, "ensemble": ensemble}
        write_atomically(args.json, json.dumps(found | {"weight_average": average}, indent=1).encode() + b"\n")
    return 0


def caption(which: str, members: Sequence[Trained], images: Images, unlike: str) -> list[str]:
    lines = [f"Accuracy on {len(images.test.labels):,} test images. Ensemble: the networks' softmax, averaged."]
    if unlike:
        lines.append(f"Weight average: there is none, as the networks differ in {unlike}.")
    else:
        lines.append("Weight average: one network of averaged weights, with batch-norm statistics of its own, taken on")
        lines.append(f"the {len(images.train.labels):,} training images as in training (cropped, mirrored).")
    if which == "best":
        held_out = dict.fromkeys(one.settings.get("val") for one in members)
        sets = [f"{val:,} images held out of training" if val else "these test images themselves" for val in held_out]
        lines.append(f"The best epoch of each network was chosen on {' or '.join(sets)}.")
    return lines


if __name__ == "__main__":
    sys.exit(program(main))
