"""Plots of a table's rows, one function a figure: gains, courses of accuracy, filters and information, coefficients."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.plots import BLACK, COLOURS, FEW, WIDTH, coefficients, pyplot, save, with_legend
from analysis.runs import THRESHOLDS
from experiments.results import Cells, gain

OFF = 4  # a loss of so many times the highest gain is off the scale
LINES = 4  # that are told apart in one panel, beside the baseline
QUARTER = 75  # % of a run, after which the last quarter begins


def draw(cells: Cells, title: str, stem: Path) -> list[Path]:
    """Draws what there is of a table's rows on one data set, into files whose names begin with the stem's."""
    return [save(figure, stem.with_name(f"{stem.name}-{what}.png")) for what, figure in figures(cells, title)]


def figures(cells: Cells, title: str) -> Iterator[tuple[str, Figure]]:
    """What each figure shows, and the figure."""
    if any(math.isfinite(gain(one, cells.get(one.row.baseline), "last").low) for one in cells.values()):
        yield "gain", gains(cells, title)
    frame = courses_of(cells)
    if len(frame):
        late = frame[frame.index.get_level_values("share") > QUARTER]
        columns = {"Whole course": frame["test_accuracy"], "Last quarter": late["test_accuracy"]}
        yield "accuracy", courses(cells, columns, "test accuracy (%)", title)
    if frame.get(f"invalid_{THRESHOLDS[0]}", pd.Series([0])).max() > 0:
        columns = {f"L1 norm below {threshold}": frame[f"invalid_{threshold}"] for threshold in THRESHOLDS}
        figure = courses(cells, columns, "invalid filters", title)
        for panel in figure.axes:
            panel.set_ylim(0, max(1, panel.get_ylim()[1]))  # no fractions of a filter where there is none
        yield "invalid", figure
    if "information" in frame:
        columns = {"Sum of the layers' entropies": frame["information"].dropna()}
        yield "information", courses(cells, columns, "nats", title)
    for one in cells.values():
        run = one.first("result")
        if one.row.is_grafting and run and any(len(network.coefficients) for network in run.networks):
            yield "coefficients", coefficients(replace(run, label=f"{one.row.label}, seed {one.results.index[0]}"))
            break  # one shows how they behave


def courses_of(cells: Cells) -> pd.DataFrame:
    """The networks' metrics, means over a run's networks, by label of the row, seed and share of the epochs (%)."""
    parts = {
        (label, seed, network.number): network.metrics.assign(share=lambda own: 100 * (own["epoch"] + 1) / len(own))
        for label, one in cells.items()
        for seed, run in one.results["result"].items()
        for network in run.networks
    }
    if not parts:
        return pd.DataFrame()
    frame = pd.concat(parts, names=["row", "seed", "network"])
    return frame.groupby(["row", "seed", "share"]).mean(numeric_only=True)


def gains(cells: Cells, title: str) -> Figure:
    """A dot for each row and figure, with its interval where there is one, and the published gain beside them."""
    compared = [one for one in cells.values() if one.row.baseline in cells and len(one.results)]
    figure, panel = pyplot.subplots(figsize=(WIDTH, 1 + 0.34 * len(compared)))
    by = "by validation" if any(one.results["picked"].notna().any() for one in compared) else "on the test set"
    shown = ("last", "last epoch", "o", -0.14), ("best", f"best epoch, {by}", "D", 0.14)
    found = {name: np.array([gain(one, cells[one.row.baseline], name) for one in compared]).T for name, *_ in shown}
    lowest = -OFF * max(1, np.nanmax([mean for mean, *_ in found.values()]))
    for (name, label, marker, offset), colour in zip(shown, COLOURS, strict=False):
        mean, low, high, _ = found[name]
        for y in np.flatnonzero(mean < lowest):  # a row that failed would leave no room for the others
            place = {"transform": panel.get_yaxis_transform(), "va": "center"}
            panel.text(0.01, y + offset, f"◂ −{-mean[y]:.1f}", color=colour, fontsize=7, **place)
        mean = np.where(mean < lowest, np.nan, mean)
        style = {"fmt": marker, "color": colour, "label": label, "markersize": 5}
        panel.errorbar(mean, np.arange(len(compared)) + offset, xerr=(mean - low, high - mean), **style)
    papers = [(one.row.paper, cells[one.row.baseline].row.paper) for one in compared]
    papers = {y: own - other for y, (own, other) in enumerate(papers) if isinstance(own, float) and other is not None}
    if papers:
        panel.plot(papers.values(), papers.keys(), "x", color="dimgrey", markersize=5, label="published")
    panel.axvline(0, color=BLACK, linewidth=0.8)
    labels = [f"{one.row.label}  (n = {n:g})" for one, n in zip(compared, found["last"][3], strict=True)]
    panel.set_yticks(range(len(compared)), labels)
    panel.set_ylim(len(compared) - 0.5, -0.5)
    panel.grid(False, axis="y")
    panel.set_xlabel("gain over the single network of the same schedule\n(percentage points, 95 % interval)")
    figure.suptitle(title)
    return with_legend(figure)


def courses(cells: Cells, columns: dict[str, pd.Series], ylabel: str, title: str) -> Figure:
    """A row of panels for a baseline and each few of its rows: means over networks and seeds, the seeds' range."""
    groups = grouped(cells)
    options = {"squeeze": False, "sharex": "col", "sharey": "col"}
    figure, panels = pyplot.subplots(len(groups), len(columns), figsize=(WIDTH, 0.6 + 2 * len(groups)), **options)
    for group, beside in zip(groups, panels, strict=True):
        for panel, column in zip(beside, columns.values(), strict=True):
            for label, colour in zip(group, [BLACK, *COLOURS], strict=False):
                seeds = column[column.index.get_level_values("row") == label].groupby("share")
                mean = seeds.mean()
                panel.plot(mean, marker="o" if len(mean) <= FEW else "", color=colour, label=label)
                panel.fill_between(mean.index, seeds.min(), seeds.max(), color=colour, alpha=0.15, linewidth=0)
        beside[0].set_ylabel(ylabel)
        beside[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7)
    for top, bottom, heading in zip(panels[0], panels[-1], columns, strict=True):
        top.set_title(heading)
        bottom.set_xlabel("epochs (% of the run's own)")
    figure.supxlabel("Lines: mean over networks and seeds. Bands: lowest to highest seed.", fontsize=7, color="dimgrey")
    figure.suptitle(title)
    return figure


def grouped(cells: Cells) -> list[list[str]]:
    """A baseline and some of its rows, no more than a panel can show; only such as were trained."""
    groups = []
    trained = [label for label, one in cells.items() if len(one.results) and not one.row.is_ensemble]
    for baseline in [label for label, one in cells.items() if one.row.baseline is None]:
        own = [label for label in trained if cells[label].row.baseline == baseline]
        # Grafting beside the plain average, in which the entropies do not count.
        own.sort(key=lambda label: (cells[label].row.is_grafting, "--method average" in cells[label].row.flags))
        if own or baseline in trained:
            ends = range(len(own), 0, -LINES)  # the last panel is full
            groups += [[baseline, *own[max(0, end - LINES) : end]] for end in reversed(ends)] or [[baseline]]
    return groups
