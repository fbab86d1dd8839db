"""What all examples train: a small network, which tells noisy images of four patterns apart."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def images(count: int, seed: int, noise: float = 2) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, 8, 8) of four patterns, and which pattern each is (count,)."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return patterns[labels] + noise * torch.randn(count, 1, 8, 8, generator=generator), labels


def build(network: int) -> nn.Module:
    torch.manual_seed(network)  # each network starts from weights of its own
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    """An epoch; the seed is of the order."""
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
