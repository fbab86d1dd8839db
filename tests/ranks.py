"""python ranks.py RANKS ARGUMENT...: does what torchrun --nproc_per_node RANKS grafting.py ARGUMENT... does.

It is torchrun's own agent, but the ranks are forked from it instead of started, so that torch is imported once. And two
models that train in no time, for `-a ranks:tiny` and, without batch norm and dropout, `-a ranks:plain`.
"""

import runpy
import sys
from pathlib import Path

from torch import nn
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

SCRIPT = Path(__file__).resolve().parent.parent / "grafting_imagenet" / "grafting.py"


def tiny(num_classes: int) -> nn.Module:
    first = [nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(
        *first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(16, num_classes)
    )


def plain(num_classes: int) -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


def work(arguments: list[str]) -> None:
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")


if __name__ == "__main__":
    count, arguments = int(sys.argv[1]), sys.argv[2:]
    if count == 1:
        work(arguments)
        sys.exit()
    nodes = {"min_nodes": 1, "max_nodes": 1, "nproc_per_node": count, "rdzv_endpoint": "localhost:0"}
    options = {"run_id": "test", "rdzv_backend": "c10d", "start_method": "fork", "max_restarts": 0}
    elastic_launch(LaunchConfig(**nodes, **options, monitor_interval=0.1), work)(arguments)
