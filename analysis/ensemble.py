"""Tests the networks of one or several runs: each alone, their ensemble, and the average of their weights.

    python analysis/ensemble.py checkpoint/two
    python analysis/ensemble.py checkpoint/seed0 checkpoint/seed1 --which best --json ensemble.json

Models and images are those that the files record. The ensemble is the average of the networks' softmax, and costs as
much as all of them. The average of the weights is one network again; its batch norm gets statistics of its own, from a
pass over the training images.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, update_bn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import Trained, autocast, batches_of, load_images, load_trained, scores_of
from analysis.runs import mean_and_deviation, program, table
from filter_grafting.checkpoint import write_atomically
from filter_grafting.errors import GraftingError
from filter_grafting.membership import observe
from training.flags import Parser, path
from training.images import Images
from training.process import pick_device

CAPTION = """
Accuracy on {test:,} test images. Ensemble: the networks' softmax, averaged. Weight average: one network of averaged
weights (none where the models differ), with batch-norm statistics of its own, taken on the {train:,} training images
as in training (cropped, mirrored)."""


def find(directory: Path, which: str) -> list[Path]:
    """The checkpoints of all networks of a run. Raises GraftingError if one is missing."""
    paths = []
    for status in observe(directory):
        stem = f"{which}{status.network}"
        found = [*directory.glob(f"{stem}.*")]
        if not found:
            advice = "wait until it is done, continue it with --resume, or test --which best"
            raise GraftingError(f"{directory / stem} is missing (network {status.network}: {status}): {advice}")
        paths += found
    if not paths:
        raise GraftingError(f"{directory} is not the save directory of a run")
    return paths


def reestimate(trained: Trained, images: Images, device: torch.device) -> None:
    """Gives the batch norm of a model the mean and variance of what it sees now, averaged over all batches.

    The images are cropped and mirrored as in training, since such are the statistics that every other network is
    tested with; and shuffled, as class folders come sorted. Batches are of one size, as each counts the same.
    """
    batches = math.ceil(len(images.train.labels) / (1000 if trained.is_cifar else 128))
    size = math.ceil(len(images.train.labels) / batches)
    with autocast(trained, device):
        update_bn(batches_of(trained, images.train, device, size, train=True).epoch(0), trained.model)


def test(members: Sequence[Trained], images: Images, device: torch.device) -> dict[str, Any]:
    """Accuracies (%) of the networks, of their ensemble, and of the average of their weights."""

    def accuracy(scores: Tensor) -> float:
        return 100 * (scores.argmax(1) == labels).double().mean().item()

    scores, (labels, *_) = zip(*(scores_of(member, images.test, device) for member in members), strict=True)
    found = {"networks": list(map(accuracy, scores)), "weight_average": None}
    found["ensemble"] = accuracy(torch.stack([own.softmax(1) for own in scores]).mean(0))
    if len({member.name for member in members}) == 1:
        averaged = AveragedModel(members[0].model)
        for member in members:
            averaged.update_parameters(member.model)
        one = members[0]._replace(model=averaged.module)
        reestimate(one, images, device)
        found["weight_average"] = accuracy(scores_of(one, images.test, device)[0])
    return found


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("directories", metavar="DIR", nargs="+", type=path, help="save directory of a run")
    add("--which", choices=("final", "best"), default="final", help="the last epoch's networks, or the best ones")
    add("--data", metavar="DIR", help="the images, as given to grafting.py (default: as the files record)")
    add("--device", choices=("cuda", "cpu"), help="where to test (default: cuda where there is one)")
    add("--json", metavar="FILE", type=path, help="a file for the accuracies, in percent")
    args = parser.parse_args()
    device = pick_device(args.device)
    directories = dict.fromkeys(directory.resolve() for directory in args.directories)
    members = [load_trained(file, device=device) for one in directories for file in find(one, args.which)]
    first = members[0]
    for other in members[1:]:
        if (other.classes, other.image_size) != (first.classes, first.image_size):
            raise GraftingError(f"{first.path} and {other.path} have other classes or image sizes: test them apart")
    images = load_images(first, args.data)
    found = {"members": [str(member.path) for member in members]} | test(members, images, device)

    rows = []
    for member, accuracy in zip(members, found["networks"], strict=True):
        end, epoch = "/".join(member.path.parts[-2:]), member.contents.get("epoch", "–")
        saved = mean_and_deviation([member.contents.get("accuracy")], 2)
        rows.append([end, member.name, epoch, f"{accuracy:.2f}", saved])
    averages = {f"mean of {len(members)}": found["networks"]}
    averages |= {"ensemble": [found["ensemble"]], "weight average": [found["weight_average"]]}
    rows += [[name, "", "", mean_and_deviation(values, 2), ""] for name, values in averages.items()]
    frame = pd.DataFrame(rows, columns=["network", "model", "epoch", "accuracy (%)", "when saved (%)"])
    print(table(frame, right=list(frame)[2:]))
    print(CAPTION.format(test=len(images.test.labels), train=len(images.train.labels)))
    if args.json:
        write_atomically(args.json, json.dumps(found, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
