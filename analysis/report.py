"""Tabulates runs of either script, alive or done: accuracies, gains over the baseline, invalid filters; plots them.

    python analysis/report.py checkpoint/demo/baseline checkpoint/demo/grafted --plots plots
    python analysis/report.py results/small --format csv >results.csv

A directory stands for all runs in it and below it, results of the experiments among them.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.runs import THRESHOLDS, Network, Run, find_runs, labels, mean_and_deviation, program, read_run, table
from filter_grafting.membership import printable
from training.flags import Parser, path

WIDTH = 120  # columns of a terminal, which no line of the table is longer than
GRAFTING = {"num", "a", "c", "level", "method", "scion", "criterion", "difflr"}  # settings that a baseline lacks
COLUMNS = ["run", "network", "model", "method", "epochs", "best", "last", "gain", "seconds_per_epoch"]
COLUMNS += ["total", "shortcut_total", "state", "file", "directory", "classes"]
COLUMNS += [f"{kind}invalid_{threshold}" for kind in ("", "shortcut_") for threshold in THRESHOLDS]
CAPTION = """\
Best and last: test accuracy in %, of a run with several networks their mean ± sample standard deviation; the best epoch
was chosen on the images of --val or, without, on the test images. Gain: over the baseline of the same settings, in
percentage points, at the last epoch that both have. <0.1, <0.01: filters with an L1 norm below (shortcuts apart, see
--format csv). s/epoch: median."""


# ---- What is known of each network


def gain(run: Run, network: Network, runs: Sequence[Run]) -> float:
    """Over the mean of the baselines of its settings, at the last epoch that all have; NaN if there is none.

    Its settings are all but those of grafting; of several baselines that of the same seed counts, or else all.
    """
    recipe = run.recipe(GRAFTING)
    alike = [other for other in runs if recipe and other.is_baseline and other.recipe(GRAFTING) == recipe]
    alike = [other for other in alike if other.settings.get("seed") == run.settings.get("seed")] or alike
    if run.is_baseline or not alike:
        return math.nan
    networks = [network, *(other.networks[0] for other in alike)]
    courses = pd.concat([one.metrics.set_index("epoch")["test_accuracy"] for one in networks], axis=1, join="inner")
    return courses.iloc[-1, 0] - courses.iloc[-1, 1:].mean() if len(courses) else math.nan


def progress(run: Run, network: Network) -> str:
    """`done`, or how far an unfinished network is: `epoch 50 of 200, waiting for network 1`."""
    status = network.status
    if status is None or status.state == "done":
        return "done"
    if not len(network.metrics):
        return f"{status}, no epoch has ended"
    return f"epoch {len(network.metrics)} of {status.epochs or run.settings.get('epochs', '?')}, {status}"


def frame_of(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each network."""
    rows = []
    for run in runs:
        about = {"run": run.label, "model": run.model, "method": run.method, "directory": run.directory}
        about["classes"] = str(run.settings.get("classes", ""))
        for network in run.networks:
            row = {"network": network.number, "epochs": len(network.metrics), "best": network.best}
            row |= {"last": network.last, "gain": gain(run, network, runs), "state": progress(run, network)}
            row |= {"seconds_per_epoch": network.seconds_per_epoch, "file": network.best_file or ""}
            rows.append(about | row | network.filters)
    # invalid_0.1 of {"invalid": {"0.1": 3}}
    return pd.json_normalize(rows, sep="_").reindex(columns=COLUMNS).round(4)


def best_networks(frame: pd.DataFrame) -> pd.Index:
    """A row for each number of classes: accuracies on other data sets cannot be compared."""
    return pd.Index(frame.dropna(subset="best").groupby("classes", sort=False)["best"].idxmax())


# ---- The table for people


def text_table(runs: Sequence[Run], frame: pd.DataFrame, style: str) -> tuple[str, list[str]]:
    """The table, and the sentences below it that its numbers in brackets refer to."""
    rows, notes = [], []
    best = best_networks(frame)
    for run in runs:
        own, name = frame[frame["directory"] == run.directory], run.label
        if (run.networks or run.record) and run.method != run.label:
            name += f": {run.method}"
        rows.append(row_of(name, own, best))
        if "ensemble" in run.record:
            rows[-1]["last %"] = f"{run.record['ensemble']['ensemble']:.2f}"
        states = zip(own["network"], own["state"], strict=True)
        for sentence in [*run.errors, *(f"network {i}: {state}" for i, state in states if state != "done")]:
            notes.append(f"{run.label}: {sentence}")
            rows[-1]["epochs"] += f" [{len(notes)}]"
        if len(own) > 1:
            rows += [row_of(f"· network {own['network'][at]}", own.loc[[at]], best) for at in own.index]
    texts = pd.DataFrame(rows)
    return table(narrowed(texts) if style == "markdown" else texts, style, right=list(texts)[1:]), notes


def row_of(name: str, networks: pd.DataFrame, best: pd.Index) -> dict[str, str]:
    """The texts of a row: of one network, with a star if it is a best one, or the means of several."""

    def mean(column: str, form: str) -> str:
        value = networks[column].mean()
        return "–" if math.isnan(value) else format(value, form)

    row = {"run": name, "epochs": "/".join(map(str, sorted(set(networks["epochs"]))))}
    row |= {f"{which} %": mean_and_deviation(networks[which], 2) for which in ("best", "last")}
    row["best %"] += " *" * (len(networks) == 1 and networks.index[0] in best)
    row["gain"] = mean("gain", "+.2f").removesuffix("–")
    row |= {f"<{threshold}": mean(f"invalid_{threshold}", ".1f").removesuffix(".0") for threshold in THRESHOLDS}
    return row | {"s/epoch": mean("seconds_per_epoch", ".1f")}


def narrowed(texts: pd.DataFrame) -> pd.DataFrame:
    """With names cut so that the table is no wider than WIDTH."""
    widths = [max(len(name), texts[name].str.len().max()) for name in texts]
    room = max(12, WIDTH - sum(widths[1:]) - 3 * len(widths) - 1)
    return texts.assign(run=[name if len(name) <= room else f"{name[: room - 1]}…" for name in texts["run"]])


def sentences(frame: pd.DataFrame) -> list[str]:
    """What is said below the table."""
    said, best = [], frame.loc[best_networks(frame)]
    for _, one in best.iterrows():
        which = f" in {one['classes']} classes" * (len(best) > 1)
        file = f": {one['file']}".replace(f" {Path.cwd()}/", " ") if one["file"] else ""
        said.append(f"* Best{which}: network {one['network']} of {one['run']}, {one['best']:.2f} %{file}")
    totals = frame.dropna(subset="total").groupby("model")["total"].first()
    return [*said, CAPTION, *(f"A {model or 'network'} has {total:,.0f} filters." for model, total in totals.items())]


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("directories", metavar="DIR", nargs="+", type=path, help="save directory of a run, or a folder of runs")
    add("--format", choices=("markdown", "csv", "latex"), default="markdown", help="of the table")
    kinds = "draw plots into this folder, as PNG of 200 dpi; with OUT.pdf or OUT.svg into OUT, in that format"
    add("--plots", metavar="OUT", type=path, help=kinds)
    args = parser.parse_args()
    directories = list(dict.fromkeys(found for given in args.directories for found in find_runs(given.absolute())))
    runs = [read_run(one, label) for one, label in zip(directories, labels(directories), strict=True)]
    runs.sort(key=lambda run: (not run.networks, run.model, -run.last, run.label))
    frame = frame_of(runs)
    text, notes = text_table(runs, frame, args.format)
    about = sys.stdout if args.format == "markdown" else sys.stderr  # a table for programs comes alone
    print(table(frame, "csv") if args.format == "csv" else text, flush=True)
    if args.format == "markdown":
        print("", *sentences(frame), sep="\n")
    if notes:
        print("", *(printable(f"[{k}] {note}") for k, note in enumerate(notes, 1)), sep="\n", file=about)
    if args.plots:
        from analysis import plots  # matplotlib, for those who ask for plots alone

        is_vector = args.plots.suffix in (".pdf", ".svg")
        folder, kind = (args.plots.with_suffix(""), args.plots.suffix[1:]) if is_vector else (args.plots, "png")
        folder.mkdir(parents=True, exist_ok=True)
        files = plots.draw(runs, folder, kind)
        print("", *(f"- {file}" for file in files), sep="\n", file=about)
    return int(not any(run.record or run.networks for run in runs))


if __name__ == "__main__":
    sys.exit(program(main))
