"""The ranks of one torchrun job as a ring: each trains a network, and no folder is shared.

    torchrun --nproc_per_node 2 examples/process_group.py

On several machines the same, with torchrun's --nnodes and --rdzv_endpoint; with "nccl" for "gloo" on GPUs.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from filter_grafting import Grafting, ProcessGroupRing

EPOCHS = 4


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, 8, 8) of four patterns, and which pattern each is (count,)."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return patterns[labels] + 2 * torch.randn(count, 1, 8, 8, generator=generator), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    x, y = images(512, seed=1)
    model.train()
    for batch in torch.randperm(512).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def test(model: nn.Module) -> float:
    x, y = images(512, seed=2)
    model.eval()
    correct: Tensor = model(x).argmax(1) == y
    return correct.float().mean().item()


dist.init_process_group("gloo")
ring = ProcessGroupRing()
torch.manual_seed(ring.network)  # each network starts from weights, and has an order, of its own
convolutions = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
grafting = Grafting(model, ring)
for epoch in range(EPOCHS):
    train(model, optimizer)
    print(f"network {ring.network}, epoch {epoch}: accuracy {test(model):.3f}", flush=True)
    if epoch + 1 < EPOCHS:
        grafting.step()
dist.destroy_process_group()
