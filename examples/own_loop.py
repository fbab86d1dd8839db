"""Two networks in a training loop of your own, a process each, which graft through files in a shared directory.

    python examples/own_loop.py 1 & python examples/own_loop.py 2

Killed at any moment and started again, a network goes on from its last checkpoint to the very same weights.
"""

import logging
import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filter_grafting import FileRing, Grafting

logging.basicConfig(level=logging.INFO, format="%(message)s")  # a network that waits says for whom
NETWORK, EPOCHS = int(sys.argv[1]), 4


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, 8, 8) of four patterns, and which pattern each is (count,)."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return patterns[labels] + 2 * torch.randn(count, 1, 8, 8, generator=generator), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x, y = images(512, seed=1)
    model.train()
    for batch in torch.randperm(512, generator=torch.Generator().manual_seed(seed)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


@torch.no_grad()
def test(model: nn.Module) -> float:
    x, y = images(512, seed=2)
    model.eval()
    correct: Tensor = model(x).argmax(1) == y
    return correct.float().mean().item()


torch.manual_seed(NETWORK)  # each network starts from weights of its own
convolutions = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

with FileRing("own_loop_run", NETWORK, 2, settings={"lr": 0.05}, resume=True) as ring:
    grafting = Grafting(model, ring, checkpoint={"optimizer": optimizer})
    for epoch in range(grafting.round, EPOCHS):
        train(model, optimizer, seed=1000 * NETWORK + epoch)  # an order of its own for each network and epoch
        print(f"network {NETWORK}, epoch {epoch}: accuracy {test(model):.3f}", flush=True)
        if epoch + 1 < EPOCHS:
            grafting.step()
torch.save(model.state_dict(), f"own_loop_run/final{NETWORK}.t7")
