"""Says what a trained model takes images for: the likeliest classes, with their probabilities.

    python analysis/predict.py checkpoint/demo/grafted/best1.t7 photo.jpg
    python analysis/predict.py checkpoint/demo/grafted/best1.t7 photos/*.jpg --top 1

Model and names of the classes are those that the file records; images are resized as in testing.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import Trained, file_parser, load_trained
from analysis.runs import program
from grafting_cifar import data as cifar
from grafting_imagenet import data as imagenet
from training.flags import number, path
from training.images import DataError
from training.process import pick_device


def read_image(trained: Trained, path: Path) -> Tensor:
    """An image file as the model was tested with it: (1, 3, size, size), normalised. Raises DataError."""
    if trained.is_cifar:
        pixels = torch.from_numpy(cifar.read_image(path).copy())
    else:
        pixels = imagenet.central(imagenet.read_image(str(path)), trained.image_size).permute(1, 2, 0)
    mean, std = torch.tensor([trained.mean, trained.std]) * 255
    return ((pixels.float() - mean) / std).permute(2, 0, 1)[None]


@torch.inference_mode()
def main() -> int:
    parser = file_parser(__doc__)
    add = parser.add_argument
    add("images", metavar="IMAGE", nargs="+", type=path, help="files that Pillow can read")
    add("--top", metavar="K", type=number(int, 1), default=3, help="classes to name")
    add("--device", choices=("cuda", "cpu"), help="where to compute (default: cuda where there is one)")
    args = parser.parse_args()
    device = pick_device(args.device)
    trained = load_trained(args.file, args.model, device)
    status = 0
    for file in args.images:
        try:
            probabilities = trained.model(read_image(trained, file).to(device))[0].float().softmax(0)
        except DataError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        likeliest = probabilities.argsort(descending=True)[: args.top].tolist()
        named = [f"{trained.classes[k]} {100 * probabilities[k]:.1f} %" for k in likeliest]
        print(f"{file}: {', '.join(named)}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(program(main))
