"""The CIFAR models by name: build("resnet32", 10). Torch is imported when one is built, not for the names."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

_DEPTHS = (20, 32, 44, 56, 110)
_HOMES = {  # the file, which has a constructor of that name, and its arguments
    **{f"resnet{depth}": ("resnet", {"depth": depth}) for depth in _DEPTHS},
    **{f"resnet{depth}_leaky": ("resnet", {"depth": depth, "leaky": True}) for depth in _DEPTHS},
    "wrn28_10": ("wide_resnet", {}),
    "mobilenetv2": ("mobilenetv2", {}),
    **{f"mobilenetv2_w{width:03d}": ("mobilenetv2", {"width": width / 100}) for width in (25, 50, 75)},
    "vgg16": ("vgg", {}),
}
NAMES = tuple(_HOMES)


def build(name: str, num_classes: int = 10) -> nn.Module:
    """The model called name (one of NAMES, or package.module:function), with fresh weights from torch's generator.

    It takes images (n, 3, 32, 32) and returns logits (n, num_classes). Raises ValueError if there is no such model.
    """
    if ":" in name:
        return import_module("training.models").own_model(name, num_classes, 32)
    if name not in _HOMES:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(NAMES)}")
    file, options = _HOMES[name]
    return getattr(import_module(f"{__name__}.{file}"), file)(num_classes, **options)
