"""What a network tells of itself: its tables are whole and exact, its lines are the fixed ones."""

import csv
import os
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from filter_grafting.checkpoint import load
from filter_grafting.errors import GraftingError, WriteError
from filter_grafting.grafting import Layer
from training import records
from training.flags import command
from training.loop import Diverged, Result
from training.records import Progress, Records, Table, layer_rows, log_fields, say

COLUMNS = ("epoch", "layer", "coefficient")


def rows_of(path):
    with open(path) as file:
        return list(csv.reader(file))[1:]


# Tables


def test_rows_of_an_epoch_take_the_place_of_it_and_of_later_ones(tmp_path):
    path = tmp_path / "table.csv"
    table = Table(path, COLUMNS)
    table.write(0, [[0, "conv1", 0.5], [0, "a,b", 0.25]])
    table.write(1, [[1, "conv1", 0.5]])
    assert path.read_text() == 'epoch,layer,coefficient\n0,conv1,0.5\n0,"a,b",0.25\n1,conv1,0.5\n'
    again = Table(path, COLUMNS)
    again.write(1, [[1, "conv1", 0.7]])
    assert rows_of(path) == [["0", "conv1", "0.5"], ["0", "a,b", "0.25"], ["1", "conv1", "0.7"]]
    Table(path, COLUMNS).write(0, [])
    assert rows_of(path) == []


@pytest.mark.parametrize("rest", ["1,conv", '1,"conv1', "\0\0\0\0", "1,x,1,2\n", ",,\n", "\udcff"])
def test_what_is_half_written_or_damaged_is_dropped(tmp_path, rest):
    path = tmp_path / "table.csv"
    path.write_bytes(("epoch,layer,coefficient\n0,conv1,0.5\n" + rest).encode(errors="surrogateescape"))
    Table(path, COLUMNS).write(1, [[1, "conv1", 0.4]])
    assert rows_of(path) == [["0", "conv1", "0.5"], ["1", "conv1", "0.4"]]


def test_a_table_of_fewer_columns_is_continued_with_empty_ones(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("epoch,one\n0,5\n1,6\n2\n")
    Table(path, ["epoch", "one", "two"]).write(2, [[2, 7, 8]])
    assert rows_of(path) == [["0", "5", ""], ["1", "6", ""], ["2", "7", "8"]]


# Epochs


@pytest.fixture
def make_records(tmp_path):
    def make(val=False, tensorboard=False):
        ring = SimpleNamespace(
            directory=tmp_path, network=1, networks=2, key="net", file=lambda kind: tmp_path / f"{kind}1.t7"
        )
        ring.update = lambda state, **fields: setattr(ring, "status", fields)
        about = {"data": "0a", "model": "m", "classes": ["a", "b"], "mean": (0.5,), "std": (0.1,), "image_size": 32}
        return Records(ring, model(), {"lr": 0.1, "epochs": 4}, about, ["a note"], tensorboard), ring

    return make


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3))


def tell(told, epoch, accuracy, val=None, layers=(), loss=1.0):
    train, test = Result(2.0, 30.0, None, 1.0), Result(loss, accuracy, None, 0.5)
    val = None if val is None else Result(1.0, val, None, 0.25)
    row = told.row(epoch, 0.1, train, test, val, model())
    told.epoch(row, layers, {"0.weight": torch.full((1,), accuracy)})
    return row


def test_the_line_of_an_epoch(make_records, capsys):
    told, ring = make_records()
    with told.timing("wait"):
        pass
    tell(told, 0, 55.05)
    *head, line = capsys.readouterr().out.splitlines()
    assert line == (
        "Network:1    epoch:0    accuracy:55.050    best:55.050    loss:2.0000    lr:0.1    "
        "train:1.00s    test:0.50s    wait:0.00s    graft:0.00s"
    )
    assert head[-2:] == ["settings: lr=0.1 epochs=4", "a note"]
    assert ring.status == {"accuracy": 55.05, "best": 55.05}


def test_further_fields_of_a_line():
    row = {"test_accuracy": 50, "best": 50, "val_accuracy": 51, "test_top5": 90, "train_loss": 1, "lr": 0.1}
    row |= dict.fromkeys((f"{phase}_seconds" for phase in records.PHASES), 0)
    assert "best:50.000    val:51.000    accuracy@5:90.000    loss:1.0000" in log_fields(row)


def test_the_best_epoch_is_chosen_on_the_validation_images_if_there_are_any(make_records, tmp_path):
    told, _ = make_records()
    for epoch, (accuracy, val) in enumerate([(50, 40), (70, 30), (60, 45), (60, 45)]):
        tell(told, epoch, accuracy, val)
    assert [float(row[6]) for row in rows_of(tmp_path / "metrics1.csv")] == [50, 50, 60, 60]  # of equals, the first
    best = load(tmp_path / "best1.t7")
    assert (best["epoch"], best["accuracy"], best["net"]["0.weight"].item()) == (2, 60, 60)


def test_best_says_what_whoever_uses_it_needs_to_know(make_records, tmp_path):
    told, _ = make_records()
    tell(told, 0, 50)
    tell(told, 3, 40)
    expected = {
        "settings": {"lr": 0.1, "epochs": 4},
        "data": "0a",
        "model": "m",
        "classes": ["a", "b"],
        "mean": (0.5,),
        "std": (0.1,),
    }
    expected |= {"image_size": 32, "command": command(), "best": 50}
    for kind, epoch, accuracy in ("best", 0, 50), ("final", 3, 40):
        contents = load(tmp_path / f"{kind}1.t7")
        contents.pop("net")
        assert contents == expected | {"epoch": epoch, "accuracy": accuracy}


def test_a_resumed_network_tells_the_same_again_and_goes_on(make_records, tmp_path, capsys):
    told, _ = make_records()
    layers = layer_rows(0, {"conv": Layer(1.5, 1.25, 0.7)})
    tell(told, 0, 50)
    row = tell(told, 1, 60, layers=layers)
    tell(told, 2, 70, layers=layer_rows(1, {"conv": Layer(1.5, 1.25, 0.6)}))
    lines = capsys.readouterr().out.splitlines()
    (tmp_path / "best1.t7").unlink()
    again, _ = make_records()
    again.resume(row, layers, {"0.weight": torch.zeros(1)})
    assert (tmp_path / "best1.t7").exists()
    assert [row[0] for row in rows_of(tmp_path / "metrics1.csv")] == ["0", "1"]
    assert rows_of(tmp_path / "coefficients1.csv") == [["0", "conv", "1.500000", "1.250000", "0.7"]]
    tell(again, 2, 55)
    assert rows_of(tmp_path / "metrics1.csv")[2][6] == "60"
    said = capsys.readouterr().out.splitlines()
    assert "continuing after epoch 1" in said and lines[-2] in said


def test_a_test_loss_that_is_no_number_is_published_nowhere(make_records, tmp_path):
    told, _ = make_records()
    with pytest.raises(Diverged, match="the test loss became nan"):
        tell(told, 0, 50, loss=float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_rows_information_is_the_sum_of_its_layers_entropies(make_records, tmp_path):
    told, _ = make_records()
    tell(told, 0, 50)
    weight = model()[0].weight.detach().flatten().double()
    counts = torch.histc(weight, 10, weight.min(), weight.max())
    counts[-1] -= 1  # the maximum is in no bin
    shares = counts[counts > 0] / len(weight)
    information = float(rows_of(tmp_path / "metrics1.csv")[0][-1])
    assert information == pytest.approx(-(shares * shares.log()).sum().item(), rel=1e-5)


# TensorBoard


def test_curves_and_coefficients_for_tensorboard(make_records, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told, _ = make_records(tensorboard=True)
    layers = [layer_rows(epoch, {name: Layer(1, 1, 0.5) for name in "ab"}) for epoch in range(2)]
    tell(told, 0, 50)
    tell(told, 1, 60, layers=layers[0])
    tell(told, 2, 70, layers=layers[1])
    sizes = {"scalars": 0, "histograms": 0, "images": 0}
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard" / "network1"), sizes).Reload()
    assert [event.value for event in events.Scalars("test_accuracy")] == [50, 60, 70]
    assert [event.step for event in events.Histograms("coefficients")] == [0, 1]
    image = events.Images("coefficients of each layer by epoch")[-1]
    assert (image.width, image.height) == (2, 2)


def test_a_missing_tensorboard_is_a_sentence(make_records, monkeypatch):
    monkeypatch.setattr(records.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(GraftingError, match="the package tensorboard is missing: pip install tensorboard"):
        make_records(tensorboard=True)


# Lines and bars


def test_a_log_on_a_full_disk_is_a_sentence_once(monkeypatch):
    saved = os.dup(1)
    try:
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        with open(1, "w", closefd=False) as full:
            monkeypatch.setattr(sys, "stdout", full)
            with pytest.raises(WriteError, match=r"^cannot write the log to standard output: No space left on device$"):
                say("x")
            say("to nowhere, since it cannot be written")
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def ring_of(progress=lambda step: None):
    return SimpleNamespace(progress=progress, update=lambda state, **fields: None)


def follow(progress, batches=3):
    totals = torch.tensor([4.0, 4.0, 1.0], dtype=torch.float64)  # loss, images, correct
    for step, _ in enumerate(progress.follow([None] * batches), 1):
        progress.report(totals, step * totals)


def test_lines_of_progress_every_few_batches(capsys):
    steps, checks = [], []
    follow(Progress(ring_of(steps.append), lambda: checks.append(0), 4, [None] * 3, 0.1, every=2))
    lines = capsys.readouterr().out.splitlines()
    fields = r"    ".join(
        [r"Time +[\d.]+ \( *[\d.]+\)", r"Data +[\d.]+ \( *[\d.]+\)", r"Loss 1.0000e\+00 \(1.0000e\+00\)"]
    )
    for line, step in zip(lines, (0, 2), strict=True):
        assert re.fullmatch(rf"Epoch: \[4\]\[{step}/3\]    {fields}    Acc@1  25\.00 \( 25\.00\)", line)
    assert steps == [0, 1, 2] and len(checks) == 3


@pytest.mark.parametrize(("lr", "label"), [(0.1, "epoch 4:"), (None, "epoch 4 test:")])
def test_a_bar_on_a_terminal(capsys, monkeypatch, lr, label):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    follow(Progress(ring_of(), lambda: None, 4, [None] * 3, lr))
    out = capsys.readouterr().out
    assert label in out and "loss 1.0000, accuracy 25.00" in out and "Epoch:" not in out
    follow(Progress(None, lambda: None, 4, [None] * 3, lr))  # another process speaks for this network
    assert capsys.readouterr().out == ""
