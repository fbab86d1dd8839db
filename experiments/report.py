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
    against_steps,
    datasets,
    from_baseline,
)
from experiments.tables import NAMES, PRESETS, SEEDS, Table, runs, tables
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
mean difference from the row's baseline in percentage points, seed by seed, with its 95 % interval (Student's t). A seed
gives all rows the same initial weights, order and augmentation; the images are the same for all runs, and the interval
says nothing of others. † An ensemble has one accuracy, that of its networks' averaged outputs after the last epoch, and
is compared with the mean of these networks where they are those of its baseline."""
NAMED = 5  # in the sentence that names rivals
OUTCOMES = {"above": "ahead", "level": "level", "below": "behind", "unknown": "open for want of seeds"}


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

    recipes = {(run.name, run.seed): run.recipe for run in runs(NAMES, args.preset, SEEDS)}
    results = Results(args.results / args.preset, recipes)
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
        parts.append(f"Damaged, unfinished or of other settings, and counted as not run:\n\n{damages}")
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
    own = distinct(found for place in places for found in against_baseline(*place))
    others = distinct(found for place in places for found in against_rivals(results, *place))
    schedules = distinct(found for place in places for found in against_steps(*place))
    if not own and not others:
        return "**Reading.** No grafting run stands beside a baseline or a rival yet: nothing can be said of it."
    counts = [len(one.results) for cells, _ in places for one in cells.values() if one.results]
    lines = [
        tally(own, "Grafting against the single network of its row's baseline"),
        tally(others, "Grafting against rivals on the same schedule that cost no more training"),
        *(
            f"The cosine alone, without grafting, gains {gain(one.last)} after the last epoch "
            f"({cell(one.one.row.label)} against {cell(one.other.row.label)}, {one.dataset})."
            for one in schedules
        ),
    ]
    return (
        "**Reading**, counted from the tables below:\n\n" + "\n".join(f"- {line}" for line in lines if line) + "\n\n"
        "“Ahead” and “behind” mean that the 95 % interval of the difference lies on one side of 0; “level”, that it "
        "contains 0, which shows neither that grafting helps nor that it does not. Of 20 such intervals about one "
        f"misses by chance, and n is only {extent(counts)}."
    )


def distinct(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Tables share runs: each pair of them counts once."""
    return list({(one.dataset, one.one.entry.run, one.other.entry.run): one for one in comparisons}.values())


def tally(comparisons: Sequence[Comparison], what: str) -> str:
    """`what: after the last epoch ahead 1, level 3, behind 1 of 5 (…); at the epoch picked by validation ….`"""
    parts = []
    for figure, when in ("last", "after the last epoch"), ("best", "at the epoch picked by validation"):
        found = [(one, difference) for one in comparisons if math.isfinite((difference := getattr(one, figure)).gain)]
        counts = Counter(difference.verdict for _, difference in found)
        said = [f"{words} {counts[verdict]}" for verdict, words in OUTCOMES.items() if counts[verdict]]
        if said:
            parts.append(f"{when} {', '.join(said)} of {len(found)}{losses(found)}")
    return f"{what}: {'; '.join(parts)}." if parts else ""


def losses(found: Sequence[tuple[Comparison, Difference]]) -> str:
    """Where grafting is behind, with the difference, the largest first."""
    beaten = sorted((pair for pair in found if pair[1].verdict == "below"), key=lambda pair: pair[1].gain)
    listed = [
        f"{cell(one.one.row.label)} behind {cell(one.other.row.label)} on {one.dataset} ({gain(difference)})"
        for one, difference in beaten[:NAMED]
    ]
    listed += [f"{len(beaten) - NAMED} more, see below"] * (len(beaten) > NAMED)
    return f" ({'; '.join(listed)})" if listed else ""


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
    everything = [one for dataset in datasets(table) for one in results.cells(table, dataset).values()]
    source = f"Published figures: {table.source}. " if has_paper(everything) else ""
    return "\n\n".join([*filter(None, parts), source + again])


def accuracy_table(cells: dict[str, Cell], has_top5: bool) -> list[list[Any]]:
    picked = {result.is_validated for cell in cells.values() for result in cell.results if result.courses}
    how = {True: "by validation", False: "on the test set"}
    best = f"best, {how[picked.pop()]}" if len(picked) == 1 else "best"
    published = [[paper(one)] for one in cells.values()] if has_paper(cells.values()) else [[]] * len(cells)
    heading = ["method", *["paper"] * any(published), best, "last", *["top-5, last"] * has_top5]
    rows = [[*heading, "gain of best", "gain of last", "n"]]
    for (label, one), figure_of_paper in zip(cells.items(), published, strict=True):
        texts = [mean(one.values(figure), 2) for figure in ("best", "last")] if one.results else ["not run"] * 2
        if picked and one.values("best"):
            texts[0] += f" ({how[one.results[0].is_validated]})"
        gains = [gain(from_baseline(cells, label, figure)) for figure in ("best", "last")]
        mark = " †" if is_ensemble(one) else ""
        top5 = [mean(one.values("top5"), 2)] * has_top5
        rows.append([label + mark, *figure_of_paper, *texts, *top5, *gains, len(one.results)])
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
    """Grafting beside its rivals."""
    rows = [["grafting", "against", "epochs of all", "difference of last", "difference of best, by validation", "n"]]
    for one in against_rivals(results, cells, dataset):
        epochs = " : ".join(f"{results.cost(side.results[0]):g}" for side in (one.one, one.other))
        n = len(one.one.by_seed("last").keys() & one.other.by_seed("last").keys())
        rows.append([one.one.row.label, one.other.row.label, epochs, gain(one.last), gain(one.best), n])
    heading = "Grafting against rivals on the same schedule that cost no more training (an ensemble costs more to use):"
    return [heading, "\n".join(markdown(rows))] if rows[1:] else []


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
            "time of a run (median)",
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
    mixed = len({result.data for result in everything if result.data}) > 1
    machine = "; ".join(tell([result.hardware for result in everything]))
    versions = "; ".join(tell([result.versions for result in everything]))
    return [
        *["**These runs were not all trained on the same images.**"] * mixed,
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


def has_paper(cells: Iterable[Cell]) -> bool:
    return any(one.entry.paper is not None for one in cells)


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
