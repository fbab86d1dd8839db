"""Models that lie in several processes: FSDP2's shards, DistributedDataParallel's copies, and what FSDP1 is told."""

import os
import re
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from naive import chain, coefficients_of, pair, randomised
from ring_tools import in_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from filter_grafting import (
    FileRing,
    Grafting,
    GraftingError,
    MismatchError,
    graft,
    invalid_filters,
    load_plain_state,
    plain_state,
)

LIBRARY = Path(__file__).resolve().parents[1] / "docs" / "library.md"


def make():
    """Filters that do not divide by 2, and one that only the first process holds."""
    return nn.Sequential(chain(filters=(5, 8)), nn.Conv2d(1, 1, 3))


def holds(model, state):
    return all(torch.equal(entry, state[key]) for key, entry in plain_state(model).items())


def in_each_of_two(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    model, neighbour = pair(make)
    expected = randomised(make(), 1)
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
    exchange = Mock(swap=Mock(return_value=plain_state(randomised(make(), 1))))
    Grafting(model, exchange).step()
    assert all(type(entry) is torch.Tensor for entry in exchange.swap.call_args.args[0].values())
    with pytest.raises(MismatchError, match="the model is sharded"):
        graft(fully_shard(randomised(chain(), 1), mesh=mesh), chain().state_dict(), level="filter")
    # A value that is not finite is in one process's shard alone, and all of them say so.
    bad = fully_shard(make(), mesh=mesh)
    if rank == 1:
        bad[0][0].weight.to_local().data.fill_(torch.nan)
    with pytest.raises(MismatchError, match=r"^0\.0\.weight: the network holds a value that is not finite"):
        graft(bad, neighbour)

    copies = nn.parallel.DistributedDataParallel(randomised(make(), 1))
    other = nn.parallel.DistributedDataParallel(randomised(make(), 2))
    assert coefficients_of(graft(copies, other.state_dict())) == coefficients_of(expected_layers)
    assert holds(copies, expected.state_dict())
    with FileRing(folder / f"refused{rank}", 1, 2) as ring, pytest.raises(GraftingError, match="copy of one rank"):
        Grafting(copies, ring)
    # The page's exchange for them; what the other network has published is there.
    (recipe,) = re.findall(r"^from contextlib.*?(?=^```)", LIBRARY.read_text(), re.DOTALL | re.MULTILINE)
    os.chdir(folder)
    if rank == 0:
        os.mkdir("run_ranks")
        torch.save({"net": neighbour}, "run_ranks/ckpt0_0.t7")
    space = {"dist": dist, "nn": nn, "FileRing": FileRing, "Grafting": Grafting}
    space |= {"build": lambda: randomised(make(), 1), "i": 1}
    exec(recipe, space)
    assert holds(space["grafting"].model, expected.state_dict())

    with pytest.raises(MismatchError, match=r"holds a copy, not the model's own \(FSDP1\?\)"):
        graft(FullyShardedDataParallel(make(), device_id=torch.device("cpu")), neighbour)


def test_models_that_lie_in_several_processes(tmp_path):
    in_processes(in_each_of_two, 2, tmp_path)
