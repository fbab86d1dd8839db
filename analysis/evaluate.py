"""Tests a trained model: its accuracy, that of each class, and what is taken for what.

    python analysis/evaluate.py checkpoint/demo/grafted/best1.t7
    python analysis/evaluate.py checkpoint/demo/grafted/best1.t7 --data glyphs --plot confusion.png

Model and settings are those that the file records, and so are the images, where --data does not say otherwise.
"""

import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import file_parser, load_images, load_trained, scores_of
from analysis.runs import mean_and_deviation, program, table
from training.flags import path
from training.process import pick_device


def main() -> int:
    parser = file_parser(__doc__)
    add = parser.add_argument
    add("--data", metavar="DIR", help="the images, as given to grafting.py (default: as the file records)")
    add("--device", choices=("cuda", "cpu"), help="where to test (default: cuda where there is one)")
    add("--plot", metavar="OUT", type=path, help="draw the confusion matrix: OUT.png, OUT.pdf or OUT.svg")
    args = parser.parse_args()
    if args.plot and args.plot.suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"argument --plot: got {args.plot}, expected a name that ends in .png, .pdf or .svg")
    device = pick_device(args.device)
    trained = load_trained(args.file, args.model, device)
    images = load_images(trained, args.data)
    scores, labels = scores_of(trained, images.test, device)
    classes = len(images.classes)
    # How many images of each class (row) are taken for each class (column).
    pairs = torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2)
    matrix = pairs.view(classes, classes).numpy()

    frame = pd.DataFrame({"class": images.classes, "images": matrix.sum(1)})
    shares = 100 * matrix.diagonal() / frame["images"].clip(lower=1)
    frame["accuracy (%)"] = shares.map("{:.2f}".format)
    print(table(frame, right=["images", "accuracy (%)"]), "", sep="\n")
    accuracy, loss = 100 * matrix.trace() / len(labels), torch.nn.functional.cross_entropy(scores, labels)
    saved = mean_and_deviation([trained.contents.get("accuracy")], 3)
    print(
        f"accuracy: {accuracy:.3f} % of {len(labels):,} test images ({saved} when it was saved), loss {loss:.4f} "
        f"({trained.name}, {args.file})"
    )
    if args.plot:
        from analysis import plots  # matplotlib, for those who ask for the plot alone

        title = f"{args.file.name}: {accuracy:.2f} % of {len(labels):,} images"
        print(f"- {plots.save(plots.confusion(matrix, images.classes, title), args.plot)}")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
