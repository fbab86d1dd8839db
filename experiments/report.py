#!/usr/bin/env python
"""Writes the report of what run.py has run: Markdown tables beside the paper's figures, and plots.

    python experiments/report.py
    python experiments/report.py main fair --preset small

Prints the Markdown that it writes to report.md. A cell without a readable result says "not run".
"""

import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from common.flags import Parser
from experiments import figures
from experiments.summary import (
    Cell,
    Comparison,
    Course,
    Difference,
    Result,
    Results,
    against_baseline,
    against_rivals,
    datasets,
    from_baseline,
)
from experiments.tables import PRESETS, Table, tables
from filter_grafting.checkpoint import write_atomically
from filter_grafting.errors import WriteError
from filter_grafting.exchange import duration
from grafting_cifar.report import cell, markdown, mean
from grafting_cifar.runs import THRESHOLDS

ROOT = Path(__file__).resolve().parent.parent
LEGEND = """\
Accuracies are in % of the test images: mean ± sample standard deviation over n seeds. **Last**: mean over a run's
networks after the last epoch. **Best, by validation**: at the network and epoch with the highest accuracy on held-out
training images. **Best, on the test set**: the highest of any network and epoch, as in the paper; it is picked on the
very images that it is measured on. Either best has more to pick from in a run of several networks. **Gain**:
difference from the row's baseline in percentage points, with its 95 % interval (Welch's t). † An ensemble has one
accuracy, that of its networks' averaged outputs after the last epoch; where these networks are the baseline's own of
further seeds, they count in its n, too."""
NAMED = 5  # in the sentence that names rivals
OUTCOMES = {"above": "ahead of", "level": "level with", "below": "behind"}


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("tables", metavar="TABLE", nargs="*", help="names of tables, or all (default: all)")
    parser.add_argument("--preset", choices=PRESETS, default="paper", help="whose results")
    parser.add_argument("--results", metavar="DIR", type=Path, default=ROOT / "results",
                        help="the folder that run.py fills")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path,
                        help="folder for report.md and plots/ (default: the preset's, in --results)")  # fmt: skip
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "±" is no reason to fail

    known = tables(args.preset)
    names = args.tables or ["all"]
    if unknown := [name for name in names if name not in known and name != "all"]:
        parser.error(f"argument TABLE: got {unknown[0]!r}, expected {', '.join(known)}, or all")
    chosen = [table for name, table in known.items() if name in names or "all" in names]

    results = Results(args.results / args.preset)
    out = args.out or results.directory
    try:
        (out / "plots").mkdir(parents=True, exist_ok=True)
        text = report(chosen, results, args.preset, out)
        write_atomically(out / "report.md", text.encode())
    except (OSError, WriteError) as error:
        print(f"the report cannot be written: {error}", file=sys.stderr)
        return 1
    print(text, end="", flush=True)
    print(f"written to {out / 'report.md'}", file=sys.stderr)
    return int(bool(results.damages) and not any(has_run(table, results) for table in chosen))


def report(chosen: Sequence[Table], results: Results, preset: str, out: Path) -> str:
    """The whole report; its plots are drawn into out/plots."""
    mapped: set[str] = set()
    sections = [
        section(table, results, preset, figures.draw(table, results, preset, out / "plots", mapped)) for table in chosen
    ]
    parts = [f"# Results of the preset {preset}", reading(chosen, results, preset), contents(chosen, results)]
    if results.damages:
        damages = "\n".join(f"- {cell(damage)}" for damage in results.damages)
        parts.append(f"Damaged or unfinished, and counted as not run:\n\n{damages}")
    return "\n\n".join([*parts, LEGEND, *sections]) + "\n"


def has_run(table: Table, results: Results) -> bool:
    return any(results.of(entry.run) for row in table.rows for entry in row.cells.values())


def contents(chosen: Sequence[Table], results: Results) -> str:
    rows = [["table", "name", "data set", "rows run", "seeds"]]
    for table in chosen:
        anchor = re.sub(r"[^\w\- ]", "", table.title.lower()).replace(" ", "-")
        for dataset in datasets(table):
            counts = [len(one.results) for one in results.cells(table, dataset).values()]
            done = f"{sum(map(bool, counts))} of {len(counts)}" if any(counts) else "not run"
            rows.append([f"[{table.title}](#{anchor})", f"`{table.name}`", dataset, done, extent(filter(None, counts))])
    return "\n".join(markdown(rows))


def reading(chosen: Sequence[Table], results: Results, preset: str) -> str:
    """What the figures say of grafting, counted from them."""
    if not any(has_run(table, results) for table in chosen):
        what = "No result could be read" if results.damages else "Nothing has been run yet"
        command = f"python experiments/run.py {' '.join(table.name for table in chosen)} --preset {preset}"
        return f"**{what}.** To fill this report: `{command}`"
    places = [
        (results.cells(table, dataset), dataset)
        for table in chosen
        if table.kind != "filters"
        for dataset in datasets(table)
    ]
    sentences = []
    for figure, when in (
        ("last", "After the last epoch"),
        ("validated_best", "At the epoch picked by validation, which ensembles lack,"),
    ):
        own = distinct(found for place in places for found in against_baseline(*place, figure))
        others = distinct(found for place in places for found in against_rivals(results, *place, figure))
        counted = set(map(pair, own))  # one table's baseline may be another's rival
        others = [one for one in others if pair(one) not in counted]
        said = [f"{tally(own)} of {len(own)} baselines"] if own else []
        said += [f"{tally(others)} of {len(others)} rivals at equal or lower cost{names(others)}"] if others else []
        if said:
            sentences.append(f"{when} grafting is {'; it is '.join(said)}.")
    if not sentences:
        return "**Reading.** No grafting run stands beside a baseline or a rival yet: nothing can be said of it."
    counts = [len(one.results) for cells, _ in places for one in cells.values() if one.results]
    return (
        f"**Reading**, computed from the tables below. {' '.join(sentences)} “Ahead” and “behind” mean that the 95 % "
        "interval of the difference lies on one side of 0; “level”, that it contains 0, which shows neither that "
        "grafting helps nor that it does not. A rival is another way to train the same architecture, whose networks "
        f"have together seen no more epochs. n is {extent(counts)}; of 20 such intervals about one misses "
        "by chance."
    )


def distinct(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Tables share runs: each pair of them counts once."""
    return list({pair(one): one for one in comparisons}.values())


def pair(one: Comparison) -> tuple[str, str, str]:
    return one.dataset, one.grafting.entry.run, one.other.entry.run


def tally(comparisons: Sequence[Comparison]) -> str:
    """`ahead of 1, level with 3 and behind 0`"""
    counts = Counter(one.difference.verdict for one in comparisons)
    ahead, level, behind = (f"{words} {counts[verdict]}" for verdict, words in OUTCOMES.items())
    unknown = f" (and {counts['unknown']} open, for want of seeds)" if counts["unknown"] else ""
    return f"{ahead}, {level} and {behind}{unknown}"


def names(comparisons: Sequence[Comparison]) -> str:
    """The rivals that beat grafting, with the difference that grafting makes to them, the largest first."""
    beaten = sorted(
        (one for one in comparisons if one.difference.verdict == "below"), key=lambda one: one.difference.gain
    )
    listed = [
        f"*{cell(one.grafting.row.label)}* by *{cell(one.other.row.label)}* on {one.dataset} ({gain(one.difference)})"
        for one in beaten[:NAMED]
    ]
    listed += [f"{len(beaten) - NAMED} more, see below"] * (len(beaten) > NAMED)
    return f"; beaten is {'; '.join(listed)}" if listed else ""


def section(table: Table, results: Results, preset: str, plots: dict[str, list[Path]]) -> str:
    """A table's part of the report; `plots` by data set."""
    parts = [f"## {table.title}", table.note]
    for dataset in datasets(table):
        cells = results.cells(table, dataset)
        lines = filters_table(cells) if table.kind == "filters" else accuracy_table(cells, table.kind == "top5")
        parts += [f"### {table.title}: {dataset}", "\n".join(markdown(lines)), *footnotes(cells)]
        if table.kind != "filters":
            parts += against(results, cells, dataset)
        parts += [f"![{path.stem}](plots/{path.name})" for path in plots.get(dataset, [])]
        parts += small_print(results, cells)
    again = f"To run what is missing: `python experiments/run.py {table.name} --preset {preset}`"
    return "\n\n".join([*filter(None, parts), f"Published figures: {table.source}. {again}"])


def accuracy_table(cells: dict[str, Cell], has_top5: bool) -> list[list[Any]]:
    picked = {result.is_validated for cell in cells.values() for result in cell.results if result.courses}
    how = {True: "by validation", False: "on the test set"}
    best = f"best, {how[picked.pop()]}" if len(picked) == 1 else "best"
    rows = [["method", "paper", best, "last", *["top-5, last"] * has_top5, "gain of best", "gain of last", "n"]]
    for label, one in cells.items():
        texts = [mean(one.values(figure), 2) for figure in ("best", "last")] if one.results else ["not run"] * 2
        if picked and one.values("best"):
            texts[0] += f" ({how[one.results[0].is_validated]})"
        gains = [gain(from_baseline(cells, label, figure)) for figure in ("best", "last")]
        mark = " †" if is_ensemble(one) else ""
        top5 = [mean(one.values("top5"), 2)] * has_top5
        rows.append([label + mark, paper(one), *texts, *top5, *gains, len(one.results)])
    return rows


def filters_table(cells: dict[str, Cell]) -> list[list[Any]]:
    rows = [["method", "paper", *(f"invalid at {threshold:g}" for threshold in THRESHOLDS), "in shortcuts", "n"]]
    for label, one in cells.items():
        counted = [result.courses for result in one.results if result.courses]
        texts = [average_count(counted, "invalid", k) for k in range(len(THRESHOLDS))] if counted else ["not run"] * 2
        beside = [average_count(counted, "shortcuts", k) for k in range(len(THRESHOLDS)) if counted]
        rows.append([label, paper(one), *texts, ", ".join(filter(None, beside)) or "–", len(counted)])
    return rows


def average_count(counted: Sequence[Sequence[Course]], kind: str, k: int) -> str:
    """`36.5 ± 0.7 of 1136` at threshold k: means over the networks of each seed, mean and deviation over seeds."""
    means = [statistics.mean(getattr(course, kind)[k][0] for course in courses) for courses in counted]
    total = getattr(counted[0][0], kind)[k][1]
    return f"{mean(means, 1)} of {total:g}" if total else ""


def footnotes(cells: dict[str, Cell]) -> list[str]:
    """What else is known of ensembles, and of scions that were never needed."""
    ensembles = {label: one for label, one in cells.items() if is_ensemble(one)}
    alone = {label: [statistics.mean(result.alone) for result in one.results] for label, one in ensembles.items()}
    notes = [
        f"† {cell(label)}: its networks alone {mean(alone[label], 2)} (mean); "
        f"their uniform weight average {mean(one.values('weight_average'), 2)}."
        for label, one in ensembles.items()
    ]
    for label, one in cells.items():
        grafted = [course for result in one.results if result.has_scions for course in result.courses]
        counts = [course.invalid_course[0] for course in grafted if course.invalid_course]
        if counts and not any(map(any, counts)):
            notes.append(f"{cell(label)}: no filter was invalid after any epoch, so that nothing was grafted.")
    return notes


def against(results: Results, cells: dict[str, Cell], dataset: str) -> list[str]:
    """Grafting beside its rivals, a line for each row and figure."""
    lines = []
    for figure, when in (("last", "last"), ("validated_best", "best")):
        found: dict[str, dict[str, list[str]]] = {}
        for one in against_rivals(results, cells, dataset, figure):
            outcome = OUTCOMES.get(one.difference.verdict, "without an interval against")
            outcomes = found.setdefault(one.grafting.row.label, {})
            outcomes.setdefault(outcome, []).append(f"{cell(one.other.row.label)} ({gain(one.difference)})")
        for label, outcomes in found.items():
            said = "; ".join(f"{outcome} {', '.join(others)}" for outcome, others in outcomes.items())
            lines.append(f"- {cell(label)}, by {when}: {said}.")
    return ["Against rivals at equal or lower cost:\n\n" + "\n".join(lines)] if lines else []


def small_print(results: Results, cells: dict[str, Cell]) -> list[str]:
    """Everything that the figures depend on: settings, cost, machine."""
    ran = {label: one for label, one in cells.items() if one.results}
    if not ran:
        return []
    settings = {label: settings_of(one.results) for label, one in ran.items()}
    trained = [own for own in settings.values() if own]  # an ensemble has none of its own
    shared = {
        name: value for own in trained[:1] for name, value in own.items() if all(o.get(name) == value for o in trained)
    }
    rows = [
        [
            "method",
            "compared with",
            "settings of its own",
            "networks",
            "epochs of all",
            "time per run (median)",
            "seeds",
        ]
    ]
    for label, one in ran.items():
        own = flags({name: value for name, value in settings[label].items() if shared.get(name) != value})
        if is_ensemble(one):
            own = "made of " + ", ".join(f"`{member}`" for member in one.results[0].members)
        seconds = statistics.median(result.seconds for result in one.results)
        seeds = ", ".join(str(result.seed) for result in one.results)
        first = one.results[0]
        cost = results.cost(first)
        epochs = "–" if math.isnan(cost) else cost
        time = "–" if math.isnan(seconds) else duration(seconds)
        rows.append([label, one.row.baseline or "–", own or "–", first.networks, epochs, time, seeds])
    everything = [result for one in ran.values() for result in one.results]
    machine = "; ".join(tell([result.hardware for result in everything]))
    versions = "; ".join(tell([result.versions for result in everything]))
    return [
        f"Settings of all rows: {cell(flags(shared)) or '–'}. Hardware: {machine}. Versions: {versions}.",
        "\n".join(markdown(rows)),
    ]


def settings_of(results: Sequence[Result]) -> dict[str, str]:
    """What a run's seeds were trained with, but the seed; both where they differ."""
    keys = dict.fromkeys(key for result in results for key in result.settings if key != "seed")
    return {key: " / ".join(dict.fromkeys(str(result.settings.get(key, "–")) for result in results)) for key in keys}


def flags(settings: dict[str, str]) -> str:
    return ", ".join(f"`{name} {value}`" for name, value in settings.items())


def tell(values: Sequence[str]) -> list[str]:
    """What there is, with the number of runs where there is more than one thing."""
    counts = Counter(values)
    return [cell(value) + (f" ({count} runs)" if len(counts) > 1 else "") for value, count in counts.items()]


def is_ensemble(one: Cell) -> bool:
    return bool(one.results) and not one.results[0].courses


def paper(one: Cell) -> str:
    figure = one.entry.paper
    return "–" if figure is None else f"{figure:.2f}" if isinstance(figure, float) else str(figure)


def gain(difference: Difference) -> str:
    """`+0.31 [−0.12, +0.74]`, as far as it is known."""
    if math.isnan(difference.gain):
        return "–"
    interval = "" if math.isnan(difference.low) else f" [{difference.low:+.2f}, {difference.high:+.2f}]"
    return f"{difference.gain:+.2f}{interval or ' [–]'}".replace("-", "−")


def extent(counts: Iterable[int]) -> str:
    counts = list(counts)
    low, high = min(counts, default=0), max(counts, default=0)
    return str(high) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    sys.exit(main())
