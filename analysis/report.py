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
    baselines_of,
    find_runs,
    labels,
    mean_and_deviation,
    program,
    read_run,
    table,
)
from training.flags import Parser

WIDTH = 120  # columns of a terminal, which no line of the table is longer than
FORMATS = ("png", "pdf", "svg")
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


# ---- What is said of the runs


def progress(run: Run, network: Network) -> str:
    """`done`, or how far an unfinished network is: `epoch 50 of 200, waiting for network 1`."""
    status = network.status
    if status is None or status.state == "done":
        return "done"
    if not len(network.metrics):
        return f"{status}, no epoch has ended"
    return f"epoch {len(network.metrics)} of {status.epochs or run.settings.get('epochs', '?')}, {status}"


def gain(run: Run, network: Network, runs: Sequence[Run]) -> float:
    """Over the mean of the baselines, at the last epoch that all have; NaN if there is none."""
    baselines = [other for baseline in baselines_of(run, runs) for other in baseline.networks]
    columns = [each.metrics.set_index("epoch")["test_accuracy"] for each in (network, *baselines)]
    common = pd.concat(columns, axis=1, join="inner")
    if not baselines or common.empty:
        return math.nan
    own, *others = common.iloc[-1]
    return own - sum(others) / len(others)


def frame_of(runs: Sequence[Run]) -> pd.DataFrame:
    """All that is known, a row for each network."""
    rows = []
    for run in runs:
        for network in run.networks:
            row = {"run": run.label, "network": network.number, "model": run.model, "method": run.method}
            row |= {"epochs": len(network.metrics), "best": network.best, "last": network.last}
            row |= {"gain": gain(run, network, runs), "seconds_per_epoch": network.seconds_per_epoch}
            for kind, counts in ("", network.invalid), ("shortcut_", network.shortcuts):
                for k, threshold in enumerate(THRESHOLDS):
                    invalid, total = counts[k] if counts else (math.nan, math.nan)
                    row |= {f"{kind}invalid_{threshold:g}": invalid, f"{kind}filters": total}
            row |= {"counted_in": network.counted_in, "state": progress(run, network)}
            rows.append(row | {"file": network.best_file or "", "directory": run.directory})
    return pd.DataFrame(rows).round(4)


def text_table(runs: Sequence[Run], style: str) -> tuple[str, list[str]]:
    """The table for people, no wider than WIDTH in Markdown, and the notes that its numbers in brackets refer to."""
    notes: list[str] = []

    def note(text: str) -> str:
        notes.append(text)
        return f" [{len(notes)}]"

    rows, best, everything = [], best_networks(runs), frame_of(runs)
    several_models = len({run.model for run in runs if run.model}) > 1
    for run in runs:
        name = f"{run.label}: {run.model + ', ' if several_models else ''}{run.method}"
        name = name if (run.networks or run.record) and run.method != run.label else run.label
        marks = "".join(note(f"{run.label}: {error}") for error in run.errors)
        known = everything[everything["directory"] == run.directory] if run.networks else everything[:0]
        if len(known) != 1:
            rows.append(row_of(name, known, marks))
        for k, network in enumerate(run.networks):
            own = marks if len(known) == 1 else ""
            if (state := progress(run, network)) != "done":
                own += note(f"{run.label}, network {network.number}: {state}")
            row = row_of(name if len(known) == 1 else f"· network {network.number}", known.iloc[[k]], own)
            row["best %"] += " *" if network in best.values() else ""
            rows.append(row)
        if "ensemble" in run.record:
            rows[-1]["last %"] = f"{run.record['ensemble'].get('ensemble', math.nan):.2f}"
    frame = pd.DataFrame(rows)
    text = table(frame, style, right=list(frame)[1:])
    if style == "markdown" and (excess := len(text.partition("\n")[0]) - WIDTH) > 0:
        widest = max(12, frame["run"].str.len().max() - excess)
        frame["run"] = [name if len(name) <= widest else f"{name[: widest - 1]}…" for name in frame["run"]]
        text = table(frame, style, right=list(frame)[1:])
    return text, notes


def row_of(name: str, networks: pd.DataFrame, marks: str) -> dict[str, str]:
    """The texts of a row: of one network, or the means of several."""

    def mean(column: str, digits: int) -> str:
        value = networks[column].mean() if len(networks) else math.nan
        return "–" if math.isnan(value) else f"{value:.{digits}f}"

    best, last = (mean_and_deviation(networks[column] if len(networks) else [], 2) for column in ("best", "last"))
    epochs = "/".join(sorted({str(epochs) for epochs in networks["epochs"]})) if len(networks) else ""
    difference = networks["gain"].mean() if len(networks) else math.nan
    row = {"run": name, "epochs": epochs + marks, "best %": best, "last %": last}
    row["gain"] = "" if math.isnan(difference) else f"{difference:+.2f}"
    row |= {f"<{k:g}": mean(f"invalid_{k:g}", 1).removesuffix(".0") for k in THRESHOLDS}
    return row | {"s/epoch": mean("seconds_per_epoch", 1)}


def best_networks(runs: Sequence[Run]) -> dict[str, Network]:
    """By number of classes: accuracies on other data sets cannot be compared."""
    best: dict[str, Network] = {}
    for run in runs:
        classes = str(run.settings.get("classes", ""))
        for network in run.networks:
            if not math.isnan(network.best) and (classes not in best or network.best > best[classes].best):
                best[classes] = network
    return best


def sentences(runs: Sequence[Run]) -> list[str]:
    """What is said below the table."""
    said = []
    best = best_networks(runs)
    for classes, network in best.items():
        run = next(run for run in runs if network in run.networks)
        file = f": {short_path(network.best_file)}" if network.best_file else ""
        which = f" in {classes} classes" if len(best) > 1 else ""
        said.append(f"* Best{which}: network {network.number} of {run.label}, {network.best:.2f} %{file}")
    filters = {run.model: run.networks[0].invalid[0][1] for run in runs if run.networks and run.networks[0].invalid}
    said += [CAPTION, " ".join(f"A {model or 'network'} has {total:,} filters." for model, total in filters.items())]
    for run in runs:
        for network in run.networks:
            if any(invalid for invalid, _ in network.shortcuts):
                counts = ", ".join(f"{invalid} of {total}" for invalid, total in network.shortcuts)
                said.append(
                    f"Of shortcut convolutions, counted apart: {counts} ({run.label}, network {network.number})."
                )
    return list(filter(None, said))


def short_path(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def in_order(runs: Sequence[Run]) -> list[Run]:
    """By model, the most accurate after the last epoch first; those without an accuracy last."""

    def place(run: Run) -> tuple:
        lasts = [network.last for network in run.networks if not math.isnan(network.last)]
        return (not lasts, run.model, -sum(lasts) / len(lasts) if lasts else 0, run.label)

    return sorted(runs, key=place)


def main() -> int:
    args = parse()
    directories = list(dict.fromkeys(found for given in args.directories for found in find_runs(given.absolute())))
    runs = in_order([read_run(path, label) for path, label in zip(directories, labels(directories), strict=True)])
    text, notes = text_table(runs, args.format)
    about = sys.stdout if args.format == "markdown" else sys.stderr  # a table for programs comes alone
    print(table(frame_of(runs), "csv") if args.format == "csv" else text, flush=True)
    if args.format == "markdown":
        print("", *sentences(runs), sep="\n")
    if notes:
        print("", *(f"[{k}] {line}" for k, line in enumerate(notes, 1)), sep="\n", file=about)
    if args.plots:
        from analysis import plots  # matplotlib, for those who ask for plots alone

        args.plots.mkdir(parents=True, exist_ok=True)
        paths = list(plots.draw(runs, args.plots, f".{args.plot_format or 'png'}"))
        print("", *(f"- {path}" for path in paths), sep="\n", file=about)
    return int(
        not any(run.record or any(network.status or len(network.metrics) for network in run.networks) for run in runs)
    )


if __name__ == "__main__":
    sys.exit(program(main))
