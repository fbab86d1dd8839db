"""Plots of the experiments' tables, as PNG files 1000 pixels wide: gains, courses, networks, coefficients."""

import io
import math
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from experiments.summary import Cell, Difference, Result, Results, datasets, from_baseline
from experiments.tables import Table
from filter_grafting.checkpoint import write_atomically
from grafting_cifar.plots import COLOURS, FEW, STYLE, WIDTH, coefficients, pyplot
from grafting_cifar.runs import THRESHOLDS, Run

BLACK = "#000000"
LINES = 4  # that are told apart in one panel, beside the baseline
METHODS = tuple(colour for colour in COLOURS if colour != BLACK)  # black is the baseline's
FIGURES = {"last": ("o", 0.14, COLOURS[0]), "best": ("D", -0.14, COLOURS[1])}  # marker, offset, colour
Cells = dict[str, Cell]


def draw(table: Table, results: Results, preset: str, out: Path, mapped: set[str]) -> dict[str, list[Path]]:
    """Draws what there is of a table; the paths of the files by data set.

    `mapped` are the runs whose coefficients an earlier table shows; the one drawn here is added.
    """
    paths: dict[str, list[Path]] = {}
    with pyplot.rc_context(STYLE):
        for dataset in datasets(table):
            cells = {label: cell for label, cell in results.cells(table, dataset).items() if cell.results}
            title = f"{table.title}, {dataset}, preset {preset}"
            stem = re.sub(r"[^\w.-]+", "_", f"{table.name}-{dataset}")
            paths[dataset] = [
                save(figure, out / f"{name.format(stem)}.png") for name, figure in plots(table, cells, title, mapped)
            ]
    return paths


def plots(table: Table, cells: Cells, title: str, mapped: set[str]) -> Iterator[tuple[str, Figure]]:
    """Name of each file, with {} for the table and data set, and the figure."""
    if table.kind == "filters":
        if any(invalid_course(result, 0) for cell in cells.values() for result in cell.results):
            yield "{}-invalid", invalid_filters(cells, title)
        return
    if any(gains(cells, figure) for figure in FIGURES):
        yield "{}-gain", gain(cells, title)
    if any(result.courses for cell in cells.values() for result in cell.results):
        yield "{}-accuracy", accuracy(cells, title)
    if table.name == "networks" and len({cell.results[0].networks for cell in cells.values()}) > 1:
        yield "{}-networks", networks(cells, title)
    for label, cell in cells.items():
        first = cell.results[0]
        if first.is_grafting and cell.entry.run not in mapped and any(one.coefficients for one in first.courses):
            mapped.add(cell.entry.run)
            yield "{}-coefficients", coefficients(Run(f"{title}\n{label}, seed {first.seed}", first.courses))
            break  # one shows how they behave


def gains(cells: Cells, figure: str) -> dict[str, Difference]:
    """By label of the row, of those that are compared with another."""
    found = {label: from_baseline(cells, label, figure) for label in cells}
    return {label: one for label, one in found.items() if math.isfinite(one.gain)}


def gain(cells: Cells, title: str) -> Figure:
    """A dot with its interval for each row and figure, the paper's beside them."""
    found = {figure: gains(cells, figure) for figure in FIGURES}
    labels = [label for label in cells if any(label in some for some in found.values())]
    figure, panel = pyplot.subplots(figsize=(WIDTH, 1.9 + 0.5 * len(labels)))
    for name, (marker, offset, colour) in FIGURES.items():
        panel.plot([], [], marker, color=colour, label=name_of(name, cells))
        for label, one in found[name].items():
            y = labels.index(label) - offset
            if math.isfinite(one.low):
                panel.hlines(y, one.low, one.high, color=colour, linewidth=2)
            face = colour if math.isfinite(one.low) else "white"
            panel.plot(one.gain, y, marker, color=colour, markerfacecolor=face, markersize=7)
    legend = "the paper's"
    for y, label in enumerate(labels):
        figures = cells[label].entry.paper, cells[cells[label].row.baseline].entry.paper
        if all(isinstance(value, int | float) for value in figures):
            panel.plot(figures[0] - figures[1], y, "x", color="dimgrey", markersize=7, label=legend)
            legend = None
    for y, (above, below) in enumerate(pairwise(labels)):
        if cells[above].row.baseline != cells[below].row.baseline:
            panel.axhline(y + 0.5, color="lightgrey", linewidth=1)
    panel.axvline(0, color=BLACK, linewidth=1)
    panel.set_yticks(range(len(labels)), [f"{label}  (n = {len(cells[label].results)})" for label in labels])
    panel.set_ylim(len(labels) - 0.5, -0.5)
    panel.grid(False, axis="y")
    baselines = {cells[label].row.baseline for label in labels}
    reference = baselines.pop() if len(baselines) == 1 else "the row's baseline"
    panel.set_xlabel(f"gain over {reference} (percentage points of test accuracy)")
    figure.suptitle(f"{title}: gain with 95 % interval (none: hollow)", fontsize=12)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def name_of(figure: str, cells: Cells) -> str:
    if figure == "last":
        return "last epoch"
    picked = {result.is_validated for cell in cells.values() for result in cell.results if result.courses}
    how = {(True,): ", by validation", (False,): ", on the test set"}.get(tuple(picked), "")
    return f"best epoch{how}"


def accuracy(cells: Cells, title: str) -> Figure:
    """Test accuracy over the epochs; of long runs the end enlarged, too."""

    def course(result: Result) -> list[float]:
        return mean_course([network.accuracies for network in result.courses])

    shortest = min(len(course(result)) for cell in cells.values() for result in cell.results if result.courses)
    columns = [("Whole course", course, False)]
    if shortest > FEW:
        columns.append(("Last quarter of each run", course, True))
    figure = courses(cells, columns, "test accuracy (%)")
    figure.suptitle(f"{title}: accuracy over epochs", fontsize=12)
    return figure


def invalid_filters(cells: Cells, title: str) -> Figure:
    columns = [
        (f"L1 norm below {threshold:g}", lambda result, k=k: invalid_course(result, k), False)
        for k, threshold in enumerate(THRESHOLDS)
    ]
    figure = courses(cells, columns, "invalid filters (% of all)")
    for panel in figure.axes:
        panel.set_ylim(bottom=0)
    figure.suptitle(f"{title}: invalid filters over epochs", fontsize=12)
    return figure


def invalid_course(result: Result, k: int) -> list[float]:
    if not result.courses or not all(network.invalid_course for network in result.courses):
        return []
    return mean_course([network.invalid_course[k] for network in result.courses])


def mean_course(networks: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.mean(values) for values in zip(*networks, strict=True)]


Column = tuple[str, Callable[[Result], list[float]], bool]  # title, what is drawn of a result, its last quarter alone


def courses(cells: Cells, columns: Sequence[Column], ylabel: str) -> Figure:
    """A row of panels for each group of rows: lines are means over networks and seeds, bands the range of the seeds."""
    drawn = {label: cell for label, cell in cells.items() if any(map(columns[0][1], cell.results))}
    groups = grouped(drawn)
    figure, panels = pyplot.subplots(
        len(groups), len(columns), figsize=(WIDTH, 1.2 + 2.7 * len(groups)), squeeze=False, sharex="col"
    )
    firsts: dict[tuple[str, str], Axes] = {}
    for (baseline, group), beside in zip(groups, panels, strict=True):
        for panel, (title, course, is_end) in zip(beside, columns, strict=True):
            colours = iter(METHODS)
            for label in group:
                is_baseline = label == baseline
                style = {"color": BLACK, "linestyle": "--"} if is_baseline else {"color": next(colours)}
                draw_course(panel, list(map(course, drawn[label].results)), is_end, label, style)
            panel.xaxis.get_major_locator().set_params(integer=True)
            share_range(firsts.setdefault((baseline, title), panel), panel)
        beside[0].set_ylabel(ylabel)
        beside[-1].legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9)
    for top, bottom, (title, _, is_end) in zip(panels[0], panels[-1], columns, strict=True):
        top.set_title(title, fontsize=11)
        bottom.set_xlabel("epochs (% of the run's own)" if is_end else "epoch")
    figure.supxlabel("Lines: mean over networks and seeds. Bands: lowest to highest seed.", fontsize=9, color="dimgrey")
    return figure


def share_range(first: Axes, panel: Axes) -> None:
    """Panels that show the same baseline can be compared by eye."""
    if panel is not first:
        low, high = zip(first.get_ylim(), panel.get_ylim(), strict=True)
        panel.sharey(first)
        first.set_ylim(min(low), max(high))


def grouped(cells: Cells) -> list[tuple[str, list[str]]]:
    """A baseline and the labels of some rows that are compared with it, itself first; rows of their own come last."""
    groups: dict[str, list[str]] = {}
    alone = []
    for label, cell in cells.items():
        if cell.row.baseline in cells:
            groups.setdefault(cell.row.baseline, []).append(label)
        elif not any(other.row.baseline == label for other in cells.values()):
            alone.append(label)
    parts = [(baseline, [baseline, *part]) for baseline, group in groups.items() for part in divided(group)]
    return parts + [("", part) for part in divided(alone)]


def divided(labels: Sequence[str]) -> list[list[str]]:
    """Parts of about equal size, none larger than fits a panel."""
    count = math.ceil(len(labels) / LINES)
    return [list(labels[k * len(labels) // count : (k + 1) * len(labels) // count]) for k in range(count)]


def draw_course(panel: Axes, seeds: list[list[float]], is_end: bool, label: str, style: dict) -> None:
    """A line and its band over the epochs; of the last quarter alone, over the share of the epochs that have ended."""
    seeds = [values for values in seeds if values]
    if not seeds:
        return
    values = list(zip(*seeds, strict=False))
    epochs = list(range(len(values)))
    if is_end:
        begin = len(values) - len(values) // 4
        epochs, values = [100 * (epoch + 1) / len(values) for epoch in epochs[begin:]], values[begin:]
    marker = "o" if len(epochs) <= FEW else ""
    panel.plot(
        epochs, list(map(statistics.mean, values)), **style, linewidth=1.5, marker=marker, markersize=3, label=label
    )
    panel.fill_between(
        epochs, list(map(min, values)), list(map(max, values)), color=style["color"], alpha=0.15, linewidth=0
    )


def networks(cells: Cells, title: str) -> Figure:
    """Accuracy by number of networks, with the ensembles marked."""
    figure, panel = pyplot.subplots(figsize=(WIDTH, 5))
    trained = sorted(
        (cell for cell in cells.values() if cell.results[0].courses), key=lambda cell: cell.results[0].networks
    )
    compared = {cell.row.baseline for cell in trained}
    joined = [cell for cell in trained if cell.row.baseline or cell.row.label in compared]
    apart = [cell for cell in trained if cell not in joined]  # a single network on another schedule
    for name, (marker, offset, colour) in FIGURES.items():
        style = {"color": colour, "marker": marker, "linewidth": 1.5, "capsize": 3}
        for some, more in (joined, {"label": name_of(name, cells)}), (apart, {"linestyle": "", "fillstyle": "none"}):
            points = [(cell.results[0].networks + offset / 4, cell.values(name)) for cell in some]
            if points:
                whisker(panel, points, **style, **more)
    for cell in apart:
        at = (cell.results[0].networks, statistics.mean(cell.values("last")))
        panel.annotate(cell.row.label, at, xytext=(14, -4), textcoords="offset points", fontsize=9)
    ensembles = [
        (cell.results[0].networks, cell.values("ensemble")) for cell in cells.values() if not cell.results[0].courses
    ]
    if ensembles:
        style = {"color": COLOURS[2], "marker": "*", "markersize": 14, "linestyle": "", "capsize": 3}
        whisker(panel, ensembles, label="ensemble, trained apart", **style)
    panel.set(xlabel="number of networks", ylabel="test accuracy (%)")
    panel.set_xticks(sorted({cell.results[0].networks for cell in cells.values()}))
    figure.suptitle(f"{title}: accuracy by number of networks, ± sample standard deviation", fontsize=12)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def whisker(panel: Axes, points: Sequence[tuple[float, list[float]]], **style: object) -> None:
    spreads = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
    panel.errorbar([x for x, _ in points], [statistics.mean(values) for _, values in points], spreads, **style)


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG file of few colours: a fraction of the size, and looks the same."""
    canvas, file = figure.canvas, io.BytesIO()
    canvas.draw()  # once: savefig would, with this layout, draw twice
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    pyplot.close(figure)
    image.quantize(128, method=Image.Quantize.MEDIANCUT).save(file, "png", optimize=True)
    write_atomically(path, file.getvalue())
    return path
