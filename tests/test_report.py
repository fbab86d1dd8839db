"""The report: what it says of whole, unfinished and damaged runs, and in which forms."""

import io
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from saved import HEADER, call, filters_of, rows_of, save_run

from analysis import report
from analysis.runs import Network, Run, labels, mean_and_deviation

ROOT = Path(__file__).resolve().parent.parent
ROW = "0,1,1,1,1,1,1,1,1,1,1,1\n"


def run_report(*arguments):
    """(exit status, the table's rows as dicts, all that is printed)."""
    status, output, _ = call(report, *arguments)
    return status, rows_of(output), output


def test_a_row_per_network_under_the_mean_of_their_run(tmp_path):
    norms = [(1.0, 0.05, 0.005, 0.0), (1.0, 2.0, 0.05, float("nan"))]  # NaN is invalid
    save_run(tmp_path / "two", [[50.0, 71.5, 70.25], [40.0, 60.0, 68.75]], norms=norms)
    status, (mean, first, second), output = run_report(tmp_path / "two")
    assert status == 0
    assert mean["run"] == "two: grafting of 2"
    assert (first["epochs"], first["best %"], first["last %"]) == ("3", "71.50 *", "70.25")
    assert (first["<0.1"], first["<0.01"], second["<0.1"], second["<0.01"]) == ("3", "2", "2", "1")
    assert first["s/epoch"] == "3.0"  # the median of 1, 2 and 3 s of training, and 1 s of the rest
    assert mean["last %"] == f"69.50 ± {statistics.stdev([70.25, 68.75]):.2f}"
    assert mean["<0.1"] == "2.5"
    assert f"* Best: network 1 of two, 71.50 %: {tmp_path / 'two' / 'best1.t7'}" in output
    assert "A resnet20 has 4 filters." in output


def test_gains_are_over_the_baseline_of_the_same_settings_at_the_last_common_epoch(tmp_path):
    save_run(tmp_path / "base", [[50.0, 60.0, 61.0]], lr=0.1, seed=0)
    save_run(tmp_path / "other_seed", [[10.0, 10.0, 10.0]], lr=0.1, seed=1)
    save_run(tmp_path / "other_rate", [[90.0, 90.0, 90.0]], lr=0.2, seed=0)
    save_run(tmp_path / "two", [[50.0, 61.5, 62.0], [50.0, 62.5, 64.0]], lr=0.1, seed=0, difflr=True, a=0.6)
    save_run(tmp_path / "alive", [[50.0, 58.0]] * 2, lr=0.1, seed=0, states=("training",) * 2)
    rows = [row for row in run_report(tmp_path)[1] if not row["run"].startswith("·")]
    gains = {row["run"].partition(":")[0]: row["gain"] for row in rows}
    assert gains == {"base": "", "other_seed": "", "other_rate": "", "two": "+2.00", "alive": "-2.00"}
    assert [row["run"].partition(":")[0] for row in rows][:2] == ["other_rate", "two"], "the most accurate come first"


@pytest.mark.parametrize(
    ("settings", "num", "name"),
    [
        ({"method": "grafting", "scion": "external", "a": 0.4, "c": 500}, 1, "baseline"),
        ({"cos": True, "difflr": True}, 2, "grafting of 2, cosine, dlr"),
        ({"method": "average", "a": 0.0}, 3, "average of 3"),
        ({"scion": "noise"}, 1, "baseline, noise scions"),
        ({"criterion": "l1", "level": "filter", "c": 5}, 3, "grafting of 3, filter level, by L1 norm, c 5"),
        ({"steplr": True, "a": 0.6}, 2, "grafting of 2, steps, a 0.6"),
    ],
)
def test_methods_have_a_name_each(settings, num, name):
    assert Run(Path("run"), "run", settings, [Network(i) for i in range(num)]).method == name


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["c/baseline_cifar10_resnet32", "c/grafting_cifar10_resnet32_num4"], ["baseline", "grafting_num4"]),
        (["c/grafting_resnet32", "c/grafting_resnet32_a0.6"], ["grafting_resnet32", "grafting_resnet32_a0.6"]),
        (["x/run", "y/run"], ["x", "y"]),
        (["r/num1/seed0", "r/num2/seed0"], ["num1", "num2"]),
    ],
)
def test_names_of_runs_are_shortened_to_what_differs(paths, short):
    assert labels([Path(path) for path in paths]) == short


def test_the_table_fits_120_columns_and_csv_has_all_there_is(tmp_path):
    name = "a-name-that-is-longer-than-anyone-would-ever-think-of"
    settings = {"model": "mobilenetv2", "cos": True, "difflr": True}
    runs = [save_run(tmp_path / f"{name}{k}", [[50.0 + k, 60.25]] * 2, epochs=2, **settings) for k in range(2)]
    torch.save({"net": filters_of((1.0, 0.05), (0.001, 3.0, 4.0))}, runs[0] / "final1.t7")
    _, rows, output = run_report(*runs, runs[0])
    assert max(len(line) for line in output.splitlines() if line.startswith("|")) <= 120
    assert rows[0]["run"].endswith("…")
    table = pd.read_csv(io.StringIO(call(report, *runs, "--format", "csv")[1]))
    assert list(table["network"]) == [1, 2, 1, 2] and set(table["last"]) == {60.25}
    assert list(table["invalid_0.1"]) == [1, 2, 2, 2] and set(table["method"]) == {"grafting of 2, cosine, dlr"}
    assert list(table["shortcut_invalid_0.01"]) == [1, 0, 0, 0] and table["shortcut_total"][0] == 3


def test_latex_comes_without_the_notes(tmp_path):
    directory = save_run(tmp_path / "a_run", [[50.0]], epochs=2, states=("stopped by SIGINT",), imagenet=True)
    _, output, errors = call(report, directory, "--format", "latex")
    assert output.startswith("\\begin{tabular}") and output.endswith("\\end{tabular}\n")
    assert "a\\_run: baseline" in output
    assert "[1] a_run: network 1: epoch 1 of 2, stopped" in errors


def test_the_projects_own_results_are_read_without_a_remark():
    status, rows, output = run_report(ROOT / "results" / "small")
    assert status == 0 and len(rows) > 50 and "[1]" not in output
    last = {row["run"].partition(":")[0]: row["last %"] for row in rows}
    assert last["num1/seed0"] == "69.48" and last["num1_ensemble2/seed0"] == "71.52"


def test_unfinished_networks_are_reported_as_such(tmp_path):
    states = ("stopped by SIGTERM", "failed the loss became nan \x1b[31mred", "training", "starting")
    directory = save_run(tmp_path / "run", [[50.0, 60.0]] * 4, epochs=200, states=states)
    for name in ("metrics4.csv", "coefficients4.csv", "best4.t7"):
        (directory / name).unlink()
    status, rows, output = run_report(directory)
    assert status == 0
    assert [row["epochs"] for row in rows] == ["0/2 [1] [2] [3] [4]", "2", "2", "2", "0"]
    assert "[1] run: network 1: epoch 2 of 200, stopped: by SIGTERM\n" in output
    assert "[2] run: network 2: epoch 2 of 200, failed: the loss became nan  [31mred\n" in output
    assert "[3] run: network 3: epoch 2 of 200, died" in output, "it says that it trains, but no process lives"
    assert "[4] run: network 4: died, no epoch has ended" in output
    assert (rows[3]["<0.1"], rows[4]["best %"], rows[4]["<0.1"]) == ("2", "–", "–"), "counted in best3"


DAMAGES = {
    "metrics1.csv is missing": ("metrics1.csv", Path.unlink),
    "metrics1.csv is damaged: ": ("metrics1.csv", lambda path: path.write_bytes(b"\xff\xfe\n\x00")),
    "metrics1.csv ends after 1 of 3 epochs": ("metrics1.csv", lambda path: path.write_text(HEADER + ROW + ROW[:-1])),
    "it has no column coefficient": ("coefficients1.csv", lambda path: path.write_text("epoch,layer\n0,conv1\n")),
    "final1 is missing": ("final1.t7", Path.unlink),
    "final1.t7 is truncated, damaged or": ("final1.t7", lambda path: path.write_bytes(path.read_bytes()[:-100])),
}


@pytest.mark.parametrize("remark", DAMAGES)
def test_damage_is_a_numbered_sentence_and_the_rest_is_read(tmp_path, remark):
    directory = save_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2)
    name, damage = DAMAGES[remark]
    damage(directory / name)
    status, (mean, _, second), output = run_report(directory)
    assert status == 0
    assert "[1]" in mean["epochs"] and second["last %"] == "70.00"
    (note,) = [line for line in output.splitlines() if line.startswith("[1] run: ")]
    assert remark in note


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("{")], ids=["missing", "damaged"])
def test_only_where_nothing_can_be_read_is_the_exit_status_1(tmp_path, spoil):
    there = save_run(tmp_path / "run", [[50.0]], epochs=1)
    status, rows, output = run_report(there, tmp_path / "nothing here")
    assert (status, rows[1]["run"]) == (0, "nothing here")
    assert "[1] nothing here: not the save directory of a run" in output
    spoil(there / "run.json")
    status, _, output = run_report(there)
    assert status == 1 and "[1] run: not the save directory of a run" in output


def test_means_say_of_how_many():
    assert mean_and_deviation([1.0, 2.0, float("nan")], 2) == "1.50 ± 0.71 (2 of 3)"
    assert mean_and_deviation([float("nan")], 2) == "–"


def test_the_script_runs_from_anywhere_and_ends_quietly_when_its_reader_has_gone(tmp_path):
    directory = save_run(tmp_path / "a run", [[50.0]], epochs=1)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no plots were asked for')")
    command = [sys.executable, ROOT / "analysis" / "report.py", directory.name]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (closed.communicate()[1], closed.returncode) == (b"", 0)
