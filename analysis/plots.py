"""Plots of runs, one function a figure; each returns a matplotlib Figure, for `save` to write.

A run's colour is the same in every figure, its networks differ by their dashes, and baselines are black.
"""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.runs import THRESHOLDS, Network, Run, groups_of

# Okabe and Ito's colours, which hold for a colour-blind reader; black is a baseline's.
BLACK = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DASHES = ("-", "--", ":", "-.")
WIDTH = 7.0  # inches: two columns of a paper
FEW = 20  # epochs, up to which each is marked by a point
MANY = 12  # lines, above which the legend names runs alone
TALLEST = 8.0  # inches of heat maps
SMALLEST_NORM = 1e-4  # smaller ones are drawn here: a logarithmic axis has no 0
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # fonts that journals accept, and text that can be selected
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs may hold a $
}
styled = pyplot.rc_context(STYLE)  # a decorator

Line = tuple[Run, Network, dict]  # with its colour and dashes


def draw(runs: Sequence[Run], out: Path, suffix: str = ".png") -> Iterator[Path]:
    """Draws into the folder what there is to draw, and yields the path of each file."""
    trained = [run for run in runs if any(len(network.metrics) for network in run.networks)]
    if trained:
        yield save(accuracy(trained), out / f"accuracy{suffix}")
        yield save(losses(trained), out / f"losses{suffix}")
    if any(len(informations(network)) for run in runs for network in run.networks):
        yield save(information(runs), out / f"information{suffix}")
    for run in runs:
        if any(len(network.coefficients) for network in run.networks):
            name = re.sub(r"[^\w.-]+", "_", run.label)
            yield save(coefficients(run), out / f"coefficients_{name}{suffix}")
            yield save(coefficients_map(run), out / f"coefficients_map_{name}{suffix}")
    if any(len(network.norms) for run in runs for network in run.networks):
        yield save(invalid_share(runs), out / f"invalid_share{suffix}")
        yield save(filter_norms(runs), out / f"filter_norms{suffix}")
    if len({run.method for run in trained}) > 1:
        yield save(comparison(trained), out / f"comparison{suffix}")


@styled
def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix: .png (200 dpi), .pdf or .svg."""
    figure.savefig(path)
    pyplot.close(figure)
    return path


# ---- Over epochs


@styled
def accuracy(runs: Sequence[Run]) -> Figure:
    """Test accuracy over epochs, a line a network; of long runs the last quarter enlarged, too."""
    lines = [line for line in lines_of(runs) if len(line[1].metrics)]
    is_long = max(len(network.metrics) for _, network, _ in lines) > FEW
    figure, panels = pyplot.subplots(1 + is_long, figsize=(WIDTH, 3 + 2.4 * is_long), squeeze=False)
    for _, network, style in lines:
        draw_course(panels[0, 0], network.metrics["epoch"], network.metrics["test_accuracy"], style)
    panels[0, 0].set(title="Test accuracy of each network", xlabel="epoch")
    if is_long:
        ends = {network.metrics["epoch"].iloc[-1] for _, network, _ in lines}
        for _, network, style in lines:
            late = network.metrics.tail(1 + len(network.metrics) // 4)
            epochs = late["epoch"] if len(ends) == 1 else late["epoch"] - late["epoch"].iloc[-1]
            draw_course(panels[1, 0], epochs, late["test_accuracy"], style)
        panels[1, 0].set_title("The same, last quarter" + " of each" * (len(ends) > 1))
        panels[1, 0].set_xlabel("epoch" + ", counted back from each network's last" * (len(ends) > 1))
    for panel in panels.flat:
        panel.set_ylabel("test accuracy (%)")
    return finish(figure, panels.flat)


@styled
def losses(runs: Sequence[Run]) -> Figure:
    """Mean cross-entropy of the training images during the epoch, and of the test images after it."""
    figure, panels = pyplot.subplots(1, 2, figsize=(WIDTH, 3))
    for panel, part in zip(panels, ("train", "test"), strict=True):
        for _, network, style in lines_of(runs):
            if f"{part}_loss" in network.metrics:
                draw_course(panel, network.metrics["epoch"], network.metrics[f"{part}_loss"], style)
        panel.set(title=f"{part.capitalize()} loss", xlabel="epoch")
    panels[0].set_ylabel("cross-entropy (nats)")
    return finish(figure, panels)


@styled
def information(runs: Sequence[Run]) -> Figure:
    """The information that a network holds: the sum of its layers' entropies, over epochs (the paper's figure)."""
    figure, panel = pyplot.subplots(figsize=(WIDTH, 3))
    for _, network, style in lines_of(runs):
        values = informations(network)
        draw_course(panel, values.index, values, style)
    panel.set(title="Information of each network", xlabel="epoch", ylabel="sum of layer entropies (nats)")
    return finish(figure, [panel])


def informations(network: Network) -> pd.Series:
    """By epoch, as recorded; of earlier versions' runs the sum of the entropies beside the coefficients."""
    if network.metrics.get("information", pd.Series(dtype=float)).notna().any():
        return network.metrics.set_index("epoch")["information"].dropna()
    if "own_entropy" in network.coefficients:
        return network.coefficients.groupby("epoch")["own_entropy"].sum(min_count=1).dropna()
    return pd.Series(dtype=float)


# ---- Coefficients


@styled
def coefficients(run: Run) -> Figure:
    """The coefficient of every layer over epochs, from the first layer (dark) to the last (light), and their mean."""
    grids, shades = coefficient_grids(run), matplotlib.colormaps["cividis"]
    figure, panels = panels_for(run, grids, columns=2, height=2.2, ylabel="coefficient")
    for panel, (_, grid) in zip(panels.flat, grids, strict=False):
        for k, (_, layer) in enumerate(grid.iterrows()):
            draw_course(panel, grid.columns, layer, {"color": shades(k / len(grid)), "linewidth": 0.7, "alpha": 0.7})
        mean = {"color": COLOURS[1], "linewidth": 2, "label": "mean over layers"}
        draw_course(panel, grid.columns, grid.mean(), mean)
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, max(2, len(grids[0][1]))), shades)
    figure.colorbar(scale, ax=panels, label="layer, from the input", ticks=matplotlib.ticker.MaxNLocator(integer=True))
    return finish(figure, panels.flat[: len(grids)])


@styled
def coefficients_map(run: Run) -> Figure:
    """A heat map of layer by epoch for each network, in one range of colours, white at equal shares."""
    grids = coefficient_grids(run)
    layers = list(grids[0][1].index)
    reach = max(float(np.nanmax(np.abs(grid.to_numpy() - 0.5))) for _, grid in grids)
    columns = 2 if len(grids) <= 4 else 4
    height = max(1.6, min(0.13 * len(layers) + 0.5, TALLEST / math.ceil(len(grids) / columns)))
    figure, panels = panels_for(run, grids, columns, height, ylabel="layer")
    every = math.ceil(len(layers) / (height / 0.12))  # as many names can be read beside it
    colours = {"cmap": "PuOr", "vmin": 0.5 - (reach or 0.5), "vmax": 0.5 + (reach or 0.5)}
    for panel, (network, grid) in zip(panels.flat, grids, strict=False):
        extent = (grid.columns[0] - 0.5, grid.columns[-1] + 0.5, len(layers) - 0.5, -0.5)
        image = panel.imshow(grid, aspect="auto", interpolation="nearest", extent=extent, **colours)
        if reach == 0:
            panel.set_title(f"network {network.number}: 0.5 everywhere")
        panel.set_yticks(range(0, len(layers), every), layers[::every], fontsize=6)
        panel.grid(False)
    pad = 0.15 / figure.get_figheight()  # a share of the height, which depends on the number of layers
    figure.colorbar(image, ax=panels, label="coefficient", location="bottom", aspect=50, shrink=0.6, pad=pad)
    return finish(figure, panels.flat[: len(grids)], legend=False)


def coefficient_grids(run: Run) -> list[tuple[Network, pd.DataFrame]]:
    """A frame of layers by epochs for each network; all have the same of both, NaN where there is no coefficient."""
    networks = [network for network in run.networks if len(network.coefficients)]
    everything = pd.concat([network.coefficients for network in networks])
    layers = list(dict.fromkeys(everything["layer"]))
    epochs = range(int(everything["epoch"].min()), int(everything["epoch"].max()) + 1)
    grids = [network.coefficients.pivot(index="layer", columns="epoch", values="coefficient") for network in networks]
    return list(zip(networks, [grid.reindex(index=layers, columns=epochs) for grid in grids], strict=True))


def panels_for(
    run: Run, grids: Sequence[tuple[Network, pd.DataFrame]], columns: int, height: float, ylabel: str
) -> tuple[Figure, np.ndarray]:
    """A panel of this height for each network, in rows of so many, under the run's name."""
    columns = min(columns, len(grids))
    rows = math.ceil(len(grids) / columns)
    size = (WIDTH, 0.8 + rows * height)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, sharey=True)
    figure.suptitle(f"{run.label}: share of its own weights that each layer keeps", fontsize=10)
    for k, panel in enumerate(panels.flat):
        if k >= len(grids):
            panel.set_axis_off()
            continue
        panel.set_title(f"network {grids[k][0].number}")
        panel.set_ylabel(ylabel if k % columns == 0 else "")
        if k + columns >= len(grids):  # nothing below it
            panel.set_xlabel("epoch")
            panel.tick_params(labelbottom=True)
    return figure, panels


# ---- Filters


@styled
def invalid_share(runs: Sequence[Run]) -> Figure:
    """The share of filters whose L1 norm is under each threshold from 1 to 0.001."""
    figure, panel = pyplot.subplots(figsize=(WIDTH, 3.2))
    thresholds = np.geomspace(1, 0.001, 301)
    largest = 0.0
    for _, network, style in lines_of(runs):
        if len(network.norms):
            under = 100 * np.mean(~(network.norms >= thresholds[:, None]), axis=1)  # what is NaN is invalid
            largest = max(largest, under.max())
            panel.plot(thresholds, under, **style)
    if largest == 0:
        say_instead(panel, "No filter of these networks has an L1 norm below 1.")
        return figure
    panel.set(xscale="log", xlim=(1, 0.001), ylim=(0, None))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set(title="Invalid filters", xlabel="threshold of the L1 norm", ylabel="filters under the threshold (%)")
    return finish(figure, [])


@styled
def filter_norms(runs: Sequence[Run]) -> Figure:
    """How the L1 norms of the filters are distributed: their histogram, and how many lie below each norm."""
    lines = [(network, style) for _, network, style in lines_of(runs) if len(network.norms)]
    norms = [np.sort(np.maximum(network.norms[np.isfinite(network.norms)], SMALLEST_NORM)) for network, _ in lines]
    shown = np.concatenate([*norms, [0.5 * min(THRESHOLDS)]])
    edges = np.geomspace(shown.min(), 1.05 * shown.max(), 61)
    figure, (histogram, cumulative) = pyplot.subplots(2, figsize=(WIDTH, 5), sharex=True, subplot_kw={"xscale": "log"})
    for (_, style), values in zip(lines, norms, strict=True):
        if len(values):
            histogram.hist(values, edges, weights=np.full(len(values), 100 / len(values)), histtype="step", **style)
            shares = 100 * np.arange(len(values) + 1) / len(values)
            cumulative.plot([values[0], *values], shares, drawstyle="steps-post", **style)
    histogram.set(title="L1 norms of the filters", ylabel="filters (%)")
    cumulative.set(xlabel="L1 norm", ylabel="filters up to this norm (%)")
    cumulative.xaxis.set_major_formatter("{x:g}")
    for panel in (histogram, cumulative):
        for threshold in THRESHOLDS:
            panel.axvline(threshold, color="grey", linestyle="--", linewidth=0.8)
            panel.annotate(f"{threshold:g}", (threshold, 0.97), xycoords=("data", "axes fraction"), fontsize=7)
    return finish(figure, [], legend=cumulative)


# ---- Comparisons


@styled
def comparison(runs: Sequence[Run]) -> Figure:
    """Baseline against grafted: the networks of the same settings together, from whichever runs."""
    groups = {name: [n for run in alike for n in run.networks] for name, alike in groups_of(runs).items()}
    figure, panels = pyplot.subplot_mosaic(
        [["course", "course"], ["accuracy", "filters"]], figsize=(WIDTH, 5.5), height_ratios=(3, 2)
    )
    has_invalid = False
    baselines = sum("baseline" in name for name in groups)
    for k, (name, networks) in enumerate(groups.items()):
        style = look(k, "baseline" in name and baselines == 1)
        colour, label = style["color"], f"{name} ({len(networks)} network{'s' * (len(networks) > 1)})"
        by_epoch = pd.concat([network.metrics for network in networks]).groupby("epoch")["test_accuracy"]
        course = by_epoch.agg(["mean", "min", "max"])
        draw_course(panels["course"], course.index, course["mean"], style | {"label": plain(label)})
        panels["course"].fill_between(course.index, course["min"], course["max"], color=colour, alpha=0.2, linewidth=0)
        place = 0.7 * ((k + 0.5) / len(groups) - 0.5)
        scatter(panels["accuracy"], place, [network.best for network in networks], colour, len(groups))
        scatter(panels["accuracy"], 1 + place, [network.last for network in networks], colour, len(groups))
        for at in range(len(THRESHOLDS)):
            shares = [100 * network.invalid[at][0] / network.invalid[at][1] for network in networks if network.invalid]
            has_invalid |= any(shares)
            scatter(panels["filters"], at + place, shares, colour, len(groups))
    panels["course"].set(title="Test accuracy: mean and range of the networks", xlabel="epoch", ylabel="accuracy (%)")
    panels["accuracy"].set(title="Each network, and the mean", ylabel="test accuracy (%)", xlim=(-0.5, 1.5))
    panels["accuracy"].set_xticks((0, 1), ("best epoch", "last epoch"))
    if has_invalid:
        panels["filters"].set(ylabel="share of all filters (%)", ylim=(0, None), xlim=(-0.5, 1.5))
        panels["filters"].set_xticks((0, 1), [f"L1 norm < {threshold:g}" for threshold in THRESHOLDS])
    else:
        say_instead(panels["filters"], f"No filter has an L1 norm\nbelow {max(THRESHOLDS):g}.")
    panels["filters"].set_title("Invalid filters")
    return finish(figure, [panels["course"]])


@styled
def confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """How often (in % of a class's images) images of each class (row) are taken for each class (column)."""
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = min(WIDTH, 2.6 + 0.42 * len(classes))
    figure, panel = pyplot.subplots(figsize=(size + 0.6, size))
    scale = matplotlib.colors.PowerNorm(0.5, 0, 100)  # a root, so that rare confusions are seen beside the diagonal
    image = panel.imshow(shares, cmap="cividis", norm=scale)
    every = math.ceil(len(classes) / 50)
    names = [name if len(name) <= 14 else name[:13] + "…" for name in map(str, classes)][::every]
    small = 8 if len(classes) <= 20 else 5
    panel.set_xticks(range(0, len(classes), every), names, rotation=90, fontsize=small)
    panel.set_yticks(range(0, len(classes), every), names, fontsize=small)
    if len(classes) <= 20:
        for row, column in np.argwhere(matrix):
            colour = "black" if shares[row, column] > 35 else "white"
            text = f"{shares[row, column]:.0f}"
            panel.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    panel.set(title=title, xlabel="predicted class", ylabel="class")
    panel.grid(False)
    figure.colorbar(image, ax=panel, label="% of the class's images", shrink=0.8)
    return figure


# ---- What they share


def lines_of(runs: Sequence[Run]) -> list[Line]:
    """Every network with its style: a colour a run, or a network where there is one run; black for a baseline."""
    many = sum(len(run.networks) for run in runs) > MANY
    baselines = sum(run.is_baseline for run in runs)
    lines: list[Line] = []
    for at, run in enumerate(runs):
        for k, network in enumerate(run.networks):
            label = run.label
            if len(run.networks) > 1:
                label += f" ({len(run.networks)} networks)" if many else f", network {network.number}"
            label = "_" if many and k else plain(label)  # no entry in the legend
            style = look(at, run.is_baseline and baselines == 1, k) if len(runs) > 1 else look(k)
            lines.append((run, network, style | {"label": label}))
    return lines


def look(at: int, is_black: bool = False, dash: int = 0) -> dict:
    """Colour and dashes of what comes at this place; after as many as there are colours, further dashes."""
    colour = BLACK if is_black else COLOURS[at % len(COLOURS)]
    return {"color": colour, "linestyle": DASHES[(dash + at // len(COLOURS)) % len(DASHES)]}


def draw_course(panel: Axes, epochs: Sequence[int], values: Sequence[float], style: dict) -> None:
    if len(epochs):
        panel.plot(epochs, values, marker="o" if len(epochs) <= FEW else "", **style)


def scatter(panel: Axes, place: float, values: Sequence[float], colour: str, groups: int) -> None:
    """The values above a place, and their mean, no wider than its part of the panel."""
    reach = min(0.06, 0.3 / groups)
    if len(values):
        panel.plot([place] * len(values), values, "o", color=colour, alpha=0.7)
        panel.hlines(np.mean(values), place - reach, place + reach, color=colour, linewidth=2)
        panel.grid(False, axis="x")


def finish(figure: Figure, over_epochs: Sequence[Axes], legend: bool | Axes = True) -> Figure:
    """Whole epochs on the axes, and the legend below the panels, in room of its own."""
    for panel in over_epochs:
        whole_ticks(panel)
    if legend:
        panel = figure.axes[0] if legend is True else legend
        handles, labels = panel.get_legend_handles_labels()
        columns = max(1, min(3, 110 // (8 + max(map(len, labels), default=1))))
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.18 * math.ceil(len(labels) / columns))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


def whole_ticks(panel: Axes) -> None:
    """Ticks of epochs are whole numbers; a single epoch has one."""
    low, high = panel.get_xlim()
    if high - low <= 1:
        panel.set_xlim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
        panel.set_xticks([round((low + high) / 2)])
    else:
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def say_instead(panel: Axes, sentence: str) -> None:
    """One sentence in the place of an empty panel."""
    panel.clear()
    panel.set_axis_off()
    panel.text(0.5, 0.5, sentence, ha="center", va="center", transform=panel.transAxes)


def plain(text: str) -> str:
    """Fit for a legend, which leaves out a label that begins with an underscore."""
    return f" {text}" if text.startswith("_") else text
