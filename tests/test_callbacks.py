"""Grafting inside the trainers of Lightning and transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trainers
from processes import environment
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from filter_grafting import GraftingError, MismatchError, graft, plain_state

ROOT = Path(__file__).resolve().parent.parent
EPOCHS, STEPS = 4, 3  # of each epoch


def build() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))


class Events:
    """An exchange whose neighbour never changes; what happens around it is listed as well."""

    def __init__(self):
        self.happened, self.model = [], build()

    def swap(self, state, round):
        self.happened.append(("graft", round))
        return {key: self.model.state_dict()[key.removeprefix("model.")] + 1 for key in state}

    def rounds(self):
        return [round for what, round in self.happened if what == "graft"]


def data():
    return TensorDataset(torch.randn(STEPS * 2, 1, 4, 4), torch.randint(2, (STEPS * 2,)))


# Lightning


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def lightning(request):
    return pytest.importorskip(request.param, reason=f"{request.param} is not installed")


def fit(lightning, events, epochs=EPOCHS, **options):
    """Trains by Lightning, and tells when it tests and saves; returns the callback."""
    from filter_grafting.callbacks.lightning import GraftingCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def validation_step(self, batch):
            if batch is not None and not self.trainer.sanity_checking:
                events.happened.append(("test", self.current_epoch))

        def on_save_checkpoint(self, checkpoint):
            events.happened.append(("save", self.current_epoch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = GraftingCallback(events, **options)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback, lightning.callbacks.ModelCheckpoint()],
    )
    trainer.fit(Module(), DataLoader(data(), 2), DataLoader(data(), STEPS * 2))
    return callback


def test_lightning_tests_and_saves_a_network_before_it_grafts(lightning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = Events()
    callback = fit(lightning, events)
    expected = [(what, epoch) for epoch in range(EPOCHS) for what in ("test", "save", "graft")]
    assert events.happened == expected[:-1]  # nothing is grafted after the last epoch
    assert list(callback.layers) == ["model.0"] and callback.state_dict() == {"begun": EPOCHS - 1}


def test_lightning_grafts_every_so_many_epochs_with_the_options_of_grafting(lightning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = Events()
    options = {"a": 0.0, "layers": nn.Linear, "exclude": ("*.1.*",), "warmup": 2}
    callback = fit(lightning, events, 7, every_n_epochs=2, **options)
    assert events.rounds() == [3, 5]
    assert {name: layer.coefficient for name, layer in callback.layers.items()} == {"model.3": 0.5}


def test_lightning_hears_what_cannot_be_grafted_before_it_trains(lightning, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    events = Events()
    with pytest.raises(ValueError, match="every: got 0"):
        fit(lightning, events, every_n_epochs=0)
    with pytest.raises(MismatchError, match="has no layer that layers= selects"):
        fit(lightning, events, layers=nn.LSTM)
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


def train(transformers, events, folder, epochs=EPOCHS, arguments=(), dataset=None, **options):
    from filter_grafting.callbacks.transformers import GraftingCallback

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            events.happened.append(("test", state.global_step // STEPS - 1))

        def on_save(self, args, state, control, **kwargs):
            events.happened.append(("save", state.global_step // STEPS - 1))

    images = [{"x": x, "labels": label} for x, label in data()]
    callback = GraftingCallback(events, **options)
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    arguments = {"num_train_epochs": epochs, "per_device_train_batch_size": 2, **quiet, **dict(arguments)}
    settings = transformers.TrainingArguments(str(folder), **arguments)
    trainer = transformers.Trainer(
        Network(), settings, train_dataset=dataset or images, eval_dataset=images, callbacks=[callback, Watch()]
    )
    trainer.train()
    return callback


def test_transformers_tests_and_saves_a_network_before_it_grafts(transformers, tmp_path):
    events = Events()
    callback = train(transformers, events, tmp_path, arguments={"eval_strategy": "epoch", "save_strategy": "epoch"})
    expected = [(what, epoch) for epoch in range(EPOCHS) for what in ("test", "save", "graft")]
    assert events.happened == expected[:-1]
    assert list(callback.layers) == ["model.0"]


@pytest.mark.parametrize(
    ("options", "rounds"),
    [
        ({"every_n_epochs": 2}, [1]),
        ({"every_n_steps": 4}, [3, 7]),  # of 12: after the last step, too, nothing is grafted
        ({"every_n_steps": 5, "warmup": 6, "layers": nn.Linear, "exclude": ("*.1.*",)}, [9]),
        ({"warmup": 2}, [2]),
    ],
)
def test_transformers_grafts_every_so_many_epochs_or_steps(transformers, tmp_path, options, rounds):
    events = Events()
    train(transformers, events, tmp_path, arguments={"save_strategy": "no"}, **options)
    assert events.rounds() == rounds


def test_steps_are_those_of_the_optimizer(transformers, tmp_path):
    events, arguments = Events(), {"save_strategy": "no", "gradient_accumulation_steps": 2}
    train(transformers, events, tmp_path, arguments=arguments, every_n_steps=3)  # two steps an epoch
    assert events.rounds() == [2, 5]


def test_data_without_a_length_have_steps_but_no_epochs(transformers, tmp_path):
    events, arguments = Events(), {"save_strategy": "no", "max_steps": 5}
    train(transformers, events, tmp_path, arguments=arguments, dataset=Endless(), every_n_steps=2)
    assert events.rounds() == [1, 3]
    with pytest.raises(ValueError, match="every_n_epochs: the data have no length"):
        train(transformers, events, tmp_path, arguments=arguments, dataset=Endless())


def test_transformers_hears_what_cannot_be_grafted_before_it_trains(transformers, tmp_path):
    events = Events()
    with pytest.raises(ValueError, match="every_n_epochs and every_n_steps: got both"):
        train(transformers, events, tmp_path, every_n_epochs=1, every_n_steps=1)
    with pytest.raises(ValueError, match="every: got 0"):
        train(transformers, events, tmp_path, every_n_steps=0)
    with pytest.raises(MismatchError, match="has no layer that layers= selects"):
        train(transformers, events, tmp_path, layers=nn.LSTM)
    assert events.happened == []


# Both


def test_a_graft_in_a_trainer_is_that_of_graft():
    from filter_grafting.callbacks import TrainerGrafting

    events, model, other = Events(), build(), build()
    grafting = TrainerGrafting(events, 1, {"c": 5})
    grafting.start(model, 1)
    expected = graft(other, events.swap(plain_state(other), 0), c=5)
    assert grafting.step(1) == expected
    assert all(torch.equal(entry, other.state_dict()[key]) for key, entry in model.state_dict().items())
    with pytest.raises(GraftingError, match="spreads one network over 2 processes; start each network as one process"):
        grafting.start(model, 2)


@pytest.mark.parametrize("missing", ["lightning", "transformers"])
def test_a_package_that_is_missing_is_named(missing):
    code = f"""
import sys
sys.modules |= dict.fromkeys(["lightning", "lightning.pytorch", "pytorch_lightning", "transformers"])
import filter_grafting.callbacks
try:
    import filter_grafting.callbacks.{missing}
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"needs {missing}" in result.stdout.lower() and f"pip install {missing}" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("package", trainers.CASES)
def test_networks_that_are_killed_and_resumed_come_to_the_same_weights(package, half, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    cases = list(trainers.CASES[package])[half::2]
    command = [sys.executable, "-W", "ignore", trainers.__file__, package, tmp_path, *cases]
    result = subprocess.run(command, env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
