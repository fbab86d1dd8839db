"""The experiments' report: its figures, what it says of missing and damaged results, and its plots."""

import math

import numpy
import pandas
import pytest
from finished import write_ensemble, write_run
from PIL import Image
from saved import call
from scipy import stats

from experiments import plots, report
from experiments.results import Cell, cells_of, pairs_of, read_results
from experiments.tables import TABLES, Table, rows

BASE, TWO, COSINE, DLR = (f"cifar10_resnet20_{flags}" for flags in ("num1", "num2", "num1_cos", "num2_difflr_cos"))
EMA, ENSEMBLE = (f"cifar10_resnet20_{flags}" for flags in ("num1_ema", "num1_ensemble2"))
FLAGS = {"single": "--num 1", "grafted": "--num 2", "ema": "--num 1 --method ema", "both": "2 x --num 1"}
FLAGS |= {"six": "6 x --num 1", "average": "--num 2 --difflr --cos --method average"}
SINGLE, GRAFTED = "ResNet-20, baseline single", "ResNet-20, grafted"


def make_table(*methods):
    """Rows that are compared with a single network."""
    rows = [("resnet20", "baseline single", FLAGS["single"], None)]
    rows += [("resnet20", method, FLAGS[method], None) for method in methods]
    return Table("A table", "A note.", rows, datasets=("CIFAR-10",))


PAIR = make_table("grafted")


@pytest.fixture
def run_report(tmp_path, monkeypatch):
    """Runs report.py on tables of the test's own, in the places of two; returns exit status and report."""

    def run(*tables, with_plots=False, preset="small"):
        names = ["main", "fair"][: len(tables)]
        with monkeypatch.context() as patch:
            for name, table in zip(names, tables, strict=True):
                patch.setitem(TABLES, name, table)
            if not with_plots:
                patch.setattr(plots, "draw", lambda *_: [])
            status, text, _ = call(report, *names, "--preset", preset, "--results", tmp_path)
        assert (tmp_path / preset / "report.md").read_text() == text
        return status, text

    return run


def row_of(text, label):
    """The first row of this label, as {column: cell}."""
    lines = text.splitlines()
    place = next(k for k, line in enumerate(lines) if line.startswith(f"| {label} "))
    top = max(k for k in range(place) if lines[k].startswith("| method"))
    return dict(zip(*([cell.strip() for cell in lines[k].split("|")[1:-1]] for k in (top, place)), strict=True))


# ---- Figures


def test_mean_deviation_and_interval_are_those_of_the_formulas(tmp_path, run_report):
    one, other = [80.0, 81.0, 79.5, 90.0], [82.0, 82.6, 81.2]
    for seed, value in enumerate(one):
        write_run(tmp_path, BASE, seed, [[50.0, value]])
    for seed, value in enumerate(other):
        write_run(tmp_path, TWO, seed, [[50.0, value - 1], [50.0, value + 1]])
    status, text = run_report(PAIR)
    gains = numpy.subtract(other, one[:3])  # the fourth seed has no partner
    reach = stats.t.ppf(0.975, 2) * numpy.std(gains, ddof=1) / math.sqrt(3)
    low, high = gains.mean() - reach, gains.mean() + reach
    row = row_of(text, GRAFTED)
    assert row["last"] == f"{numpy.mean(other):.2f} ± {numpy.std(other, ddof=1):.2f}" and row["n"] == "3"
    assert row["gain of last"] == f"{gains.mean():+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    assert row["best, on the test set"] == "82.93 ± 0.70"  # of the better network
    assert row_of(text, SINGLE)["last"] == "82.62 ± 4.96"
    assert status == 0 and low > 0 and "baseline: after the last epoch ahead 1 of 1." in text


def test_an_ensemble_is_compared_with_the_mean_of_its_own_networks(tmp_path, run_report):
    for seed in (0, 1, 100, 101):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed % 100]])
    for seed in (0, 1):
        write_ensemble(tmp_path, ENSEMBLE, seed, 85.0 + seed, [70.0, 72.0 + seed])
    _, text = run_report(make_table("both"))
    assert row_of(text, "ResNet-20, both †")["gain of last"].startswith("+14.25 [")  # 85 - 71, and 86 - 71.5
    assert row_of(text, SINGLE)["n"] == "2"  # those of seeds 100 and 101 are there for the ensemble alone
    assert (
        "ResNet-20, both: its networks alone 71.25 ± 0.35 (mean); their uniform weight average 10.00 (1 of 2)." in text
    )


@pytest.mark.parametrize("val", [500, 0])  # training images held out, or a folder val/
def test_best_is_picked_by_validation_where_there_is_one(tmp_path, run_report, val):
    write_run(tmp_path, BASE, 0, [[70.0, 90.0, 80.0]], validation=[[60.0, 61.0, 62.0]], val=val)
    validation = [[50.0, 51.0, 52.0], [99.0, 51.0, 52.0]]
    write_run(tmp_path, TWO, 0, [[70.0, 90.0, 80.0], [75.0, 60.0, 85.0]], validation=validation, val=val)
    _, text = run_report(PAIR)
    assert row_of(text, GRAFTED)["best, by validation"] == "75.00"
    assert row_of(text, GRAFTED)["gain of best"] == "−5.00 [–]"
    assert "at the epoch picked by validation open for want of seeds 1 of 1." in text


def test_rivals_cost_no_more_have_the_same_baseline_and_rates_and_each_pair_counts_once(tmp_path, run_report):
    for seed in range(3):
        for member in seed, 100 + seed:
            write_run(tmp_path, BASE, member, [[50.0, 80 + 0.1 * seed]])
        write_run(tmp_path, TWO, seed, [[50.0, 82 + 0.2 * seed]] * 2)
        write_run(tmp_path, EMA, seed, [[50.0, 83 + 0.1 * seed]])
        write_ensemble(tmp_path, ENSEMBLE, seed, 81 + 0.2 * seed, [79.0, 81.0])
        write_ensemble(tmp_path, "cifar10_resnet20_num1_ensemble6", seed, 90.0, [79.0] * 6)  # costs more
        write_run(tmp_path, f"{DLR}_average", seed, [[50.0, 70.0]] * 2)  # at other rates
    table = make_table("grafted", "ema", "both", "six", "average")
    _, text = run_report(table, table)
    rivals = [[part.strip() for part in line.split("|")[2:5]] for line in text.splitlines() if " : " in line]
    expected = [["ResNet-20, ema", "60 : 30", "−0.90 [−1.15, −0.65]"], ["ResNet-20, both", "60 : 60", "+1.00 [–]"]]
    assert rivals == expected * 2
    assert "baseline: after the last epoch ahead 1 of 1." in text
    said = "after the last epoch behind 1, open for want of seeds 1 of 2 (ResNet-20, grafted behind ResNet-20, ema on"
    assert f"no more training: {said}" in text


def test_what_the_schedule_does_is_told_apart_from_grafting(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed]])
        write_run(tmp_path, COSINE, seed, [[50.0, 85.0 + seed]])
        write_run(tmp_path, DLR, seed, [[50.0, 82.0 + 2 * seed]] * 2)
    _, text = run_report(TABLES["main"])
    assert "gains +5.00 [–] after the last epoch (ResNet-20, baseline, cosine against ResNet-20, baseline, " in text
    assert text.count("The cosine alone") == 1


def test_on_imagenet_too_where_the_cosine_is_the_default():
    cells = {row.label: Cell(row, pandas.DataFrame({"epochs": [90]})) for row in rows("imagenet", "paper")}
    pairs = [(one.row.label, other.row.label) for kind, one, other in pairs_of(cells) if kind == "schedule"]
    names = "ResNet-18", "ResNet-34", "ResNet-50"
    assert pairs == [(f"{name}, baseline, cosine", f"{name}, baseline, steps") for name in names]


def test_a_gain_over_fewer_seeds_than_its_row_has_says_over_how_many(tmp_path, run_report, monkeypatch):
    labels = []
    monkeypatch.setattr(plots, "save", lambda figure, path: labels.append(figure.axes[0].get_yticklabels()) or path)
    for seed in range(4):
        write_run(tmp_path, TWO, seed, [[50.0, 82.0 + seed]] * 2)
    for seed in range(2):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0]])
    _, text = run_report(PAIR, with_plots=True)
    assert (
        row_of(text, GRAFTED)["gain of last"] == "+2.50 [−3.85, +8.85] (2 of 4)" and row_of(text, GRAFTED)["n"] == "4"
    )
    assert [label.get_text() for label in labels[0]] == [f"{GRAFTED}  (n = 2)"]


# ---- What stands beside


def test_missing_and_damaged_results_count_as_not_run_and_are_named(tmp_path, run_report):
    folders = [write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed]]) for seed in range(5)]
    (folders[0] / "result.json").write_bytes(b'{"name": "a", "sett')
    (folders[1] / "metrics1.csv").unlink()
    record = (folders[4] / "result.json").read_text()
    (folders[4] / "result.json").write_text(record.replace("--epochs 30", "--epochs 3"))
    status, text = run_report(PAIR)
    assert status == 0
    row = row_of(text, SINGLE)
    assert row["last"] == "82.50 ± 0.71" and row_of(text, GRAFTED)["last"] == "not run" and "gain of last" not in row
    for seed, what in {0: "result.json", 1: "metrics1.csv ends after epoch 0 of", 4: "of another command"}.items():
        assert what in text.split(f"- {BASE}/seed{seed}: ")[1].splitlines()[0]
    for folder in folders[2:4]:
        (folder / "result.json").write_text("[]")
    status, text = run_report(PAIR)
    assert status == 1 and "No result is there yet" in text


@pytest.mark.parametrize("preset", ["paper", "small"])
def test_all_tables_have_their_place(tmp_path, run_report, preset):
    status, text = run_report(preset=preset)
    names = set(TABLES) if preset == "paper" else set(TABLES) - {"imagenet"}
    assert status == 0 and all(f"## {TABLES[name].title}\n" in text for name in names)
    assert all(f"`python experiments/run.py {name} --preset {preset} --results {tmp_path}`" in text for name in names)
    assert ("RePr" in text) == ("92.83" in text) == ("36/1136" in text) == (preset == "paper")


def test_tables_that_a_preset_does_not_run_leave_its_report_alone(tmp_path):
    status, _, errors = call(report, "imagenet", "--preset", "small", "--results", tmp_path)
    assert status == 2 and "small runs nothing of imagenet" in errors and not any(tmp_path.iterdir())


def test_filters_information_flags_machine_and_time_stand_beside_the_accuracies_and_are_drawn(tmp_path, run_report):
    for seed, count in enumerate((30, 34)):
        more = {"information": 20.5 + seed, "amp": True}
        write_run(tmp_path, BASE, seed, [[50.0, 70.0, 80.0]], invalid=(count, 7), **more)
        write_run(tmp_path, TWO, seed, [[50.0, 70.0, 80.0 + seed]] * 2, information=20.0)
    _, text = run_report(PAIR, with_plots=True)
    row = row_of(text, SINGLE)
    assert row["invalid, below 0.1"] == "32.0 ± 2.8 of 1136" and row["invalid, below 0.01"] == "7.0 ± 0.0 of 1136"
    assert row["information (nats)"] == "21.0 ± 0.7" and row["last"] == "80.00 ± 0.00"
    assert "`--epochs 30 --step_epochs 9 --images 10000 " in text
    named = f"{SINGLE} (bfloat16); {GRAFTED} (float32)."
    assert f"In different precisions, which may be part of the differences: {named}\n" in text
    row = row_of(text.split("Hardware: 2 cores (4 runs). Versions: python 3.11, torch 2.9 (4 runs). ")[1], GRAFTED)
    assert list(row.values()) == [GRAFTED, SINGLE, "`--num 2`", "60", "12 s", "0, 1"]

    kinds = ("gain", "accuracy", "coefficients", "invalid", "information")
    paths = {path.name: path for path in (tmp_path / "small" / "plots").iterdir()}
    assert set(paths) == {f"main-CIFAR-10-{kind}.png" for kind in kinds}
    for name, path in paths.items():
        assert f"](plots/{name})" in text and path.stat().st_size < 200_000
        pixels = numpy.asarray(Image.open(path).convert("RGB"))
        assert pixels.shape[1] == 1400 and 0.01 < (pixels < 200).any(-1).mean() < 0.9


def test_a_row_that_failed_is_named_at_the_edge_of_the_gains_and_leaves_the_others_their_scale(tmp_path, monkeypatch):
    monkeypatch.setitem(TABLES, "main", make_table("grafted", "ema"))
    for seed in (0, 1, 2):
        for name, accuracy in ((BASE, 60.0), (TWO, 61.0 + seed / 10), (EMA, 10.0)):
            write_run(tmp_path, name, seed, [[accuracy]] * (1 + (name == TWO)))
    cells = cells_of("main", "small", read_results(tmp_path / "small", "small")[0])["CIFAR-10"]
    panel = plots.gains(cells, "Gains").axes[0]
    assert [text.get_text() for text in panel.texts] == ["◂ −50.0"] * 2
    assert -2 < panel.get_xlim()[0] < panel.get_xlim()[1] < 3
