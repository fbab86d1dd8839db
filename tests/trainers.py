"""python trainers.py {lightning,transformers} DIRECTORY: kills networks inside a trainer, and resumes them.

The trainer's package is imported once; each network is a process that is forked from this one, and kills itself with
SIGKILL where a case says so. It ends with status 0 if all come to the weights of the same run without a kill.
"""

import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from filter_grafting import FileRing

EPOCHS, STEPS = 6, 4  # of each epoch


class Case(NamedTuple):
    """How the trainer grafts and saves, and after which step each network is killed (0: never)."""

    kills: tuple[int, int]
    graft: Mapping[str, int] = MappingProxyType({})
    save: Mapping[str, Any] = MappingProxyType({})
    validate: bool = True
    keep: float = 0


LIGHTNING = {
    "after an epoch": Case((12, 0), validate=False),  # the checkpoint is there, the graft is not
    "within an epoch": Case((11, 0), save={"every_n_train_steps": 2}),
    "both, from other epochs": Case((7, 8)),
    "every two epochs": Case((14, 10), graft={"every_n_epochs": 2}),
    "saved rarely": Case((23, 0), save={"every_n_epochs": 3}, keep=5),
    "saved rarely, both": Case((23, 22), save={"every_n_epochs": 3}),
}
TRANSFORMERS = {
    "after an epoch": Case((12, 0), save={"save_strategy": "epoch"}),
    "within an epoch": Case((11, 0), save={"save_steps": 2}),
    "both, from other epochs": Case((7, 8), save={"save_strategy": "epoch"}),
    "every three steps": Case((11, 0), graft={"every_n_steps": 3}, save={"save_steps": 3}),
    "steps, saved rarely": Case((19, 0), graft={"every_n_steps": 2}, save={"save_steps": 6}, keep=5),
}
CASES = {"lightning": LIGHTNING, "transformers": TRANSFORMERS}


class Network(nn.Module):
    """Returns what the Trainer of transformers wants."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def data(network: int) -> TensorDataset:
    torch.manual_seed(network)
    return TensorDataset(torch.randn(STEPS * 8, 1, 4, 4), torch.randint(2, (STEPS * 8,)))


class Resumable(DataLoader):
    """Batches that go on within an epoch: of others, Lightning begins anew."""

    first = done = 0

    def __iter__(self):
        first, self.first = self.first, 0
        for self.done, batch in enumerate(super().__iter__(), 1):
            if self.done > first:
                yield batch

    def state_dict(self):
        return {"done": self.done}

    def load_state_dict(self, state):
        self.first = state["done"] % STEPS


def kill_after(step: int, done: int) -> None:
    if 0 < step == done:
        os.kill(os.getpid(), signal.SIGKILL)


def lightning(directory: Path, network: int, ring: FileRing, case: Case, kill: int) -> nn.Module:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from filter_grafting.callbacks.lightning import GraftingCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = Network()

        def training_step(self, batch):
            return self.network(*batch)["loss"]

        def validation_step(self, batch):
            self.log("loss", self.network(*batch)["loss"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)

    class Kill(Callback):
        def on_train_batch_end(self, trainer, *arguments):
            if trainer.global_step % STEPS:
                kill_after(kill, trainer.global_step)

        def on_train_epoch_start(self, trainer, module):  # all of the epoch's end, its checkpoint too, is over
            kill_after(kill, trainer.global_step)

    module = Module()
    saving = ModelCheckpoint(directory / f"trainer{network}", save_last=True, **case.save)
    callbacks = [Kill(), GraftingCallback(ring, **case.graft), saving]
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    batches = Resumable(data(network), batch_size=8)
    trainer = Trainer(accelerator="cpu", max_epochs=EPOCHS, callbacks=callbacks, **quiet)
    trainer.fit(module, batches, batches if case.validate else None, ckpt_path="last")
    return module


def transformers(directory: Path, network: int, ring: FileRing, case: Case, kill: int) -> nn.Module:
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from filter_grafting.callbacks.transformers import GraftingCallback

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            kill_after(kill, state.global_step)

        def on_epoch_begin(self, *arguments, **kwargs):
            self.on_step_begin(*arguments)

    model, output = Network(), directory / f"trainer{network}"
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = TrainingArguments(
        output, num_train_epochs=EPOCHS, per_device_train_batch_size=8, learning_rate=0.05, **case.save, **quiet
    )
    images = [{"x": x, "labels": label} for x, label in data(network)]
    callbacks = [Kill(), GraftingCallback(ring, **case.graft)]
    trainer = Trainer(model, arguments, train_dataset=images, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output) if output.is_dir() else None)
    return model


def start(train, directory: Path, network: int, case: Case, kill: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        torch.manual_seed(network)
        with FileRing(directory, network, 2, resume=True, keep=case.keep, timeout=120) as ring:
            model = train(directory, network, ring, case, kill)
        torch.save(model.state_dict(), directory / f"final{network}")
        status = 0
    except BaseException:
        traceback.print_exc()
    os._exit(status)


def run(train, directory: Path, case: Case, kills: tuple[int, int]) -> list[dict[str, torch.Tensor]]:
    """Trains both networks; one that is killed is started again, where both are, when both are dead."""
    directory.mkdir(parents=True)
    living = {start(train, directory, network, case, kills[network - 1]): network for network in (1, 2)}
    dead, doomed, deadline = [], {network for network in (1, 2) if kills[network - 1]}, time.monotonic() + 240
    try:
        while living:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                assert time.monotonic() < deadline, "a network hangs"
                time.sleep(0.05)
                continue
            network, status = living.pop(pid), os.waitstatus_to_exitcode(status)
            assert status == (-signal.SIGKILL if network in doomed else 0), (directory.name, network, status)
            if network in doomed:
                doomed.remove(network)
                dead.append(network)
            if dead and not doomed:
                living |= {start(train, directory, network, case, 0): network for network in dead}
                dead = []
    finally:
        for pid in living:
            os.kill(pid, signal.SIGKILL)
    return [torch.load(directory / f"final{network}", weights_only=True) for network in (1, 2)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    package, directory = sys.argv[1], Path(sys.argv[2])
    train = {"lightning": lightning, "transformers": transformers}[package]
    importlib.import_module({"lightning": "lightning.pytorch", "transformers": "transformers.trainer"}[package])
    for name, case in CASES[package].items():
        expected = run(train, directory / name / "undisturbed", case, (0, 0))
        found = run(train, directory / name / "killed", case, case.kills)
        for network, one, other in zip((1, 2), found, expected, strict=True):
            for key in other:
                assert torch.equal(one[key], other[key]), (name, network, key)
        print(name, flush=True)
