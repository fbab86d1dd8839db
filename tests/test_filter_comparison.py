"""The filter comparison: its counts against NumPy's, the checkpoints that it reads, and what it says of others."""

import sys

import numpy as np
import pytest
import torch

from analysis import filter_comparison
from analysis.runs import program
from grafting_cifar import models


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script in this process: (exit status, the table's rows as dicts, all it printed, its errors)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["filter_comparison.py", *map(str, arguments)])
        status = program(filter_comparison.main)
        output, errors = capsys.readouterr()
        table = [line.strip("|").split("|") for line in output.splitlines() if line.startswith("|")]
        head, _, *body = [[cell.strip() for cell in line] for line in table] or [[], []]
        return status, [dict(zip(head, row, strict=True)) for row in body], output, errors

    return run


def weak_state(name):
    """A network with filters of all norms, from 1e-4 of what they were to all of it."""
    torch.manual_seed(0)
    state = models.build(name).state_dict()
    for entry in state.values():
        if entry.dim() == 4:
            entry *= 10 ** torch.linspace(-4, 0, len(entry))[:, None, None, None]
    return state


def count(state, threshold):
    """(invalid, total) outside shortcuts and in them, filter by filter."""
    counts = {False: [0, 0], True: [0, 0]}
    for key, entry in state.items():
        for weights in entry.numpy() if entry.dim() == 4 else ():
            in_shortcut = "shortcut" in key
            counts[in_shortcut][0] += float(np.abs(weights).sum()) < threshold
            counts[in_shortcut][1] += 1
    return *counts[False], *counts[True]


def test_counts_are_those_of_a_loop_over_all_filters(tmp_path, run):
    states = {"a/final1.t7": weak_state("resnet20"), "b/final1.t7": weak_state("mobilenetv2")}
    for name, state in states.items():
        (tmp_path / name).parent.mkdir()
        torch.save({"net": state}, tmp_path / name)
    status, rows, output, _ = run("--r", *(tmp_path / name for name in states))
    assert status == 0
    assert [(row["file"], row["threshold"]) for row in rows] == [(n, t) for n in states for t in ("0.1", "0.01")]
    for row in rows:
        invalid, total, beside, beside_total = count(states[row["file"]], float(row["threshold"]))
        assert 0 < invalid < total
        assert [int(row["invalid"]), int(row["total"])] == [invalid, total]
        assert row["ratio (%)"] == f"{100 * invalid / total:.2f}"
        assert row["shortcuts"] == (f"{beside} of {beside_total}" if beside_total else "–")
        assert row["shortcuts (%)"] == (f"{100 * beside / beside_total:.2f}" if beside_total else "–")
    assert rows[2]["shortcuts"].endswith(" of 456") and rows[2]["shortcuts"] != "0 of 456"
    assert max(map(len, output.splitlines())) <= 110


def test_thresholds_are_the_users(tmp_path, run):
    torch.save({"conv.weight": torch.tensor([0.5, -2.0, torch.nan])[:, None, None, None]}, tmp_path / "net.t7")
    _, rows, output, _ = run("--r", tmp_path / "net.t7", "--threshold", "1", "2.5", "2")
    assert [(row["threshold"], row["invalid"]) for row in rows] == [("1", "2"), ("2.5", "3"), ("2", "2")], (
        "NaN is invalid"
    )
    assert rows[0]["shortcuts"] == "–" and "in their names" in output


def wrapped(state):
    return {f"module.{key}": entry for key, entry in state.items()}


FORMS = {
    "ours": lambda state: {"net": state, "epoch": 3, "settings": {"model": "mobilenetv2"}},
    "authors'": lambda state: {"net": wrapped(state), "acc": 90.5, "epoch": 3},
    "ImageNet": lambda state: {"state_dict": wrapped(state), "arch": "resnet18", "best_acc1": torch.tensor(3.0)},
    "bare": lambda state: state,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_checkpoint_is_read(tmp_path, run, form):
    state = {
        "layers.0.conv1.weight": torch.tensor([0.05, 5.0])[:, None, None, None],
        "layers.0.shortcut.0.weight": torch.tensor([0.05, 0.02, 5.0])[:, None, None, None],
    }
    torch.save(FORMS[form](state), tmp_path / "net.t7")
    status, rows, _, _ = run("--r", tmp_path / "net.t7", "--threshold", "0.1")
    assert status == 0
    assert (rows[0]["invalid"], rows[0]["total"], rows[0]["shortcuts"]) == ("1", "2", "2 of 3")


def test_what_cannot_be_read_is_named_in_a_line_and_the_rest_is_shown(tmp_path, run):
    good = {"conv.weight": torch.ones(2, 1, 1, 1)}
    torch.save({"net": good}, tmp_path / "good.t7")
    torch.save({"net": good, "acc": np.float64(90.5)}, tmp_path / "numpy.t7")
    torch.save({"net": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "linear.t7")
    torch.save({"epoch": 3}, tmp_path / "epoch.t7")
    (tmp_path / "cut.t7").write_bytes((tmp_path / "good.t7").read_bytes()[:-100])
    reasons = {
        "missing.t7": "there is no such file",
        "numpy.t7": "holds more than tensors",
        "linear.t7": "no convolution found",
        "epoch.t7": "holds no state dict",
        "cut.t7": "damaged",
    }
    status, rows, _, errors = run("--r", *(tmp_path / name for name in [*reasons, "good.t7"]))
    assert status == 1
    assert [row["file"] for row in rows] == ["good.t7", "good.t7"]
    for (name, reason), line in zip(reasons.items(), errors.splitlines(), strict=True):
        assert line.startswith(str(tmp_path / name)) and reason in line


@pytest.mark.parametrize("flags", [[], ["--r", "a.t7", "--threshold", "0"]])
def test_a_wrong_flag_is_one_line_and_exit_status_2(capsys, flags):
    with pytest.raises(SystemExit) as end:
        filter_comparison.parse(flags)
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
