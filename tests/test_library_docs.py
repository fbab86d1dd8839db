"""The code blocks of docs/library.md run as they stand, in as many processes as they have networks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "library.md").read_text(), re.DOTALL | re.MULTILINE)
TRAINERS = ("lightning", "transformers")

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

# Runs blocks as networks 1...N, each a fork; when one fails, the others are not waited for.
RUN = """
import os, signal, sys, traceback
networks, own, *blocks = sys.argv[1:]
space = {"os": os}
exec(own, space)
children = {}
for i in range(1, int(networks) + 1):
    child = os.fork()
    if child:
        children[child] = i
        continue
    code = 1
    try:
        space["i"] = i
        space["torch"].manual_seed(i)
        for block in blocks:
            exec(compile(block, block, "exec"), space)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)
while children:
    child, status = os.wait()
    del children[child]
    if status:
        for other in children:
            os.kill(other, signal.SIGKILL)
        sys.exit(1)
"""


def run(folder: Path, networks: int, own: str, *blocks: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(networks), own, *blocks]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)
    try:
        out, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, out


def of_a_trainer(block: str) -> bool:
    return any(f"from {package}" in block for package in TRAINERS)


def test_the_blocks_of_the_page_run(tmp_path):
    blocks = [block for block in BLOCKS if not of_a_trainer(block)]
    assert len(blocks) >= 8
    run(tmp_path, 2, OWN, *blocks)


def test_the_blocks_of_the_page_about_trainers_run(tmp_path):
    for package in TRAINERS:
        pytest.importorskip(package, reason=f"{package} is not installed")
    blocks = [block for block in BLOCKS if of_a_trainer(block)]
    assert len(blocks) == 2
    run(tmp_path, 2, OWN + TRAINED, *blocks)
    assert {path.name for path in tmp_path.iterdir()} >= {"run_lightning", "run_trainer"}


def test_the_library_in_one_block_runs_as_a_ring_of_three(tmp_path):
    run(tmp_path, 3, OWN, HEAD)
