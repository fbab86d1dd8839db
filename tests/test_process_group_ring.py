import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from ring_tools import ROOT
from torch import nn

from filter_grafting import FileRing, Grafting, graft_ring

# The first three ranks train network rank+1 a little, by other numbers, and graft three times; then all swap.
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
group = dist.new_group([0, 1, 2])  # a part of the job
if rank < 3:
    model = build(rank + 1)
    grafting = Grafting(model, ProcessGroupRing(group))
    for round in range(3):
        train(model, rank + 1, round)
        grafting.step()
    torch.save(model.state_dict(), out + ".grafted")
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


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> tuple[Path, list[str]]:
    """Four processes that do all this: the folder of what they saved, and what they said."""
    folder, processes = tmp_path_factory.mktemp("ranks"), []
    try:
        for rank in range(4):
            words = [str(folder / "store"), str(rank), "4", str(folder / f"{rank}.t7")]
            command = [sys.executable, "-W", "ignore", "-c", NETWORKS + RANK, *words]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            processes.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert not any(process.returncode for process in processes), said
    return folder, [out for out, _ in said]


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


def test_a_ring_of_3_gives_the_same_weights_in_one_process_by_files_and_by_process_groups(tmp_path, ranks):
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
    for rank, (one, other) in enumerate(zip(together, apart, strict=True)):
        found = torch.load(ranks[0] / f"{rank}.t7.grafted", weights_only=True)
        for name, entry in one.state_dict().items():
            assert torch.equal(entry, other.state_dict()[name]) and torch.equal(entry, found[name]), name


def test_states_of_any_types_and_sizes_are_swapped_among_the_ranks_of_a_group(ranks):
    folder, said = ranks
    for rank in range(3):
        found, other = torch.load(folder / f"{rank}.t7", weights_only=True), (rank - 1) % 3
        dtype = [torch.bfloat16, torch.float32, torch.float64][other]
        assert list(found) == ["head", "count", "mask", "complex", "empty", "small", "more"]
        assert torch.equal(found["head"], torch.full((other + 1, 2), other + 0.5, dtype=dtype))
        assert (found["count"], found["complex"].tolist(), found["more"]) == (other, [1j * other], {"rank": other})
        assert found["mask"].tolist() == [True, other > 0] and found["small"].float().tolist() == [other] * 3
    assert set(said) == {"networks 1 to 4 are at rounds [0, 0, 0, 1]; let all swap the same round\n"}
