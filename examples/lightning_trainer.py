"""Two networks, each a process with a Lightning Trainer, which graft after every epoch.

    python examples/lightning_trainer.py 1 & python examples/lightning_trainer.py 2

Killed and started again, a network goes on from the Trainer's last checkpoint.
"""

import sys

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from task import build, images
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from filter_grafting import FileRing
from filter_grafting.callbacks.lightning import GraftingCallback

NETWORK, DIRECTORY = int(sys.argv[1]), "lightning_run"


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = build(NETWORK)  # which also sets the seed of its order

    def training_step(self, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor]) -> None:
        correct = (self.model(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("accuracy", correct)
        print(f"network {NETWORK}, epoch {self.current_epoch}: accuracy {correct:.3f}", flush=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


train = DataLoader(TensorDataset(*images(512, seed=1)), batch_size=32, shuffle=True)
test = DataLoader(TensorDataset(*images(512, seed=2)), batch_size=512)
with FileRing(DIRECTORY, NETWORK, 2, settings={"lr": 0.05}, resume=True) as ring:
    saving = ModelCheckpoint(f"{DIRECTORY}/trainer{NETWORK}", save_last=True)
    callbacks: list[Callback] = [GraftingCallback(ring), saving]
    trainer = Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_progress_bar=False, callbacks=callbacks)
    trainer.fit(Network(), train, test, ckpt_path="last")
