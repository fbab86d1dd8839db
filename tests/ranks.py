"""python ranks.py RANKS ARGUMENT...: does what torchrun --nproc-per-node RANKS -- grafting.py ARGUMENT... does.

It is torchrun's own agent, but the ranks are forked from it instead of started, so that torch is imported once. Two
networks that train in no time are added to torchvision's, `tiny` and, without batch norm, `tiny_plain`; with either the
script runs as it is.
"""

import runpy
import sys
from pathlib import Path

import torchvision.models
from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torchvision.models._api import register_model

SCRIPT = Path(__file__).resolve().parent.parent / "grafting_imagenet" / "grafting.py"


def tiny(*, weights: None, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, num_classes),
    )  # fmt: skip


def tiny_plain(*, weights: None, num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


def work(arguments: list[str]) -> None:
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    for build in (tiny, tiny_plain):
        build.__module__ = f"{torchvision.models.__name__}.{build.__name__}"
        register_model()(build)
    count, arguments = int(sys.argv[1]), sys.argv[2:]
    if count == 1:
        work(arguments)
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        start_method="fork", max_restarts=0, monitor_interval=0.1,
    )  # fmt: skip
    elastic_launch(config, work)(arguments)
