"""What runs leave behind, with figures that a test chooses, and the programs of analysis/ called in this process."""

import contextlib
import io
import json
import socket
import sys

import pandas as pd
import pytest
import torch
import torchvision

from analysis.runs import program
from grafting_cifar import models
from grafting_cifar.data import MEAN, STD

CLASSES = ["one", "two"]  # those of the fixture `images`
IMAGENET = {"image_size": 64, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def call(module, *arguments):
    """Runs a program: (exit status, what it printed, its errors)."""
    output, errors = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        patch.setattr(sys, "argv", ["program.py", *map(str, arguments)])
        try:
            status = program(module.main)
        except SystemExit as end:
            status = end.code
    return status, output.getvalue(), errors.getvalue()


def rows_of(output):
    """The rows of a Markdown table as dicts."""
    lines = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in body]


# ---- Save directories


def filters_of(norms, shortcut_norms=()):
    """A state dict whose filters have these L1 norms."""
    state = {"conv1.weight": torch.tensor(norms)[:, None, None, None].expand(-1, 1, 2, 2) / 4}
    if shortcut_norms:
        state["layers.0.shortcut.0.weight"] = torch.tensor(shortcut_norms)[:, None, None, None]
    return state


def save_run(directory, accuracies, *, epochs=3, norms=((1.0, 0.05, 0.005),) * 8, states=(), **settings):
    """Writes what a run leaves: accuracies[i - 1] are those of network i, one per epoch."""
    directory.mkdir(parents=True)
    num = len(accuracies)
    settings = {"model": "resnet20", "num": num, "epochs": epochs} | settings
    (directory / "run.json").write_text(json.dumps({"run": "ab", "settings": settings}))
    for i, values in enumerate(accuracies, 1):
        at = pd.DataFrame({"epoch": range(len(values)), "test_accuracy": values, "train_loss": 1, "test_loss": 2})
        at["best"], at["train_seconds"], at["information"] = at["test_accuracy"].cummax(), at["epoch"] + 1, 30.0
        at[["test_seconds", "wait_seconds", "graft_seconds"]] = 0.5, 0.25, 0.25
        at.to_csv(directory / f"metrics{i}.csv", index=False)
        if num > 1:
            grafted = [(epoch, "conv1", 0.45 + epoch / 100) for epoch in range(min(len(values), epochs - 1))]
            frame = pd.DataFrame(grafted, columns=["epoch", "layer", "coefficient"])
            frame.to_csv(directory / f"coefficients{i}.csv", index=False)
        state, _, detail = (states[i - 1] if states else "done").partition(" ")
        status = {"network": i, "num": num, "run": "ab", "state": state, "detail": detail, "epoch": len(values) - 1}
        status |= {"epochs": epochs, "host": socket.gethostname(), "pid": 2**30, "time": 0.0}
        (directory / f"network{i}.json").write_text(json.dumps(status))
        for name in ["best"] + ["final"] * (state == "done"):
            torch.save({"net": filters_of(norms[i - 1])}, directory / f"{name}{i}.t7")
    return directory


# ---- Trained models


def trained_like(seed, name="resnet20"):
    """The weights of a model for two classes, whose batch norm has seen something."""
    torch.manual_seed(seed)
    model = models.build(name, 2)
    model(torch.randn(8, 3, 32, 32))
    return model.state_dict()


def save_model(path, state=None, key="net", **changes):
    """A file as grafting.py leaves it; what is changed to None is left out."""
    contents = {
        key: trained_like(0) if state is None else state,
        "epoch": 3,
        "accuracy": 50.0,
        "settings": {"model": "resnet20", "num": 2, "lr": 0.1, "val": 0},
        "model": "resnet20",
        "classes": CLASSES,
        "mean": list(MEAN),
        "std": list(STD),
        "image_size": 32,
        "command": ["python", "grafting.py"],
    } | changes
    torch.save({name: value for name, value in contents.items() if value is not None}, path)
    return path


def save_imagenet_model(path, **changes):
    """The same of a ResNet-18 for images of 64 pixels; returns the model, too."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=2)
    model(torch.randn(8, 3, 64, 64))
    settings = {"arch": "resnet18", "num": 1}
    changes = {"model": "resnet18", "settings": settings, **IMAGENET, **changes}
    return save_model(path, model.state_dict(), "state_dict", **changes), model
