"""Plots of runs, one function a figure; each returns a matplotlib Figure, for `save` to write."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, which hold for a colour-blind reader; black is a baseline's.
BLACK = "#000000"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 7.0  # inches: two columns of a paper
FEW = 20  # epochs, up to which each is marked by a point
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


def save(figure: Figure, path: Path) -> Path:
    """Writes a figure in the format of the path's suffix: .png (200 dpi), .pdf or .svg."""
    with pyplot.rc_context(STYLE):
        figure.savefig(path)
    pyplot.close(figure)
    return path


def whole_ticks(panel: Axes) -> None:
    """Ticks of epochs are whole numbers; a single epoch has one."""
    low, high = panel.get_xlim()
    if high - low < 1:
        panel.set_xlim((low + high) / 2 - 0.5, (low + high) / 2 + 0.5)
        panel.set_xticks([round((low + high) / 2)])
    else:
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def say_instead(panel: Axes, sentence: str) -> None:
    """One sentence in the place of an empty panel."""
    panel.set_axis_off()
    panel.text(0.5, 0.5, sentence, ha="center", va="center", transform=panel.transAxes, wrap=True)
