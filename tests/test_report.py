"""The report: what it says of whole, unfinished and damaged runs, in which forms, and what it draws."""

import io
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from processes import ROOT
from saved import call, filters_of, rows_of, save_run

from analysis import plots, report
from analysis.runs import Network, Run, labels, read_run


def run_report(*arguments):
    """(exit status, the table's rows as dicts, all that is printed)."""
    status, output, _ = call(report, *arguments)
    return status, rows_of(output), output


def test_a_row_per_network_and_the_best_network_is_named_with_its_file(tmp_path):
    norms = [(1.0, 0.05, 0.005, 0.0), (1.0, 2.0, 0.05, math.nan)]  # NaN is invalid
    save_run(tmp_path / "two", [[50.0, 71.5, 70.25], [40.0, 60.0, 68.75]], norms=norms)
    status, (first, second), output = run_report(tmp_path / "two")
    assert status == 0
    expected = {"run": "two: grafting of 2", "network": "1", "epochs": "3", "best %": "71.50 *", "last %": "70.25"}
    # The median of 1, 2 and 3 s of training, and 1 s of the rest.
    assert first == expected | {"gain": "–", "<0.1": "3", "<0.01": "2", "s/epoch": "3.0"}
    assert (second["network"], second["best %"], second["<0.1"], second["<0.01"]) == ("2", "68.75", "2", "1")
    assert f"* Best: network 1 of two, 71.50 %: {tmp_path / 'two' / 'best1.t7'}\n" in output
    assert "A resnet20 has 4 filters." in output


def test_gains_are_over_the_baseline_of_the_same_settings_at_the_last_common_epoch(tmp_path):
    save_run(tmp_path / "base", [[50.0, 60.0, 61.0]], lr=0.1, seed=0)
    save_run(tmp_path / "other_seed", [[10.0, 10.0, 10.0]], lr=0.1, seed=1)
    save_run(tmp_path / "other_rate", [[90.0, 90.0, 90.0]], lr=0.2, seed=0)
    save_run(tmp_path / "two", [[50.0, 61.5, 62.0], [50.0, 62.5, 64.0]], lr=0.1, seed=0, difflr=True, a=0.6)
    save_run(tmp_path / "alive", [[50.0, 58.0]], lr=0.1, seed=0, states=("training",), scion="noise")
    save_run(tmp_path / "rival", [[50.0, 60.0, 60.5]], lr=0.1, seed=0, together="mutual", networks=2)
    rows = [(row["run"].partition(":")[0], row["gain"]) for row in run_report(tmp_path)[1]]
    assert rows[:3] == [("other_rate", "–"), ("two", "+1.00"), ("two", "+3.00")], "the most accurate come first"
    assert dict(rows[3:]) == {"base": "–", "rival": "-0.50", "alive": "-2.00", "other_seed": "–"}


def test_a_run_that_starts_from_a_checkpoint_is_compared_epoch_by_epoch(tmp_path):
    save_run(tmp_path / "base", [[50.0, 60.0, 60.0]])
    late = save_run(tmp_path / "late", [[70.0, 71.0, 61.0]] * 2)
    for i in 1, 2:
        rows = (late / f"metrics{i}.csv").read_text().splitlines(keepends=True)
        (late / f"metrics{i}.csv").write_text(rows[0] + "".join(rows[2:]))
    _, rows, output = run_report(tmp_path)
    assert [row["gain"] for row in rows] == ["+1.00", "+1.00", "–"] and "[1]" not in output


def test_methods_and_runs_have_short_names():
    def method(count, **settings):
        return Run(Path("run"), "run", {"num": count} | settings, [Network(i) for i in range(count)]).method

    assert method(1, method="grafting", scion="external", a=0.4, c=500.0) == "baseline"
    assert method(2, method="average", cos=True, difflr=True, a=0.0) == "average of 2, cos, difflr"
    assert method(1, together="mutual", networks=3) == "mutual of 3"
    assert method(3, criterion="l1", level="filter", a=0.6) == "grafting of 3, level filter, criterion l1, a 0.6"
    for paths, short in (
        (["c/baseline_cifar10_resnet32", "c/grafting_cifar10_resnet32_num4"], ["baseline", "grafting_num4"]),
        (["c/grafting_resnet32", "c/grafting_resnet32_a0.6"], ["grafting_resnet32", "grafting_resnet32_a0.6"]),
        (["r/num1/seed0", "r/num2/seed0"], ["num1", "num2"]),
    ):
        assert labels([Path(path) for path in paths]) == short


def test_the_table_fits_120_columns_and_other_forms_come_without_the_notes(tmp_path):
    name = "a-name-that-is-longer-than-anyone-would-ever-think-of"
    settings = {"model": "mobilenetv2", "cos": True, "difflr": True}
    runs = [save_run(tmp_path / f"{name}{k}", [[50.0 + k, 60.25]] * 2, epochs=2, **settings) for k in range(2)]
    torch.save({"net": filters_of((1.0, 0.05), (0.001, 3.0, 4.0))}, runs[0] / "final1.t7")
    (runs[1] / "final2.t7").unlink()
    _, rows, output = run_report(*runs, runs[0])
    assert max(len(line) for line in output.splitlines() if line.startswith("|")) == 120
    assert rows[0]["run"].endswith("…") and len(rows) == 4
    _, output, errors = call(report, *runs, "--format", "csv")
    frame = pd.read_csv(io.StringIO(output))
    assert list(frame["network"]) == [1, 2, 1, 2] and set(frame["last"]) == {60.25} and "final2 is missing" in errors
    assert list(frame["invalid_0.1"]) == [1, 2, 2, 2] and set(frame["method"]) == {"grafting of 2, cos, difflr"}
    assert list(frame["shortcut_invalid_0.01"]) == [1, 0, 0, 0] and frame["shortcut_total"][0] == 3
    _, output, errors = call(report, *runs, "--format", "latex")
    assert output.startswith("\\begin{tabular}") and output.endswith("\\end{tabular}\n") and "[1] " in errors


def test_the_projects_own_results_are_read_without_a_remark():
    status, rows, output = run_report(ROOT / "results" / "small")
    assert status == 0 and len(rows) > 50 and "[1]" not in output
    last = {row["run"].partition(":")[0]: row["last %"] for row in rows}
    assert last["num1/seed0"] == "69.48" and last["num1_ensemble2/seed0"] == "71.52"
    names = {row["run"].partition(": ")[2] for row in rows if row["gain"] == "–"}
    assert names == {"baseline", "baseline, cos", "ensemble of 2"}


def test_unfinished_networks_are_reported_as_such(tmp_path):
    states = ("stopped by SIGTERM", "failed the loss became nan \x1b[31mred", "training", "starting")
    directory = save_run(tmp_path / "run", [[50.0, 60.0]] * 4, epochs=200, states=states)
    for name in ("metrics4.csv", "coefficients4.csv", "best4.t7"):
        (directory / name).unlink()
    status, rows, output = run_report(directory)
    assert status == 0
    assert [row["epochs"] for row in rows] == ["2 [1] [2] [3] [4]", "2", "2", "0"]
    assert "[1] run: network 1: epoch 2 of 200, stopped: by SIGTERM\n" in output
    assert "[2] run: network 2: epoch 2 of 200, failed: the loss became nan  [31mred\n" in output
    assert "[3] run: network 3: epoch 2 of 200, died" in output, "it says that it trains, but no process lives"
    assert "[4] run: network 4: epoch 0 of 200, died\n" in output
    assert (rows[2]["<0.1"], rows[3]["best %"], rows[3]["<0.1"]) == ("2", "–", "–"), "counted in best3"


@pytest.mark.parametrize(
    ("name", "damage", "remark"),
    [
        ("metrics1.csv", Path.unlink, "metrics1.csv ends after epoch 0 of 3"),
        ("metrics1.csv", lambda path: path.write_bytes(b"\xff\xfe\n\x00"), "metrics1.csv is damaged: "),
        ("metrics1.csv", lambda path: path.write_text(path.read_text()[:-1]), "metrics1.csv ends after epoch 2 of 3"),
        ("coefficients1.csv", lambda path: path.write_text("epoch\n"), "is damaged: it has no column layer"),
        ("coefficients1.csv", lambda path: (path.unlink(), path.mkdir()), "coefficients1.csv is damaged: [Errno"),
        ("final1.t7", Path.unlink, "final1 is missing"),
        ("final1.t7", lambda path: os.truncate(path, 1000), "final1.t7 is truncated, damaged or"),
    ],
)
def test_damage_is_a_numbered_sentence_and_the_rest_is_read(tmp_path, name, damage, remark):
    directory = save_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2)
    damage(directory / name)
    status, (first, second), output = run_report(directory)
    assert status == 0 and "[1]" in first["epochs"] and second["last %"] == "70.00"
    assert remark in output.split("[1] run: ")[1].splitlines()[0]


def test_only_where_nothing_can_be_read_is_the_exit_status_1(tmp_path):
    there = save_run(tmp_path / "run", [[50.0]], epochs=1)
    status, rows, output = run_report(there, tmp_path / "nothing here")
    assert (status, rows[1]["run"]) == (0, "nothing here: unreadable")
    assert "[1] nothing here: not the save directory of a run" in output
    (there / "run.json").write_text("{")
    assert run_report(there)[0] == 1


def test_the_script_runs_from_anywhere_and_ends_quietly_when_its_reader_has_gone(tmp_path):
    save_run(tmp_path / "a run", [[50.0]], epochs=1)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no plots were asked for')")
    line = f"set -o pipefail; '{sys.executable}' '{ROOT}/analysis/report.py' 'a run' | true"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# ---- Plots


def lines(panel):
    """The courses in a panel by label: their points."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.get_lines()}


@pytest.fixture
def two(tmp_path):
    return save_run(tmp_path / "two", [[50.0, 60.0, 61.0], [40.0, 50.0, 62.0]])


def test_what_can_be_drawn_is_drawn_in_the_format_asked_for(tmp_path, two):
    base = save_run(tmp_path / "base $line", [[50.0, 55.0, 60.0]])
    (base / "metrics1.csv").unlink()
    torch.save({"net": filters_of((math.nan, 1.0))}, base / "final1.t7")
    status, output, _ = call(report, base, two, tmp_path / "nothing", "--plots", tmp_path / "plots.svg")
    assert status == 0
    written = [Path(line[2:]) for line in output.splitlines() if line.startswith("- ")]
    names = ["accuracy", "losses", "information", "coefficients_two", "filters"]
    assert written == [tmp_path / "plots" / f"{name}.svg" for name in names]
    assert all(path.read_text().startswith("<?xml") for path in written)
    figure = plots.coefficients(read_run(two))
    assert Image.open(plots.save(figure, tmp_path / "a.png")).width == 7 * 200, "7 inches of 200 dpi"
    assert plots.save(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_courses_are_the_files_and_their_last_quarter_is_enlarged(tmp_path, two):
    base = read_run(save_run(tmp_path / "base", [[50.0 + k for k in range(30)]], epochs=30))
    whole, late = plots.courses([base, read_run(two)], plots.COURSES["accuracy"]).axes
    assert lines(whole)["two"] == [(0, 50.0), (1, 60.0), (2, 61.0)]
    assert [line.get_color() for line in whole.get_lines()] == [*plots.COLOURS[:2], plots.COLOURS[1]]
    assert lines(late)["base"] == [(epoch, 50.0 + epoch) for epoch in range(22, 30)]
    training, test, *_ = plots.courses([read_run(two)], plots.COURSES["losses"]).axes
    assert lines(training)["network 2"] == [(0, 1), (1, 1), (2, 1)] and lines(test)["network 1"][0] == (0, 2)


def test_coefficients_and_norms_are_the_files_and_epochs_without_any_are_gaps(two):
    run = read_run(two)
    assert plots.coefficients(run).axes[0].images[0].get_array().tolist() == [[0.45, 0.46]]
    run.networks[0].coefficients = pd.DataFrame({"epoch": [0, 2], "layer": "conv1", "coefficient": [0.4, 0.6]})
    assert plots.coefficients(run).axes[0].images[0].get_array().filled(-1).tolist() == [[0.4, -1, 0.6]]
    run.networks[0].norms = torch.tensor([2.0, 0.5, 0.0, math.nan])
    smallest = plots.SMALLEST_NORM  # where 0 is drawn; NaN is invalid
    steps = [(smallest, 0), (smallest, 0.25), (smallest, 0.5), (0.5, 0.75), (2, 1)]
    assert lines(plots.filters([run]).axes[0])["network 1"] == steps


def test_confusions_are_shares_of_their_row():
    panel = plots.confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"], "title").axes[0]
    assert sorted(text.get_text() for text in panel.texts) == ["25", "75"]
    assert panel.images[0].get_array().tolist() == [[75, 25], [0, 0]]
