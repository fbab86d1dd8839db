"""The plots: what is drawn of which runs, and in which form."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from saved import call, filters_of, save_run

from analysis import plots, report
from analysis.runs import read_run


def lines(panel):
    """The courses in a panel by label: their points."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in panel.get_lines()}


@pytest.fixture
def two(tmp_path):
    return save_run(tmp_path / "two", [[50.0, 60.0, 61.0], [40.0, 50.0, 62.0]])


def test_every_figure_is_drawn_in_the_format_asked_for(tmp_path, two):
    base = save_run(tmp_path / "base $line", [[50.0, 55.0, 60.0]])
    status, output, _ = call(report, base, two, "--plots", tmp_path / "plots.svg")
    assert status == 0
    written = [Path(line[2:]) for line in output.splitlines() if line.startswith("- ")]
    names = ["accuracy", "losses", "information", "coefficients_two", "filters", "comparison"]
    assert [path.name for path in written] == [f"{name}.svg" for name in names]
    assert all(path.read_text().startswith("<?xml") for path in written)


def test_png_files_have_200_dpi_and_pdf_files_are_such(tmp_path, two):
    figure = plots.filters([read_run(two)])
    assert Image.open(plots.save(figure, tmp_path / "a.png")).width == 7 * 200, "7 inches"
    assert plots.save(figure, tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_courses_are_the_files_and_their_last_quarter_is_enlarged(tmp_path, two):
    base = read_run(save_run(tmp_path / "base", [[50.0 + k for k in range(30)]], epochs=30))
    whole, late = plots.courses([base, read_run(two)], *plots.COURSES["accuracy"]).axes
    assert lines(whole)["two"] == [(0, 50.0), (1, 60.0), (2, 61.0)]
    assert [line.get_color() for line in whole.get_lines()] == [*plots.COLOURS[:2], plots.COLOURS[1]]
    assert lines(late)["base"] == [(epoch, 50.0 + epoch) for epoch in range(22, 30)]
    training, test, *_ = plots.courses([read_run(two)], *plots.COURSES["losses"]).axes
    assert lines(training)["network 2"] == [(0, 1), (1, 1), (2, 1)] and lines(test)["network 1"][0] == (0, 2)


def test_coefficients_are_the_files_and_epochs_without_any_are_gaps(two):
    run = read_run(two)
    assert plots.coefficients(run).axes[0].images[0].get_array().tolist() == [[0.45, 0.46]]
    run.networks[0].coefficients = pd.DataFrame({"epoch": [0, 2, 2], "layer": "conv1", "coefficient": [0.4, 0.7, 0.6]})
    image, *_ = plots.coefficients(run).axes[0].images
    assert image.get_array().filled(-1).tolist() == [[0.4, -1, 0.6]]


def test_the_share_up_to_each_norm_is_counted(tmp_path):
    norms = (2.0, 0.5, 0.0, math.nan)
    run = read_run(save_run(tmp_path / "run", [[50.0]], epochs=1, norms=[norms]))
    drawn = lines(plots.filters([run]).axes[0])["network 1"]
    smallest = plots.SMALLEST_NORM  # where 0 is drawn; NaN is invalid
    assert drawn == [(smallest, 0), (smallest, 0.25), (smallest, 0.5), (0.5, 0.75), (2, 1)]


def test_networks_of_the_same_settings_are_averaged_and_no_others(tmp_path):
    kinds = {"a": {"lr": 0.1, "seed": 0}, "b": {"lr": 0.1, "seed": 1}, "c": {"lr": 0.2}, "d": {"method": "ema"}}
    runs = [
        read_run(save_run(tmp_path / name, [[50.0 + k]], epochs=1, **kind))
        for k, (name, kind) in enumerate(kinds.items())
    ]
    assert lines(plots.comparison(runs).axes[0]) == {
        "a: baseline (n = 2)": [(0, 50.5)],
        "c: baseline (n = 1)": [(0, 52)],
        "d: ema (n = 1)": [(0, 53)],
    }


def test_confusions_are_shares_of_their_row():
    panel = plots.confusion(np.array([[3, 1], [0, 0]]), ["cat", "dog"], "title").axes[0]
    assert sorted(text.get_text() for text in panel.texts) == ["25", "75"]
    assert panel.images[0].get_array().tolist() == [[75, 25], [0, 0]]


def test_a_damaged_run_is_plotted_as_far_as_it_goes(tmp_path, two, monkeypatch):
    monkeypatch.setattr(plots, "save", lambda figure, path: path)
    (two / "metrics1.csv").unlink()
    torch.save({"net": filters_of((math.nan, 1.0))}, two / "final1.t7")
    drawn = [path.stem for path in plots.draw([read_run(two), read_run(tmp_path / "no")], tmp_path, "svg")]
    assert drawn == ["accuracy", "losses", "information", "coefficients_two", "filters"]
