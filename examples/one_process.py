"""Three networks that train in turn in one process, and graft without files: `graft_ring` blends all at once.

python examples/one_process.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from filter_grafting import graft_ring

NETWORKS, EPOCHS = 3, 4


def images(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noisy images (count, 1, 8, 8) of four patterns, and which pattern each is (count,)."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return patterns[labels] + 2 * torch.randn(count, 1, 8, 8, generator=generator), labels


def build(network: int) -> nn.Module:
    torch.manual_seed(network)  # each network starts from weights of its own
    first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
    second = [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


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


models = [build(network) for network in range(1, NETWORKS + 1)]
optimizers = [torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in models]
for epoch in range(EPOCHS):
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    print(f"epoch {epoch}: accuracies {', '.join(f'{test(model):.3f}' for model in models)}")
    if epoch + 1 < EPOCHS:
        found = graft_ring(models)
        print("  network 1 keeps", {name: layer.coefficient for name, layer in found[0].items()})
