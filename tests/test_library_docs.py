"""The code blocks of docs/library.md and the examples run as they stand, in as many processes as they have networks."""

import json
import re
import socket
from pathlib import Path

import pytest
from processes import ROOT, Process

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL | re.MULTILINE)
TRAINERS = ("lightning", "transformers")
RUN = Path(__file__).with_name("networks.py")

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
TRAINED = """
import lightning.pytorch, transformers
from torch.utils.data import DataLoader
from filter_grafting import FileRing

class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build()

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.model(x), labels)}

class Module(lightning.pytorch.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = Network()

    def training_step(self, batch):
        return self.network(**batch)["loss"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

images = [{"x": torch.randn(1, 4, 4), "labels": k % 2} for k in range(32)]
network, module, batches = Network(), Module(), DataLoader(images, batch_size=8)
"""
# The library in one block: each of its lines runs.
HEAD = """
from filter_grafting import FileRing, Grafting, ProcessGroupRing, graft_ring

with FileRing("run", i, 3, settings={"lr": 0.1}, resume=True) as ring:
    grafting = Grafting(model, ring, exclude=("head.*",))
    for epoch in range(grafting.round, epochs):
        train(model); test(model)
        if epoch + 1 < epochs: grafting.step()

m1, m2, m3 = build(), build(), build()
graft_ring([m1, m2, m3])

import torch.distributed as dist
dist.init_process_group("gloo", init_method=f"file://{os.getcwd()}/store", rank=i - 1, world_size=3)
mesh = dist.device_mesh.init_device_mesh("cpu", (3, 1), mesh_dim_names=("network", "replica"))
ddp_model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("replica"))
assert list(Grafting(ddp_model, ProcessGroupRing(mesh.get_group("network"))).step()) == ["conv"]
"""

TORCHRUN = 'os.environ |= {"RANK": str(i - 1), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "%d"}'
EXAMPLE = """
sys.path.insert(0, {folder!r})
sys.argv = [{path!r}, str(i)]
exec(compile(open({path!r}).read(), {path!r}, "exec"), {{"__name__": "__main__"}})
"""


def case(folder: Path, networks: int, first: str, *blocks: str) -> dict:
    folder.mkdir()
    return {"folder": str(folder), "networks": networks, "first": first, "blocks": blocks}


def example(folder: Path, name: str, networks: int = 2) -> dict:
    path = ROOT / "examples" / f"{name}.py"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = [TORCHRUN % free.getsockname()[1]] if name == "process_group" else []
    code = EXAMPLE.format(folder=str(path.parent), path=str(path))
    return case(folder / name, networks, "import torch", *torchrun, code)


def run(folder: Path, *cases: dict) -> str:
    """What these cases print."""
    (folder / "cases.json").write_text(json.dumps(cases))
    process = Process(RUN, [str(folder / "cases.json")], folder / "log")
    try:
        assert process.wait(300) == 0, process.output()
    finally:
        process.kill()
    return process.output()


def assert_learns(output: str, lines: int) -> None:
    """So many lines tell accuracies, the last one better than chance, which is 0.25."""
    found = [re.findall(r"0\.\d+", line) for line in re.findall("accurac.*", output)]
    assert len(found) >= lines and max(map(float, found[-1])) > 0.4, output


def of_a_trainer(block: str) -> bool:
    return any(f"from {package}" in block for package in TRAINERS)


def test_the_blocks_of_the_page_run(tmp_path):
    blocks = [block for block in BLOCKS if not of_a_trainer(block)]
    assert len(blocks) >= 8
    page = case(tmp_path / "page", 2, OWN, *blocks)
    run(tmp_path, page, case(tmp_path / "head", 3, OWN, HEAD))


@pytest.mark.parametrize(("name", "processes"), [("own_loop", 2), ("process_group", 2), ("one_process", 1)])
def test_an_example_runs_and_its_networks_learn(tmp_path, name, processes):
    assert_learns(run(tmp_path, example(tmp_path, name, processes)), 4 * processes)


def test_the_blocks_and_examples_of_trainers_run(tmp_path):
    for package in TRAINERS:
        pytest.importorskip(package, reason=f"{package} is not installed")
    blocks = [block for block in BLOCKS if of_a_trainer(block)]
    assert len(blocks) == 2
    page = case(tmp_path / "page", 2, OWN + TRAINED, *blocks)
    output = run(tmp_path, page, *(example(tmp_path, f"{package}_trainer") for package in TRAINERS))
    assert {path.name for path in (tmp_path / "page").iterdir()} >= {"run_lightning", "run_trainer"}
    assert_learns(output, 4 * 2 * 2)
