"""What a network tells of itself: its tables are whole and exact, its lines are the fixed ones."""

import re
import sys
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from processes import read_table
from torch import nn

from filter_grafting.checkpoint import load
from filter_grafting.grafting import Layer
from filter_grafting.membership import read_status
from filter_grafting.rings import Checkpoint
from filter_grafting.states import State
from training import loop, records
from training.flags import command
from training.images import Images
from training.loop import Result
from training.records import Records, follow, layer_rows, write_rows

SETTINGS = {"model": "m", "lr": 0.1, "epochs": 4, "data": "x"}


@pytest.fixture
def ring(make_ring):
    return make_ring()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3))


def make_records(ring, tensorboard=False):
    images = Images(None, None, None, ["a", "b"], ["a note"])
    return Records(ring, model(), SETTINGS, images, {"image_size": 32}, [], tensorboard)


def tell(told, epoch, accuracy, val=None, layers=()):
    train, test = Result(2.0, 30.0, None, 1.0), Result(1.0, accuracy, 90.0 if val else None, 0.5)
    val = None if val is None else Result(1.0, val, None, 0.25)
    row = told.row(epoch, 0.1, train, test, val, model())
    told.epoch(row, layers, {"0.weight": torch.full((1,), accuracy)})
    return row


def test_rows_of_an_epoch_take_the_place_of_it_and_of_later_ones(tmp_path):
    path, head = tmp_path / "table.csv", "epoch,layer,coefficient\n"

    def write(epoch, *rows):
        write_rows(path, ("epoch", "layer", "coefficient"), epoch, [[epoch, *row] for row in rows])

    write(-1)
    assert not path.exists()
    write(0, ["conv1", 0.5], ["a,b", 0.25])
    write(1, ["conv1", 0.5])
    write(1, ["conv1", 0.7])
    assert path.read_text() == f'{head}0,conv1,0.5\n0,"a,b",0.25\n1,conv1,0.7\n'
    write(0)
    assert path.read_text() == head


def test_the_line_of_an_epoch(ring, tmp_path, capsys):
    told = make_records(ring)
    assert told.timed("wait", divmod, 7, 2) == (3, 1)
    tell(told, 0, 55.05)
    *head, line = capsys.readouterr().out.splitlines()
    assert line == (
        "Network:1    epoch:0    accuracy:55.050    best:55.050    loss:2.0000    lr:0.1    "
        "train:1.00s    test:0.50s    wait:0.00s    graft:0.00s"
    )
    assert head[-2:] == ["settings: model=m lr=0.1 epochs=4 data=x", "a note"]
    assert read_status(tmp_path, 1).items() >= {"accuracy": 55.05, "best": 55.05}.items()
    tell(told, 1, 50, val=60)
    assert "best:50.000    val:60.000    accuracy@5:90.000    loss:2.0000" in capsys.readouterr().out


def test_the_best_epoch_is_chosen_on_the_validation_images_if_there_are_any(ring, tmp_path):
    told = make_records(ring)
    for epoch, (accuracy, val) in enumerate([(50, 40), (70, 30), (60, 45), (60, 45)]):
        tell(told, epoch, accuracy, val)
    assert [row["best"] for row in read_table(tmp_path / "metrics1.csv")] == ["50", "50", "60", "60"]
    best = load(tmp_path / "best1.t7")
    assert (best["epoch"], best["accuracy"], best["net"]["0.weight"].item()) == (2, 60, 60)  # of equals, the first


def test_best_and_final_say_what_whoever_uses_them_needs_to_know(ring, tmp_path):
    told = make_records(ring)
    tell(told, 0, 50)
    tell(told, 3, 40)
    expected = {"settings": SETTINGS, "model": "m", "data": "x", "classes": ["a", "b"], "command": command()}
    expected["image_size"] = 32
    for kind, epoch, accuracy in ("best", 0, 50), ("final", 3, 40):
        contents = load(tmp_path / f"{kind}1.t7")
        contents.pop("net")
        assert contents == expected | {"epoch": epoch, "accuracy": accuracy, "best": 50}


def test_a_resumed_network_tells_the_same_again_and_goes_on(ring, tmp_path, capsys):
    told = make_records(ring)
    layers = layer_rows(0, {"conv": Layer(1.5, 1.25, 0.7)})
    tell(told, 0, 50)
    row = tell(told, 1, 60, layers=layers)
    tell(told, 2, 70, layers=layer_rows(1, {"conv": Layer(1.5, 1.25, 0.6)}))
    lines = capsys.readouterr().out.splitlines()
    (tmp_path / "best1.t7").unlink()
    again = make_records(ring)
    again.resume(Checkpoint(1, State({"0.weight": torch.zeros(1)}), {"row": row, "layers": layers}, tmp_path))
    assert (tmp_path / "best1.t7").exists()
    assert [row["epoch"] for row in read_table(tmp_path / "metrics1.csv")] == ["0", "1"]
    (only,) = read_table(tmp_path / "coefficients1.csv")
    assert [*only.values()] == ["0", "conv", "1.500000", "1.250000", "0.7"]
    tell(again, 2, 55)
    assert read_table(tmp_path / "metrics1.csv")[2]["best"] == "60"
    said = capsys.readouterr().out.splitlines()
    assert "continuing after epoch 1" in said and lines[-2] in said


def test_curves_and_coefficients_for_tensorboard(ring, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told = make_records(ring, tensorboard=True)
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


def test_lines_of_progress_every_few_batches(capsys):
    ring, check = Mock(), Mock()
    run(ring, every=2, check=check)
    for line, step in zip(capsys.readouterr().out.splitlines(), (0, 2), strict=True):
        figures = r"Time +[\d.]+ \( *[\d.]+\)    Data +[\d.]+ \( *[\d.]+\)    Loss 1.0000e\+00 \(1.0000e\+00\)"
        figures += r"    Acc@1  25\.00 \( 25\.00\)"
        assert re.fullmatch(rf"Epoch: \[4\]\[{step}/3\]    {figures}", line)
    assert ring.progress.call_args_list == [call(0), call(1), call(2)] and check.call_count == 3


def test_the_wait_for_the_device_is_of_the_batch_and_not_of_the_next_ones_data(capsys, monkeypatch):
    def means(totals):  # which wait for the device
        now[0] += 1.0
        return loop.means(totals)

    now = [0.0]
    monkeypatch.setattr(records, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(records, "means", means)
    run(Mock(), every=1)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("Time  2.000 ( 2.000)    Data  0.000 ( 0.000)" in line for line in lines)


@pytest.mark.parametrize(("lr", "label"), [(0.1, "epoch 4:"), (None, "epoch 4 test:")])
def test_a_bar_on_a_terminal(capsys, monkeypatch, lr, label):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    run(Mock(), lr)
    out = capsys.readouterr().out
    assert label in out and "loss 1.0000, accuracy 25.00" in out and "Epoch:" not in out
    run(None, lr)  # another process speaks for this network
    assert capsys.readouterr().out == ""
