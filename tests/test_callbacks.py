"""Grafting inside the trainers of Lightning and transformers."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trainers
from processes import environment
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from filter_grafting import GraftingError, MismatchError, graft

ROOT = Path(__file__).resolve().parent.parent
STEPS = 3  # of each epoch


def build(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


class Events:
    """An exchange whose neighbour never changes; what happens around it is listed as well."""

    def __init__(self):
        self.happened, self.neighbour = [], build(2).state_dict()

    def swap(self, state, round):
        self.happened.append(("graft", round))
        return {key: self.neighbour[key.removeprefix("model.")] for key in state}

    def rounds(self):
        return [round for what, round in self.happened if what == "graft"]


def assert_grafted(model: nn.Module, events: Events, **options) -> None:
    """Of a model that was trained at a rate of 0."""
    expected = build()
    for _ in events.rounds():
        graft(expected, events.neighbour, **options)
    assert all(map(torch.equal, model.parameters(), expected.parameters()))


def data():
    return TensorDataset(torch.randn(STEPS * 2, 1, 4, 4), torch.randint(2, (STEPS * 2,)))


# Lightning


def lightning(package, events, folder, epochs, **options):
    """Trains by Lightning, and tells when it tests and saves; returns the callback and the model."""
    from filter_grafting.callbacks.lightning import GraftingCallback

    class Module(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch):
            if not self.trainer.sanity_checking:
                events.happened.append(("test", self.current_epoch))

        def on_save_checkpoint(self, checkpoint):
            events.happened.append(("save", self.current_epoch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.0)

    callback, module = GraftingCallback(events, **options), Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [callback, package.callbacks.ModelCheckpoint(folder)]
    trainer = package.Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(data(), 2), DataLoader(data(), STEPS * 2))
    return callback, module.model


def test_lightning_tests_and_saves_a_network_before_it_grafts_at_the_chosen_epochs(tmp_path):
    package, events = pytest.importorskip("lightning.pytorch", reason="lightning is not installed"), Events()
    options = {"c": 5, "layers": nn.Linear}
    callback, model = lightning(package, events, tmp_path, 8, every_n_epochs=2, warmup=2, **options)
    # After the last epoch nothing is grafted.
    expected = [(what, epoch) for epoch in range(8) for what in ("test", "save", "graft")]
    assert events.happened == [(what, epoch) for what, epoch in expected if what != "graft" or epoch in (3, 5)]
    assert list(callback.layers) == ["model.3"]
    assert_grafted(model, events, **options)


def test_lightning_under_its_other_name(tmp_path):
    package, events = pytest.importorskip("pytorch_lightning", reason="it is not installed"), Events()
    lightning(package, events, tmp_path, 2)
    assert events.rounds() == [0]


def test_lightning_hears_what_cannot_be_grafted_before_it_trains(tmp_path):
    package, events = pytest.importorskip("lightning.pytorch", reason="lightning is not installed"), Events()
    with pytest.raises(ValueError, match="every: got 0"):
        lightning(package, events, tmp_path, 2, every_n_epochs=0)
    with pytest.raises(MismatchError, match="has no layer that layers= selects"):
        lightning(package, events, tmp_path, 2, layers=nn.LSTM)
    from filter_grafting.callbacks.lightning import GraftingCallback

    with pytest.raises(GraftingError, match="spreads one network over 2 processes; start each network as one process"):
        GraftingCallback(events).on_train_start(SimpleNamespace(world_size=2), build())
    assert events.happened == []


# transformers


@pytest.fixture
def transformers():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = build()

    def forward(self, x, labels=None):
        logits = self.model(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield {"x": torch.randn(1, 4, 4), "labels": 0}


def train(transformers, events, folder, arguments=(), dataset=None, **options):
    """Trains by the Trainer, and tells when it tests and saves; returns the callback and the model."""
    from filter_grafting.callbacks.transformers import GraftingCallback

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            events.happened.append(("test", state.global_step // STEPS - 1))

        def on_save(self, args, state, control, **kwargs):
            events.happened.append(("save", state.global_step // STEPS - 1))

    images = [{"x": x, "labels": label} for x, label in data()]
    callback, network = GraftingCallback(events, **options), Network()
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    training = {"num_train_epochs": 4, "per_device_train_batch_size": 2, "learning_rate": 0.0, "save_strategy": "no"}
    settings = transformers.TrainingArguments(str(folder), **{**quiet, **training, **dict(arguments)})
    trainer = transformers.Trainer(
        network, settings, train_dataset=dataset or images, eval_dataset=images, callbacks=[callback, Watch()]
    )
    trainer.train()
    return callback, network.model


def test_transformers_tests_and_saves_a_network_before_it_grafts(transformers, tmp_path):
    events = Events()
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    callback, model = train(transformers, events, tmp_path, arguments, c=5)
    expected = [(what, epoch) for epoch in range(4) for what in ("test", "save", "graft")]
    assert events.happened == expected[:-1]  # nothing is grafted after the last epoch
    assert list(callback.layers) == ["model.0"]
    assert_grafted(model, events, c=5)


@pytest.mark.parametrize(
    ("arguments", "options", "rounds"),
    [
        ({}, {"every_n_epochs": 2}, [1]),
        ({}, {"every_n_steps": 4}, [3, 7]),  # of 12: after the last step, too, nothing is grafted
        # Steps are those of the optimizer: two an epoch.
        ({"gradient_accumulation_steps": 2}, {"every_n_steps": 2, "warmup": 3, "layers": nn.Linear}, [3, 5]),
    ],
)
def test_transformers_grafts_every_so_many_epochs_or_steps(transformers, tmp_path, arguments, options, rounds):
    events = Events()
    train(transformers, events, tmp_path, arguments, **options)
    assert events.rounds() == rounds


def test_data_without_a_length_have_steps_but_no_epochs(transformers, tmp_path):
    events, arguments = Events(), {"max_steps": 5}
    train(transformers, events, tmp_path, arguments, Endless(), every_n_steps=2)
    assert events.rounds() == [1, 3]
    with pytest.raises(ValueError, match="every_n_epochs: the data have no length"):
        train(transformers, events, tmp_path, arguments, Endless())


def test_transformers_hears_what_cannot_be_grafted_before_it_trains(transformers, tmp_path):
    events = Events()
    with pytest.raises(ValueError, match="every_n_epochs and every_n_steps: got both"):
        train(transformers, events, tmp_path, every_n_epochs=1, every_n_steps=1)
    with pytest.raises(MismatchError, match="has no layer that layers= selects"):
        train(transformers, events, tmp_path, layers=nn.LSTM)
    assert events.happened == []


# Both


@pytest.mark.parametrize("package", ["lightning", "transformers"])
def test_a_package_that_is_missing_is_named(package, monkeypatch):
    for name in "lightning", "lightning.pytorch", "pytorch_lightning", "transformers":
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"filter_grafting.callbacks.{package}", raising=False)
    with pytest.raises(ImportError, match=f"(?i)needs {package}.*pip install {package}"):
        importlib.import_module(f"filter_grafting.callbacks.{package}")


@pytest.mark.slow
@pytest.mark.parametrize("package", trainers.CASES)
def test_networks_that_are_killed_and_resumed_come_to_the_same_weights(package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    command = [sys.executable, "-W", "ignore", trainers.__file__, package, tmp_path]
    result = subprocess.run(command, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
