"""The report: what it says of whole, unfinished and damaged runs, and in which forms."""

import io
import json
import os
import socket
import statistics
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from analysis import report
from analysis.runs import find_runs, labels, mean_and_deviation, method, program, read_run

ROOT = Path(__file__).resolve().parent.parent
HEADER = (
    "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,best,"
    "train_seconds,test_seconds,wait_seconds,graft_seconds\n"
)
ROW = "0,1,1,1,1,1,1,1,1,1,1\n"


def state_dict(norms, shortcut_norms=()):
    """A network whose filters have these L1 norms."""
    state = {"conv1.weight": torch.tensor(norms)[:, None, None, None].expand(-1, 1, 2, 2) / 4}
    state["bn1.weight"] = torch.ones(len(norms))
    if shortcut_norms:
        state["layers.0.shortcut.0.weight"] = torch.tensor(shortcut_norms)[:, None, None, None]
    return state


def make_run(
    directory, accuracies, *, epochs=3, norms=((1.0, 0.05, 0.005),) * 8, states=(), imagenet=False, **settings
):
    """Writes what a run leaves: accuracies[i - 1] are those of network i, one per epoch."""
    directory.mkdir(parents=True)
    num = len(accuracies)
    settings = {"model": "resnet20", "num": num, "epochs": epochs, "a": 0.4, "c": 500, "level": "layer"} | settings
    (directory / "run.json").write_text(json.dumps({"run": "ab", "settings": settings}))
    for i, values in enumerate(accuracies, 1):
        rows = [
            f"{epoch},0.1,1,50,1,{accuracy},{max(values[: epoch + 1])},{epoch + 1},0.5,0.25,0.25\n"
            for epoch, accuracy in enumerate(values)
        ]
        (directory / f"metrics{i}.csv").write_text(HEADER + "".join(rows))
        if num > 1:
            grafted = [f"{epoch},conv1,1.1,1.2,0.{45 + epoch}\n" for epoch in range(min(len(values), epochs - 1))]
            header = "epoch,layer,own_entropy,neighbour_entropy,coefficient\n"
            (directory / f"coefficients{i}.csv").write_text(header + "".join(grafted))
        state, _, detail = (states[i - 1] if states else "done").partition(" ")
        status = {"network": i, "num": num, "run": "ab", "state": state, "detail": detail, "epoch": len(values) - 1}
        status |= {"epochs": epochs, "accuracy": values[-1], "best": max(values)}
        status |= {"host": socket.gethostname(), "pid": 2**30, "time": 0.0}
        (directory / f"network{i}.json").write_text(json.dumps(status))
        names = [("best", values.index(max(values)))] + [("final", len(values) - 1)] * (state == "done")
        for name, epoch in names:
            contents = {"state_dict" if imagenet else "net": state_dict(norms[i - 1]), "epoch": epoch}
            torch.save(contents, directory / f"{name}{i}.{'tar' if imagenet else 't7'}")
    return directory


@pytest.fixture
def run_report(monkeypatch, capsys):
    """Runs the report in this process: (exit status, the table's rows as dicts, all it printed)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        status = program(report.main)
        output = capsys.readouterr().out
        lines = [line.replace("\\|", "¦") for line in output.splitlines() if line.startswith("|")]
        table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] or [[], []]
        return status, [dict(zip(table[0], row, strict=True)) for row in table[2:]], output

    return run


def frame(directories, capsys, monkeypatch):
    """What `--format csv` prints, as pandas reads it."""
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, directories), "--format", "csv"])
    assert program(report.main) == 0
    return pd.read_csv(io.StringIO(capsys.readouterr().out))


def test_a_row_per_network_under_the_mean_of_their_run(tmp_path, run_report):
    norms = [(1.0, 0.05, 0.005, 0.0), (1.0, 2.0, 0.05, 0.02)]
    make_run(tmp_path / "two", [[50.0, 71.5, 70.25], [40.0, 60.0, 68.75]], norms=norms)
    status, (mean, first, second), output = run_report(tmp_path / "two")
    assert status == 0
    assert mean["run"] == "two: grafting of 2"
    assert (first["epochs"], first["best %"], first["last %"]) == ("3", "71.50 *", "70.25")
    assert (first["<0.1"], first["<0.01"], second["<0.1"], second["<0.01"]) == ("3", "2", "2", "0")
    assert first["s/epoch"] == "3.0"  # the median of 1, 2 and 3 s of training, and 1 s of the rest
    assert mean["last %"] == f"69.50 ± {statistics.stdev([70.25, 68.75]):.2f}"
    assert mean["<0.1"] == "2.5"
    assert f"* Best: network 1 of two, 71.50 %: {tmp_path / 'two' / 'best1.t7'}" in output
    assert "A resnet20 has 4 filters." in output


def test_gains_are_over_the_baseline_of_the_same_settings_at_the_last_common_epoch(tmp_path, run_report):
    make_run(tmp_path / "base", [[50.0, 60.0, 61.0]], lr=0.1, seed=0)
    make_run(tmp_path / "other_seed", [[10.0, 10.0, 10.0]], lr=0.1, seed=1)
    make_run(tmp_path / "other_rate", [[90.0, 90.0, 90.0]], lr=0.2, seed=0)
    make_run(tmp_path / "two", [[50.0, 61.5, 62.0], [50.0, 62.5, 64.0]], lr=0.1, seed=0, difflr=True, a=0.6)
    make_run(tmp_path / "alive", [[50.0, 58.0]] * 2, lr=0.1, seed=0, states=("training",) * 2)
    _, rows, _ = run_report(*(tmp_path / name for name in ("base", "other_seed", "other_rate", "two", "alive")))
    gains = {row["run"].partition(":")[0]: row["gain"] for row in rows if not row["run"].startswith("·")}
    assert gains == {"base": "", "other_seed": "", "other_rate": "", "two": "+2.00", "alive": "-2.00"}


def test_the_most_accurate_run_comes_first(tmp_path, run_report):
    runs = [
        make_run(tmp_path / name, [[last]], epochs=1, lr=last) for name, last in (("a", 5.0), ("b", 7.0), ("c", 6.0))
    ]
    _, rows, _ = run_report(*runs, runs[0])
    assert [row["run"][0] for row in rows] == ["b", "c", "a"], "a directory given twice is reported once"


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
    assert method(settings, num) == name


@pytest.mark.parametrize(
    ("paths", "short"),
    [
        (["c/baseline_cifar10_resnet32", "c/grafting_cifar10_resnet32_num4"], ["baseline", "grafting_num4"]),
        (["c/grafting_resnet32", "c/grafting_resnet32_a0.6"], ["grafting", "grafting_a0.6"]),
        (["x/run", "y/run"], ["x", "y"]),
        (["r/num1/seed0", "r/num2/seed0"], ["num1", "num2"]),
    ],
)
def test_names_of_runs_are_shortened_to_what_differs(paths, short):
    assert labels([Path(path) for path in paths]) == short


def test_the_table_fits_120_columns_and_csv_has_all_there_is(tmp_path, run_report, capsys, monkeypatch):
    name = "a-name-that-is-longer-than-anyone-would-ever-think-of"
    runs = [
        make_run(tmp_path / f"{name}{k}", [[50.0 + k, 60.25]] * 2, epochs=2, model="mobilenetv2", cos=True, difflr=True)
        for k in range(2)
    ]
    _, rows, output = run_report(*runs)
    assert max(len(line) for line in output.splitlines() if line.startswith("|")) <= 120
    assert rows[0]["run"].endswith("…")
    table = frame(runs, capsys, monkeypatch)
    assert list(table["network"]) == [1, 2, 1, 2] and set(table["last"]) == {60.25}
    assert set(table["invalid_0.1"]) == {2} and set(table["method"]) == {"grafting of 2, cosine, dlr"}


def test_latex_comes_without_the_notes(tmp_path, run_report, capsys):
    directory = make_run(tmp_path / "a_run", [[50.0]], epochs=2, states=("stopped by SIGINT",))
    _, _, output = run_report(directory, "--format", "latex")
    assert output.startswith("\\begin{tabular}") and output.endswith("\\end{tabular}\n")
    assert "a\\_run: baseline" in output


def test_shortcut_convolutions_are_counted_apart(tmp_path, run_report):
    directory = make_run(tmp_path / "run", [[50.0]], epochs=1)
    torch.save({"net": state_dict((1.0, 0.05), (0.001, 3.0, 4.0))}, directory / "final1.t7")
    _, (row,), output = run_report(directory)
    assert row["<0.1"] == "1"
    assert "Of shortcut convolutions, counted apart: 1 of 3, 1 of 3 (run, network 1)." in output


def test_imagenet_runs_and_results_of_experiments_are_read(tmp_path, run_report):
    make_run(tmp_path / "image", [[50.0, 60.0]] * 2, epochs=2, imagenet=True)
    folder = tmp_path / "results" / "small" / "num1" / "seed0"
    folder.mkdir(parents=True)
    (folder / "metrics1.csv").write_text(HEADER + ROW)
    counts = {
        "total": 8,
        "invalid": {"0.1": 3, "0.01": 1},
        "shortcut_total": 0,
        "shortcut_invalid": {"0.1": 0, "0.01": 0},
    }
    record = {"settings": {"model": "resnet20", "epochs": 1}, "networks": 1, "filters": [counts]}
    (folder / "result.json").write_text(json.dumps(record))
    assert find_runs(tmp_path / "results") == [folder]
    status, rows, _ = run_report(tmp_path / "image", tmp_path / "results")
    assert status == 0
    assert [row["epochs"] for row in rows] == ["2", "2", "2", "1"]
    assert (rows[3]["<0.1"], rows[3]["<0.01"], rows[3]["last %"]) == ("3", "1", "1.00")
    (folder / "metrics1.csv").write_text(HEADER + ROW[:-1])
    assert not len(read_run(folder).networks[0].metrics), "its only row is half-written"


def test_unfinished_networks_are_reported_as_such(tmp_path, run_report):
    states = ("stopped by SIGTERM", "failed the loss became nan | \x1b[31mred", "training")
    directory = make_run(tmp_path / "run", [[50.0, 60.0]] * 3, epochs=200, states=states)
    (directory / "best3.t7").unlink()
    torch.save({"net": state_dict((1.0,)), "epoch": 0}, directory / "ckpt0_0.t7")
    torch.save({"net": state_dict((0.0,)), "epoch": 1}, directory / "ckpt0_1.t7")
    status, rows, output = run_report(directory)
    assert status == 0
    assert [row["epochs"] for row in rows] == ["2", "2 [1]", "2 [2]", "2 [3]"]
    assert "[1] run, network 1: epoch 2 of 200, stopped" in output
    assert "[2] run, network 2: epoch 2 of 200, failed: the loss became nan |  [31mred\n" in output
    assert "[3] run, network 3: epoch 2 of 200, died" in output, "it says that it trains, but no process lives"
    assert rows[3]["<0.1"] == "1", "counted in the newest of its checkpoints"


def test_a_network_without_an_epoch_is_no_damage(tmp_path, run_report):
    directory = make_run(tmp_path / "run", [[50.0]], epochs=2, states=("stopped by SIGINT",))
    for name in ("metrics1.csv", "best1.t7"):
        (directory / name).unlink()
    status, (row,), output = run_report(directory)
    assert (status, row["best %"], row["<0.1"]) == (0, "–", "–")
    assert "[1] run, network 1: stopped" in output and ", no epoch has ended" in output
    (directory / "metrics1.csv").write_text(HEADER)
    assert run_report(directory)[1][0]["best %"] == "–"


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "metrics1.csv is missing": ("metrics1.csv", Path.unlink),
    "metrics1.csv is damaged: 'utf-8' codec": ("metrics1.csv", lambda path: path.write_bytes(b"\xff\xfe\n\x00")),
    "expected rows of epoch, test_accuracy, best": ("metrics1.csv", lambda path: path.write_text("epoch\n1\n")),
    "metrics1.csv is damaged: it has values that are not finite": (
        "metrics1.csv",
        lambda path: path.write_text(HEADER + "0,1\n"),
    ),
    "could not convert string to float: 'what?'": (
        "metrics1.csv",
        lambda path: path.write_text(HEADER + "0,1,1,1,1,what?,1,1,1,1,1\n"),
    ),
    "metrics1.csv is damaged: expected rows of epoch": (
        "metrics1.csv",
        lambda path: path.write_text(HEADER + "0," + ROW),
    ),
    "metrics1.csv ends after 1 of 3 epochs": ("metrics1.csv", lambda path: path.write_text(HEADER + ROW)),
    "coefficients1.csv is damaged: expected": (
        "coefficients1.csv",
        lambda path: path.write_text("epoch,layer\n0,conv1\n"),
    ),
    "final1 is missing": ("final1.t7", Path.unlink),
    "final1.t7 is empty": ("final1.t7", lambda path: path.write_bytes(b"")),
    "final1.t7 is truncated, damaged or": ("final1.t7", cut),
    "final1.t7 holds no state dict": ("final1.t7", lambda path: torch.save({"net": [1]}, path)),
    "run.json is missing": ("run.json", Path.unlink),
    "run.json is unreadable": ("run.json", lambda path: path.write_text("{")),
}


@pytest.mark.parametrize("remark", DAMAGES)
def test_damage_is_a_numbered_sentence_and_the_rest_is_read(tmp_path, run_report, remark):
    directory = make_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2)
    name, damage = DAMAGES[remark]
    damage(directory / name)
    status, (mean, _, second), output = run_report(directory)
    assert status == 0
    assert "[1]" in mean["epochs"] and second["last %"] == "70.00"
    (note,) = [line for line in output.splitlines() if line.startswith("[1] run: ")]
    assert remark in note


def test_only_where_nothing_can_be_read_is_the_exit_status_1(tmp_path, run_report):
    there = make_run(tmp_path / "run", [[50.0]], epochs=1)
    status, rows, output = run_report(there, tmp_path / "nothing here")
    assert (status, rows[1]["run"]) == (0, "nothing here")
    assert "[1] nothing here: there is no such directory" in output
    (tmp_path / "empty").mkdir()
    status, _, output = run_report(tmp_path / "empty")
    assert status == 1 and "[1] empty: not the save directory of a run" in output


def test_means_say_of_how_many():
    assert mean_and_deviation([1.0, 2.0, float("nan")], 2) == "1.50 ± 0.71 (2 of 3)"
    assert mean_and_deviation([float("nan")], 2) == "–"


def test_the_script_runs_from_anywhere_and_ends_quietly_when_its_reader_has_gone(tmp_path):
    directory = make_run(tmp_path / "a run", [[50.0]], epochs=1)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no plots were asked for')")
    command = [sys.executable, ROOT / "analysis" / "report.py", *[directory.name] * 2]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (closed.communicate()[1], closed.returncode) == (b"", 0)
