"""What two epochs of a ring of two print, recorded before the program was rebuilt: the digits must stay.

On the processor that they were recorded on (AVX-512, one thread, fp32) all of them are the same. Others round in other
places, which may even move a coefficient by a hundredth where a weight lies on the edge of a bin; order and
augmentation, being computed in integers, are the same everywhere.
"""

from typing import NamedTuple

import pytest
import torch
from imagenet import ImageRun
from processes import Run, make_images, read_table

CPU = torch.backends.cpu.get_cpu_capability()
COLUMNS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")


class Network(NamedTuple):
    first: str  # COLUMNS of the first epoch
    second: str
    coefficients: str  # of each layer, in the one graft


CIFAR = {
    1: Network(
        "1.5710980892181396 50.0 9.718323707580566 50.0",
        "0.9044981002807617 43.75 0.7768868803977966 50.0",
        "0.7 0.31 0.3 0.33 0.3 0.3 0.7 0.59 0.31 0.68 0.3 0.7 0.7 0.3 0.7 0.61 0.31 0.69 0.3",
    ),
    2: Network(
        "0.9420857727527618 50.0 14.15748405456543 50.0",
        "0.8332764804363251 50.0 0.7980382442474365 50.0",
        "0.3 0.69 0.7 0.67 0.7 0.7 0.3 0.41 0.69 0.32 0.7 0.3 0.3 0.7 0.3 0.39 0.69 0.31 0.7",
    ),
}

IMAGENET = {
    1: Network(
        "0.820575475692749 46.875 0.7063202857971191 50.0",
        "0.6589674949645996 68.75 0.6955856084823608 50.0",
        "0.3 0.58 0.31 0.31 0.66 0.36 0.31 0.69 0.69 0.7 0.3 0.68 0.7 0.69 0.3 0.3 0.35 0.68 0.69 0.69",
    ),
    2: Network(
        "0.715027779340744 59.375 0.6871616244316101 50.0",
        "0.6709928810596466 62.5 0.6951228380203247 50.0",
        "0.7 0.42 0.69 0.69 0.34 0.64 0.69 0.31 0.31 0.3 0.7 0.32 0.3 0.31 0.7 0.7 0.65 0.32 0.31 0.31",
    ),
}


def numbers(text):
    return [float(word) for word in text.split()]


def assert_digits(run, expected):
    for network, recorded in expected.items():
        rows = read_table(run.directory / f"coefficients{network}.csv")
        coefficients = [float(row["coefficient"]) for row in rows]
        assert coefficients == pytest.approx(numbers(recorded.coefficients), abs=0.021)
        is_same = CPU == "AVX512" and coefficients == numbers(recorded.coefficients)
        figures = [
            [float(row[name]) for name in COLUMNS] for row in read_table(run.directory / f"metrics{network}.csv")
        ]
        assert figures[0] == pytest.approx(numbers(recorded.first), rel=1e-4)
        assert figures[1][::2] == pytest.approx(numbers(recorded.second)[::2], rel=1e-4 if is_same else 0.03)
        assert figures[1][1::2] == pytest.approx(numbers(recorded.second)[1::2], abs=0.01 if is_same else 13)


def test_the_cifar_scripts_digits(images, tmp_path):
    run = Run(tmp_path / "run", images, 2, 2, ("--model", "resnet20", "--lr", "0.01"))
    assert_digits(run.finish(), CIFAR)


def test_the_imagenet_scripts_digits(tmp_path):
    larger = make_images(tmp_path / "larger", 1, (40, 48), "val")
    run = ImageRun(tmp_path / "run", larger, 2, 2, ["-a", "resnet18", "-b", "16", "-j", "1", "--lr", "0.01"])
    assert_digits(run.finish(), IMAGENET)
