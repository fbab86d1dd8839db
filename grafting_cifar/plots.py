"""Plots of runs, as PNG files 1000 pixels wide: accuracies, coefficients, filter norms, comparison."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from grafting_cifar.runs import THRESHOLDS, Network, Run

WIDTH = 10  # inches of 100 pixels
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
DASHES = ("-", "--", ":", "-.")
TWO_COLUMNS = 60  # characters, up to which two entries of a legend stand side by side
FEW = 20  # epochs, up to which each is marked by a point
LABELLED_LAYERS = 60  # as many names can be read beside a heat map
SMALLEST_NORM = 1e-4  # smaller ones are drawn here: a logarithmic axis has no 0
STYLE = {
    "figure.dpi": 100, "savefig.dpi": 100, "figure.constrained_layout.use": True, "font.size": 11,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "legend.frameon": False, "text.parse_math": False,
}  # fmt: skip

Line = tuple[Run, Network]


def plot(runs: Sequence[Run], out: Path) -> Iterator[Path]:
    """Draws what there is to draw, and yields the path of each file."""
    trained = [(run, network) for run in runs for network in run.networks if network.accuracies]
    counted = [(run, network) for run in runs for network in run.networks if network.norms]
    with pyplot.rc_context(STYLE):
        if trained:
            yield _save(accuracy(trained), out / "accuracy.png")
        for run in runs:
            if any(network.coefficients for network in run.networks):
                name = re.sub(r"[^\w.-]+", "_", run.label)
                yield _save(coefficients(run), out / f"coefficients_{name}.png")
        if counted:
            yield _save(filter_norms(counted), out / "filter_norms.png")
        if len({run.method for run, _ in trained}) > 1:
            yield _save(comparison(trained), out / "comparison.png")


def accuracy(lines: Sequence[Line]) -> Figure:
    """Test accuracy over the epochs, a line for each network; of long runs the last quarter enlarged, too."""
    longest = max(len(network.epochs) for _, network in lines)
    is_long = longest > FEW
    figure, panels = pyplot.subplots(1 + is_long, figsize=(WIDTH, 4.6 + 3.6 * is_long))
    first, *rest = [panels] if isinstance(panels, Axes) else panels
    for panel in (first, *rest):
        for (run, network), style in zip(lines, _styles(lines), strict=True):
            label = f"{run.label}, network {network.number}: best {network.best:.2f} %, last {network.last:.2f} %"
            panel.plot(network.epochs, network.accuracies, label=_plain(label), **style, **_points(longest))
        panel.set(xlabel="epoch", ylabel="test accuracy (%)")
        panel.xaxis.get_major_locator().set_params(integer=True)
    first.set_title("Test accuracy of each network")
    for panel in rest:
        begin = max(network.epochs[-1] for _, network in lines) - longest // 4
        late = [
            value
            for _, network in lines
            for epoch, value in zip(network.epochs, network.accuracies, strict=True)
            if epoch >= begin
        ]
        margin = 0.05 * (max(late) - min(late)) + 0.05
        panel.set_title("The same, last quarter")
        panel.set_xlim(begin, begin + 1.02 * (longest // 4))
        panel.set_ylim(min(late) - margin, max(late) + margin)
    _legend(figure, first)
    return figure


def coefficients(run: Run) -> Figure:
    """A heat map of layer by epoch for each network, in one range of colours, white at equal shares."""
    networks = [network for network in run.networks if network.coefficients]
    layers = list(dict.fromkeys(layer for network in networks for layer in network.coefficients))
    epochs = {epoch for network in networks for shares in network.coefficients.values() for epoch in shares}
    begin, end = min(epochs), max(epochs) + 1
    maps = [
        [[network.coefficients[name].get(epoch, math.nan) for epoch in range(begin, end)] for name in layers]
        for network in networks
    ]
    shares = [share for grid in maps for line in grid for share in line if math.isfinite(share)]
    reach = max((abs(share - 0.5) for share in shares), default=0) or 0.5

    columns = min(2, len(networks))
    rows = math.ceil(len(networks) / columns)
    height = max(2.4, 0.15 * min(len(layers), LABELLED_LAYERS) + 0.5)
    figure, panels = pyplot.subplots(
        rows, columns, figsize=(WIDTH, rows * height + 1), squeeze=False, sharex=True, sharey=True
    )
    every = math.ceil(len(layers) / LABELLED_LAYERS)
    for panel, network, grid in zip(panels.flat, networks, maps, strict=False):
        image = panel.imshow(
            grid, cmap="PuOr", vmin=0.5 - reach, vmax=0.5 + reach, aspect="auto", interpolation="nearest",
            extent=(begin - 0.5, end - 0.5, len(layers) - 0.5, -0.5),
        )  # fmt: skip
        panel.set_title(f"network {network.number}", fontsize=11)
        panel.set_yticks(range(0, len(layers), every), layers[::every], fontsize=8)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(False)
    for panel in panels.flat[len(networks) :]:
        panel.axis("off")
    for panel in panels[-1]:
        panel.set_xlabel("epoch")
    for panel in panels[:, 0]:
        panel.set_ylabel("layer")
    figure.suptitle(_plain(f"{run.label}: share of its own weights that each layer keeps"), fontsize=12)
    pad = 0.15 / figure.get_figheight()  # a share of the height, which depends on the number of layers
    figure.colorbar(image, ax=panels, label="coefficient", location="bottom", aspect=60, shrink=0.6, pad=pad)
    return figure


def filter_norms(lines: Sequence[Line]) -> Figure:
    """How the L1 norms of the filters are distributed: their histogram, and how many lie below each norm."""
    norms = [[max(norm, SMALLEST_NORM) for norm in network.norms] for _, network in lines]
    low, high = min(0.5 * min(THRESHOLDS), *map(min, norms)), 1.05 * max(map(max, norms))
    edges = [low * (high / low) ** (k / 60) for k in range(61)]
    figure, (histogram, cumulative) = pyplot.subplots(
        2, figsize=(WIDTH, 7.5), sharex=True, subplot_kw={"xscale": "log"}
    )
    for (run, network), style, values in zip(lines, _styles(lines), norms, strict=True):
        label = f"{run.label}, network {network.number} ({network.counted_in})"
        style |= {"linewidth": 1.5, "label": _plain(label)}
        ranks = [100 * rank / len(values) for rank in range(1, len(values) + 1)]
        histogram.hist(values, edges, weights=[100 / len(values)] * len(values), histtype="step", **style)
        cumulative.plot(sorted(values), ranks, **style)
    histogram.set(title="L1 norms of the filters", ylabel="filters (%)")
    cumulative.set(xlabel="L1 norm", ylabel="filters up to this norm (%)")
    cumulative.xaxis.set_major_formatter("{x:g}")
    for panel in (histogram, cumulative):
        for threshold in THRESHOLDS:
            panel.axvline(threshold, color="grey", linestyle="--", linewidth=1)
            panel.annotate(
                f"{threshold:g}", (threshold, 1), xycoords=("data", "axes fraction"),
                xytext=(3, -3), textcoords="offset points", va="top", fontsize=9, color="dimgrey",
            )  # fmt: skip
    _legend(figure, cumulative)
    return figure


def comparison(lines: Sequence[Line]) -> Figure:
    """Baseline against grafted: the networks of the same settings together, from whichever runs."""
    groups = alike(lines)
    longest = max(len(network.epochs) for _, network in lines)
    figure, panels = pyplot.subplot_mosaic(
        [["course", "course"], ["accuracy", "filters"]],
        figsize=(WIDTH, 8.2),
        height_ratios=(3, 2),
    )
    for position, (name, networks) in enumerate(groups.items()):
        colour = COLOURS[position % len(COLOURS)]
        offset = 0.6 * ((position + 0.5) / len(groups) - 0.5)
        values = defaultdict(list)
        for network in networks:
            for epoch, value in zip(network.epochs, network.accuracies, strict=True):
                values[epoch].append(value)
        epochs, values = sorted(values), [values[epoch] for epoch in sorted(values)]
        label = _plain(f"{name} ({len(networks)} network{'s' * (len(networks) > 1)})")
        panel = panels["course"]
        panel.plot(epochs, list(map(statistics.mean, values)), color=colour, label=label, **_points(longest))
        panel.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=colour, alpha=0.2, linewidth=0)
        _scatter(panels["accuracy"], 0 + offset, [network.best for network in networks], colour)
        _scatter(panels["accuracy"], 1 + offset, [network.last for network in networks], colour)
        for k in range(len(THRESHOLDS)):
            shares = [100 * network.invalid[k][0] / network.invalid[k][1] for network in networks if network.invalid]
            _scatter(panels["filters"], k + offset, shares, colour)
    panels["course"].set(
        title="Test accuracy: mean and range of the networks", xlabel="epoch", ylabel="test accuracy (%)"
    )
    panels["course"].xaxis.get_major_locator().set_params(integer=True)
    panels["accuracy"].set(title="Each network, and the mean", ylabel="test accuracy (%)")
    panels["accuracy"].set_xticks((0, 1), ("best epoch", "last epoch"))
    panels["filters"].set(title="Invalid filters", ylabel="share of all filters (%)", ylim=(0, None))
    panels["filters"].set_xticks(range(len(THRESHOLDS)), [f"L1 norm < {threshold:g}" for threshold in THRESHOLDS])
    _legend(figure, panels["course"])
    return figure


def alike(lines: Sequence[Line]) -> dict[str, list[Network]]:
    """The networks by model and method, and by the other settings but the seed, which are named where they differ."""
    groups: dict[str, dict[frozenset, list[Network]]] = defaultdict(dict)
    for run, network in sorted(lines, key=lambda line: (line[0].model, line[0].method != "baseline")):
        settings = frozenset((key, str(value)) for key, value in run.settings.items() if key != "seed")
        groups[f"{run.model}, {run.method}"].setdefault(settings, []).append(network)
    named = {}
    for name, parts in groups.items():
        shared = frozenset.intersection(*parts)
        for settings, networks in parts.items():
            named[", ".join([name, *(f"{key} {value}" for key, value in sorted(settings - shared))])] = networks
    return named


def _scatter(panel: Axes, position: float, values: Sequence[float], colour: str) -> None:
    if values:
        panel.plot([position] * len(values), values, "o", color=colour, markersize=5, alpha=0.7)
        panel.hlines(statistics.mean(values), position - 0.06, position + 0.06, color=colour, linewidth=2)
        panel.set_xlim(-0.5, 1.5)
        panel.grid(False, axis="x")


def _styles(lines: Sequence[Line]) -> list[dict]:
    """A colour for each line while there are enough; else one for each run, and dashes for its networks."""
    if len(lines) <= len(COLOURS):
        return [{"color": colour} for colour in COLOURS[: len(lines)]]
    runs = list(dict.fromkeys(run.label for run, _ in lines))
    return [
        {
            "color": COLOURS[runs.index(run.label) % len(COLOURS)],
            "linestyle": DASHES[(network.number - 1) % len(DASHES)],
        }
        for run, network in lines
    ]


def _points(epochs: int) -> dict:
    return {"linewidth": 1.5, "marker": "o" if epochs <= FEW else "", "markersize": 4}


def _legend(figure: Figure, panel: Axes) -> None:
    """Adds the legend below the panels, in room of its own."""
    handles, labels = panel.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) <= TWO_COLUMNS else 1
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.25 * math.ceil(len(labels) / columns))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9)


def _plain(text: str) -> str:
    """Fit for a legend, which leaves out a label that begins with an underscore."""
    return f" {text}" if text.startswith("_") else text


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path)
    pyplot.close(figure)
    return path
