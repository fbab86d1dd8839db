"""The filter comparison: its counts against NumPy's, the checkpoints that it reads, and what it says of others."""

import numpy as np
import torch
from saved import call, filters_of, rows_of

from analysis import filter_comparison
from grafting_cifar import models


def count(state, threshold, in_shortcuts):
    """(invalid, total), filter by filter."""
    filters = [(key, weights) for key, entry in state.items() if entry.dim() == 4 for weights in entry.numpy()]
    norms = [float(np.abs(weights).sum()) for key, weights in filters if ("shortcut" in key) == in_shortcuts]
    return sum(norm < threshold for norm in norms), len(norms)


def test_counts_are_those_of_a_loop_over_all_filters(tmp_path):
    states = {}
    for name in "resnet20", "mobilenetv2":
        torch.manual_seed(0)
        state = states[str(tmp_path / name)] = models.build(name).state_dict()
        for entry in state.values():
            if entry.dim() == 4:  # filters of all norms, from 1e-4 of what they were to all of it
                entry *= 10 ** torch.linspace(-4, 0, len(entry))[:, None, None, None]
        torch.save({"net": state}, tmp_path / name)
    status, output, _ = call(filter_comparison, "--r", *states)
    rows = rows_of(output)
    assert status == 0 and [(row["file"], row["threshold"]) for row in rows] == [
        (name, threshold) for name in states for threshold in ("0.1", "0.01")
    ]
    for row in rows:
        invalid, total = count(states[row["file"]], float(row["threshold"]), False)
        assert 0 < invalid < total and [int(row["invalid"]), int(row["total"])] == [invalid, total]
        assert row["ratio (%)"] == f"{100 * invalid / total:.2f}"
        invalid, total = count(states[row["file"]], float(row["threshold"]), True)
        expected = (f"{invalid} of {total}", f"{100 * invalid / total:.2f}") if total else ("–", "–")
        assert (row["shortcuts"], row["shortcuts (%)"]) == expected
    assert rows[2]["shortcuts"].endswith(" of 456") and rows[2]["shortcuts"] != "0 of 456"


def test_every_form_of_checkpoint_is_read_and_thresholds_are_the_users(tmp_path):
    state = filters_of((0.5, 2.0, float("nan")), (0.05, 0.02, 5.0))
    wrapped = {f"module.{key}": entry for key, entry in state.items()}
    torch.save({"net": wrapped, "acc": 90.5, "epoch": 3}, tmp_path / "authors.t7")
    torch.save({"state_dict": wrapped, "arch": "resnet18", "best_acc1": torch.tensor(3.0)}, tmp_path / "imagenet.tar")
    torch.save(state, tmp_path / "bare")
    status, output, _ = call(filter_comparison, "--r", *sorted(tmp_path.iterdir()), "--threshold", "1", "2.5", "2")
    assert status == 0
    found = [(row["threshold"], row["invalid"], row["shortcuts"]) for row in rows_of(output)]
    assert found == [("1", "2", "2 of 3"), ("2.5", "3", "2 of 3"), ("2", "2", "2 of 3")] * 3, "NaN is invalid"


def test_what_cannot_be_read_is_named_in_a_line_and_the_rest_is_shown(tmp_path):
    good = {"conv.weight": torch.ones(2, 1, 1, 1)}
    torch.save({"net": good}, tmp_path / "good.t7")
    torch.save({"net": good, "acc": np.float64(90.5)}, tmp_path / "numpy.t7")
    torch.save({"net": torch.nn.Linear(2, 2).state_dict()}, tmp_path / "linear.t7")
    reasons = {"missing.t7": "No such file", "numpy.t7": "holds more than tensors", "linear.t7": "no convolution found"}
    status, output, errors = call(filter_comparison, "--r", *(tmp_path / name for name in [*reasons, "good.t7"]))
    assert status == 1 and {row["file"] for row in rows_of(output)} == {str(tmp_path / "good.t7")}
    for (name, reason), line in zip(reasons.items(), errors.splitlines(), strict=True):
        assert str(tmp_path / name) in line and reason in line


def test_a_wrong_flag_is_one_line_and_exit_status_2():
    status, _, errors = call(filter_comparison, "--r", "a.t7", "--threshold", "0")
    assert status == 2 and errors.count("\n") == 1
