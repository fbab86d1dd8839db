"""The plots: what is drawn of which runs, in which form, and the edge cases of the panels."""

import math
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from test_report import make_run, state_dict

from analysis import plots, report
from analysis.runs import groups_of, program, read_run


def lines(panel):
    """The courses in a panel by label: their points."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.get_lines()}


def texts(panel):
    return [text.get_text() for text in panel.texts]


@pytest.fixture
def runs(tmp_path):
    """A baseline of 30 epochs and two networks of 3."""
    base = make_run(tmp_path / "_base $line", [[50.0 + k for k in range(30)]], epochs=30)
    two = make_run(tmp_path / "two", [[50.0, 60.0, 61.0], [40.0, 50.0, 62.0]])
    return [read_run(base), read_run(two)]


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">I", data[16:20])[0]


def test_every_figure_is_drawn(tmp_path, runs, monkeypatch, capsys):
    names = ["accuracy", "losses", "information", "coefficients_two", "filters", "comparison"]
    monkeypatch.setattr(
        sys, "argv", ["report.py", *(str(run.directory) for run in runs), "--plots", f"{tmp_path}/plots"]
    )
    assert program(report.main) == 0
    written = [Path(line[2:]) for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert [path.name for path in written] == [f"{name}.png" for name in names]
    assert {size(path) for path in written} == {7 * 200}, "7 inches at 200 dpi"


@pytest.mark.parametrize(
    ("flags", "start"), [(["a.pdf"], b"%PDF"), (["a", "--plot-format", "svg"], b"<?xm")], ids=["pdf", "svg"]
)
def test_plots_have_the_format_asked_for(tmp_path, runs, flags, start):
    args = report.parse(["DIR", "--plots", f"{tmp_path}/{flags[0]}", *flags[1:]])
    assert args.plots == tmp_path / "a"
    path = plots.save(plots.losses(runs), tmp_path / f"losses.{args.plot_format}")
    assert path.read_bytes()[:4] == start


def test_accuracies_are_drawn_whole_and_the_last_quarter_of_each_enlarged(runs):
    whole, late = plots.accuracy(runs).axes
    drawn = lines(whole)
    assert drawn["two, network 2"] == [(0, 40.0), (1, 50.0), (2, 62.0)]
    assert list(drawn) == [" _base $line", "two, network 1", "two, network 2"], "a legend leaves out what begins with _"
    assert lines(late)[" _base $line"][0] == (-7, 72.0), "counted back, since the runs end at other epochs"


def test_losses_information_and_coefficients_are_the_files(runs):
    training, test = plots.losses(runs).axes
    assert lines(training)["two, network 1"] == lines(test)["two, network 1"] == [(0, 1), (1, 1), (2, 1)]
    (panel,) = plots.information(runs).axes
    assert lines(panel) == {f"two, network {i}": [(0, 1.1), (1, 1.1)] for i in (1, 2)}
    runs[0].networks[0].metrics["information"] = np.arange(30.0)
    assert lines(plots.information(runs).axes[0])[" _base $line"][5] == (5, 5.0)
    assert plots.coefficients(runs[1]).axes[0].images[0].get_array().tolist() == [[0.45, 0.46]]


def test_the_share_under_each_threshold_is_counted(tmp_path):
    directory = make_run(tmp_path / "run", [[50.0]], epochs=1, norms=[(2.0, 0.5, 0.05, 0.0005)])
    run = read_run(directory)
    drawn = dict(lines(plots.filters([run]).axes[1])["run"])
    for threshold, share in drawn.items():
        expected = 100 * np.mean(np.float32([2.0, 0.5, 0.05, 0.0005]) < threshold)
        assert share == expected or min(abs(threshold - norm) for norm in (0.5, 0.05, 0.0005)) < 1e-3
    assert (max(drawn), min(drawn)) == (1, pytest.approx(0.001))
    run.networks[0].norms = np.array([math.nan, 5.0])
    assert set(dict(lines(plots.filters([run]).axes[1])["run"]).values()) == {50}, "NaN is invalid"


def test_a_single_epoch_has_one_tick(tmp_path):
    runs = [read_run(make_run(tmp_path / "one", [[50.0], [51.0]], epochs=1))]
    two = read_run(make_run(tmp_path / "two", [[50.0, 60.0]] * 2, epochs=2))  # of which one is grafted
    figures = [plots.accuracy(runs), plots.coefficients(two), plots.information([two])]
    for figure in figures:
        figure.canvas.draw()
        assert figure.axes[0].get_xticks().tolist() == [0]
    long = read_run(make_run(tmp_path / "three", [[50.0, 60.0, 61.0]] * 2))
    for figure in (plots.accuracy([long]), plots.coefficients(long)):
        figure.canvas.draw()
        assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_what_is_zero_everywhere_is_a_sentence(tmp_path):
    runs = [
        read_run(make_run(tmp_path / f"num{num}", [[50.0, 60.0]] * num, epochs=2, norms=[(5.0, 6.0)] * 2))
        for num in (1, 2)
    ]
    _, share = plots.filters(runs).axes
    assert texts(share) == ["No filter has an L1 norm below 1."] and not share.get_lines()
    runs[1].networks[0].coefficients["coefficient"] = runs[1].networks[1].coefficients["coefficient"] = 0.5
    assert plots.coefficients(runs[1]).axes[0].get_title() == "network 1: 0.5 everywhere"


def test_only_networks_of_the_same_settings_are_averaged(tmp_path):
    kinds = {
        "a": {"lr": 0.1, "seed": 0},
        "b": {"lr": 0.1, "seed": 1},
        "c": {"lr": 0.2},
        "d": {"lr": 0.1, "method": "ema"},
    }
    runs = [read_run(make_run(tmp_path / name, [[50.0]], epochs=1, **kind)) for name, kind in kinds.items()]
    found = {name: [run.label for run in alike] for name, alike in groups_of(runs).items()}
    assert found == {
        "resnet20, baseline, lr 0.1": ["a", "b"],
        "resnet20, baseline, lr 0.2": ["c"],
        "resnet20, ema": ["d"],
    }


def test_confusions_are_shares_of_their_row():
    figure = plots.confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"], "title")
    assert sorted(texts(figure.axes[0])) == ["25", "75"]
    assert figure.axes[0].images[0].get_array().tolist() == [[75, 25], [0, 0]]


def test_a_damaged_run_is_plotted_as_far_as_it_goes(tmp_path):
    directory = make_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2)
    (directory / "metrics1.csv").unlink()
    torch.save({"net": state_dict((math.nan, 1.0))}, directory / "final1.t7")
    (tmp_path / "plots").mkdir()
    drawn = [path.name for path in plots.draw([read_run(directory), read_run(tmp_path / "no")], tmp_path / "plots")]
    assert drawn == ["accuracy.png", "losses.png", "information.png", "coefficients_run.png", "filters.png"]


def test_epochs_without_a_coefficient_are_gaps(tmp_path):
    run = read_run(make_run(tmp_path / "run", [[50.0, 60.0, 70.0]] * 2))
    run.networks[0].coefficients = pd.DataFrame({"epoch": [0, 2], "layer": ["conv1"] * 2, "coefficient": [0.4, 0.6]})
    (drawn,) = plots.coefficients(run).axes[0].images
    assert drawn.get_array().filled(-1).tolist() == [[0.4, -1, 0.6]]
