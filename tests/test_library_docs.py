"""The code blocks of README.md and docs/library.md, and the examples, run as they stand, with a process a network."""

import importlib
import os
import re
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.elastic.utils.distributed import get_free_port

ROOT = Path(__file__).resolve().parent.parent
README, LIBRARY = (
    re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    for page in ("README.md", "docs/library.md")
)
# What is the reader's own.
OWN = """
from collections import OrderedDict
import torch
from torch import nn

def build(classes=2):
    first = {"conv": nn.Conv2d(1, 2, 3), "norm": nn.BatchNorm2d(2), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(first, head=nn.Linear(8, classes)))

def train(model):
    model.train()
    optimizer.zero_grad()
    model(torch.randn(4, 1, 4, 4)).square().sum().backward()
    optimizer.step()

def test(model):
    model.eval()

epochs, model = 3, build()
optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
"""
NETWORK = """
from torch.utils.data import DataLoader
from filter_grafting import FileRing

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build()

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.model(x), labels)}

images = [{"x": torch.randn(1, 4, 4), "labels": k % 2} for k in range(32)]
network, batches = Network(), DataLoader(images, batch_size=8)
"""
MODULE = """
from lightning.pytorch import LightningModule

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def training_step(self, batch):
        return self.network(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

module = Module()
"""
TRAINERS = {"lightning": ("lightning.pytorch", NETWORK + MODULE), "transformers": ("transformers.trainer", NETWORK)}


def networks(count: int, folder: Path, *blocks: str) -> None:
    """Runs blocks of code as networks 1...N, each a fork of this process, in which torch is imported already."""
    method = "spawn" if torch.cuda.is_initialized() else "fork"  # a fork could not go on with a GPU
    mp.start_processes(_network, (count, folder, get_free_port(), blocks), nprocs=count, start_method=method)


def _network(rank: int, count: int, folder: Path, port: int, blocks: tuple[str, ...]) -> None:
    os.chdir(folder)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    space = {"i": rank + 1, "count": count, "port": str(port)}
    for block in blocks:
        exec(compile(block, block, "exec"), space)


def example(name: str, count: int, folder: Path) -> None:
    """Runs an example, as a shell would start it for each network; torchrun also sets variables."""
    path = ROOT / "examples" / f"{name}.py"
    torchrun = 'import os\nos.environ |= {"RANK": str(i - 1), "WORLD_SIZE": str(count), "MASTER_PORT": port}\n'
    torchrun += 'os.environ["MASTER_ADDR"] = "127.0.0.1"'
    start = f"import sys\nsys.path.insert(0, {str(path.parent)!r})\nsys.argv = [{str(path)!r}, str(i)]"
    networks(count, folder, *([torchrun] if name == "process_group" else []), start, path.read_text())


def assert_learns(output: str, lines: int) -> None:
    """So many lines tell accuracies, the last one better than chance, which is 0.25."""
    # Networks write to one file: one's line may begin at the end of another's.
    found = [re.findall(r"0\.\d+", part.splitlines()[0]) for part in output.split("accurac")[1:]]
    assert len(found) >= lines and max(map(float, found[-1])) > 0.4, output


def of_a_trainer(block: str) -> bool:
    return any(f"from {package}" in block for package in TRAINERS)


def test_the_block_of_the_readme_runs_as_a_ring_of_three(tmp_path):
    networks(3, tmp_path, OWN, "model1, model2, model3 = build(), build(), build()", *README)
    assert len(README) == 1 and (tmp_path / "run" / "network3.json").exists()


def test_the_blocks_of_the_page_run(tmp_path):
    blocks = [block for block in LIBRARY if not of_a_trainer(block)]
    assert len(blocks) >= 8
    networks(2, tmp_path, OWN, *blocks)


@pytest.mark.parametrize(("name", "count"), [("own_loop", 2), ("process_group", 2), ("one_process", 1)])
def test_an_example_runs_and_its_networks_learn(tmp_path, capfd, name, count):
    example(name, count, tmp_path)
    assert_learns(capfd.readouterr().out, 4 * count)


@pytest.mark.parametrize("package", TRAINERS)
def test_the_block_and_the_example_of_a_trainer_run(tmp_path, capfd, package):
    module, own = TRAINERS[package]
    pytest.importorskip(package, reason=f"{package} is not installed")
    importlib.import_module(module)  # here, and so once for all networks
    (block,) = (block for block in LIBRARY if f"from {package}" in block)
    networks(2, tmp_path, OWN + own, block)
    capfd.readouterr()
    example(f"{package}_trainer", 2, tmp_path)
    assert_learns(capfd.readouterr().out, 4 * 2)
