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


def course(networks: Sequence[Network]) -> pd.Series:
    """Mean test accuracy by epoch, of the epochs that all of the networks have."""
    columns = [network.metrics.set_index("epoch")["test_accuracy"] for network in networks]
    return pd.concat(columns, axis=1, join="inner").mean(axis=1)


def gain(run: Run, networks: Sequence[Network], runs: Sequence[Run]) -> float:
    """Over the mean of the baselines, at the last epoch that all have; NaN if there is none."""
    baselines = [network for other in baselines_of(run, runs) for network in other.networks]
    if not baselines or not networks:
        return math.nan
    own, others = course(networks), course(baselines)
    common = own.index.intersection(others.index)
    return own[common[-1]] - others[common[-1]] if len(common) else math.nan


def frame_of(runs: Sequence[Run]) -> pd.DataFrame:
    """All that is known, a row for each network."""
    rows = []
    for run in runs:
        for network in run.networks:
            row = {"run": run.label, "network": network.number, "model": run.model, "method": run.method}
            row |= {"epochs": len(network.metrics), "best": network.best, "last": network.last}
            row |= {"gain": gain(run, [network], runs), "seconds_per_epoch": network.seconds_per_epoch}
            for kind, counts in ("", network.invalid), ("shortcut_", network.shortcuts):
                for threshold, (invalid, total) in zip(THRESHOLDS, counts, strict=False):
                    row |= {f"{kind}invalid_{threshold:g}": invalid, f"{kind}filters": total}
            row |= {"counted_in": network.counted_in, "state": progress(run, network)}
            rows.append(row | {"file": network.best_file or "", "directory": run.directory})
    return pd.DataFrame(rows).round(4)


def text_table(runs: Sequence[Run], style: str) -> tuple[str, list[str]]:
    """The table for people, no wider than WIDTH in Markdown, and the notes that its numbers in brackets refer to."""
    notes: list[str] = []
    rows: list[dict[str, str]] = []
    best = best_network(runs)
    several_models = len({run.model for run in runs if run.model}) > 1
    for run in runs:
        name = f"{run.label}: {run.model + ', ' if several_models else ''}{run.method}"
        name = name if (run.networks or run.record) and run.method != run.label else run.label
        marks = [note(notes, f"{run.label}: {error}") for error in run.errors]
        if len(run.networks) != 1:
            rows.append(row_of(name, run, run.networks, runs, marks))
        for network in run.networks:
            own = marks if len(run.networks) == 1 else []
            if (state := progress(run, network)) != "done":
                own = [*own, note(notes, f"{run.label}, network {network.number}: {state}")]
            name_of_row = name if len(run.networks) == 1 else f"· network {network.number}"
            row = row_of(name_of_row, run, [network], runs, own)
            row["best %"] += " *" if network is best else ""
            rows.append(row)
    frame = pd.DataFrame(rows)
    right = list(frame)[1:]
    text = table(frame, style, right)
    if style == "markdown" and (excess := len(text.partition("\n")[0]) - WIDTH) > 0:
        widest = max(12, frame["run"].str.len().max() - excess)
        frame["run"] = [name if len(name) <= widest else f"{name[: widest - 1]}…" for name in frame["run"]]
        text = table(frame, style, right)
    return text, notes


def note(notes: list[str], text: str) -> str:
    notes.append(text)
    return f" [{len(notes)}]"


def row_of(name: str, run: Run, networks: Sequence[Network], runs: Sequence[Run], marks: Sequence[str]) -> dict:
    """The texts of a row: of one network, or the means of several."""
    last = mean_and_deviation([network.last for network in networks], 2)
    if "ensemble" in run.record:
        last = f"{run.record['ensemble'].get('ensemble', math.nan):.2f}"
    difference = gain(run, networks, runs)
    row = {
        "run": name,
        "epochs": "/".join(sorted({str(len(network.metrics)) for network in networks})) + "".join(marks),
        "best %": mean_and_deviation([network.best for network in networks], 2),
        "last %": last,
        "gain": "" if math.isnan(difference) else f"{difference:+.2f}",
    }
    counted = [network for network in networks if network.invalid]
    for k, threshold in enumerate(THRESHOLDS):
        mean = mean_and_deviation([network.invalid[k][0] for network in counted], 1).partition(" ")[0]
        row[f"<{threshold:g}"] = mean.removesuffix(".0")
    seconds = mean_and_deviation([network.seconds_per_epoch for network in networks], 1)
    return row | {"s/epoch": seconds.partition(" ")[0]}


def best_network(runs: Sequence[Run]) -> Network | None:
    networks = [network for run in runs for network in run.networks if not math.isnan(network.best)]
    return max(networks, key=lambda network: network.best, default=None)


def sentences(runs: Sequence[Run]) -> list[str]:
    """What is said below the table."""
    said = []
    if best := best_network(runs):
        run = next(run for run in runs if best in run.networks)
        file = f": {short_path(best.best_file)}" if best.best_file else ""
        said.append(f"* The best network is network {best.number} of {run.label}, {best.best:.2f} %{file}")
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
