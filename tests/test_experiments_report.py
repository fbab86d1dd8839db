"""The experiments' report: its figures, what it says of missing and damaged results, and its plots."""

import json
import math
import sys

import numpy
import pytest
from finished import write_ensemble, write_run
from PIL import Image
from scipy import stats

from experiments import figures, report, summary
from experiments.tables import PRESETS, Entry, Row, Table


def make_table(*rows, name="main", kind="accuracy", dataset="CIFAR-10"):
    """Rows as (label, baseline, run) or with the paper's figure behind."""
    rows = [Row(label, baseline, {dataset: Entry(run, *(paper or [None]))}) for label, baseline, run, *paper in rows]
    return Table(name, f"The {name} table", "A note.", kind, rows, "the paper's README")


@pytest.fixture
def run_report(tmp_path, monkeypatch, capsys):
    """Runs report.py on tables of the test's own, by default without plots; returns exit status, report and errors."""

    def run(tables, *arguments, plots=False):
        if tables:
            monkeypatch.setattr(report, "tables", lambda preset: {table.name: table for table in tables})
        monkeypatch.setattr(sys, "argv", ["report.py", "--preset", "small", "--results", str(tmp_path), *arguments])
        if not plots:
            monkeypatch.setattr(figures, "draw", lambda *arguments: {})
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


PAIR = make_table(("single", None, "a", 92.63), ("grafted", "single", "b", 93.33))


def test_mean_deviation_and_interval_are_those_of_the_formulas(tmp_path, run_report):
    one, other = [80.0, 81.0, 79.5, 90.0], [82.0, 82.6, 81.2]
    for seed, value in enumerate(one):
        write_run(tmp_path, "a", seed, [[50.0, value]])
    for seed, value in enumerate(other):
        write_run(tmp_path, "b", seed, [[50.0, value - 1], [50.0, value + 1]])
    write_run(tmp_path, "b", 100, [[50.0, 10.0]])  # is there for an ensemble alone
    status, text, _ = run_report([PAIR])
    assert status == 0 and (tmp_path / "small/report.md").read_text() == text

    low, high = stats.ttest_rel(other, one[:3]).confidence_interval(0.95)  # the fourth seed has no partner
    interval = f"{numpy.mean(numpy.subtract(other, one[:3])):+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    _, paper, best, last, _, last_gain, n = row_of(text, "grafted")
    assert (paper, last, last_gain, n) == (
        "93.33",
        f"{numpy.mean(other):.2f} ± {numpy.std(other, ddof=1):.2f}",
        interval,
        "3",
    )
    assert best == "82.93 ± 0.70"
    assert row_of(text, "single") == ["single", "92.63", *["82.62 ± 4.96"] * 2, "–", "–", "4"]
    assert low > 0 and "baseline: after the last epoch ahead 1 of 1." in text


@pytest.mark.parametrize(
    "one, other, expected",
    [([80.0], [81.0, 82.0], 1), ([80.0, 80.3], [81.1, 81.4], 1.1), ([], [80.0], None)],
    ids=["one seed", "no spread", "none"],
)
def test_difference_without_spread_has_no_interval(one, other, expected):
    gain, low, high = summary.difference(dict(enumerate(other)), dict(enumerate(one)))
    assert math.isnan(low) and math.isnan(high)
    assert math.isnan(gain) if expected is None else gain == pytest.approx(expected)


def test_an_ensemble_is_compared_with_the_mean_of_its_own_networks(tmp_path, run_report):
    for seed in (0, 1, 100, 101):
        write_run(tmp_path, "a", seed, [[50.0, 80.0 + seed % 100]])
    for seed in (0, 1):
        write_ensemble(tmp_path, "e", seed, [f"a/seed{seed}", f"a/seed{100 + seed}"], 85.0 + seed, [70.0, 72.0 + seed])
    _, text, _ = run_report([make_table(("single", None, "a"), ("both", "single", "e"))])
    assert row_of(text, "both †")[4].startswith("+14.25 [")  # 85 - 71, and 86 - 71.5


def test_results_of_another_command_are_not_taken_for_those_of_this_one(tmp_path):
    write_run(tmp_path, "a", 0, [[50.0, 80.0]])
    recipes = {("a", 0): "python … --lr 0.5"}
    results = summary.Results(tmp_path / "small", recipes)
    assert results.of("a") == [] and results.damages == ["a/seed0: result.json is of another command: python …"]
    assert len(summary.Results(tmp_path / "small", {("a", 1): ""}).of("a")) == 1


def test_a_pause_of_the_machine_is_no_time_of_the_run(tmp_path):
    folder = write_run(tmp_path, "a", 0, [[50.0, 60.0, 70.0]])
    path = folder / "metrics1.csv"
    path.write_text(path.read_text().replace(",3,1,0,0,", ",3000,1,0,0,", 1))
    (result,) = summary.Results(tmp_path / "small", {}).of("a")
    assert result.seconds == 3 * (3 + 1)


def test_best_epochs_picked_on_the_test_images_are_not_judged(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, "a", seed, [[50.0, 80.0 + seed]])
        write_run(tmp_path, "b", seed, [[90.0, 80.0 + 2 * seed]] * 2)
        write_run(tmp_path, "c", seed, [[50.0, 80.1 + seed]], method="ema")
    _, text, _ = run_report([make_table(("single", None, "a"), ("grafted", "single", "b"), ("ema", "single", "c"))])
    assert "after the last epoch level 1 of 1." in text and "picked by validation level" not in text
    assert row_of(text.split("Grafting against rivals on the same schedule that cost no more training (")[1],
                  "grafted")[3:] == ["+0.90 [−1.58, +3.38]", "–", "3"]  # fmt: skip


def test_runs_on_different_images_are_told(tmp_path, run_report):
    for seed, data in enumerate(("12ab", "12ab", "34cd")):
        path = write_run(tmp_path, "a", seed, [[50.0, 80.0]]) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data": data}))
    assert "not all trained on the same images" in run_report([PAIR])[1]
    path.write_text(path.read_text().replace("34cd", "12ab"))
    assert "not all trained on the same images" not in run_report([PAIR])[1]


def test_best_is_picked_by_validation_where_there_is_one(tmp_path, run_report):
    accuracies = [[70.0, 90.0, 80.0], [75.0, 60.0, 85.0]]
    write_run(tmp_path, "a", 0, accuracies)
    write_run(tmp_path, "b", 0, accuracies, validation=[[50.0, 51.0, 52.0], [99.0, 51.0, 52.0]])
    _, text, _ = run_report([PAIR])
    assert row_of(text, "single")[2:4] == ["90.00 (on the test set)", "82.50"]
    assert row_of(text, "grafted")[2:5] == ["75.00 (by validation)", "82.50", "–"]  # they cannot be compared
    _, text, _ = run_report([make_table(("grafted", None, "b"))])
    assert row_of(text, "method")[1] == "best, by validation"


def test_what_is_missing_or_damaged_is_not_run(tmp_path, run_report):
    for seed in range(5):
        write_run(tmp_path, "a", seed, [[50.0, 80.0 + seed]])
    folders = [tmp_path / f"small/a/seed{seed}" for seed in range(5)]
    (folders[0] / "result.json").write_bytes(b'{"name": "a", "sett')
    (folders[1] / "metrics1.csv").write_text((folders[1] / "metrics1.csv").read_text()[:-4])
    (folders[2] / "metrics1.csv").unlink()
    status, text, _ = run_report([PAIR])
    assert status == 0
    assert row_of(text, "single")[2:] == ["83.50 ± 0.71"] * 2 + ["–", "–", "2"]
    assert row_of(text, "grafted")[2:] == ["not run", "not run", "–", "–", "0"]
    for seed, what in enumerate(("result.json is unreadable", "metrics1.csv", "metrics1.csv is missing")):
        assert f"- a/seed{seed}: " in text and what in text.split(f"- a/seed{seed}: ")[1].splitlines()[0]
    for folder in folders[3:]:
        (folder / "result.json").write_text("[]")
    status, text, _ = run_report([PAIR])
    assert status == 1 and "No result could be read" in text


@pytest.mark.parametrize(
    "change",
    [
        {"settings": None}, {"settings": {}}, {"command": None}, {"networks": 2},
        {"filters": [[]]}, {"filters": [{"total": 3}]}, {"versions": []}, {"ensemble": {"ensemble": 90}},
    ],
)  # fmt: skip
def test_odd_records_are_damage(tmp_path, change):
    path = write_run(tmp_path, "a", 0, [[50.0, 80.0]]) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    results = summary.Results(tmp_path / "small", {})
    assert results.of("a") == [] and len(results.damages) == 1 and "result.json" in results.damages[0]


def test_absent_results_say_what_to_type(tmp_path, run_report):
    status, text, _ = run_report([PAIR], "--out", str(tmp_path / "out"), plots=True)
    assert status == 0 and "`python experiments/run.py main --preset small`" in text
    assert row_of(text, "grafted") == ["grafted", "93.33", "not run", "not run", "–", "–", "0"]
    assert (tmp_path / "out/report.md").exists() and not (tmp_path / "small").exists()


@pytest.mark.parametrize("preset", PRESETS)
def test_all_tables_have_their_place(run_report, preset):
    status, text, _ = run_report(None, "--preset", preset)
    assert status == 0
    assert all(
        f"| `{name}` " in text and f"## {table.title}\n" in text for name, table in report.tables(preset).items()
    )


def test_unknown_table_is_one_line(run_report):
    status, text, error = run_report([PAIR], "mian")
    assert (status, text, error.count("\n")) == (2, "", 1) and "got 'mian', expected main, " in error


def test_rivals_cost_no_more_and_have_the_same_baseline(tmp_path, run_report):
    for seed in range(3):
        for run, value, networks in (("base", 80, 1), ("grafted", 82, 2), ("ema", 83, 1), ("three", 90, 3)):
            more = {"method": {"ema": "ema", "three": "average"}.get(run, "grafting")}
            write_run(tmp_path, run, seed, [[50.0, value + 0.1 * seed]] * networks, **more)
        write_run(tmp_path, "cosine", seed, [[50.0, 95.0 + 0.2 * seed]], cos=True)
        members = [f"base/seed{seed}", f"base/seed{(seed + 1) % 3}"]
        write_ensemble(tmp_path, "two", seed, members, 81 + 0.1 * seed, [79.0, 81.0])
        write_ensemble(tmp_path, "many", seed, ["base/seed0", "three/seed0"], 95.0, [80.0] * 4)
    runs = ("grafted", "ema", "three", "two", "many")
    rows = ("base", None, "base"), *((run, "base", run) for run in runs), ("cosine", None, "cosine")
    _, text, _ = run_report([make_table(*rows)])
    lines = [[cell.strip() for cell in line.split("|")[1:5]] for line in text.splitlines() if " : " in line]
    assert lines == [["grafted", "ema", "4 : 2", "−1.00 [–]"], ["grafted", "two", "4 : 4", "+1.00 [–]"]]
    assert "no more training: after the last epoch open for want of seeds 2 of 2." in text
    assert row_of(text, "two †")[1:3] == ["–", "81.10 ± 0.10"]
    assert "† two: its networks alone 80.00 ± 0.00 (mean); their uniform weight average 10.00 ± 0.00." in text


def test_a_pair_is_counted_once_whichever_tables_it_stands_in(tmp_path, run_report):
    for seed in range(2):
        for run, value, networks in (("base", 80, 1), ("tuned", 85, 1), ("grafted", 82, 2)):
            write_run(tmp_path, run, seed, [[50.0, value + 0.1 * networks * seed]] * networks)
    first = make_table(("base", None, "base"), ("grafted", "base", "grafted"))
    second = make_table(("tuned", None, "tuned"), ("base", None, "base"), ("grafted", "tuned", "grafted"), name="fair")
    _, text, _ = run_report([first, second])
    assert "baseline: after the last epoch ahead 1, behind 1 of 2 (grafted behind tuned on CIFAR-10 (−2.95 " in text
    table = make_table(("base", None, "base"), ("tuned", "base", "tuned"), ("grafted", "base", "grafted"))
    assert "rivals on the same schedule that cost no more training: after the last epoch behind 1 of 1" in run_report(
        [table, table]
    )[1]


def test_what_the_schedule_does_is_told_apart_from_grafting(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, "steps", seed, [[50.0, 80.0 + seed]], cos=False)
        write_run(tmp_path, "cosine", seed, [[50.0, 85.0 + seed]], cos=True)
        write_run(tmp_path, "wide", seed, [[50.0, 95.0 + seed]], cos=True, model="resnet110")
        write_run(tmp_path, "grafted", seed, [[50.0, 82.0 + 2 * seed]] * 2, cos=True)
    rows = ("steps", None, "steps"), ("cosine", None, "cosine"), ("wide", None, "wide")
    _, text, _ = run_report([make_table(*rows, ("grafted", "cosine", "grafted"))])
    assert "gains +5.00 [–] after the last epoch (cosine against steps, CIFAR-10)." in text
    assert text.count("The cosine alone") == 1


def test_an_average_under_another_name_is_no_grafting(tmp_path, run_report):
    for seed in range(2):
        for run, networks, a in (("base", 1, 0.4), ("blind", 2, 0.0)):
            write_run(tmp_path, run, seed, [[50.0, 80.0 + seed]] * networks, a=a)
    _, text, _ = run_report([make_table(("base", None, "base"), ("blind", "base", "blind"))])
    assert "No grafting run" in text
    assert "paper" not in "".join(row_of(text, "method"))  # no row has a figure of it


@pytest.mark.parametrize("count", [0, 1])
def test_scions_that_were_never_needed_are_named(tmp_path, run_report, count):
    write_run(tmp_path, "noisy", 0, [[50.0, 80.0]], invalid=(count, 0), scion="noise")
    _, text, _ = run_report([make_table(("noise", None, "noisy"))])
    assert ("noise: no filter was invalid after any epoch" in text) == (count == 0)


def test_the_end_of_the_course_shows_runs_of_all_lengths(tmp_path):
    for run, epochs in (("short", 24), ("long", 48)):
        write_run(tmp_path, run, 0, [[50.0 + epoch for epoch in range(epochs)]])
    write_ensemble(tmp_path, "both", 0, ["short/seed0", "long/seed0"], 81.0, [80.0, 80.0])
    table = make_table(("short", None, "short"), ("long", "short", "long"), ("both", "short", "both"))
    cells = summary.Results(tmp_path / "small", {}).cells(table, "CIFAR-10")
    _, end = figures.accuracy(cells, "").axes
    assert [(line.get_label(), list(line.get_xdata())) for line in end.lines] == [
        ("short", pytest.approx([100 * epoch / 24 for epoch in range(19, 25)])),
        ("long", pytest.approx([100 * epoch / 48 for epoch in range(37, 49)])),
    ]


def test_invalid_filters_beside_the_papers(tmp_path, run_report):
    for seed, count in enumerate((30, 34)):
        write_run(tmp_path, "a", seed, [[50.0, 80.0]], invalid=(count, 7))
    _, text, _ = run_report([make_table(("single", None, "a", "36/1136"), ("other", None, "b"), kind="filters")])
    assert row_of(text, "single") == ["single", "36/1136", "32.0 ± 2.8 of 1136", "7.0 ± 0.0 of 1136", "–", "2"]
    assert row_of(text, "other")[2:] == ["not run", "not run", "–", "0"]


def test_settings_machine_and_time_stand_below(tmp_path, run_report):
    for seed in range(3):
        write_run(tmp_path, "a", seed, [[50.0, 80.0]], lr=0.1, cos=False)
        write_run(tmp_path, "b", seed, [[50.0, 80.0]] * 2, lr=0.1, cos=True)
    _, text, _ = run_report([PAIR])
    shared = next(line for line in text.splitlines() if line.startswith("Settings of all rows"))
    assert "`model resnet20`" in shared and "`lr 0.1`" in shared and "cos" not in shared and "seed" not in shared
    assert "Hardware: 2 cores. Versions: python 3.11, torch 2.9." in shared
    below = text.split(shared)[1]
    assert row_of(below, "grafted") == ["grafted", "single", "`num 2`, `cos True`", "2", "4", "8 s", "0, 1, 2"]


def test_plots_show_something_and_are_small(tmp_path, run_report):
    for seed in range(2):
        for run, networks in (("a", 1), ("b", 2), ("c", 3)):
            accuracies = [[50.0 + 10 * seed, 70.0, 80.0 + networks + seed]] * networks
            write_run(tmp_path, run, seed, accuracies, coefficients=networks > 1, invalid=(40 - seed, 30))
        write_ensemble(tmp_path, "d", seed, ["a/seed0", "a/seed1"], 84.0 + seed, [81.0, 82.0])
    rows = [
        ("single", None, "a", 90.0),
        ("two", "single", "b", 91.0),
        ("three", "single", "c"),
        ("both", "single", "d"),
    ]
    tables = [make_table(*rows, name="networks"), make_table(*rows[:2], name="filters", kind="filters")]
    _, text, _ = run_report(tables, plots=True)
    names = {f"networks-CIFAR-10-{kind}" for kind in ("gain", "accuracy", "networks", "coefficients")}
    names.add("filters-CIFAR-10-invalid")
    assert {path.stem for path in (tmp_path / "small/plots").iterdir()} == names
    for name in names:
        path = tmp_path / f"small/plots/{name}.png"
        assert f"](plots/{name}.png)" in text and path.stat().st_size < 150_000
        with Image.open(path) as image:
            pixels = numpy.asarray(image.convert("RGB"))
        assert pixels.shape[1] == 1000
        assert len(numpy.unique(pixels.reshape(-1, 3), axis=0)) > 20 and 0.01 < (pixels < 200).any(-1).mean() < 0.9
