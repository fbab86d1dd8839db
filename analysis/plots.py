"""Plots of runs, one function a figure; each returns a matplotlib Figure, for `save` to write.

A run's colour is the same in every figure, and its networks differ by their dashes; where there is one run, its
networks have a colour each.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

import numpy as np
from matplotlib import pyplot
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from analysis.runs import THRESHOLDS, Network, Run

# Okabe and Ito's colours, which hold for a colour-blind reader.
BLACK = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DASHES = ("-", "--", ":", "-.")
FORMATS = (".png", ".pdf", ".svg")
WIDTH = 7.0  # inches: two columns of a paper
FEW = 20  # epochs, up to which each is marked by a point; classes, up to which confusions are written in numbers
SMALLEST_NORM = 1e-4  # smaller ones are drawn here: a logarithmic axis has no 0
STYLE = {
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 3.5,
    "pdf.fonttype": 42,  # fonts that journals accept, and text that can be selected
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of runs may hold a $
}
pyplot.rcParams.update(STYLE)
COURSES = {  # by name of the figure: columns of the metrics, and what is on the axis of their panels
    "accuracy": {"test_accuracy": "test accuracy (%)"},
    "losses": {"train_loss": "training loss (nats)", "test_loss": "test loss (nats)"},
    "information": {"information": "sum of layer entropies (nats)"},
}


def draw(runs: Sequence[Run], out: Path) -> Iterator[Path]:
    """Draws what there is to draw into the folder, as PNG; into OUT as PDF or SVG, if it is called OUT.pdf or OUT.svg.

    Yields the path of each file.
    """
    folder, suffix = (out.with_suffix(""), out.suffix) if out.suffix in FORMATS else (out, ".png")
    folder.mkdir(parents=True, exist_ok=True)
    networks = [network for run in runs for network in run.networks]
    for name, columns in COURSES.items():
        if any(column in network.metrics for network in networks if len(network.metrics) for column in columns):
            yield save(courses(runs, columns), folder / f"{name}{suffix}")
    for run in runs:
        if any(len(network.coefficients) for network in run.networks):
            name = re.sub(r"[^\w.-]+", "_", run.label)
            yield save(coefficients(run), folder / f"coefficients_{name}{suffix}")
    if any(len(network.norms) for network in networks):
        yield save(filters(runs), folder / f"filters{suffix}")


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix: .png (200 dpi), .pdf or .svg."""
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix[1:])
    pyplot.close(figure)
    if path.suffix == ".png":  # of few colours: a fraction of the size, and looks the same
        Image.open(image).convert("RGB").quantize(256).save(path, optimize=True, dpi=(200, 200))
    else:
        path.write_bytes(image.getvalue())
    return path


# ---- Runs


def courses(runs: Sequence[Run], columns: dict[str, str]) -> Figure:
    """A panel for each column, with a line for each network; below it the last quarter of each line, enlarged."""
    figure, panels = pyplot.subplots(2, len(columns), figsize=(WIDTH, 5), squeeze=False)
    for (whole, late), (column, what) in zip(panels.T, columns.items(), strict=True):
        for network, style in lines_of(runs):
            if column in network.metrics:  # an older version's may lack it
                course = network.metrics.set_index("epoch")[column]
                for panel, part in (whole, course), (late, course.tail(1 + len(course) // 4)):
                    panel.plot(part, marker="o" if len(part) <= FEW else "", **style)
        whole.set(xlabel="epoch", ylabel=what)
        late.set(xlabel="epoch, in the last quarter", ylabel=what)
    for panel in panels.flat:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return with_legend(figure)


def coefficients(run: Run) -> Figure:
    """Every layer's coefficient over epochs, a heat map a network, white at equal shares."""
    networks = [network for network in run.networks if len(network.coefficients)]
    reach = max((network.coefficients["coefficient"] - 0.5).abs().max() for network in networks) or 0.5
    layers = networks[0].coefficients["layer"].unique()
    height = min(7.0, 1.3 + 0.12 * len(layers))
    figure, panels = pyplot.subplots(1, len(networks), figsize=(WIDTH, height), sharey=True, squeeze=False)
    for panel, network in zip(panels.flat, networks, strict=True):
        grid = network.coefficients.pivot(index="layer", columns="epoch", values="coefficient")
        first, last = grid.columns.min(), grid.columns.max()
        grid = grid.reindex(index=layers, columns=range(first, last + 1))  # an epoch without coefficients is a gap
        place = {"extent": (first - 0.5, last + 0.5, len(layers) - 0.5, -0.5), "aspect": "auto"}
        image = panel.imshow(grid, cmap="PuOr", vmin=0.5 - reach, vmax=0.5 + reach, interpolation="nearest", **place)
        panel.set(title=f"network {network.number}", xlabel="epoch")
        panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        panel.grid(False)
    every = math.ceil(len(layers) / 50)  # as many names can be read
    panels[0, 0].set_yticks(range(0, len(layers), every), layers[::every], fontsize=6)
    figure.suptitle(f"{run.label}: share of its own weights that each layer keeps")
    figure.colorbar(image, ax=panels, label="coefficient")
    return figure


def filters(runs: Sequence[Run]) -> Figure:
    """The share of the filters under each L1 norm, in which the invalid ones are the left end."""
    figure, panel = pyplot.subplots(figsize=(WIDTH, 3.5), subplot_kw={"xscale": "log"})
    for network, style in lines_of(runs):
        if len(network.norms):  # what is NaN is invalid
            panel.ecdf(network.norms.double().nan_to_num().clamp(min=SMALLEST_NORM).numpy(), **style)
    for threshold in THRESHOLDS:
        panel.axvline(threshold, color="grey", linestyle="--", linewidth=0.8)
    panel.set_xlim(left=min(THRESHOLDS) / 10)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    panel.set(title="Filters by L1 norm; those left of the dashed lines are invalid")
    panel.set(xlabel="L1 norm", ylabel="filters under this norm (%)")
    return with_legend(figure)


def lines_of(runs: Sequence[Run]) -> Iterator[tuple[Network, dict]]:
    """Every network with its style; of several runs, a legend names each once."""
    for at, run in enumerate(runs):
        for k, network in enumerate(run.networks):
            if len(runs) == 1:
                place, dash, label = k, 0, f"network {network.number}"
            else:  # a label that begins with an underscore is left out of legends
                place, dash, label = at, k, "_" if k else run.label
            dash = DASHES[(dash + place // len(COLOURS)) % len(DASHES)]
            yield network, {"color": COLOURS[place % len(COLOURS)], "linestyle": dash, "label": label}


def with_legend(figure: Figure) -> Figure:
    """The legend of the first panel below all of them, in room of its own."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = 2 if max(map(len, labels), default=0) < 50 else 1
    figure.set_figheight(figure.get_figheight() + 0.18 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    return figure


# ---- A model


def confusion(matrix: np.ndarray, classes: Sequence[str], title: str) -> Figure:
    """How often (in % of a class's images) images of each class (row) are taken for each class (column)."""
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    size = min(WIDTH, 2.6 + 0.42 * len(classes))
    figure, panel = pyplot.subplots(figsize=(size + 0.6, size))
    # A root of the share, so that rare confusions are seen beside the diagonal.
    image = panel.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, 0, 100))
    names = classes if len(classes) <= 100 else ()
    fontsize = 8 if len(names) <= FEW else 4
    panel.set_xticks(range(len(names)), names, rotation=90, fontsize=fontsize)
    panel.set_yticks(range(len(names)), names, fontsize=fontsize)
    for row, column in np.argwhere(matrix) if len(classes) <= FEW else ():
        colour = "black" if shares[row, column] > 35 else "white"
        panel.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", fontsize=7, color=colour)
    panel.set(title=title, xlabel="predicted class", ylabel="class")
    panel.grid(False)
    figure.colorbar(image, ax=panel, label="% of the class's images", shrink=0.8)
    return figure
