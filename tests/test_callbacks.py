"""Grafting inside the trainers of Lightning and transformers."""

import importlib
import itertools
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from filter_grafting import FileRing, GraftingError, MismatchError, graft
from filter_grafting.membership import observe

STEPS = 4  # of each epoch


def build(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def state_of(network):
    return {f"network.{key}": entry for key, entry in network.state_dict().items()}


def data():
    torch.manual_seed(0)
    return TensorDataset(torch.randn(STEPS * 8, 1, 4, 4), torch.randint(2, (STEPS * 8,)))


class Neighbour:
    """An exchange whose neighbour never changes; it lists what happens, each with its epoch."""

    def __init__(self):
        self.happened, self.network = [], build(2)

    def swap(self, state, round):
        self.happened.append(("graft", round))
        return state_of(self.network)

    def watch(self, what, steps):
        if what != "begin":
            self.happened.append((what, steps // STEPS - 1))


class Killed(Exception):
    pass


def by_lightning(folder, exchange, options, save=(), epochs=6, rate=0.05, watch=lambda what, steps: None):
    """Trains a network in a Lightning Trainer; returns the callback and the network.

    `watch` is told what happens after so many steps: "test", "save", or "begin" of an epoch, or of a step.
    """
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from filter_grafting.callbacks.lightning import GraftingCallback

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.network = build()

        def training_step(self, batch):
            return nn.functional.cross_entropy(self.network(batch[0]), batch[1])

        def validation_step(self, batch):
            self.log("loss", self.training_step(batch))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), rate, momentum=0.9)

    watching = Callback()
    watching.on_validation_end = lambda trainer, _: trainer.sanity_checking or watch("test", trainer.global_step)
    watching.on_save_checkpoint = lambda trainer, *_: watch("save", trainer.global_step)
    watching.on_train_epoch_start = lambda trainer, _: watch("begin", trainer.global_step)  # its end is over
    module, callback = Module(), GraftingCallback(exchange, **options)
    saving = ModelCheckpoint(folder / "trainer", save_last=True, **dict(save))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [watching, callback, saving]
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, callbacks=callbacks, **quiet)
    batches = DataLoader(data(), batch_size=8)
    trainer.fit(module, batches, batches, ckpt_path="last")
    return callback, module.network


class Network(nn.Module):
    """Returns what the Trainer of transformers wants."""

    def __init__(self):
        super().__init__()
        self.network = build()

    def forward(self, x, labels=None):
        logits = self.network(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def by_transformers(
    folder, exchange, options, save=(), epochs=6, rate=0.05, watch=lambda what, steps: None, images=None
):
    """The same in the Trainer of transformers; `save` may have any of its arguments."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_utils import get_last_checkpoint

    from filter_grafting.callbacks.transformers import GraftingCallback

    watching = TrainerCallback()
    watching.on_evaluate = lambda args, state, control, **_: watch("test", state.global_step)
    watching.on_save = lambda args, state, control, **_: watch("save", state.global_step)
    watching.on_epoch_begin = lambda args, state, control, **_: watch("begin", state.global_step)
    watching.on_step_begin = watching.on_epoch_begin
    model, output, callback = Network(), folder / "trainer", GraftingCallback(exchange, **options)
    settings = {"num_train_epochs": epochs, "per_device_train_batch_size": 8, "learning_rate": rate}
    quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    images = images or [{"x": x, "labels": label} for x, label in data()]
    trainer = Trainer(
        model,
        TrainingArguments(output, **settings, **quiet, **dict(save)),
        train_dataset=images,
        eval_dataset=images,
        callbacks=[watching, callback],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))
    return callback, model.network


@pytest.fixture(params=["lightning", "transformers"])
def package(request):
    return request.param


@pytest.fixture
def train(package):
    for name in ["lightning"] if package == "lightning" else ["transformers", "accelerate"]:
        pytest.importorskip(name, reason=f"{name} is not installed")
    return by_lightning if package == "lightning" else by_transformers


def test_a_network_is_tested_and_saved_before_it_grafts_and_its_last_epoch_is_followed_by_no_graft(
    train, package, tmp_path
):
    neighbour, options = Neighbour(), {"c": 5, "layers": nn.Linear}
    save = {"eval_strategy": "epoch", "save_strategy": "epoch"} if package == "transformers" else {}
    chosen = {"every_n_epochs": 2, "warmup": 2, **options}
    callback, network = train(tmp_path, neighbour, chosen, save, epochs=8, rate=0.0, watch=neighbour.watch)
    events = [(what, epoch) for epoch in range(8) for what in ("test", "save", "graft")]
    events = [(what, epoch) for what, epoch in events if what != "graft" or epoch in (3, 5)]
    assert list(dict.fromkeys(neighbour.happened)) == events  # Lightning saves its last checkpoint twice
    assert list(callback.layers) == ["network.4"]
    expected = build()
    for _ in range(2):
        graft(expected, neighbour.network.state_dict(), **options)
    assert all(map(torch.equal, network.parameters(), expected.parameters()))
    with pytest.raises(MismatchError, match="has no layer that layers= selects"):  # before it trains
        train(tmp_path / "refused", Neighbour(), {"layers": nn.LSTM})


def test_a_trainer_tells_the_ring_its_batches_and_does_not_start_anew_where_it_has_grafted(
    train, package, tmp_path, make_ring
):
    ring = make_ring(1, 2)
    torch.save({"net": state_of(build(2))}, ring.path(0, 2))
    save = {"eval_strategy": "epoch", "save_strategy": "no"} if package == "transformers" else {}
    train(tmp_path / "first", ring, {}, save, epochs=2)
    ring.update("training")
    tried = 2 if package == "lightning" else 0  # before it trains
    assert observe(tmp_path, [1])[0].step == 2 * (STEPS + STEPS) + tried  # to train on, and to test on
    with pytest.raises(GraftingError, match=r"the trainer starts anew, but network 1 has published in .*resume the tr"):
        train(tmp_path / "second", ring, {})


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield {"x": torch.randn(1, 4, 4), "labels": 0}


@pytest.mark.parametrize("package", ["transformers"], indirect=True)
@pytest.mark.parametrize(
    ("images", "accumulated", "options", "rounds"),
    [
        (None, 2, {"every_n_steps": 2, "warmup": 3}, [3, 5]),  # steps of the optimizer; after the last of 8, none
        (Endless(), 1, {"every_n_steps": 3}, [2, 5]),
    ],
)
def test_transformers_grafts_every_so_many_steps_but_knows_no_epochs_of_data_without_a_length(
    train, tmp_path, images, accumulated, options, rounds
):
    neighbour = Neighbour()
    arguments = {"save_strategy": "no", "max_steps": 8, "gradient_accumulation_steps": accumulated}
    train(tmp_path, neighbour, options, arguments, images=images)
    assert neighbour.happened == [("graft", round) for round in rounds]
    with pytest.raises(ValueError, match="every_n_epochs: the data have no length"):
        train(tmp_path, neighbour, {}, arguments, images=Endless())
    with pytest.raises(ValueError, match="every_n_epochs and every_n_steps: got both"):
        train(tmp_path, neighbour, {"every_n_epochs": 1, "every_n_steps": 1})


class Short(Endless):
    """Data that have fewer batches than they say: 3 of 4."""

    def __len__(self):
        return STEPS * 8

    def __iter__(self):
        return itertools.islice(super().__iter__(), 3 * 8)


@pytest.mark.parametrize("package", ["transformers"], indirect=True)
def test_where_epochs_end_early_steps_are_grafted_once_and_epochs_never(train, tmp_path):
    neighbour, never = Neighbour(), {"save_strategy": "no"}
    # Of two batches a step, the third is left over: at the next epoch's head no step is done since.
    train(tmp_path, neighbour, {"every_n_steps": 1}, {**never, "gradient_accumulation_steps": 2}, 2, images=Short())
    assert neighbour.happened == [("graft", 0), ("graft", 1)]
    with pytest.raises(
        GraftingError, match=r"the epoch ended at 0\.75, before the end of its data: give every_n_steps"
    ):
        train(tmp_path, Neighbour(), {}, never, images=Short())


# Steps after which it is killed, and resumed from the trainer's checkpoint.
KILLS = [
    ("lightning", {}, {}, 12),  # after an epoch: the checkpoint is there, the graft is not
    ("lightning", {"every_n_epochs": 2}, {"every_n_epochs": 3}, 20),  # saved rarely: grafts are repeated
    ("transformers", {}, {"save_strategy": "epoch"}, 12),
    ("transformers", {"every_n_steps": 2}, {"save_steps": 6}, 19),
]


@pytest.mark.slow
@pytest.mark.parametrize(("package", "options", "save", "kill"), KILLS, indirect=["package"])
def test_a_network_that_is_killed_and_resumed_comes_to_the_same_weights(train, tmp_path, options, save, kill):
    def killing(what, steps):
        if (what, steps) == ("begin", kill):
            raise Killed

    def run(folder, **watch):
        with FileRing(folder, 1, 2, resume=True) as ring:
            for round in range(6 * STEPS):  # its neighbour is far ahead
                torch.save({"net": state_of(build(100 + round))}, ring.path(round, 2))
            return train(folder, ring, options, save, **watch)[1].state_dict()

    expected = run(tmp_path / "undisturbed")
    with pytest.raises(Killed):
        run(tmp_path / "killed", watch=killing)
    found = run(tmp_path / "killed")
    assert all(torch.equal(found[key], entry) for key, entry in expected.items())


# What is installed


def without(monkeypatch, package, *names):
    """The callback, imported as if some packages were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"filter_grafting.callbacks.{package}", raising=False)
    return importlib.import_module(f"filter_grafting.callbacks.{package}").GraftingCallback


def test_lightning_may_be_installed_under_its_other_name(monkeypatch):
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")
    callback = without(monkeypatch, "lightning", "lightning.pytorch")
    assert issubclass(callback, other.Callback)
    with pytest.raises(GraftingError, match="spreads one network over 2 processes; start each network as one process"):
        callback(Neighbour()).on_train_start(
            SimpleNamespace(world_size=2, global_step=0, current_epoch=0, strategy=None), build()
        )


@pytest.mark.usefixtures("train")  # which skips where the package is not installed
def test_deepspeed_is_refused_on_one_gpu_too(package):
    module = importlib.import_module(f"filter_grafting.callbacks.{package}")
    callback, begun = module.GraftingCallback(Neighbour()), {"world_size": 1, "global_step": 0, "current_epoch": 0}
    with pytest.raises(GraftingError, match="DeepSpeed writes its own copies of the weights over each graft"):
        if package == "lightning":
            strategy = Mock(spec=module.DeepSpeedStrategy)
            callback.on_train_start(SimpleNamespace(**begun, strategy=strategy), build())
        else:
            arguments = SimpleNamespace(**begun, deepspeed_plugin="its settings")
            callback.on_train_begin(arguments, arguments, None, model=build(), train_dataloader=data())


def test_a_package_that_is_missing_is_named(monkeypatch, package):
    with pytest.raises(ImportError, match=f"(?i)needs {package}.*pip install {package}"):
        without(monkeypatch, package, "lightning", "lightning.pytorch", "pytorch_lightning", "transformers")
