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
    "figure.titlesize": 10,
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


def draw(runs: Sequence[Run], out: Path, suffix: str = ".png") -> Iterator[Path]:
    """Draws into the folder what there is to draw, and yields the path of each file."""
    everyone = [network for run in runs for network in run.networks]
    trained = [run for run in runs if any(len(network.metrics) for network in run.networks)]
    if trained:
        yield save(accuracy(trained), out / f"accuracy{suffix}")
        yield save(losses(trained), out / f"losses{suffix}")
    if any(len(informations(network)) for network in everyone):
        yield save(information(runs), out / f"information{suffix}")
    for run in runs:
        if any(len(network.coefficients) for network in run.networks):
            name = re.sub(r"[^\w.-]+", "_", run.label)
            yield save(coefficients(run), out / f"coefficients_{name}{suffix}")
    if any(len(network.norms) for network in everyone):
        yield save(filters(runs), out / f"filters{suffix}")
    if len({run.method for run in trained}) > 1:
        yield save(comparison(trained), out / f"comparison{suffix}")


@styled
def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix: .png (200 dpi), .pdf or .svg."""
    figure.savefig(path)
    pyplot.close(figure)
    return path


@styled
def accuracy(runs: Sequence[Run]) -> Figure:
    """Test accuracy over epochs, a line a network; of long runs the last quarter enlarged, too."""
    lines = [line for line in lines_of(runs) if len(line[0].metrics)]
    ends = {network.metrics["epoch"].iloc[-1] for network, _ in lines}
    is_long = max(ends) >= FEW
    figure, panels = pyplot.subplots(1 + is_long, figsize=(WIDTH, 3 + 2.4 * is_long), squeeze=False)
    for network, style in lines:
        course = network.metrics.set_index("epoch")["test_accuracy"]
        draw_course(panels[0, 0], course, style)
        if is_long:
            late = course.tail(1 + len(course) // 4)
            draw_course(panels[1, 0], late if len(ends) == 1 else late.set_axis(late.index - late.index[-1]), style)
    panels[0, 0].set(title="Test accuracy of each network", xlabel="epoch")
    if is_long:
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
        for network, style in lines_of(runs):
            if f"{part}_loss" in network.metrics:
                draw_course(panel, network.metrics.set_index("epoch")[f"{part}_loss"], style)
        panel.set(title=f"{part.capitalize()} loss", xlabel="epoch")
    panels[0].set_ylabel("cross-entropy (nats)")
    return finish(figure, panels)


@styled
def information(runs: Sequence[Run]) -> Figure:
    """The information that a network holds: the sum of its layers' entropies, over epochs (the paper's figure)."""
    figure, panel = pyplot.subplots(figsize=(WIDTH, 3))
    for network, style in lines_of(runs):
        draw_course(panel, informations(network), style)
    panel.set(title="Information of each network", xlabel="epoch", ylabel="sum of layer entropies (nats)")
    return finish(figure, [panel])


def informations(network: Network) -> pd.Series:
    """By epoch, as recorded; of earlier versions' runs the sum of the entropies beside the coefficients."""
    if "information" in network.metrics and network.metrics["information"].notna().any():
        return network.metrics.set_index("epoch")["information"].dropna()
    if "own_entropy" in network.coefficients:
        return network.coefficients.groupby("epoch")["own_entropy"].sum(min_count=1).dropna()
    return pd.Series(dtype=float)


@styled
def coefficients(run: Run) -> Figure:
    """Every layer's coefficient over epochs, a heat map a network, in one range of colours, white at equal shares."""
    networks = [network for network in run.networks if len(network.coefficients)]
    grids = [network.coefficients.pivot(index="layer", columns="epoch", values="coefficient") for network in networks]
    layers = list(dict.fromkeys(pd.concat([network.coefficients for network in networks])["layer"]))
    epochs = range(min(grid.columns.min() for grid in grids), max(grid.columns.max() for grid in grids) + 1)
    reach = max(float(np.nanmax(np.abs(grid - 0.5))) for grid in grids)
    across = min(len(grids), 2 if len(grids) <= 4 else 4)
    down = math.ceil(len(grids) / across)
    height = max(1.6, min(0.13 * len(layers) + 0.5, TALLEST / down))
    every = math.ceil(len(layers) / (height / 0.12))  # as many names can be read beside it
    options = {"squeeze": False, "sharex": True, "sharey": True}
    figure, panels = pyplot.subplots(down, across, figsize=(WIDTH, 0.8 + down * height), **options)
    figure.suptitle(f"{run.label}: share of its own weights that each layer keeps")
    for panel in panels.flat[len(grids) :]:
        panel.set_axis_off()
    colours = {"cmap": "PuOr", "vmin": 0.5 - (reach or 0.5), "vmax": 0.5 + (reach or 0.5)}
    extent = (epochs[0] - 0.5, epochs[-1] + 0.5, len(layers) - 0.5, -0.5)
    for k, (panel, network, grid) in enumerate(zip(panels.flat, networks, grids, strict=False)):
        grid = grid.reindex(index=layers, columns=epochs)  # an epoch without coefficients is a gap
        image = panel.imshow(grid, aspect="auto", interpolation="nearest", extent=extent, **colours)
        panel.set_title(f"network {network.number}" + ": 0.5 everywhere" * (reach == 0))
        panel.set_ylabel("layer" if k % across == 0 else "")
        panel.set_yticks(range(0, len(layers), every), layers[::every], fontsize=6)
        panel.grid(False)
        if k + across >= len(grids):  # nothing below it
            panel.set_xlabel("epoch")
            panel.tick_params(labelbottom=True)
    pad = 0.15 / figure.get_figheight()  # a share of the height, which depends on the number of layers
    figure.colorbar(image, ax=panels, label="coefficient", location="bottom", aspect=50, shrink=0.6, pad=pad)
    return finish(figure, panels.flat[: len(grids)], legend=False)


@styled
def filters(runs: Sequence[Run]) -> Figure:
    """How the L1 norms of the filters are distributed, and the share of them under each threshold from 1 to 0.001."""
    lines = [(network.norms, style) for network, style in lines_of(runs) if len(network.norms)]
    figure, (histogram, share) = pyplot.subplots(2, figsize=(WIDTH, 5.4), subplot_kw={"xscale": "log"})
    finite = np.concatenate([norms[np.isfinite(norms)] for norms, _ in lines] + [THRESHOLDS])
    edges = np.geomspace(max(0.5 * finite.min(), SMALLEST_NORM), 1.05 * finite.max(), 61)
    thresholds = np.geomspace(1, 0.001, 301)
    has_any = False
    for norms, style in lines:
        weights = np.full(len(norms), 100 / len(norms))
        histogram.hist(np.maximum(norms, edges[0]), edges, weights=weights, histtype="step", **style)
        under = 100 * np.mean(~(norms >= thresholds[:, None]), axis=1)  # what is NaN is invalid
        has_any |= under.any()
        share.plot(thresholds, under, **style)
    histogram.set(title="L1 norms of the filters", xlabel="L1 norm", ylabel="filters (%)")
    share.set(title="Invalid filters", xlabel="threshold of the L1 norm", ylabel="filters under the threshold (%)")
    share.set(xlim=(1, 0.001), ylim=(0, None))
    for panel in (histogram, share):
        panel.xaxis.set_major_formatter("{x:g}")
        for threshold in THRESHOLDS:
            panel.axvline(threshold, color="grey", linestyle="--", linewidth=0.8)
    if not has_any:  # one sentence in the place of an empty panel
        share.clear()
        share.set_axis_off()
        share.text(0.5, 0.5, "No filter has an L1 norm below 1.", ha="center", transform=share.transAxes)
    return finish(figure, [])


@styled
def comparison(runs: Sequence[Run]) -> Figure:
    """Baseline against grafted: the networks of the same settings together, from whichever runs."""
    groups = {name: [n for run in alike for n in run.networks] for name, alike in groups_of(runs).items()}
    figure, (course, dots) = pyplot.subplots(2, figsize=(WIDTH, 5.5), height_ratios=(3, 2))
    baselines = sum("baseline" in name for name in groups)
    for k, (name, networks) in enumerate(groups.items()):
        style = look(k, "baseline" in name and baselines == 1)
        label = f"{name} ({len(networks)} network{'s' * (len(networks) > 1)})"
        by_epoch = pd.concat([network.metrics for network in networks]).groupby("epoch")["test_accuracy"]
        draw_band(course, by_epoch.mean(), by_epoch.min(), by_epoch.max(), style | {"label": plain(label)})
        place, reach = 0.7 * ((k + 0.5) / len(groups) - 0.5), min(0.06, 0.3 / len(groups))
        for at, values in enumerate(([n.best for n in networks], [n.last for n in networks])):
            dots.plot([at + place] * len(values), values, "o", color=style["color"], alpha=0.7)
            dots.hlines(np.mean(values), at + place - reach, at + place + reach, color=style["color"], linewidth=2)
    course.set(title="Test accuracy: mean and range of the networks", xlabel="epoch", ylabel="accuracy (%)")
    dots.set(title="Each network, and the mean", ylabel="test accuracy (%)", xlim=(-0.5, 1.5))
    dots.set_xticks((0, 1), ("best epoch", "last epoch"))
    dots.grid(False, axis="x")
    return finish(figure, [course])


@styled
def confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """How often (in % of a class's images) images of each class (row) are taken for each class (column)."""
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = min(WIDTH, 2.6 + 0.42 * len(classes))
    figure, panel = pyplot.subplots(figsize=(size + 0.6, size))
    scale = matplotlib.colors.PowerNorm(0.5, 0, 100)  # a root, so that rare confusions are seen beside the diagonal
    image = panel.imshow(shares, cmap="cividis", norm=scale)
    every, small = math.ceil(len(classes) / 50), 8 if len(classes) <= 20 else 5
    names = [name if len(name) <= 14 else name[:13] + "…" for name in classes[::every]]
    panel.set_xticks(range(0, len(classes), every), names, rotation=90, fontsize=small)
    panel.set_yticks(range(0, len(classes), every), names, fontsize=small)
    for row, column in np.argwhere(matrix) if len(classes) <= 20 else ():
        style = {"fontsize": 7, "color": "black" if shares[row, column] > 35 else "white"}
        panel.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", **style)
    panel.set(title=title, xlabel="predicted class", ylabel="class")
    panel.grid(False)
    figure.colorbar(image, ax=panel, label="% of the class's images", shrink=0.8)
    return figure


# ---- What they share


def lines_of(runs: Sequence[Run]) -> list[tuple[Network, dict]]:
    """Every network with its style: a colour a run, or a network where there is one run; black for a baseline."""
    many = sum(len(run.networks) for run in runs) > MANY
    baselines = sum(run.is_baseline for run in runs)
    lines = []
    for at, run in enumerate(runs):
        for k, network in enumerate(run.networks):
            own = f" ({len(run.networks)} networks)" if many else f", network {network.number}"
            label = "_" if many and k else plain(run.label + own * (len(run.networks) > 1))  # "_": not in the legend
            style = look(at, run.is_baseline and baselines == 1, k) if len(runs) > 1 else look(k)
            lines.append((network, style | {"label": label}))
    return lines


def look(at: int, is_black: bool = False, dash: int = 0) -> dict:
    """Colour and dashes of what comes at this place; after as many as there are colours, further dashes."""
    colour = BLACK if is_black else COLOURS[at % len(COLOURS)]
    return {"color": colour, "linestyle": DASHES[(dash + at // len(COLOURS)) % len(DASHES)]}


def draw_course(panel: Axes, course: pd.Series, style: dict) -> None:
    """Values by epoch."""
    if len(course):
        panel.plot(course.index, course, marker="o" if len(course) <= FEW else "", **style)


def draw_band(panel: Axes, course: pd.Series, low: pd.Series, high: pd.Series, style: dict) -> None:
    draw_course(panel, course, style)
    panel.fill_between(course.index, low, high, color=style["color"], alpha=0.15, linewidth=0)


def finish(figure: Figure, over_epochs: Sequence[Axes], legend: bool = True) -> Figure:
    """Whole epochs on the axes, and the legend below the panels, in room of its own."""
    for panel in over_epochs:
        whole_ticks(panel)
    if legend:
        handles, labels = figure.axes[0].get_legend_handles_labels()
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


def plain(text: str) -> str:
    """Fit for a legend, which leaves out a label that begins with an underscore."""
    return f" {text}" if text.startswith("_") else text
