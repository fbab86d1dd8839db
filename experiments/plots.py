"""Plots of the experiments' tables, one function a figure: gains, accuracies, filters and information, coefficients."""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from analysis.plots import (
    BLACK,
    COLOURS,
    FEW,
    WIDTH,
    coefficients_map,
    draw_course,
    finish,
    pyplot,
    styled,
    whole_ticks,
)
from analysis.runs import THRESHOLDS, Run
from experiments.results import Cell, Cells, Gain, gain
from experiments.tables import TABLES

FIGURES = {"last": ("o", -0.14), "best": ("D", 0.14)}  # marker, and place beside the row's own
LINES = 4  # that are told apart in one panel, beside the baseline
QUARTER = "Last quarter of each run"


def draw(tables: dict[str, dict[str, Cells]], preset: str, out: Path) -> dict[tuple[str, str], list[Path]]:
    """Draws what there is of the tables; the paths of the files by name of the table and data set."""
    paths: dict[tuple[str, str], list[Path]] = {}
    mapped: set[str] = set()  # runs whose coefficients are drawn: one table's are enough
    for name, found in tables.items():
        for dataset, cells in found.items():
            ran = {label: one for label, one in cells.items() if len(one.results)}
            title = f"{TABLES[name].title}, {dataset}, preset {preset}"
            stem = re.sub(r"[^\w.-]+", "_", f"{name}-{dataset}")
            figures = plots(ran, title, TABLES[name].kind, mapped)
            paths[name, dataset] = [save(figure, out / f"{stem}-{what}.png") for what, figure in figures]
    return paths


def plots(cells: Cells, title: str, kind: str, mapped: set[str]) -> Iterator[tuple[str, Figure]]:
    """What each figure shows, and the figure."""
    runs = [run for one in cells.values() for run in one.results["result"] if not one.is_ensemble]
    metrics = pd.concat([pd.DataFrame(), *(network.metrics for run in runs for network in run.networks)])
    if kind != "filters" and any(math.isfinite(one.mean) for one in gains(cells, "last").values()):
        yield "gain", gain_plot(cells, title)
    if kind != "filters" and runs:
        yield "accuracy", accuracy(cells, title)
    if metrics.get(f"invalid_{THRESHOLDS[0]}", pd.Series([0])).max() > 0:
        yield "invalid", invalid_filters(cells, title)
    if "information" in metrics:
        yield "information", information(cells, title)
    for label, one in cells.items() if kind != "filters" else ():
        first = one.results["result"].iloc[0]
        if one.first("is_grafting") and one.row.run not in mapped and any(len(n.coefficients) for n in first.networks):
            mapped.add(one.row.run)
            yield "coefficients", coefficients_map(replace(first, label=f"{label}, seed {one.results.index[0]}"))
            break  # one shows how they behave


@styled
def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file of few colours: a fraction of the size, and looks the same."""
    file = io.BytesIO()
    figure.savefig(file)
    pyplot.close(figure)
    Image.open(file).convert("RGB").quantize(128).save(path, optimize=True)
    return path


def gains(cells: Cells, figure: str) -> dict[str, Gain]:
    """By label of the row, of those that are compared with another."""
    found = {label: gain(one, cells.get(one.row.baseline), figure) for label, one in cells.items()}
    return {label: one for label, one in found.items() if math.isfinite(one.mean)}


@styled
def gain_plot(cells: Cells, title: str) -> Figure:
    """A dot with its interval for each row and figure (hollow without one), the published gain beside them."""
    found = {figure: gains(cells, figure) for figure in FIGURES}
    labels = [label for label in cells if any(label in some for some in found.values())]
    figure, panel = pyplot.subplots(figsize=(WIDTH, 1 + 0.34 * len(labels)))
    for (name, (marker, offset)), colour in zip(FIGURES.items(), COLOURS, strict=False):
        picked = {one.first("validated") for one in cells.values() if name == "best"}
        how = "by validation" if True in picked else "on the test set"
        panel.plot([], [], marker, color=colour, label="last epoch" if name == "last" else f"best epoch, {how}")
        for label, one in found[name].items():
            y, is_known = labels.index(label) + offset, math.isfinite(one.low)
            panel.plot([one.low, one.high], [y, y], color=colour)
            panel.plot(one.mean, y, marker, color=colour, markerfacecolor=colour if is_known else "white", markersize=5)
    legend = "published"
    for y, label in enumerate(labels):
        published = cells[label].row.paper, cells[cells[label].row.baseline].row.paper
        if all(isinstance(value, float) for value in published):
            panel.plot(published[0] - published[1], y, "x", color="dimgrey", markersize=5, label=legend)
            legend = None
    for y, (above, below) in enumerate(pairwise(labels)):
        if cells[above].row.baseline != cells[below].row.baseline:
            panel.axhline(y + 0.5, color="lightgrey", linewidth=0.8)
    panel.axvline(0, color=BLACK, linewidth=0.8)
    panel.set_yticks(range(len(labels)), [f"{label}  (n = {len(cells[label].results)})" for label in labels])
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.grid(False, axis="y")
    panel.set_xlabel("gain in accuracy (percentage points), 95 % interval")
    figure.suptitle(title, fontsize=10)
    return finish(figure, [])


def accuracy(cells: Cells, title: str) -> Figure:
    """Test accuracy over epochs; of long runs the end enlarged, too."""
    shortest = min(
        len(run.networks[0].metrics) for one in cells.values() for run in one.results["result"] if run.networks
    )
    columns = {"Whole course": "test_accuracy"} | ({QUARTER: "test_accuracy"} if shortest > FEW else {})
    return courses(cells, columns, "test accuracy (%)", title)


def invalid_filters(cells: Cells, title: str) -> Figure:
    """How many filters are invalid over epochs, at each threshold."""
    columns = {f"L1 norm below {threshold}": f"invalid_{threshold}" for threshold in THRESHOLDS}
    return courses(cells, columns, "invalid filters", title)


def information(cells: Cells, title: str) -> Figure:
    """The sum of the layers' entropies over epochs."""
    return courses(cells, {"Sum of the layers' entropies": "information"}, "information (nats)", title)


@styled
def courses(cells: Cells, columns: dict[str, str], ylabel: str, title: str) -> Figure:
    """A row of panels for a baseline and each few of its rows: means over networks and seeds, the seeds' range."""
    groups = grouped({label: one for label, one in cells.items() if not one.is_ensemble})
    figure, panels = pyplot.subplots(
        len(groups), len(columns), figsize=(WIDTH, 0.6 + 2 * len(groups)), squeeze=False, sharex="col", sharey="col"
    )
    for (baseline, labels), beside in zip(groups, panels, strict=True):
        for panel, (heading, column) in zip(beside, columns.items(), strict=True):
            for label, colour in zip([baseline, *labels], [BLACK, *COLOURS], strict=False):
                if label:
                    draw_seeds(panel, cells[label], column, heading == QUARTER, {"color": colour, "label": label})
        beside[0].set_ylabel(ylabel)
        beside[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7)
    for top, bottom, heading in zip(panels[0], panels[-1], columns, strict=True):
        top.set_title(heading)
        whole_ticks(bottom)
        bottom.set_xlabel("epochs (% of the run's own)" if heading == QUARTER else "epoch")
    figure.supxlabel("Lines: mean over networks and seeds. Bands: lowest to highest seed.", fontsize=7, color="dimgrey")
    figure.suptitle(title, fontsize=10)
    return figure


def grouped(cells: Cells) -> list[tuple[str, list[str]]]:
    """A baseline and some of its rows, no more than a panel can show; rows without a baseline come last."""
    rows: dict[str, list[str]] = {label: [] for label, one in cells.items() if one.row.baseline is None}
    for label, one in cells.items():
        if one.row.baseline is not None:
            rows.setdefault(one.row.baseline if one.row.baseline in cells else "", []).append(label)
    groups = []
    for baseline, labels in rows.items():
        count = max(1, math.ceil(len(labels) / LINES))
        size = math.ceil(len(labels) / count)
        groups += [(baseline, labels[k * size : (k + 1) * size]) for k in range(count)]
    return groups


def draw_seeds(panel: Axes, one: Cell, column: str, is_end: bool, style: dict) -> None:
    """A line and its band over the epochs; of the last quarter, over the share of the epochs that have ended."""
    seeds = [course for run in one.results["result"] if len(course := mean_course(run, column))]
    if not seeds:
        return
    frame = pd.concat(seeds, axis=1)
    if is_end:
        frame.index = 100 * (frame.index + 1) / len(frame)
        frame = frame.iloc[len(frame) - len(frame) // 4 :]
    draw_course(panel, frame.index, frame.mean(axis=1), style)
    panel.fill_between(frame.index, frame.min(axis=1), frame.max(axis=1), color=style["color"], alpha=0.15, linewidth=0)


def mean_course(run: Run, column: str) -> pd.Series:
    """Over the networks, by epoch; empty if any has no such column."""
    if not all(column in network.metrics for network in run.networks):
        return pd.Series(dtype=float)
    return pd.concat([network.metrics.set_index("epoch")[column] for network in run.networks], axis=1).mean(axis=1)
