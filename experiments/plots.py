"""Plots of the experiments' tables, one function a figure: gains, accuracies, filters and information, coefficients."""

import io
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis.plots import BLACK, COLOURS, FEW, WIDTH, coefficients, draw_band, finish, pyplot, styled, whole_ticks
from analysis.runs import THRESHOLDS, Run
from experiments.results import Cell, Cells, gain
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
    trained = {label: one for label, one in cells.items() if not one.first("members")}
    networks = [network for one in trained.values() for run in one.results["result"] for network in run.networks]
    metrics = pd.concat([pd.DataFrame(), *(network.metrics for network in networks)])
    if kind != "filters" and trained:
        if any(math.isfinite(gain(one, cells.get(one.row.baseline), "last").mean) for one in cells.values()):
            yield "gain", gains(cells, title)
        columns = {"Whole course": "test_accuracy"}
        if min(len(network.metrics) for network in networks) > FEW:
            columns[QUARTER] = "test_accuracy"
        yield "accuracy", courses(trained, columns, "test accuracy (%)", title)
    if metrics.get(f"invalid_{THRESHOLDS[0]}", pd.Series([0])).max() > 0:
        columns = {f"L1 norm below {threshold}": f"invalid_{threshold}" for threshold in THRESHOLDS}
        yield "invalid", courses(trained, columns, "invalid filters", title)
    if "information" in metrics:
        yield "information", courses(trained, {"Sum of the layers' entropies": "information"}, "nats", title)
    for label, one in trained.items() if kind != "filters" else ():
        first = one.results["result"].iloc[0]
        if one.first("is_grafting") and one.row.run not in mapped and any(len(n.coefficients) for n in first.networks):
            mapped.add(one.row.run)
            yield "coefficients", coefficients(replace(first, label=f"{label}, seed {one.results.index[0]}"))
            break  # one shows how they behave


@styled
def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file of few colours: a fraction of the size, and looks the same."""
    file = io.BytesIO()
    figure.savefig(file)
    pyplot.close(figure)
    Image.open(file).convert("RGB").quantize(128).save(path, optimize=True)
    return path


@styled
def gains(cells: Cells, title: str) -> Figure:
    """A dot with its interval for each row and figure (hollow without one), the published gain beside them."""
    compared = {label: one for label, one in cells.items() if one.row.baseline in cells}
    figure, panel = pyplot.subplots(figsize=(WIDTH, 1 + 0.34 * len(compared)))
    by = "by validation" if any(one.first("validated") == 1 for one in cells.values()) else "on the test set"
    names = {"last": "last epoch", "best": f"best epoch, {by}"}
    for (name, (marker, offset)), colour in zip(FIGURES.items(), COLOURS, strict=False):
        panel.plot([], [], marker, color=colour, label=names[name])
        for place, one in enumerate(compared.values()):
            y = place + offset
            found = gain(one, cells[one.row.baseline], name)
            face = colour if math.isfinite(found.low) else "white"
            panel.plot([found.low, found.high], [y, y], color=colour)
            panel.plot(found.mean, y, marker, color=colour, markerfacecolor=face, markersize=5)
    papers = [(one.row.paper, cells[one.row.baseline].row.paper) for one in compared.values()]
    papers = {y: own - other for y, (own, other) in enumerate(papers) if isinstance(own, float) and other is not None}
    if papers:
        panel.plot(papers.values(), papers.keys(), "x", color="dimgrey", markersize=5, label="published")
    for y, (above, below) in enumerate(pairwise(compared.values())):
        if above.row.baseline != below.row.baseline:
            panel.axhline(y + 0.5, color="lightgrey", linewidth=0.8)
    panel.axvline(0, color=BLACK, linewidth=0.8)
    panel.set_yticks(range(len(compared)), [f"{label}  (n = {len(one.results)})" for label, one in compared.items()])
    panel.set_ylim(len(compared) - 0.5, -0.5)
    panel.grid(False, axis="y")
    panel.set_xlabel("gain in accuracy (percentage points), 95 % interval")
    figure.suptitle(title)
    return finish(figure, [])


@styled
def courses(cells: Cells, columns: dict[str, str], ylabel: str, title: str) -> Figure:
    """A row of panels for a baseline and each few of its rows: means over networks and seeds, the seeds' range."""
    groups = grouped(cells)
    options = {"squeeze": False, "sharex": "col", "sharey": "col"}
    figure, panels = pyplot.subplots(len(groups), len(columns), figsize=(WIDTH, 0.6 + 2 * len(groups)), **options)
    for group, beside in zip(groups, panels, strict=True):
        for panel, (heading, column) in zip(beside, columns.items(), strict=True):
            for label, colour in zip(group, [BLACK, *COLOURS], strict=False):
                seeds = seeds_of(cells[label], column, heading == QUARTER) if label else pd.DataFrame()
                style = {"color": colour, "label": label}
                draw_band(panel, seeds.mean(axis=1), seeds.min(axis=1), seeds.max(axis=1), style)
        beside[0].set_ylabel(ylabel)
        beside[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=7)
    for top, bottom, heading in zip(panels[0], panels[-1], columns, strict=True):
        top.set_title(heading)
        whole_ticks(bottom)
        bottom.set_xlabel("epochs (% of the run's own)" if heading == QUARTER else "epoch")
    figure.supxlabel("Lines: mean over networks and seeds. Bands: lowest to highest seed.", fontsize=7, color="dimgrey")
    figure.suptitle(title)
    return figure


def grouped(cells: Cells) -> list[list[str]]:
    """A baseline and some of its rows, no more than a panel can show; "" in the place of one that has not run."""
    rows: dict[str, list[str]] = {label: [] for label, one in cells.items() if one.row.baseline is None}
    for label, one in cells.items():
        if one.row.baseline is not None:
            rows.setdefault(one.row.baseline if one.row.baseline in cells else "", []).append(label)
    groups = []
    for baseline, labels in rows.items():
        count = max(1, math.ceil(len(labels) / LINES))
        size = math.ceil(len(labels) / count)
        groups += [[baseline, *labels[k * size : (k + 1) * size]] for k in range(count)]
    return groups


def seeds_of(one: Cell, column: str, is_end: bool) -> pd.DataFrame:
    """A column for each seed, by epoch; of the last quarter, by the share of the epochs that have ended."""
    frame = pd.concat([mean_course(run, column) for run in one.results["result"]], axis=1).dropna(axis=1, how="all")
    if is_end:
        frame.index = 100 * (frame.index + 1) / len(frame)
        frame = frame.iloc[len(frame) - len(frame) // 4 :]
    return frame


def mean_course(run: Run, column: str) -> pd.Series:
    """Over the networks, by epoch; empty if any has no such column."""
    if not all(column in network.metrics for network in run.networks):
        return pd.Series(dtype=float)
    return pd.concat([network.metrics.set_index("epoch")[column] for network in run.networks], axis=1).mean(axis=1)
