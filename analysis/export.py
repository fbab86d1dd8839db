"""Writes a trained model as a folder that others can use without this project, with a model card.

    python analysis/export.py checkpoint/demo/grafted/best1.t7 exported
    python analysis/export.py checkpoint/demo/grafted/best1.t7 exported --name resnet20-glyphs

The folder holds model.pt2 (a program of torch.export, which one line loads), model.safetensors (the weights, where
safetensors is installed), model.onnx (where onnx and onnxscript are), config.json and README.md. What was written is
loaded again, and must give the scores that the model gives.
"""

import argparse
import json
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.loading import Trained, file_parser, load_trained
from analysis.runs import count_filters, program
from filter_grafting.errors import GraftingError
from filter_grafting.membership import printable
from training.flags import path

TOLERANCE = 1e-3  # of the largest score: what other kernels may differ by
CARD = """\
---
library_name: pytorch
pipeline_tag: image-classification
tags: [filter-grafting, "{architecture}"]
---
# {name}

A {architecture} for {image_size}×{image_size} images in {num_classes} classes, trained {with_what}.

{metrics}

## Use

```python
model = torch.export.load("model.pt2").module()  # (n, 3, {image_size}, {image_size}) to scores (n, {num_classes})
```

PyTorch is all that this needs. The images are RGB, {resized}, their values in [0, 1], then
normalised: `(image - mean) / std` with mean {mean} and std {std}.
The names of the classes are in `config.json`, in the order of the scores.
{more}
## Training

{trained_by}

| setting | value |
|:--------|:------|
{rows}

Filter grafting: Meng et al., *Filter Grafting for Deep Neural Networks*, CVPR 2020, arXiv 2001.05868.
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = file_parser(__doc__)
    parser.add_argument("out", metavar="OUT", type=path, help="the folder to make; it must not exist, or be empty")
    parser.add_argument("--name", help="of the model, in its card (default: the folder's)")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise GraftingError(f"{args.out} is there already: give another folder, or remove it")
    trained = load_trained(args.file, args.model)
    model = trained.model.to(memory_format=torch.contiguous_format)
    example = torch.randn(2, 3, trained.image_size, trained.image_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # In a folder beside it, which takes its name when all is there and right.
    with TemporaryDirectory(dir=args.out.parent, prefix=f".{args.out.name}.") as temporary:
        folder = Path(temporary, "model")
        folder.mkdir()
        notes = [write(model, example, folder) for write in (write_program, write_weights, write_onnx)]
        config = config_of(trained)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (folder / "README.md").write_text(card(trained, config, args.name or args.out.resolve().name, folder))
        if args.out.exists():
            args.out.rmdir()
        shutil.move(folder, args.out)
    print(*notes, f"- {args.out / 'config.json'}, README.md", sep="\n")
    if trained.missing:
        print(f"{trained.missing} Mend config.json and README.md if that is wrong.")
    return 0


# ---- The files, each loaded again and compared


def write_program(model: nn.Module, example: Tensor, folder: Path) -> str:
    """The model as torch.export has it: code and weights in one file."""
    try:
        exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("n")},))
        torch.export.save(exported, folder / "model.pt2")
    except Exception as error:  # whatever torch cannot trace
        return f"- no model.pt2: torch.export cannot trace this model ({printable(error, 200)})"
    check("model.pt2", torch.export.load(folder / "model.pt2").module()(example), model(example))
    return "- model.pt2"


def write_weights(model: nn.Module, example: Tensor, folder: Path) -> str:
    state = {key: entry.contiguous().clone() for key, entry in model.state_dict().items()}
    if find_spec("safetensors") is None:
        torch.save(state, folder / "model.pt")
        return "- model.pt, not model.safetensors: the package safetensors is not installed"
    from safetensors.torch import load_file, save_file

    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # others shall read it, too
    for key, entry in load_file(folder / "model.safetensors").items():
        check(f"model.safetensors: {key}", entry, state[key])
    return "- model.safetensors"


def write_onnx(model: nn.Module, example: Tensor, folder: Path) -> str:
    absent = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        return f"- no model.onnx: the package {absent[0]} is not installed"
    from onnx.reference import ReferenceEvaluator

    names = {"input_names": ["images"], "output_names": ["scores"], "dynamic_shapes": ({0: torch.export.Dim("n")},)}
    try:
        written = torch.onnx.export(model, (example,), dynamo=True, verbose=False, **names)
        written.save(folder / "model.onnx", external_data=False)
    except Exception as error:  # whatever ONNX has no word for
        return f"- no model.onnx: this model cannot be written as ONNX ({printable(error, 200)})"
    (scores,) = ReferenceEvaluator(str(folder / "model.onnx")).run(None, {"images": example.numpy()})
    check("model.onnx", torch.from_numpy(scores), model(example))
    return "- model.onnx"


def check(name: str, found: Tensor, expected: Tensor) -> None:
    difference = (found.double() - expected.double()).abs().max().item()
    if not difference <= TOLERANCE * max(1, expected.abs().max().item()):
        raise GraftingError(f"{name} gives other values than the model, by {difference:.3g}: nothing was written")


# ---- What is said of the model


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
        "command": trained.contents.get("command"),
    }


def card(trained: Trained, config: dict[str, Any], name: str, folder: Path) -> str:
    num, command, more, metrics = trained.settings.get("num", 1), config["command"], "", ""
    if isinstance(config["accuracy"], float):
        metrics = f"Test accuracy: {config['accuracy']:.2f} % after epoch {config['epoch']} (counted from 0).\n"
    invalid = ", ".join(f"{count} below {threshold}" for threshold, count in config["invalid_filters"].items())
    side = config["resize"].get("shorter_side")
    if not trained.is_cifar and ":" not in trained.name and (folder / "model.safetensors").exists():
        build = f'torchvision.models.get_model("{trained.name}", num_classes={len(trained.classes)})'
        more = f"\nTo train it further: `model = {build}`, then\n"
        more += '`model.load_state_dict(safetensors.torch.load_file("model.safetensors"))`.\n'
    line = command if isinstance(command, str) else shlex.join(map(str, command or []))
    return CARD.format(
        **config,
        name=name,
        with_what="by itself" if num == 1 else f"with filter grafting, as one of {num} networks side by side",
        metrics=f"{metrics}Filters by L1 norm, of {config['filters']:,}: {invalid}.",
        resized=f"their shorter side resized to {side} pixels and the centre cut out" if side else "resized to 32×32",
        more=more,
        trained_by=f"    {line}" if line else "The file does not say which command trained it.",
        rows="\n".join(f"| {printable(key)} | {printable(value, 80)} |" for key, value in config["settings"].items()),
    )


if __name__ == "__main__":
    sys.exit(program(main))
