"""The experiments' report: its figures, what it says of missing and damaged results, and its plots."""

import math
import sys

import numpy
import pandas as pd
import pytest
from finished import change, write_ensemble, write_run
from PIL import Image
from scipy import stats

from experiments import plots, report
from experiments.results import Cell, gain, read_results
from experiments.tables import PRESETS, TABLES, Row, Table

BASE, TWO, COSINE, DLR = (f"cifar10_resnet20_{flags}" for flags in ("num1", "num2", "num1_cos", "num2_difflr_cos"))
EMA, AVERAGE, ENSEMBLE = (f"cifar10_resnet20_{flags}" for flags in ("num1_ema", "num2_average", "num1_ensemble2"))
ROWS = {
    "single": "--num 1",
    "grafted": "--num 2",
    "ema": "--num 1 --method ema",
    "average": "--num 2 --method average",
    "both": "2 x --num 1",
    "noise": "--num 1 --scion noise",
}


def make_table(*labels, kind="accuracy", paper=()):
    """Rows that are compared with the first, which is a baseline."""
    figures = [*paper, *[None] * len(labels)]
    rows = [("resnet20", f"baseline {label}" if label == "single" else label, ROWS[label]) for label in labels]
    rows = [(*row, figure) for row, figure in zip(rows, figures, strict=False)]
    return Table("A table", "A note.", rows, kind, datasets=("CIFAR-10",))


@pytest.fixture
def run_report(tmp_path, monkeypatch, capsys):
    """Runs report.py on tables of the test's own; returns exit status, report and errors."""

    def run(*tables, arguments=(), with_plots=False, names=("main", "fair")):
        with monkeypatch.context() as patch:
            for name, table in zip(names, tables, strict=False):
                patch.setitem(TABLES, name, table)
            command = ["report.py", *arguments, "--preset", "small", "--results", str(tmp_path)]
            command[1:1] = names[: len(tables)]
            patch.setattr(sys, "argv", command)
            if not with_plots:
                patch.setattr(plots, "plots", lambda *_: ())
            try:
                status = report.main()
            except SystemExit as exit:
                status = exit.code
        return status, *capsys.readouterr()

    return run


def row_of(text, label):
    """The cells of the first line of a table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.split("|")[1:-1]]


SINGLE, GRAFTED = "ResNet-20, baseline single", "ResNet-20, grafted"
PAIR = make_table("single", "grafted")


# ---- Figures


def test_mean_deviation_and_interval_are_those_of_the_formulas(tmp_path, run_report):
    one, other = [80.0, 81.0, 79.5, 90.0], [82.0, 82.6, 81.2]
    for seed, value in enumerate(one):
        write_run(tmp_path, BASE, seed, [[50.0, value]])
    for seed, value in enumerate(other):
        write_run(tmp_path, TWO, seed, [[50.0, value - 1], [50.0, value + 1]])
    status, text, _ = run_report(PAIR)
    assert status == 0 and (tmp_path / "small/report.md").read_text() == text

    gains = numpy.subtract(other, one[:3])  # the fourth seed has no partner
    reach = stats.t.ppf(0.975, 2) * numpy.std(gains, ddof=1) / math.sqrt(3)
    low, high = gains.mean() - reach, gains.mean() + reach
    _, best, last, _, last_gain, *_, n = row_of(text, GRAFTED)
    assert last == f"{numpy.mean(other):.2f} ± {numpy.std(other, ddof=1):.2f}" and n == "3"
    assert last_gain == f"{gains.mean():+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    assert best == "82.93 ± 0.70"
    assert row_of(text, SINGLE)[1:5] == ["82.62 ± 4.96", "82.62 ± 4.96", "–", "–"]
    assert low > 0 and "baseline: after the last epoch ahead 1 of 1." in text


def cell(values, members=()):
    columns = {"last": values, "alone": math.nan, "members": [list(members)] * len(values)}
    return Cell(Row("CIFAR-10", "a row", None, "a run", None), pd.DataFrame(columns, index=range(len(values))))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [([81.0, 82.0], [80.0], 1), ([81.1, 81.4], [80.0, 80.3], 1.1), ([80.0], [], None)],
    ids=["one seed", "no spread", "none"],
)
def test_a_gain_without_spread_has_no_interval(one, other, expected):
    found = gain(cell(one), cell(other), "last")
    assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(found.mean) if expected is None else found.mean == pytest.approx(expected)


def test_an_ensemble_is_compared_with_the_mean_of_its_own_networks(tmp_path, run_report):
    for seed in (0, 1, 100, 101):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed % 100]])
    for seed in (0, 1):
        write_ensemble(tmp_path, ENSEMBLE, seed, 85.0 + seed, [70.0, 72.0 + seed])
    _, text, _ = run_report(make_table("single", "both"))
    assert row_of(text, "ResNet-20, both †")[4].startswith("+14.25 [")  # 85 - 71, and 86 - 71.5
    assert row_of(text, SINGLE)[-1] == "2"  # those of seeds 100 and 101 are there for the ensemble alone
    assert "ResNet-20, both: its networks alone 71.25 ± 0.35 (mean); their uniform weight average 10.00." in text


def test_best_is_picked_by_validation_where_there_is_one(tmp_path, run_report):
    accuracies = [[70.0, 90.0, 80.0], [75.0, 60.0, 85.0]]
    write_run(tmp_path, BASE, 0, accuracies[:1])
    write_run(tmp_path, TWO, 0, accuracies, validation=[[50.0, 51.0, 52.0], [99.0, 51.0, 52.0]])
    _, text, _ = run_report(PAIR)
    assert row_of(text, SINGLE)[1:3] == ["90.00 (on the test set)", "80.00"]
    assert row_of(text, GRAFTED)[1:4] == ["75.00 (by validation)", "82.50", "–"]  # they cannot be compared
    assert "picked by validation ahead" not in text and "picked by validation open" not in text


# ---- Rivals and the reading


def test_rivals_cost_no_more_and_have_the_same_baseline(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, BASE, seed, [[50.0, 80 + 0.1 * seed]])
        write_run(tmp_path, BASE, 100 + seed, [[50.0, 80 + 0.1 * seed]])
        write_run(tmp_path, TWO, seed, [[50.0, 82 + 0.1 * seed]] * 2)
        write_run(tmp_path, EMA, seed, [[50.0, 83 + 0.1 * seed]], method="ema")
        write_run(tmp_path, AVERAGE, seed, [[50.0, 60.0, 90.0 + 0.1 * seed]] * 2, method="average")  # costs more
        write_ensemble(tmp_path, ENSEMBLE, seed, 81 + 0.1 * seed, [79.0, 81.0])
    _, text, _ = run_report(make_table("single", "grafted", "ema", "average", "both"))
    lines = [[part.strip() for part in line.split("|")[2:5]] for line in text.splitlines() if " : " in line]
    assert lines == [["ResNet-20, ema", "4 : 2", "−1.00 [–]"], ["ResNet-20, both", "4 : 4", "+1.00 [–]"]]
    assert "no more training: after the last epoch open for want of seeds 2 of 2." in text


def test_a_pair_is_counted_once_whichever_tables_it_stands_in(tmp_path, run_report):
    for seed in range(2):
        for name, value, networks in ((BASE, 80, 1), (EMA, 85, 1), (TWO, 82, 2)):
            method = "ema" if name == EMA else "grafting"
            write_run(tmp_path, name, seed, [[50.0, value + 0.1 * networks * seed]] * networks, method=method)
    table = make_table("single", "grafted", "ema")
    _, text, _ = run_report(table, table)
    assert "baseline: after the last epoch ahead 1 of 1." in text
    assert "no more training: after the last epoch behind 1 of 1 (ResNet-20, grafted behind ResNet-20, ema on" in text


def test_what_the_schedule_does_is_told_apart_from_grafting(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed]], cos=False)
        write_run(tmp_path, COSINE, seed, [[50.0, 85.0 + seed]], cos=True)
        write_run(tmp_path, DLR, seed, [[50.0, 82.0 + 2 * seed]] * 2, cos=True)
    _, text, _ = run_report(TABLES["main"])
    assert "gains +5.00 [–] after the last epoch (ResNet-20, baseline, cosine against ResNet-20, baseline, " in text
    assert text.count("The cosine alone") == 1


@pytest.mark.parametrize("settings", [{"a": 0.0}, {"method": "average"}, {"method": "papa"}])
def test_an_average_under_another_name_is_no_grafting(tmp_path, run_report, settings):
    for seed in range(2):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed]])
        write_run(tmp_path, TWO, seed, [[50.0, 80.0 + seed]] * 2, **settings)
    _, text, _ = run_report(PAIR)
    assert "No grafting run" in text


# ---- What stands beside


def test_missing_and_damaged_results_count_as_not_run_and_are_named(tmp_path, run_report):
    folders = [write_run(tmp_path, BASE, seed, [[50.0, 80.0 + seed]]) for seed in range(6)]
    (folders[0] / "result.json").write_bytes(b'{"name": "a", "sett')
    (folders[1] / "metrics1.csv").write_text((folders[1] / "metrics1.csv").read_text()[:-4])
    (folders[2] / "metrics1.csv").unlink()
    change(folders[5], command="python grafting_cifar/grafting.py --lr 0.5")
    status, text, _ = run_report(PAIR)
    assert status == 0
    assert row_of(text, SINGLE)[1:3] == ["83.50 ± 0.71"] * 2 and row_of(text, SINGLE)[-1] == "2"
    assert row_of(text, GRAFTED)[1:5] == ["not run", "not run", "–", "–"]
    words = {0: "result.json", 1: "metrics1.csv", 2: "metrics1.csv is missing", 5: "of another command"}
    for seed, what in words.items():
        assert what in text.split(f"- {BASE}/seed{seed}: ")[1].splitlines()[0]
    for folder in folders[3:5]:
        (folder / "result.json").write_text("[]")
    status, text, _ = run_report(PAIR)
    assert status == 1 and "No result could be read" in text


@pytest.mark.parametrize(
    "changed",
    [{"settings": {}}, {"command": None}, {"networks": 2}, {"filters": [[]]}, {"versions": []}, {"filters": []}],
    ids=str,
)
def test_odd_records_are_damage(tmp_path, changed):
    change(write_run(tmp_path, BASE, 0, [[50.0, 80.0]]), **changed)
    frame, damages = read_results(tmp_path / "small", "small")
    assert len(frame) == 0 and len(damages) == 1 and damages[0].startswith(f"{BASE}/seed0: ")


def test_absent_results_say_what_to_type(tmp_path, run_report):
    status, text, _ = run_report(PAIR, arguments=["--out", str(tmp_path / "out")], with_plots=True)
    assert status == 0 and "`python experiments/run.py main --preset small`" in text
    assert row_of(text, GRAFTED)[1:] == ["not run", "not run", "–", "–", "0"]
    assert (tmp_path / "out/report.md").exists() and not (tmp_path / "small").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_all_tables_have_their_place(tmp_path, monkeypatch, capsys, preset):
    monkeypatch.setattr(sys, "argv", ["report.py", "--preset", preset, "--results", str(tmp_path)])
    assert report.main() == 0
    text = capsys.readouterr().out
    names = set(TABLES) if preset in ("paper", "smoke") else set(TABLES) - {"imagenet"}
    assert all(f"| `{name}` " in text and f"## {TABLES[name].title}\n" in text for name in names)
    assert ("mutual learning" in text) == ("92.83" in text) == (preset == "paper")


@pytest.mark.parametrize("count", [0, 1])
def test_scions_that_were_never_needed_are_named(tmp_path, run_report, count):
    write_run(tmp_path, "cifar10_resnet20_num1_scion_noise", 0, [[50.0, 80.0]], invalid=(count, 0), scion="noise")
    _, text, _ = run_report(make_table("single", "noise"))
    assert ("noise: no filter was invalid after any epoch" in text) == (count == 0)


def test_invalid_filters_beside_the_papers(tmp_path, run_report, monkeypatch):
    for seed, count in enumerate((30, 34)):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0]], invalid=(count, 7))
    _, text, _ = run_report(make_table("single", "grafted", kind="filters"))
    assert row_of(text, SINGLE) == [SINGLE, "–", "32.0 ± 2.8 of 1136", "7.0 ± 0.0 of 1136", "–", "2"]
    assert row_of(text, GRAFTED)[2:] == ["not run", "not run", "–", "0"]
    assert row_of(run_report(PAIR)[1], SINGLE)[-2:] == ["32.0 ± 2.8 of 1136", "2"]  # beside accuracies, too


def test_settings_machine_and_time_stand_below(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, BASE, seed, [[50.0, 80.0]], lr=0.1, cos=False)
        write_run(tmp_path, TWO, seed, [[50.0, 80.0]] * 2, lr=0.1, cos=True)
    _, text, _ = run_report(PAIR)
    shared = next(line for line in text.splitlines() if line.startswith("Settings of all rows"))
    assert "`model resnet20`" in shared and "`lr 0.1`" in shared and "cos" not in shared and "seed" not in shared
    assert "Hardware: 2 cores. Versions: python 3.11, torch 2.9. Precision: float32." in shared
    below = text.split(shared)[1]
    assert row_of(below, GRAFTED) == [GRAFTED, SINGLE, "`num 2`, `cos True`", "2", "4", "8 s", "0, 1, 2"]


# ---- Plots


def test_plots_show_something_and_are_small(tmp_path, run_report):
    for seed in range(2):
        for name, networks in ((BASE, 1), (TWO, 2), (f"{BASE}_ema", 1)):
            accuracies = [[50.0 + 10 * seed, 70.0, 80.0 + networks + seed]] * networks
            write_run(tmp_path, name, seed, accuracies, coefficients=networks > 1, invalid=(40 - seed, 30))
        write_ensemble(tmp_path, ENSEMBLE, seed, 84.0 + seed, [81.0, 82.0])
    table = make_table("single", "grafted", "ema", "both")
    _, text, _ = run_report(table, table._replace(kind="filters"), with_plots=True)
    names = {f"main-CIFAR-10-{kind}" for kind in ("gain", "accuracy", "coefficients", "invalid")}
    names.add("fair-CIFAR-10-invalid")
    assert {path.stem for path in (tmp_path / "small/plots").iterdir()} == names
    for name in names:
        path = tmp_path / f"small/plots/{name}.png"
        assert f"](plots/{name}.png)" in text and path.stat().st_size < 200_000
        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))
        assert pixels.shape[1] == 1400 and 0.01 < (pixels < 200).any(-1).mean() < 0.9


def test_the_end_of_the_course_shows_runs_of_all_lengths(tmp_path):
    write_run(tmp_path, BASE, 0, [[50.0 + epoch for epoch in range(24)]])
    write_run(tmp_path, TWO, 0, [[50.0 + epoch for epoch in range(48)]] * 2)
    frame, _ = read_results(tmp_path / "small", "small")
    rows = [Row("CIFAR-10", "short", None, BASE, None), Row("CIFAR-10", "long", "short", TWO, None)]
    cells = {row.label: Cell(row, frame[frame["run"] == row.run].set_index("seed")) for row in rows}
    end = dict(plots.plots(cells, "", "accuracy", set()))["accuracy"].axes[1]
    assert [(line.get_label(), list(line.get_xdata())) for line in end.lines] == [
        ("short", pytest.approx([100 * epoch / 24 for epoch in range(19, 25)])),
        ("long", pytest.approx([100 * epoch / 48 for epoch in range(37, 49)])),
    ]
