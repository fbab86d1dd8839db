import subprocess
import sys
import threading
from pathlib import Path

import torch
from ring_tools import ROOT
from torch import nn

from filter_grafting import FileRing, Grafting, graft_ring

# Each rank trains network rank+1 a little, by other numbers, and grafts three times.
NETWORKS = """
import torch
from torch import nn

def build(network):
    torch.manual_seed(network)
    last = nn.Conv2d(4, 2, 1, dtype=torch.float64)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), last, nn.Linear(2, 2))

def train(model, network, round):
    torch.manual_seed(100 * network + round)
    with torch.no_grad():
        for entry in model.state_dict().values():
            entry += torch.randn(entry.shape).abs().to(entry.dtype) if entry.is_floating_point() else 1
"""
RANK = """
import sys
from datetime import timedelta
import torch.distributed as dist
from filter_grafting import Grafting, GraftingError, ProcessGroupRing
store, rank, size, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
options = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=120)}
dist.init_process_group("gloo", init_method=f"file://{store}", **options)
"""
GRAFT = """
model = build(rank + 1)
grafting = Grafting(model, ProcessGroupRing())
for round in range(3):
    train(model, rank + 1, round)
    grafting.step()
torch.save(model.state_dict(), out)
"""
SWAP = """
group = dist.new_group([0, 1, 2])  # a part of the job
dtype = [torch.bfloat16, torch.float32, torch.float64, torch.float32][rank]
state = {"module.head": torch.full((rank + 1, 2), rank + 0.5, dtype=dtype), "count": torch.tensor(rank),
         "mask": torch.tensor([True, rank > 0]), "complex": torch.tensor([1j * rank]), "empty": torch.empty(0),
         "small": torch.full((3,), rank).to(torch.float8_e4m3fn), "more": {"rank": rank}}
if rank < 3:
    ring = ProcessGroupRing(group)
    assert (ring.network, ring.networks, ring.neighbour) == (rank + 1, 3, rank or 3), ring.neighbour
    found = ring.swap(state, 7)
    assert found.source == f"network {ring.neighbour}"
    torch.save(dict(found), out)
try:
    ProcessGroupRing().swap(state, rank // 3)
except GraftingError as error:
    print(error)
"""


def run_ranks(tmp_path: Path, size: int, task: str) -> tuple[list[Path], list[str]]:
    """Runs as many processes; their files, and what they said."""
    files = [tmp_path / f"{rank}.t7" for rank in range(size)]
    processes = []
    for rank, file in enumerate(files):
        code, store = NETWORKS + RANK + task, str(tmp_path / "store")
        command = [sys.executable, "-W", "ignore", "-c", code, store, str(rank), str(size), str(file)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert not any(process.returncode for process in processes), said
    return files, [out for out, _ in said]


def in_threads(tmp_path: Path, models: list[nn.Module], train) -> None:
    """Grafts through files, each network in a thread of its own."""

    def run(network: int, model: nn.Module) -> None:
        with FileRing(tmp_path / "run", network, len(models), timeout=120) as ring:
            grafting = Grafting(model, ring)
            for round in range(3):
                train(model, network, round)
                grafting.step()

    threads = [threading.Thread(target=run, args=item) for item in enumerate(models, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_ring_of_3_gives_the_same_weights_in_one_process_by_files_and_by_process_groups(tmp_path):
    tools, networks = {}, 3
    exec(NETWORKS, tools)
    together, apart = ([tools["build"](network) for network in range(1, networks + 1)] for _ in range(2))
    lock = threading.Lock()

    def train(model: nn.Module, network: int, round: int) -> None:
        with lock:  # torch's generator is that of all threads
            tools["train"](model, network, round)

    for round in range(3):
        for network, model in enumerate(together, 1):
            train(model, network, round)
        graft_ring(together)
    in_threads(tmp_path, apart, train)
    files, _ = run_ranks(tmp_path, networks, GRAFT)
    for one, other, file in zip(together, apart, files, strict=True):
        found = torch.load(file, weights_only=True)
        for name, entry in one.state_dict().items():
            assert torch.equal(entry, other.state_dict()[name]) and torch.equal(entry, found[name]), name


def test_states_of_any_types_and_sizes_are_swapped_among_the_ranks_of_a_group(tmp_path):
    files, said = run_ranks(tmp_path, 4, SWAP)
    for rank, file in enumerate(files[:3]):
        found, other = torch.load(file, weights_only=True), (rank - 1) % 3
        dtype = [torch.bfloat16, torch.float32, torch.float64][other]
        assert list(found) == ["head", "count", "mask", "complex", "empty", "small", "more"]
        assert torch.equal(found["head"], torch.full((other + 1, 2), other + 0.5, dtype=dtype))
        assert (found["count"], found["complex"].tolist(), found["more"]) == (other, [1j * other], {"rank": other})
        assert found["mask"].tolist() == [True, other > 0] and found["small"].float().tolist() == [other] * 3
    assert set(said) == {"networks 1 to 4 are at rounds [0, 0, 0, 1]; let all swap the same round\n"}
