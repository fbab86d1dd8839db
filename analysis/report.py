"""Tabulates runs of either script, alive or done: accuracies, gains over the baseline, invalid filters; plots them.

    python analysis/report.py checkpoint/demo/baseline checkpoint/demo/grafted --plots plots
    python analysis/report.py results/small --format csv >results.csv

A directory that is no run stands for all runs below it, results of the experiments among them.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.runs import (
    THRESHOLDS,
    Network,
    Run,
    find_runs,
    labels,
    mean_and_deviation,
    program,
    read_run,
    recipe,
    table,
)
from training.flags import Parser

WIDTH = 120  # columns of a terminal, which no line of the table is longer than
FORMATS = ("png", "pdf", "svg")
GRAFTING = {"num", "a", "c", "level", "method", "scion", "criterion", "difflr"}  # settings that a baseline lacks
CAPTION = """\
Best and last: test accuracy in %, of a run with several networks their mean ± sample standard deviation; the best epoch
was chosen on the images of --val or, without, on the test images. Gain: over the baseline of the same settings, in
percentage points, at the last epoch that both have. <0.1, <0.01: filters with an L1 norm below. s/epoch: median."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("directories", metavar="DIR", nargs="+", type=Path, help="save directory of a run, or a folder of runs")
    add("--format", choices=("markdown", "csv", "latex"), default="markdown", help="of the table")
    add("--plots", metavar="OUT", type=Path, help="draw plots into this folder; OUT.pdf, OUT.svg: in that format")
    add("--plot-format", choices=FORMATS, help="of the plots: PNG has 200 dpi (default: png)")
    args = parser.parse_args(arguments)
    if args.plots and args.plots.suffix[1:] in FORMATS:
        args.plot_format = args.plot_format or args.plots.suffix[1:]
        args.plots = args.plots.with_suffix("")
    return args


def progress(run: Run, network: Network) -> str:
    """`done`, or how far an unfinished network is: `epoch 50 of 200, waiting for network 1`."""
    status = network.status
    if status is None or status.state == "done":
        return "done"
    if not len(network.metrics):
        return f"{status}, no epoch has ended"
    return f"epoch {len(network.metrics)} of {status.epochs or run.settings.get('epochs', '?')}, {status}"


def gain(run: Run, network: Network, runs: Sequence[Run]) -> float:
    """Over the mean of the baselines of its settings, at the last epoch that all have; NaN if there is none.

    Its settings are all but those of grafting; of several baselines that of the same seed counts, or else all.
    """
    own = recipe(run, GRAFTING)
    alike = [other for other in runs if own and other.is_baseline and recipe(other, GRAFTING) == own]
    alike = [other for other in alike if other.settings.get("seed") == run.settings.get("seed")] or alike
    networks = [network, *(single for other in alike for single in other.networks)]
    courses = pd.concat([one.metrics.set_index("epoch")["test_accuracy"] for one in networks], axis=1, join="inner")
    if run.is_baseline or not alike or courses.empty:
        return math.nan
    return courses.iloc[-1, 0] - courses.iloc[-1, 1:].mean()


def frame_of(runs: Sequence[Run]) -> pd.DataFrame:
    """All that is known, a row for each network."""
    rows = []
    for run in runs:
        for network in run.networks:
            row = {"run": run.label, "network": network.number, "model": run.model, "method": run.method}
            row |= {"epochs": len(network.metrics), "best": network.best, "last": network.last}
            row |= {"gain": gain(run, network, runs), "seconds_per_epoch": network.seconds_per_epoch, **network.filters}
            row |= {"state": progress(run, network), "file": network.best_file or "", "directory": run.directory}
            rows.append(row | {"classes": str(run.settings.get("classes", ""))})
    needed = [
        "directory",
        "model",
        "classes",
        "best",
        "last",
        "gain",
        "total",
        *(f"invalid_{threshold}" for threshold in THRESHOLDS),
    ]
    frame = pd.json_normalize(rows, sep="_")  # invalid_0.1 of {"invalid": {"0.1": ...}}
    return frame.reindex(columns=list(dict.fromkeys([*frame, *needed]))).round(4)


def best_networks(frame: pd.DataFrame) -> pd.DataFrame:
    """By number of classes: accuracies on other data sets cannot be compared."""
    known = frame.dropna(subset="best")
    return known.loc[known.groupby("classes", sort=False)["best"].idxmax()] if len(known) else known


def text_table(runs: Sequence[Run], frame: pd.DataFrame, style: str) -> tuple[str, list[str]]:
    """The table for people, no wider than WIDTH in Markdown, and the notes that its numbers in brackets refer to."""
    rows, notes = [], []
    best = best_networks(frame).index
    several_models = len({run.model for run in runs if run.model}) > 1
    for run in runs:
        own, marks = frame[frame["directory"] == run.directory], ""
        name = f"{run.label}: {f'{run.model}, ' * several_models}{run.method}"
        name = run.label if run.method == run.label or not (run.networks or run.record) else name
        for error in run.errors:
            notes.append(f"{run.label}: {error}")
            marks += f" [{len(notes)}]"
        if len(own) != 1:
            rows.append(row_of(name, own, marks))
            name, marks = "", ""
        for place, known in own.iterrows():
            if known["state"] != "done":
                notes.append(f"{run.label}, network {known['network']}: {known['state']}")
                marks += f" [{len(notes)}]"
            rows.append(row_of(name or f"· network {known['network']}", own.loc[[place]], marks))
            rows[-1]["best %"] += " *" * (place in best)
            marks = ""
        if "ensemble" in run.record:
            rows[-1]["last %"] = f"{run.record['ensemble'].get('ensemble', math.nan):.2f}"
    texts = pd.DataFrame(rows)
    text = table(texts, style, right=list(texts)[1:])
    if style == "markdown" and (excess := len(text.partition("\n")[0]) - WIDTH) > 0:
        widest = max(12, texts["run"].str.len().max() - excess)
        texts["run"] = [name if len(name) <= widest else f"{name[: widest - 1]}…" for name in texts["run"]]
        text = table(texts, style, right=list(texts)[1:])
    return text, notes


def row_of(name: str, networks: pd.DataFrame, marks: str) -> dict[str, str]:
    """The texts of a row: of one network, or the means of several."""

    def mean(column: str, form: str) -> str:
        value = networks[column].mean() if len(networks) else math.nan
        return "–" if math.isnan(value) else format(value, form)

    epochs = "/".join(map(str, sorted(set(networks["epochs"])))) if len(networks) else ""
    row = {"run": name, "epochs": epochs + marks}
    row |= {f"{which} %": mean_and_deviation(networks[which], 2) for which in ("best", "last")}
    row |= {"gain": mean("gain", "+.2f").removesuffix("–")}
    row |= {f"<{threshold}": mean(f"invalid_{threshold}", ".1f").removesuffix(".0") for threshold in THRESHOLDS}
    return row | {"s/epoch": mean("seconds_per_epoch", ".1f")}


def sentences(frame: pd.DataFrame) -> list[str]:
    """What is said below the table."""
    said, best = [], best_networks(frame)
    for _, one in best.iterrows():
        file = f": {one['file']}".replace(f" {Path.cwd()}/", " ") if one["file"] else ""
        which = f" in {one['classes']} classes" * (len(best) > 1)
        said.append(f"* Best{which}: network {one['network']} of {one['run']}, {one['best']:.2f} %{file}")
    said.append(CAPTION)
    totals = frame.dropna(subset="total").groupby("model")["total"].first()
    said.append(" ".join(f"A {model or 'network'} has {total:,.0f} filters." for model, total in totals.items()))
    for _, one in frame.iterrows():
        counts = [one.get(f"shortcut_invalid_{threshold}", 0) for threshold in THRESHOLDS]
        if max(counts) > 0:
            apart = ", ".join(f"{count:.0f} of {one['shortcut_total']:.0f}" for count in counts)
            said.append(f"Of shortcut convolutions, counted apart: {apart} ({one['run']}, network {one['network']}).")
    return list(filter(None, said))


def in_order(runs: Sequence[Run]) -> list[Run]:
    """By model, the most accurate after the last epoch first; those without an accuracy last."""

    def place(run: Run) -> tuple:
        last = pd.Series([network.last for network in run.networks], dtype=float).mean()
        return math.isnan(last), run.model, 0 if math.isnan(last) else -last, run.label

    return sorted(runs, key=place)


def main() -> int:
    args = parse()
    directories = list(dict.fromkeys(found for given in args.directories for found in find_runs(given.absolute())))
    runs = in_order([read_run(path, label) for path, label in zip(directories, labels(directories), strict=True)])
    frame = frame_of(runs)
    text, notes = text_table(runs, frame, args.format)
    about = sys.stdout if args.format == "markdown" else sys.stderr  # a table for programs comes alone
    print(table(frame, "csv") if args.format == "csv" else text, flush=True)
    if args.format == "markdown":
        print("", *sentences(frame), sep="\n")
    if notes:
        print("", *(f"[{k}] {line}" for k, line in enumerate(notes, 1)), sep="\n", file=about)
    if args.plots:
        from analysis import plots  # matplotlib, for those who ask for plots alone

        args.plots.mkdir(parents=True, exist_ok=True)
        paths = list(plots.draw(runs, args.plots, f".{args.plot_format or 'png'}"))
        print("", *(f"- {path}" for path in paths), sep="\n", file=about)
    return int(not any(run.record or run.networks for run in runs))


if __name__ == "__main__":
    sys.exit(program(main))
