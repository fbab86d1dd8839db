"""Tests a trained model: its accuracy, that of each class, and what is taken for what.

    python analysis/evaluate.py checkpoint/demo/grafted/best1.t7
    python analysis/evaluate.py checkpoint/demo/grafted/best1.t7 --data glyphs --plot confusion.png

Model and settings are those that the file records, and so are the images, where --data does not say otherwise.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import batches_of, load_images, load_trained, scores_of
from analysis.runs import program, table
from training.flags import Parser, path
from training.process import pick_device

FEW = 100  # classes, up to which all are listed


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", type=path, help="best1.t7, final1.tar or the like of a run")
    add("--data", metavar="DIR", help="the images, as given to grafting.py (default: as the file records)")
    add("--model", metavar="NAME", help="the model, where the file does not say it")
    add("--device", choices=("cuda", "cpu"), help="where to test (default: cuda where there is one)")
    add("--plot", metavar="OUT", type=path, help="draw the confusion matrix: OUT.png, OUT.pdf or OUT.svg")
    args = parser.parse_args(arguments)
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"argument --plot: got {args.plot}, expected a name that ends in .png, .pdf or .svg")
    return args


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """How many images of each class (row) are taken for each class (column): int64 (classes, classes)."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def main() -> int:
    args = parse()
    device = pick_device(args.device)
    trained = load_trained(args.file, args.model, device)
    images = load_images(trained, args.data)
    batches = batches_of(trained, images.test, device)
    bar = tqdm(batches.epoch(), total=len(batches), desc="test", leave=False, disable=None)  # None: no bar in a log
    scores, labels = scores_of(trained.model, bar, device, bool(trained.settings.get("amp")))
    matrix = confusion_matrix(scores.argmax(1), labels, len(images.classes))

    correct, total = matrix.diag(), matrix.sum(1)
    accuracy = 100 * correct.sum().item() / len(labels)
    rows = [
        [name, count, f"{100 * right / max(1, count):.2f}"]
        for name, right, count in zip(images.classes, correct.tolist(), total.tolist(), strict=True)
    ]
    frame = pd.DataFrame(rows, columns=["class", "images", "accuracy (%)"])
    if len(frame) > FEW:
        frame = frame.iloc[(correct / total.clamp(min=1)).argsort()[:FEW].numpy()]
        print(f"The {FEW} of {len(images.classes)} classes with the lowest accuracy:\n")
    print(table(frame, right=["images", "accuracy (%)"]), "", sep="\n")
    loss = torch.nn.functional.cross_entropy(scores, labels).item()
    print(f"accuracy: {accuracy:.3f} % of {len(labels):,} test images, loss {loss:.4f} ({trained.name}, {args.file})")
    if trained.missing:
        print(f"The file does not say: {', '.join(trained.missing)}.")
    recorded = trained.contents.get("accuracy")
    if isinstance(recorded, float) and abs(accuracy - recorded) > 1:
        hint = "is --data what it was in training?"
        print(f"It had {recorded:.2f} % when it was saved, and has {accuracy:.2f} % here: {hint}", file=sys.stderr)
    if args.plot:
        from analysis import plots  # matplotlib, for those who ask for the plot alone

        title = f"{args.file.name}: {accuracy:.2f} % of {len(labels):,} images"
        print(f"- {plots.save(plots.confusion(matrix.numpy(), images.classes, title), args.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
