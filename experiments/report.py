#!/usr/bin/env python
"""Writes the report of what run.py has run: Markdown tables beside the published figures, and plots.

    python experiments/report.py
    python experiments/report.py main fair --preset small

Prints the Markdown that it writes to report.md. A row without a readable result says "not run".
"""

import argparse
import math
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.runs import THRESHOLDS, mean_and_deviation, program, table
from experiments import plots
from experiments.results import Cell, Cells, cells_of, gain, pairs_of, read_results
from experiments.tables import PRESETS, REFERENCE, TABLES
from filter_grafting.checkpoint import write_atomically
from filter_grafting.membership import duration, printable
from training.flags import ROOT, Parser, path

LEGEND = """\
Accuracies are in % of the test images: mean ± sample standard deviation over n seeds. **Last**: mean over a run's
networks after the last epoch. **Best, by validation**: at the network and epoch with the highest accuracy on validation
images (`--val`, or `val/` beside `test/`). **Best, on the test set**: the highest of any network and epoch, as in the
paper; it is picked on the very images that it is measured on. Either best has more to pick from in a run of several
networks. **Gain**: mean difference from the row's baseline in percentage points, seed by seed, with its 95 % interval
(Student's t). A seed gives all rows the same initial weights, order and augmentation; the images are the same for all
runs, and the interval says nothing of others. **Invalid**: filters with an L1 norm below a threshold, and
**information**: the sum of the layers' entropies, both means over a run's networks after the last epoch. † An ensemble
has one accuracy, that of its networks' averaged outputs after the last epoch, and is compared with the mean of these
networks where they are those of its baseline; "2 x" are the runs of seeds k and 100 + k."""
RIVALS = "Grafting against rivals on the same schedule that cost no more training"
WHEN = {"after the last epoch": "last", "at the epoch picked by validation": "picked"}
VERDICTS = ("ahead", "level", "behind", "open for want of seeds")
Pair = tuple[Cell, Cell]
Tables = dict[str, dict[str, Cells]]  # the chosen tables' cells, by name of the table and by data set


def main() -> int:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("tables", metavar="TABLE", nargs="*", choices=[*TABLES, "all"], default="all", help=", ".join(TABLES))
    flag("--preset", choices=PRESETS, default="paper", help="whose results")
    flag("--results", metavar="DIR", type=path, default=ROOT / "results", help="the folder that run.py fills")
    out = "folder for report.md and plots/ (default: the preset's, in --results)"
    flag("--out", metavar="DIR", type=path, help=out)
    args = parser.parse_args()
    directory = args.results / args.preset
    results, damages = read_results(directory, args.preset)
    chosen = TABLES if "all" in args.tables else args.tables
    tables = {name: found for name in chosen if (found := cells_of(name, args.preset, results))}
    if not tables:
        parser.error(f"argument --preset: {args.preset} runs nothing of {', '.join(chosen)}")
    out = args.out or directory
    (out / "plots").mkdir(parents=True, exist_ok=True)
    text = report(tables, args, damages, out / "plots")
    write_atomically(out / "report.md", text.encode())
    print(text, end="", flush=True)
    print(f"written to {out / 'report.md'}", file=sys.stderr)
    return int(bool(damages) and results.empty)


def report(tables: Tables, args: argparse.Namespace, damages: list[str], out: Path) -> str:
    """The whole report; its plots are drawn into `out`."""
    preset, place = args.preset, args.results.resolve()
    place = place.relative_to(ROOT) if place.is_relative_to(ROOT) else place
    flags = f"--preset {preset}" + f" --results {shlex.quote(str(place))}" * (place != Path("results"))
    parts = [f"# Results of the preset {preset}", reading(tables, flags)]
    for where, added in ("CIFAR", PRESETS[preset].cifar), ("ImageNet", PRESETS[preset].imagenet):
        if added:
            parts.append(
                f"On {where} each run has, beside the flags of its row: `{added}`. All else is at its default."
            )
    if damages:
        listed = "\n".join(f"- {printable(damage)}" for damage in damages)
        parts.append(f"Damaged, unfinished or of other settings, and counted as not run:\n\n{listed}")
    parts.append(LEGEND)
    for name, found in tables.items():
        title, note, _, source, _ = TABLES[name]
        parts += [f"## {title}", note]
        for dataset, cells in found.items():
            stem = re.sub(r"[^\w.-]+", "_", f"{name}-{dataset}")
            files = plots.draw(cells, f"{title}, {dataset}, preset {preset}", out / stem)
            parts += [f"### {title}: {dataset}", *section(cells)]
            parts += [f"![{file.stem}](plots/{file.name})" for file in files] + small_print(cells)
        missing = f"To run what is missing (`--seeds` says how often): `python experiments/run.py {name} {flags}`"
        parts.append((f"Published figures: {source}. " if preset == "paper" else "") + missing)
    if preset == "paper":
        columns = ["network", "method", "CIFAR-10", "CIFAR-100", "source"]
        parts += ["## Published figures of rivals", "Accuracy in %, as printed there; none is a run of ours."]
        parts.append(table(pd.DataFrame(REFERENCE, columns=columns)))
    return "\n\n".join(parts) + "\n"


# ---- What the figures say


def reading(tables: Tables, flags: str) -> str:
    """What the figures say of grafting, counted from them; without any, with which flags run.py makes them."""
    every = [cells for found in tables.values() for cells in found.values()]
    seeds = [len(one.results) for cells in every for one in cells.values() if len(one.results)]
    if not seeds:
        again = f"python experiments/run.py {' '.join(tables)} {flags}"
        return f"**No result is there yet.** To fill this report: `{again}`"
    compared: dict[str, dict[tuple[str, str], Pair]] = {"baseline": {}, "rival": {}, "schedule": {}}
    for cells in every:
        for kind, one, other in pairs_of(cells):
            compared[kind][one.row.run, other.row.run] = one, other  # tables share runs
    lines = [tally(compared["baseline"].values(), "Grafting against the single network of its row's baseline")]
    lines.append(tally(compared["rival"].values(), RIVALS))
    lines += [
        f"The cosine alone, without grafting, gains {gain(one, other, 'last')} after the last epoch "
        f"({one.row.label} against {other.row.label}, {one.row.dataset})."
        for one, other in compared["schedule"].values()
    ]
    extent = " to ".join(map(str, sorted({min(seeds), max(seeds)})))
    return (
        "**Reading**, counted from the tables below:\n\n" + "\n".join(f"- {line}" for line in lines) + "\n\n"
        "“Ahead” and “behind” mean that the 95 % interval of the difference lies on one side of 0; “level”, that it "
        "contains 0, which shows neither that grafting helps nor that it does not. Of 20 such intervals about one "
        f"misses by chance, and n is only {extent}."
    )


def tally(compared: Iterable[Pair], what: str) -> str:
    """`what: after the last epoch ahead 1, level 3, behind 1 of 5 (…); at the epoch picked by validation ….`"""
    parts = []
    for when, figure in WHEN.items():
        gains = [(gain(one, other, figure), one.row, other.row) for one, other in compared]
        gains = sorted((each for each in gains if math.isfinite(each[0].mean)), key=lambda each: each[0].mean)
        counts = Counter(difference.verdict for difference, *_ in gains)
        words = ", ".join(f"{word} {counts[word]}" for word in VERDICTS if counts[word])
        behind = [
            f"{one.label} behind {other.label} on {one.dataset} ({difference})"
            for difference, one, other in gains
            if difference.verdict == "behind"
        ]
        if gains:
            parts.append(f"{when} {words} of {len(gains)}" + f" ({'; '.join(behind)})" * bool(behind))
    return f"{what}: {'; '.join(parts) or 'none has been run'}."


# ---- Tables


def section(cells: Cells) -> list[str]:
    """The rows beside the published figures; grafting beside its rivals; what must be said of either."""
    parts = [table(with_figures(main_table(cells)))]
    ran = {label: one for label, one in cells.items() if len(one.results)}
    for label, one in ran.items():
        if one.row.is_ensemble:
            alone, average = mean(one, "alone"), mean(one, "weight_average")
            parts.append(f"† {label}: its networks alone {alone} (mean); their uniform weight average {average}.")
    lines = [
        {
            "grafting": one.row.label,
            "against": other.row.label,
            "epochs of all": f"{one.first('epochs'):g} : {other.first('epochs'):g}",
            "difference of last": (last := gain(one, other, "last")),
            "difference of best, by validation": gain(one, other, "picked"),
            "n": last.n,
        }
        for kind, one, other in pairs_of(cells)
        if kind == "rival"
    ]
    if lines:
        parts += [f"{RIVALS} (an ensemble costs more to use):", table(with_figures(pd.DataFrame(lines)))]
    precisions = {label: "/".join(one.results["precision"].unique()) for label, one in ran.items()}
    if len(set(precisions.values())) > 1:
        named = "; ".join(f"{label} ({precision})" for label, precision in precisions.items())
        parts.append(f"In different precisions, which may be part of the differences: {named}.")
    return parts


def main_table(cells: Cells) -> pd.DataFrame:
    """A line for each row."""
    is_picked = any(one.results["picked"].notna().any() for one in cells.values())
    lines = []
    for label, one in cells.items():
        paper, baseline = one.row.paper, cells.get(one.row.baseline)
        line = {"method": label + " †" * one.row.is_ensemble}
        line["paper"] = "–" if paper is None else f"{paper:.2f}" if isinstance(paper, float) else paper
        line[f"best, {'by validation' if is_picked else 'on the test set'}"] = mean(one, "best")
        line |= {"last": mean(one, "last"), "top-5, last": mean(one, "top5")}
        for figure in "best", "last":
            found, n = gain(one, baseline, figure), len(one.results)
            line[f"gain of {figure}"] = f"{found}" + f" ({found.n} of {n})" * (0 < found.n < n)
        for kind, where in ("", ""), ("shortcut_", " in shortcuts"):
            for threshold in THRESHOLDS:  # `36.5 ± 0.7 of 1136`
                count, total = mean(one, f"{kind}invalid_{threshold}", 1), one.first(f"{kind}total")
                if count != "not run":
                    count = f"{count} of {total:g}" if total > 0 else "–"
                line[f"invalid{where}, below {threshold}"] = count
        lines.append(line | {"information (nats)": mean(one, "information", 1), "n": len(one.results)})
    return pd.DataFrame(lines)


def with_figures(frame: pd.DataFrame) -> pd.DataFrame:
    """Without the columns in which there is no figure."""
    return frame.loc[:, (frame.columns == "last") | ~frame.astype(str).isin(["–", "not run"]).all()]


def mean(one: Cell, figure: str, digits: int = 2) -> str:
    return mean_and_deviation(one.results[figure], digits) if len(one.results) else "not run"


def small_print(cells: Cells) -> list[str]:
    """Everything that the figures depend on: flags, cost, machine."""
    lines, ran = [], [one for one in cells.values() if len(one.results)]
    if not ran:
        return []
    for one in ran:
        seconds = one.results["seconds"].median()
        line = {"method": one.row.label, "compared with": one.row.baseline or "–", "flags": f"`{one.row.flags}`"}
        line |= {"epochs of all": one.first("epochs")}
        line["time of a run (median)"] = "–" if math.isnan(seconds) else duration(seconds)
        lines.append(line | {"seeds": ", ".join(map(str, one.results.index))})
    results = pd.concat([one.results for one in ran])
    about = []
    for column in "hardware", "versions", "precision":
        counts = results[column].value_counts()
        about.append(f"{column.capitalize()}: " + "; ".join(f"{value} ({n} runs)" for value, n in counts.items()))
    parts = [f"{'. '.join(about)}.", table(pd.DataFrame(lines))]
    if len({*results["data"]} - {""}) > 1:
        parts.insert(0, "**These runs were not all trained on the same images.**")
    return parts


if __name__ == "__main__":
    sys.exit(program(main))
