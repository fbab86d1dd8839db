"""What a network tells of itself: its tables are whole and exact, its lines are the fixed ones."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from filter_grafting.checkpoint import load
from filter_grafting.grafting import Layer
from filter_grafting.rings import Checkpoint
from filter_grafting.states import State
from training import loop, records
from training.flags import command
from training.images import Images
from training.loop import Diverged, Result
from training.records import Records, follow, layer_rows, write_rows


def rows_of(path):
    with open(path) as file:
        return list(csv.reader(file))[1:]


def test_rows_of_an_epoch_take_the_place_of_it_and_of_later_ones(tmp_path):
    path, columns = tmp_path / "table.csv", ("epoch", "layer", "coefficient")
    write_rows(path, columns, -1, [])
    assert not path.exists()
    write_rows(path, columns, 0, [[0, "conv1", 0.5], [0, "a,b", 0.25]])
    write_rows(path, columns, 1, [[1, "conv1", 0.5]])
    assert path.read_text() == 'epoch,layer,coefficient\n0,conv1,0.5\n0,"a,b",0.25\n1,conv1,0.5\n'
    write_rows(path, columns, 1, [[1, "conv1", 0.7]])
    assert rows_of(path) == [["0", "conv1", "0.5"], ["0", "a,b", "0.25"], ["1", "conv1", "0.7"]]
    write_rows(path, columns, 0, [])
    assert rows_of(path) == []


# Epochs


SETTINGS = {"model": "m", "lr": 0.1, "epochs": 4, "data": "x"}


@pytest.fixture
def make_records(tmp_path):
    def make(tensorboard=False):
        ring = SimpleNamespace(
            directory=tmp_path, network=1, networks=2, key="net", file=lambda kind: tmp_path / f"{kind}1.t7"
        )
        ring.update = lambda state, **fields: setattr(ring, "status", fields)
        images = Images(None, None, None, ["a", "b"], ["a note"])
        return Records(ring, model(), SETTINGS, images, {"image_size": 32}, [], tensorboard)

    return make


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3))


def tell(told, epoch, accuracy, val=None, layers=(), loss=1.0):
    train, test = Result(2.0, 30.0, None, 1.0), Result(loss, accuracy, 90.0 if val else None, 0.5)
    val = None if val is None else Result(1.0, val, None, 0.25)
    row = told.row(epoch, 0.1, train, test, val, model())
    told.epoch(row, layers, {"0.weight": torch.full((1,), accuracy)})
    return row


def test_the_line_of_an_epoch(make_records, capsys):
    told = make_records()
    assert told.timed("wait", divmod, 7, 2) == (3, 1)
    tell(told, 0, 55.05)
    *head, line = capsys.readouterr().out.splitlines()
    assert line == (
        "Network:1    epoch:0    accuracy:55.050    best:55.050    loss:2.0000    lr:0.1    "
        "train:1.00s    test:0.50s    wait:0.00s    graft:0.00s"
    )
    assert head[-2:] == ["settings: model=m lr=0.1 epochs=4 data=x", "a note"]
    assert told.ring.status == {"accuracy": 55.05, "best": 55.05}
    tell(told, 1, 50, val=60)
    assert "best:50.000    val:60.000    accuracy@5:90.000    loss:2.0000" in capsys.readouterr().out


def test_the_best_epoch_is_chosen_on_the_validation_images_if_there_are_any(make_records, tmp_path):
    told = make_records()
    for epoch, (accuracy, val) in enumerate([(50, 40), (70, 30), (60, 45), (60, 45)]):
        tell(told, epoch, accuracy, val)
    assert [float(row[6]) for row in rows_of(tmp_path / "metrics1.csv")] == [50, 50, 60, 60]  # of equals, the first
    best = load(tmp_path / "best1.t7")
    assert (best["epoch"], best["accuracy"], best["net"]["0.weight"].item()) == (2, 60, 60)


def test_best_and_final_say_what_whoever_uses_them_needs_to_know(make_records, tmp_path):
    told = make_records()
    tell(told, 0, 50)
    tell(told, 3, 40)
    expected = {"settings": SETTINGS, "model": "m", "data": "x", "classes": ["a", "b"], "command": command()}
    expected["image_size"] = 32
    for kind, epoch, accuracy in ("best", 0, 50), ("final", 3, 40):
        contents = load(tmp_path / f"{kind}1.t7")
        contents.pop("net")
        assert contents == expected | {"epoch": epoch, "accuracy": accuracy, "best": 50}


def test_a_resumed_network_tells_the_same_again_and_goes_on(make_records, tmp_path, capsys):
    told = make_records()
    layers = layer_rows(0, {"conv": Layer(1.5, 1.25, 0.7)})
    tell(told, 0, 50)
    row = tell(told, 1, 60, layers=layers)
    tell(told, 2, 70, layers=layer_rows(1, {"conv": Layer(1.5, 1.25, 0.6)}))
    lines = capsys.readouterr().out.splitlines()
    (tmp_path / "best1.t7").unlink()
    again = make_records()
    again.resume(Checkpoint(1, State({"0.weight": torch.zeros(1)}), {"row": row, "layers": layers}, tmp_path))
    assert (tmp_path / "best1.t7").exists()
    assert [row[0] for row in rows_of(tmp_path / "metrics1.csv")] == ["0", "1"]
    assert rows_of(tmp_path / "coefficients1.csv") == [["0", "conv", "1.500000", "1.250000", "0.7"]]
    tell(again, 2, 55)
    assert rows_of(tmp_path / "metrics1.csv")[2][6] == "60"
    said = capsys.readouterr().out.splitlines()
    assert "continuing after epoch 1" in said and lines[-2] in said


def test_a_test_loss_that_is_no_number_is_published_nowhere(make_records, tmp_path):
    told = make_records()
    with pytest.raises(Diverged, match="the test loss became nan"):
        tell(told, 0, 50, loss=float("nan"))
    assert not list(tmp_path.iterdir())


def test_curves_and_coefficients_for_tensorboard(make_records, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told = make_records(tensorboard=True)
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


# Lines and bars


def run(ring, lr=0.1, every=0, check=lambda: None):
    """Three batches, each of four images with a mean loss of 1 and one that is right."""
    totals, batch = torch.zeros(3, dtype=torch.float64), torch.tensor([4.0, 4.0, 1.0])
    for _ in follow(ring, check, every, [None] * 3, totals, 3, 4, lr):
        totals += batch


def ring_of(progress=lambda step: None):
    return SimpleNamespace(progress=progress, update=lambda state, **fields: None)


def test_lines_of_progress_every_few_batches(capsys):
    steps, checks = [], []
    run(ring_of(steps.append), every=2, check=lambda: checks.append(0))
    for line, step in zip(capsys.readouterr().out.splitlines(), (0, 2), strict=True):
        figures = r"Time +[\d.]+ \( *[\d.]+\)    Data +[\d.]+ \( *[\d.]+\)    Loss 1.0000e\+00 \(1.0000e\+00\)"
        figures += r"    Acc@1  25\.00 \( 25\.00\)"
        assert re.fullmatch(rf"Epoch: \[4\]\[{step}/3\]    {figures}", line)
    assert steps == [0, 1, 2] and len(checks) == 3


def test_the_wait_for_the_device_is_of_the_batch_and_not_of_the_next_ones_data(capsys, monkeypatch):
    def means(totals):  # which wait for the device
        now[0] += 1.0
        return loop.means(totals)

    now = [0.0]
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(records, "means", means)
    run(ring_of(), every=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("Time  2.000 ( 2.000)    Data  0.000 ( 0.000)" in line for line in lines)


@pytest.mark.parametrize(("lr", "label"), [(0.1, "epoch 4:"), (None, "epoch 4 test:")])
def test_a_bar_on_a_terminal(capsys, monkeypatch, lr, label):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(ring_of(), lr)
    out = capsys.readouterr().out
    assert label in out and "loss 1.0000, accuracy 25.00" in out and "Epoch:" not in out
    run(None, lr)  # another process speaks for this network
    assert capsys.readouterr().out == ""
