"""The CIFAR models by name: build("resnet32", classes=10)."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_DEPTHS = (20, 32, 44, 56, 110)
NAMES = (
    *(f"resnet{depth}" for depth in _DEPTHS),
    *(f"resnet{depth}_leaky" for depth in _DEPTHS),
    "mobilenetv2",
    "vgg16",
)


def build(name: str, classes: int = 10) -> nn.Module:
    """The network called name (one of NAMES), with fresh weights from torch's global generator.

    It takes images (n, 3, 32, 32) and returns logits (n, classes). An unknown name is a ValueError that gives
    the nearest ones.
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=3) or NAMES
        raise ValueError(f"unknown model {name!r}: did you mean {', '.join(nearest)}?")
    # Imported here, so that NAMES is had (by --help) without the seconds that importing torch takes.
    from grafting_cifar.models import mobilenetv2, resnet, vgg

    if name.startswith("resnet"):
        return getattr(resnet, name.removesuffix("_leaky"))(classes, leaky=name.endswith("_leaky"))
    return {"mobilenetv2": mobilenetv2.mobilenetv2, "vgg16": vgg.vgg16}[name](classes)
