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
from analysis.runs import THRESHOLDS, Network, Run, find_runs, labels, program, read_run, table
from filter_grafting.membership import printable
from training.flags import Parser, path

WIDTH = 120  # columns of a terminal, which no line of the table is longer than
# In which a run may differ from its baseline: the seed, and the settings of grafting and of its rivals.
MAY_DIFFER = {"seed", "num", "a", "c", "level", "method", "scion", "criterion", "difflr"}
MAY_DIFFER |= {"together", "networks", "ema"}  # of experiments/together.py, and of --method ema in earlier runs
COLUMNS = ["run", "network", "model", "method", "epochs", "best", "last", "gain", "seconds_per_epoch"]
COLUMNS += ["total", "shortcut_total", "state", "file", "directory", "classes"]
COLUMNS += [f"{kind}invalid_{threshold}" for kind in ("", "shortcut_") for threshold in THRESHOLDS]
# Those that people look at, how they are called then, and the form of their values.
SHOWN = {"run": ("run", "{}"), "network": ("network", "{}"), "epochs": ("epochs", "{}")}
SHOWN |= {"best": ("best %", "{:.2f}"), "last": ("last %", "{:.2f}"), "gain": ("gain", "{:+.2f}")}
SHOWN |= {f"invalid_{threshold}": (f"<{threshold}", "{:.0f}") for threshold in THRESHOLDS}
SHOWN |= {"seconds_per_epoch": ("s/epoch", "{:.1f}")}
CAPTION = """\
Best and last: test accuracy in %; the best epoch was chosen on the images of --val, or of val/ beside test/; without
either, on the test images. Gain: over the baseline of the same settings, in percentage points, at the last epoch that
both have. <0.1, <0.01: filters with an L1 norm below (shortcuts apart, see --format csv). s/epoch: median."""


def frame_of(runs: Sequence[Run]) -> pd.DataFrame:
    """A row for each network, and for what has none: an ensemble, or a run that cannot be read."""
    rows = []
    for run in runs:
        about = {"run": run.label, "model": run.model, "method": run.method, "directory": run.directory}
        about["classes"] = str(run.settings.get("classes", ""))
        if not run.networks:
            rows.append(about | {"last": run.record.get("ensemble", {}).get("ensemble")})
        for network in run.networks:
            row = {"network": network.number, "epochs": len(network.metrics), "state": network.state}
            row |= {"seconds_per_epoch": network.seconds_per_epoch, "file": network.best_file or ""}
            if len(network.metrics):
                end = network.metrics.iloc[-1]
                row |= {"best": end["best"], "last": end["test_accuracy"], "gain": gain(run, network, runs)}
            rows.append(about | row | network.filters)
    # invalid_0.1 of {"invalid": {"0.1": 3}}
    return pd.json_normalize(rows, sep="_").reindex(columns=COLUMNS).convert_dtypes().round(4)


def gain(run: Run, network: Network, runs: Sequence[Run]) -> float:
    """Over the mean of the baselines of its settings, at the last epoch that all have; NaN if there is none.

    Its settings are all but those of grafting; of several baselines that of the same seed counts, or else all.
    """

    def recipe(one: Run) -> dict[str, str]:
        return {key: str(value) for key, value in one.settings.items() if key not in MAY_DIFFER}

    alike = [other for other in runs if other.is_baseline and recipe(other) == recipe(run)]
    alike = [other for other in alike if other.settings.get("seed") == run.settings.get("seed")] or alike
    compared = [one.metrics.set_index("epoch") for one in (network, *(other.networks[0] for other in alike))]
    courses = pd.concat([one["test_accuracy"] for one in compared], axis=1, join="inner")
    if run.is_baseline or not alike or courses.empty:
        return math.nan
    own, *baselines = courses.iloc[-1]
    return own - sum(baselines) / len(baselines)


def texts_of(frame: pd.DataFrame, best: pd.DataFrame, notes: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """The table for people: no wider than WIDTH, with a star at the best networks and the numbers of runs' notes."""
    texts = pd.DataFrame(
        {
            name: frame[column].astype(object).map(form.format, na_action="ignore").fillna("–")
            for column, (name, form) in SHOWN.items()
        }
    )
    texts.loc[best.index, "best %"] += " *"
    texts["run"] += ": " + frame["method"]
    for number, (label, _) in enumerate(notes, 1):
        first = frame.index[frame["run"] == label][:1]
        texts.loc[first, "epochs"] += f" [{number}]"
    others = [max(len(name), texts[name].str.len().max()) for name in texts if name != "run"]
    room = max(12, WIDTH - sum(others) - 3 * len(texts.columns) - 1)
    texts["run"] = [name if len(name) <= room else f"{name[: room - 1]}…" for name in texts["run"]]
    return texts


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
    notes = [(run.label, sentence) for run in runs for sentence in run.errors]
    # One for each number of classes: accuracies on other data sets cannot be compared.
    best = frame.loc[frame.dropna(subset="best").groupby("classes", sort=False)["best"].idxmax()]
    shown = frame if args.format == "csv" else texts_of(frame, best, notes)
    print(table(shown, args.format, right=list(shown)[1:]), flush=True)
    about = sys.stdout if args.format == "markdown" else sys.stderr  # a table for programs comes alone
    if args.format == "markdown":
        print()
        for _, one in best.iterrows():
            place = one["file"] or one["directory"]
            print(f"* Best: network {one['network']} of {one['run']}, {one['best']:.2f} %: {place}")
        print(CAPTION)
        for model, total in frame.dropna(subset="total").groupby("model")["total"].first().items():
            print(f"A {model or 'network'} has {total:,} filters.")
    for number, (label, sentence) in enumerate(notes, 1):
        print(printable(f"[{number}] {label}: {sentence}"), file=about)
    if args.plots:
        from analysis import plots  # matplotlib, for those who ask for plots alone

        for file in plots.draw(runs, args.plots):
            print(f"- {file}", file=about)
    return int(not any(run.record or run.networks for run in runs))


if __name__ == "__main__":
    sys.exit(program(main))
