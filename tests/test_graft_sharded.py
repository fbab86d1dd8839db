"""Models that lie in several processes: FSDP2's shards, DistributedDataParallel's copies, and what FSDP1 is told."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from naive import chain, coefficients_of, pair, randomised
from torch import nn

from filter_grafting import Grafting, MismatchError, graft, invalid_filters, plain_state
from filter_grafting.states import load_plain_state

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch has no distributed package here")


def make():
    """Filters that do not divide by 2, and one that only the first process holds."""
    return nn.Sequential(chain(filters=(5, 8)), nn.Conv2d(1, 1, 3))


def holds(model, state):
    return all(torch.equal(entry, state[key]) for key, entry in plain_state(model).items())


def in_each_process(rank, folder):
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    try:
        check_sharded()
        check_copies()
        check_fsdp1()
    finally:
        dist.destroy_process_group()


def check_sharded():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model, neighbour = pair(make)
    expected = copy.deepcopy(model)
    expected_layers, filters = graft(expected, neighbour), invalid_filters(model, 0.5)
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert invalid_filters(model, 0.5) == filters
    assert graft(model, neighbour) == expected_layers
    assert holds(model, expected.state_dict())
    load_plain_state(model, neighbour)
    assert holds(model, neighbour)
    # Sharded on the other side, too; and through whatever exchanges whole weights.
    other = fully_shard(randomised(make(), 2), mesh=mesh)
    graft(whole := randomised(make(), 1), other.state_dict())
    assert holds(whole, expected.state_dict())
    Grafting(model, Giver(plain_state(randomised(make(), 1)))).step()
    with pytest.raises(MismatchError, match="the model is sharded"):
        graft(fully_shard(randomised(chain(), 1), mesh=mesh), chain().state_dict(), level="filter")
    # A value that is not finite is in one process's shard alone, and all of them say so.
    neighbour["0.0.weight"][0] = 1e38
    bad = fully_shard(make(), mesh=mesh)
    if dist.get_rank() == 1:
        bad[0][0].weight.to_local().data.fill_(torch.nan)
    with pytest.raises(MismatchError, match=r"^0\.0\.weight: the network holds a value that is not finite"):
        graft(bad, neighbour)


class Giver:
    def __init__(self, state):
        self.state = state

    def swap(self, state, round):
        assert all(type(entry) is torch.Tensor for entry in state.values())
        return self.state


def check_copies():
    model, neighbour = pair(make)
    expected = copy.deepcopy(model)
    copies = nn.parallel.DistributedDataParallel(model)
    assert coefficients_of(graft(copies, neighbour)) == coefficients_of(graft(expected, neighbour))
    other = nn.parallel.DistributedDataParallel(randomised(make(), 2))
    graft(copies, other.state_dict())
    graft(expected, neighbour)
    assert holds(copies, expected.state_dict())


def check_fsdp1():
    from torch.distributed.fsdp import FullyShardedDataParallel

    model, neighbour = pair(make)
    with pytest.raises(MismatchError, match=r"holds a copy, not the model's own \(FSDP1\?\)"):
        graft(FullyShardedDataParallel(model, device_id=torch.device("cpu")), neighbour)


def test_models_that_lie_in_several_processes(tmp_path):
    mp.spawn(in_each_process, (str(tmp_path),), nprocs=2, daemon=True)
