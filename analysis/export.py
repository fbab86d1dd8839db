"""Writes a trained model as a folder that others can use without this project, with a model card.

    python analysis/export.py checkpoint/demo/grafted/best1.t7 exported
    python analysis/export.py checkpoint/demo/grafted/best1.t7 exported --name resnet20-glyphs

The folder holds model.pt2 (a program of torch.export, which one line loads), model.safetensors (the weights, where
safetensors is installed), model.onnx (where onnx and onnxscript are), config.json and README.md. What was written is
loaded again, and must give the scores that the model gives.
"""

import copy
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import Trained, file_parser, load_trained
from analysis.runs import count_filters, mean_and_deviation, method_and_number, program
from filter_grafting.errors import GraftingError
from filter_grafting.membership import printable
from training.flags import path

ANY_BATCH = ({0: torch.export.Dim("n")},)
TOLERANCE = 1e-3  # of the largest score: what other kernels may differ by


# ---- The files: each function writes one, loads it again, and returns what it makes of the example


def write_program(model: nn.Module, example: Tensor, path: Path) -> Tensor:
    """The model as torch.export has it: code and weights in one file."""
    torch.export.save(torch.export.export(model, (example,), dynamic_shapes=ANY_BATCH), path)
    return torch.export.load(path).module()(example)


def write_weights(model: nn.Module, example: Tensor, path: Path) -> Tensor:
    from safetensors.torch import load_file, save_file

    save_file({key: entry.contiguous().clone() for key, entry in model.state_dict().items()}, path)
    path.chmod(0o644)  # others shall read it, too
    again = copy.deepcopy(model)
    again.load_state_dict(load_file(path))
    return again(example)


def write_onnx(model: nn.Module, example: Tensor, path: Path) -> Tensor:
    import onnxscript  # noqa: F401  # torch.onnx needs it
    from onnx.reference import ReferenceEvaluator

    names = {"input_names": ["images"], "output_names": ["scores"]}
    exported = torch.onnx.export(model, (example,), dynamo=True, verbose=False, dynamic_shapes=ANY_BATCH, **names)
    exported.save(path, external_data=False)
    return torch.from_numpy(ReferenceEvaluator(str(path)).run(None, {"images": example.numpy()})[0])


FILES = {"model.pt2": write_program, "model.safetensors": write_weights, "model.onnx": write_onnx}


@torch.no_grad()
def write_and_check(trained: Trained, path: Path, write: Callable[[nn.Module, Tensor, Path], Tensor]) -> str:
    """The file's name, or why it is not there. Raises GraftingError if it does not give the model's scores."""
    model = trained.model.to(memory_format=torch.contiguous_format)
    example = torch.randn(2, 3, trained.image_size, trained.image_size)
    expected = model(example)
    try:
        found = write(model, example, path)
    except Exception as error:  # a package that is not installed, a layer that the format has no word for
        path.unlink(missing_ok=True)
        return f"no {path.name}: {printable(error, 200)}"
    difference = (found - expected).abs().max().item()
    if not difference <= TOLERANCE * max(1, expected.abs().max().item()):
        raise GraftingError(f"{path.name} gives other values than the model, by {difference:.3g}: nothing was written")
    return path.name


def config_of(trained: Trained) -> dict[str, Any]:
    counts, size = count_filters(trained.model.state_dict()), trained.image_size
    return {
        "architecture": trained.name,
        "num_classes": len(trained.classes),
        "classes": trained.classes,
        "image_size": size,
        # Bilinear, antialiased; then the centre is cut out.
        "resize": {"height": 32, "width": 32} if trained.is_cifar else {"shorter_side": size * 256 // 224},
        "mean": trained.mean,
        "std": trained.std,
        "accuracy": trained.contents.get("accuracy"),  # % of the test images
        "epoch": trained.contents.get("epoch"),
        "invalid_filters": counts["invalid"],  # by threshold of the L1 norm
        "filters": counts["total"],
        "settings": {key: value for key, value in trained.settings.items() if key != "classes"},
        "command": shlex.join(trained.command),
    }


def card(config: dict[str, Any], name: str) -> str:
    """The model card, as hubs show it."""
    size, side = config["image_size"], config["resize"].get("shorter_side")
    method, num = method_and_number(config["settings"])
    what = "filter grafting, as one of" if method == "grafting" else f"a rival of filter grafting ({method}),"
    how = "by itself" if num == 1 else f"with {what} {num} networks side by side"
    invalid = ", ".join(f"{count} below {threshold}" for threshold, count in config["invalid_filters"].items())
    resized = f"the shorter side resized to {side} pixels, the centre cut out" if side else "resized to 32×32"
    rows = "\n".join(f"| {key} | {value} |" for key, value in config["settings"].items())
    return f"""\
---
library_name: pytorch
pipeline_tag: image-classification
tags: [filter-grafting, "{config["architecture"]}"]
---
# {name}

A {config["architecture"]} for {size}×{size} images in {config["num_classes"]} classes, trained {how}.

Test accuracy: {mean_and_deviation([config["accuracy"]], 2)} % after epoch {config["epoch"]} (counted from 0).
Filters by L1 norm, of {config["filters"]:,}: {invalid}.

## Use

```python
model = torch.export.load("model.pt2").module()  # (n, 3, {size}, {size}) to scores (n, {config["num_classes"]})
```

PyTorch is all that this needs. The images are RGB, {resized}, their values in [0, 1], then
normalised: `(image - mean) / std` with mean {config["mean"]} and std {config["std"]}.
The names of the classes are in `config.json`, in the order of the scores.

## Training

    {config["command"] or "(the file does not say which command)"}

| setting | value |
|:--------|:------|
{rows}

Filter grafting: Meng et al., *Filter Grafting for Deep Neural Networks*, CVPR 2020, arXiv 2001.05868.
"""


def main() -> int:
    parser = file_parser(__doc__)
    parser.add_argument("out", metavar="OUT", type=path, help="the folder to make; it must not exist")
    parser.add_argument("--name", help="of the model, in its card (default: the folder's)")
    args = parser.parse_args()
    trained = load_trained(args.file, args.model)
    config = config_of(trained)
    args.out.mkdir(parents=True)
    try:
        for name, write in FILES.items():
            print(f"- {write_and_check(trained, args.out / name, write)}")
        (args.out / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (args.out / "README.md").write_text(card(config, args.name or args.out.resolve().name))
    except BaseException:
        shutil.rmtree(args.out)  # all is there and right, or nothing
        raise
    print(f"- {args.out / 'config.json'}, README.md")
    return 0


if __name__ == "__main__":
    sys.exit(program(main))
