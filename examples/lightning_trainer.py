"""Two networks, each a process with a Lightning Trainer, which graft after every epoch.

    python examples/lightning_trainer.py 1 & python examples/lightning_trainer.py 2

Killed and started again, a network goes on from the Trainer's last checkpoint.
"""

import sys

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from filter_grafting import FileRing
from filter_grafting.callbacks.lightning import GraftingCallback

NETWORK, DIRECTORY = int(sys.argv[1]), "lightning_run"


def images(count: int, seed: int) -> TensorDataset:
    """Noisy images (1, 8, 8) of four patterns, and which pattern each is."""
    patterns = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return TensorDataset(patterns[labels] + 2 * torch.randn(count, 1, 8, 8, generator=generator), labels)


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()]
        second = [nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
        self.model = nn.Sequential(*first, *second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        correct = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", correct)
        print(f"network {NETWORK}, epoch {self.current_epoch}: accuracy {correct:.3f}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


torch.manual_seed(NETWORK)  # each network starts from weights, and has an order, of its own
train, test = DataLoader(images(512, 1), batch_size=32, shuffle=True), DataLoader(images(512, 2), batch_size=512)
with FileRing(DIRECTORY, NETWORK, 2, settings={"lr": 0.05}, resume=True) as ring:
    saving = ModelCheckpoint(f"{DIRECTORY}/trainer{NETWORK}", save_last=True)
    callbacks: list[Callback] = [GraftingCallback(ring), saving]
    trainer = Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, callbacks=callbacks)
    trainer.fit(Network(), train, test, ckpt_path="last")
