"""The processes of one job as a ring, and that every way of exchanging weights gives the same bits."""

import pytest
import torch
import torch.distributed as dist
from ring_tools import in_processes
from torch import nn

from filter_grafting import FileRing, Grafting, GraftingError, ProcessGroupRing, graft, graft_ring, plain_state

NETWORKS, ROUNDS = 3, 3


def build(network):
    torch.manual_seed(network)
    last = nn.Conv2d(4, 2, 1, dtype=torch.float64)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), last, nn.Linear(2, 2))


def train(model, network, round):
    """Every entry changes a little, by other numbers in each network and round."""
    torch.manual_seed(100 * network + round)
    with torch.no_grad():
        for entry in model.state_dict().values():
            entry += torch.randn(entry.shape).abs().to(entry.dtype) if entry.is_floating_point() else 1


def state_of(rank):
    """Entries of many types, and of other sizes in each rank."""
    dtype = [torch.bfloat16, torch.float32, torch.float64, torch.float32][rank]
    return {
        "module.head": torch.full((rank + 1, 2), rank + 0.5, dtype=dtype),
        "count": torch.tensor(rank),
        "mask": torch.tensor([True, rank > 0]),
        "complex": torch.tensor([1j * rank]),
        "empty": torch.empty(0),
        "small": torch.full((3,), rank).to(torch.float8_e4m3fn),
        "more": {"rank": rank},
    }


def in_each_of_four(rank, folder):
    group = dist.new_group(range(NETWORKS))  # a part of the job
    if rank < NETWORKS:
        model, ring = build(rank + 1), ProcessGroupRing(group)
        assert (ring.network, ring.networks, ring.neighbour) == (rank + 1, 3, rank or 3)
        grafting = Grafting(model, ring)
        for round in range(ROUNDS):
            train(model, rank + 1, round)
            grafting.step()
        torch.save(model.state_dict(), folder / str(rank))

        found, expected = ring.swap(state_of(rank), 7), state_of((rank - 1) % 3)
        assert found.source == f"network {ring.neighbour}"
        assert list(found) == ["head", *list(expected)[1:]] and found["more"] == expected["more"]
        for name, entry in zip(list(found)[:-1], expected.values(), strict=False):
            assert found[name].dtype == entry.dtype and found[name].tolist() == entry.tolist(), name
    # The default group, as well where torch tells the ranks of a group alone, as before 2.8.
    with pytest.MonkeyPatch.context() as patch:
        ranks_of = dist.get_process_group_ranks
        patch.setattr(dist, "get_process_group_ranks", lambda group: ranks_of({dist.group.WORLD: group}[group]))
        assert ProcessGroupRing().swap({"rank": torch.tensor(rank)}, 8)["rank"] == (rank - 1) % 4
    with pytest.raises(GraftingError, match=r"networks 1 to 4 are at rounds \[0, 0, 0, 1\]; let all swap the same"):
        ProcessGroupRing().swap(state_of(rank), rank // 3)


def test_a_ring_of_3_gives_the_same_bits_in_one_process_by_files_and_by_process_groups(tmp_path):
    in_processes(in_each_of_four, 4, tmp_path)
    together, apart = ({network: build(network) for network in range(1, NETWORKS + 1)} for _ in range(2))
    rings = {network: FileRing(tmp_path / "run", network, NETWORKS) for network in apart}
    for round in range(ROUNDS):
        for models in together, apart:
            for network, model in models.items():
                train(model, network, round)
        graft_ring(list(together.values()))
        for network, ring in rings.items():
            ring.publish(round, plain_state(apart[network]))
        for network, ring in rings.items():
            graft(apart[network], ring.wait(round))
    for network, ring in rings.items():
        ring.leave()
        in_a_group = torch.load(tmp_path / str(network - 1), weights_only=True)
        for name, entry in together[network].state_dict().items():
            assert torch.equal(entry, apart[network].state_dict()[name]) and torch.equal(entry, in_a_group[name]), name
