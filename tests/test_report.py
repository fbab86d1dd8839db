"""The report: what it says of whole, unfinished and damaged runs, and the plots that it draws."""

import json
import os
import socket
import statistics
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grafting_cifar import plots, report
from grafting_cifar.runs import method, read_run

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
    settings = {
        "model": "resnet20",
        "num": num,
        "epochs": epochs,
        "a": 0.4,
        "c": 500,
        "level": "layer",
    } | settings
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
        status = {
            "network": i, "num": num, "state": state, "detail": detail, "epoch": len(values) - 1,
            "epochs": epochs, "accuracy": values[-1], "best": max(values),
            "host": socket.gethostname(), "pid": 2**30, "time": 0.0,
        }  # fmt: skip
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
        status = report.main()
        output = capsys.readouterr().out
        lines = [line.replace("\\|", "¦") for line in output.splitlines() if line.startswith("|")]
        head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return status, [dict(zip(head, row, strict=True)) for row in body], output

    return run


def test_a_row_per_network_and_the_mean_of_a_run(tmp_path, run_report):
    accuracies = [[50.0, 71.5, 70.25], [40.0, 60.0, 68.75]]
    norms = [(1.0, 0.05, 0.005, 0.0), (1.0, 2.0, 0.05, 0.02)]
    make_run(tmp_path / "two", accuracies, norms=norms)
    status, (first, second, mean), _ = run_report(tmp_path / "two")
    assert status == 0
    assert (first["run"], first["network"], first["model"], first["method"]) == (
        "two",
        "1",
        "resnet20",
        "grafting of 2",
    )
    assert (first["epochs"], first["best (%)"], first["last (%)"], first["state"]) == (
        "3",
        "71.50",
        "70.25",
        "done",
    )
    assert (first["invalid at 0.1"], first["invalid at 0.01"]) == ("3 of 4", "2 of 4")
    assert (second["invalid at 0.1"], second["invalid at 0.01"]) == ("2 of 4", "0 of 4")
    assert first["counted in"] == "final"
    assert first["s/epoch"] == "3.00"  # the median of 1, 2 and 3 s of training, and 1 s of the rest
    assert mean["network"] == "mean of 2"
    assert mean["last (%)"] == f"69.50 ± {statistics.stdev([70.25, 68.75]):.2f}"
    assert mean["invalid at 0.1"] == f"2.5 ± {statistics.stdev([3, 2]):.1f}"


@pytest.mark.parametrize(
    ("settings", "num", "name"),
    [
        ({"method": "grafting", "scion": "external", "a": 0.4, "c": 500}, 1, "baseline"),
        ({"cos": True, "difflr": True}, 1, "baseline, cosine"),
        ({"cos": True, "difflr": True}, 2, "grafting of 2, cosine, dlr"),
        ({"method": "average", "a": 0.0}, 3, "average of 3"),
        ({"method": "ema"}, 1, "ema"),
        ({"scion": "noise"}, 1, "baseline, noise scions"),
        ({"steplr": True, "a": 0.6}, 2, "grafting of 2, a 0.6, steps"),
    ],
)
def test_methods_have_a_name_each(settings, num, name):
    assert method(settings, num) == name


def test_baselines_and_settings_are_told_apart(tmp_path, run_report):
    make_run(tmp_path / "a", [[50.0]], epochs=1)
    make_run(tmp_path / "b", [[50.0, 60.0]] * 3, epochs=2, a=0.6, c=5, level="filter", model="vgg16")
    _, rows, _ = run_report(tmp_path / "a", tmp_path / "b", tmp_path / "a")
    methods = {row["run"]: row["method"] for row in rows}
    assert methods == {"a": "baseline", "b": "grafting of 3, filter level, a 0.6, c 5"}
    assert len(rows) == 2 + 4, "a directory given twice is reported once"


def test_only_networks_of_the_same_settings_are_averaged_in_a_plot(tmp_path):
    runs = [
        make_run(tmp_path / name, [[50.0]], epochs=1, **settings)
        for name, settings in (
            ("a", {"classes": 10, "lr": 0.1, "seed": 0}), ("b", {"classes": 10, "lr": 0.1, "seed": 1}),
            ("c", {"classes": 100, "lr": 0.1}), ("d", {"classes": 10, "lr": 0.1, "method": "ema"}),
        )
    ]  # fmt: skip
    found = plots.alike([(run, network) for run in map(read_run, runs, "abcd") for network in run.networks])
    assert {name: len(networks) for name, networks in found.items()} == {
        "resnet20, baseline, classes 10": 2, "resnet20, baseline, classes 100": 1, "resnet20, ema": 1,
    }  # fmt: skip


def test_directories_of_one_name_are_told_apart(tmp_path):
    assert report.labels([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]


def test_shortcut_convolutions_are_counted_apart(tmp_path, run_report):
    directory = make_run(tmp_path / "run", [[50.0]], epochs=1)
    torch.save({"net": state_dict((1.0, 0.05), (0.001, 3.0, 4.0))}, directory / "final1.t7")
    _, (row, mean), _ = run_report(directory)
    assert row["invalid at 0.1"] == "1 of 2, shortcuts 1 of 3"
    assert mean["invalid at 0.1"] == "1.0"


def test_imagenet_runs_are_read(tmp_path, run_report):
    status, rows, _ = run_report(make_run(tmp_path / "run", [[50.0, 60.0]] * 2, epochs=2, imagenet=True))
    assert status == 0
    assert [row["counted in"] for row in rows] == ["final", "final", ""]


def test_unfinished_networks_are_reported_as_such(tmp_path, run_report):
    states = ("stopped by SIGTERM", "failed the loss became nan | \x1b[31mred", "training")
    directory = make_run(tmp_path / "run", [[50.0, 60.0]] * 3, epochs=200, states=states)
    (directory / "best3.t7").unlink()
    torch.save({"net": state_dict((1.0,)), "epoch": 0}, directory / "ckpt0_0.t7")
    torch.save({"net": state_dict((0.0,)), "epoch": 1}, directory / "ckpt0_1.t7")
    status, rows, output = run_report(directory)
    assert status == 0
    assert rows[0]["state"] == "epoch 2 of 200, stopped by SIGTERM"
    assert rows[1]["state"] == "epoch 2 of 200, failed: the loss became nan ¦ [31mred"
    assert rows[2]["state"] == "epoch 2 of 200, died", "it says that it trains, but no process lives"
    assert [row["counted in"] for row in rows[:3]] == ["best", "best", "ckpt0_1.t7"]
    assert rows[2]["invalid at 0.1"] == "1 of 1"
    assert "\x1b" not in output


def test_a_network_without_an_epoch_is_no_damage(tmp_path, run_report):
    directory = make_run(tmp_path / "run", [[50.0]], epochs=2, states=("stopped by SIGINT",))
    for name in ("metrics1.csv", "best1.t7"):
        (directory / name).unlink()
    status, (row, _), _ = run_report(directory)
    assert (status, row["best (%)"], row["counted in"]) == (0, "–", "–")
    assert row["state"] == "stopped by SIGINT; no epoch has ended"


def test_a_half_written_last_row_is_left_out_and_said(tmp_path, run_report):
    directory = make_run(tmp_path / "run", [[50.0, 60.0]], epochs=9, states=("stopped by SIGINT",))
    with open(directory / "metrics1.csv", "a") as file:
        file.write("2,0.1,1,50,1,99.")
    status, (row, _), _ = run_report(directory)
    assert (status, row["epochs"], row["best (%)"]) == (0, "2", "60.00")
    assert "the last row of metrics1.csv is half-written" in row["state"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = {
    "metrics1.csv is missing": ("metrics1.csv", Path.unlink),
    "metrics1.csv is unreadable": ("metrics1.csv", lambda path: path.write_bytes(b"\xff\xfe\n\x00")),
    "metrics1.csv has no column test_accuracy": ("metrics1.csv", lambda path: path.write_text("epoch\n1\n")),
    "metrics1.csv has 2 fields in line 2": ("metrics1.csv", lambda path: path.write_text(HEADER + "0,1\n")),
    "damaged in column test_accuracy": (
        "metrics1.csv", lambda path: path.write_text(HEADER + "0,1,1,1,1,what?,1,1,1,1,1\n")
    ),
    "epoch 2 follows epoch 0": (
        "metrics1.csv", lambda path: path.write_text(HEADER + ROW + "2" + ROW[1:])
    ),
    "metrics1.csv ends at epoch 0 of 3": (
        "metrics1.csv", lambda path: path.write_text(HEADER + ROW)
    ),
    "coefficients1.csv is missing": ("coefficients1.csv", Path.unlink),
    "coefficients1.csv is damaged": (
        "coefficients1.csv", lambda path: path.write_text("epoch,layer,coefficient\n0,conv1,nan\n")
    ),
    "final1 is missing": ("final1.t7", Path.unlink),
    "final1.t7 is empty": ("final1.t7", lambda path: path.write_bytes(b"")),
    "final1.t7 is truncated or damaged": ("final1.t7", cut),
    "final1.t7 holds no state dict": ("final1.t7", lambda path: torch.save({"net": [1]}, path)),
    "run.json is missing": ("run.json", Path.unlink),
    "run.json is unreadable": ("run.json", lambda path: path.write_text("[" * 100_000)),
}  # fmt: skip


@pytest.mark.parametrize("remark", DAMAGES)
def test_damage_is_named_in_the_row_and_fails_the_report(tmp_path, run_report, remark):
    directory = make_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2)
    name, damage = DAMAGES[remark]
    damage(directory / name)
    status, (first, second, _), _ = run_report(directory)
    assert status == 1
    assert remark in first["state"]
    assert second["state"] == "done"
    assert first["counted in"].startswith("best" if name == "final1.t7" else "final")


def test_what_is_not_a_run_is_reported(tmp_path, run_report):
    status, rows, _ = run_report(make_run(tmp_path / "run", [[50.0]], epochs=1), tmp_path / "nothing here")
    assert status == 1
    assert rows[2]["run"] == "nothing here"
    assert rows[2]["state"] == "not the save directory of a run"


def width(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", data[16:20])[0]


def test_plots_are_a_thousand_pixels_wide(tmp_path, run_report):
    base = make_run(tmp_path / "_base $line", [[50.0 + k for k in range(30)]], epochs=30)
    runs = [make_run(tmp_path / name, [[50.0, 60.0, 61.0]] * num) for name, num in (("two", 2), ("eight", 8))]
    status, _, output = run_report(base, *runs, "--plots", tmp_path / "plots" / "here")
    assert status == 0
    paths = [Path(line.removeprefix("- ")) for line in output.splitlines() if line.startswith("- ")]
    names = [
        "accuracy.png",
        "coefficients_two.png",
        "coefficients_eight.png",
        "filter_norms.png",
        "comparison.png",
    ]
    assert [path.name for path in paths] == names
    assert [width(path) for path in paths] == [1000] * 5


def test_a_damaged_run_is_plotted_as_far_as_it_goes(tmp_path, run_report):
    directory = make_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2)
    (directory / "metrics1.csv").unlink()
    (directory / "coefficients2.csv").unlink()
    status, _, output = run_report(directory, tmp_path / "nothing", "--plots", tmp_path / "plots")
    assert status == 1
    assert [path.name for path in sorted((tmp_path / "plots").iterdir())] == [
        "accuracy.png",
        "filter_norms.png",
    ]
    assert "plots/accuracy.png" in output


def test_plots_that_cannot_be_written_are_one_sentence(tmp_path, run_report):
    (tmp_path / "file").write_text("")
    status, *_ = run_report(make_run(tmp_path / "run", [[50.0]], epochs=1), "--plots", tmp_path / "file")
    assert status == 1


def test_the_script_runs_from_anywhere_and_imports_matplotlib_for_plots_alone(tmp_path):
    directory = make_run(tmp_path / "a run", [[50.0]], epochs=1)
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no plots here')")
    command = [sys.executable, ROOT / "grafting_cifar" / "report.py", directory.name]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "| a run | 1 " in result.stdout
