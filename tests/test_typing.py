"""The package as a type checker sees it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = """
import torch
from torch import nn
from filter_grafting import Grafting, ProcessGroupRing, graft, graft_ring

model = nn.Conv2d(3, 3, 3)
state = model.state_dict()
share: float = graft(model, state, 0.4, 500, layers=(nn.Conv2d, nn.Linear))[""].coefficient
shares: torch.Tensor = graft(model, state, level="filter")[""].coefficient
entropies: list[float] = [found[""].own_entropy for found in graft_ring([model, nn.Conv2d(3, 3, 3)])]
grafting = Grafting(model, ProcessGroupRing(), checkpoint={"optimizer": torch.optim.SGD(model.parameters())})
for name, layer in (grafting.step() or {}).items():
    value: float | torch.Tensor = layer.coefficient
"""


@pytest.mark.slow
def test_the_package_and_its_use_pass_the_strict_checks_of_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "use.py").write_text(USE)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")]
    for arguments in ["-p", "filter_grafting"], [str(tmp_path / "use.py")], ["examples"]:
        result = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
