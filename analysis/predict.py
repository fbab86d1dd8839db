"""Says what a trained model takes images for: the likeliest classes, with their probabilities.

    python analysis/predict.py checkpoint/demo/grafted/best1.t7 photo.jpg
    python analysis/predict.py checkpoint/demo/grafted/best1.t7 photos/*.jpg --top 1

Model and names of the classes are those that the file records; images are resized as in testing.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import image, load_trained
from analysis.runs import program
from filter_grafting.errors import GraftingError
from filter_grafting.membership import printable
from training.flags import Parser, number, path
from training.process import pick_device


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("file", metavar="FILE", type=path, help="best1.t7, final1.tar or the like of a run")
    add("images", metavar="IMAGE", nargs="+", type=path, help="files that Pillow can read")
    add("--top", metavar="K", type=number(int, 1), default=3, help="classes to name")
    add("--model", metavar="NAME", help="the model, where the file does not say it")
    add("--device", choices=("cuda", "cpu"), help="where to compute (default: cuda where there is one)")
    return parser.parse_args(arguments)


@torch.inference_mode()
def main() -> int:
    args = parse()
    device = pick_device(args.device)
    trained = load_trained(args.file, args.model, device)
    if trained.missing:
        print(f"The file does not say: {', '.join(trained.missing)}.", file=sys.stderr)
    failures = 0
    for given in args.images:
        try:
            pixels = image(trained, given).to(device)
        except GraftingError as error:
            print(error, file=sys.stderr)
            failures += 1
            continue
        values, places = trained.model(pixels)[0].float().softmax(0).topk(min(args.top, len(trained.classes)))
        named = [f"{trained.classes[k]} {100 * p:.1f} %" for k, p in zip(places.tolist(), values.tolist(), strict=True)]
        print(printable(f"{given}: {', '.join(named)}"), flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(program(main))
