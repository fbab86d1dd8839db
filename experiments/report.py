#!/usr/bin/env python
"""Writes the report of what run.py has run: Markdown tables beside the published figures, and plots.

    python experiments/report.py
    python experiments/report.py main fair --preset small

Prints the Markdown that it writes to report.md. A row without a readable result says "not run".
"""

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.runs import THRESHOLDS, mean_and_deviation, program, table
from experiments import plots
from experiments.results import (
    Cell,
    Cells,
    Pairs,
    against_baseline,
    against_rivals,
    against_steps,
    cells_of,
    gain,
    gain_by_validation,
    read_results,
)
from experiments.tables import PRESETS, REFERENCE, TABLES
from filter_grafting.checkpoint import write_atomically
from filter_grafting.membership import duration, printable
from training.flags import Parser, path

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
PICKED = {True: "by validation", False: "on the test set"}
RIVALS = "Grafting against rivals on the same schedule that cost no more training"
WHEN = {
    "after the last epoch": lambda one, other: gain(one, other, "last"),
    "at the epoch picked by validation": gain_by_validation,
}
VERDICTS = ("ahead", "level", "behind", "open for want of seeds")
NAMED = 5  # rivals, in the sentence that names those that grafting is behind


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
    cells = {name: found for name in chosen if (found := cells_of(name, args.preset, results))}
    out = args.out or directory
    (out / "plots").mkdir(parents=True, exist_ok=True)
    text = report(cells, args.preset, damages, out / "plots")
    write_atomically(out / "report.md", text.encode())
    print(text, end="", flush=True)
    print(f"written to {out / 'report.md'}", file=sys.stderr)
    return int(bool(damages) and not counts_of(cells))


Tables = dict[str, dict[str, Cells]]  # the chosen tables' cells, by name of the table and by data set


def counts_of(tables: Tables) -> list[int]:
    """How many seeds have run, of each row that has."""
    every = (one for found in tables.values() for cells in found.values() for one in cells.values())
    return [len(one.results) for one in every if len(one.results)]


def report(tables: Tables, preset: str, damages: Sequence[str], out: Path) -> str:
    """The whole report; its plots are drawn into `out`."""
    drawn = plots.draw(tables, preset, out)
    parts = [f"# Results of the preset {preset}", reading(tables, preset, damages), contents(tables)]
    if damages:
        listed = "\n".join(f"- {printable(damage)}" for damage in damages)
        parts.append(f"Damaged, unfinished or of other settings, and counted as not run:\n\n{listed}")
    parts.append(LEGEND)
    for name, found in tables.items():
        parts += [f"## {TABLES[name].title}", TABLES[name].note]
        for dataset, cells in found.items():
            parts += section(name, dataset, cells)
            parts += [f"![{file.stem}](plots/{file.name})" for file in drawn[name, dataset]] + small_print(cells)
        again = f"To run what is missing: `python experiments/run.py {name} --preset {preset}`"
        is_published = any(one.row.paper is not None for cells in found.values() for one in cells.values())
        parts.append((f"Published figures: {TABLES[name].source}. " if is_published else "") + again)
    if preset == "paper":
        columns = ["network", "method", "CIFAR-10", "CIFAR-100", "source"]
        parts += ["## Published figures of rivals", "Accuracy in %, as printed there; none is a run of ours."]
        parts.append(table(pd.DataFrame(REFERENCE, columns=columns)))
    return "\n\n".join(parts) + "\n"


def contents(tables: Tables) -> str:
    lines = []
    for name, found in tables.items():
        title = TABLES[name].title
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for dataset, cells in found.items():
            counts = counts_of({name: {dataset: cells}})
            done = f"{len(counts)} of {len(cells)}" if counts else "not run"
            line = {"table": f"[{title}](#{anchor})", "name": f"`{name}`", "data set": dataset}
            lines.append(line | {"rows run": done, "seeds": extent(counts)})
    return table(pd.DataFrame(lines))


# ---- What the figures say


def reading(tables: Tables, preset: str, damages: Sequence[str]) -> str:
    """What the figures say of grafting, counted from them."""
    counts = counts_of(tables)
    if not counts:
        what = "No result could be read" if damages else "Nothing has been run yet"
        return f"**{what}.** To fill this report: `python experiments/run.py {' '.join(tables)} --preset {preset}`"
    own, rivals = pairs(tables, against_baseline), pairs(tables, against_rivals)
    if not own and not rivals:
        return "**Reading.** No grafting run stands beside a baseline or a rival yet: nothing can be said of it."
    lines = [tally(own, "Grafting against the single network of its row's baseline"), tally(rivals, RIVALS)]
    lines += [
        f"The cosine alone, without grafting, gains {gain(one, other, 'last')} after the last epoch "
        f"({one.row.label} against {other.row.label}, {one.row.dataset})."
        for one, other in pairs(tables, against_steps)
    ]
    return (
        "**Reading**, counted from the tables below:\n\n" + "\n".join(f"- {line}" for line in lines if line) + "\n\n"
        "“Ahead” and “behind” mean that the 95 % interval of the difference lies on one side of 0; “level”, that it "
        "contains 0, which shows neither that grafting helps nor that it does not. Of 20 such intervals about one "
        f"misses by chance, and n is only {extent(counts)}."
    )


def pairs(tables: Tables, find: Callable[[Cells], Pairs]) -> list[tuple[Cell, Cell]]:
    """Those of all tables that report accuracies; tables share runs, and each pair of them counts once."""
    named = (found for name, found in tables.items() if TABLES[name].kind != "filters")
    every = (pair for found in named for cells in found.values() for pair in find(cells))
    return list({(one.row.run, other.row.run, one.row.dataset): (one, other) for one, other in every}.values())


def tally(compared: Sequence[tuple[Cell, Cell]], what: str) -> str:
    """`what: after the last epoch ahead 1, level 3, behind 1 of 5 (…); at the epoch picked by validation ….`"""
    parts = []
    for when, of_pair in WHEN.items():
        every = [
            (of_pair(one, other), f"{one.row.label} behind {other.row.label} on {one.row.dataset}")
            for one, other in compared
        ]
        known = sorted((each for each in every if math.isfinite(each[0].mean)), key=lambda each: each[0].mean)
        counts = Counter(difference.verdict for difference, _ in known)
        words = ", ".join(f"{word} {counts[word]}" for word in VERDICTS if counts[word])
        behind = [f"{text} ({difference})" for difference, text in known if difference.verdict == "behind"]
        named = "; ".join(behind[:NAMED] + [f"{len(behind) - NAMED} more, see below"] * (len(behind) > NAMED))
        if known:
            parts.append(f"{when} {words} of {len(known)}" + f" ({named})" * bool(named))
    return f"{what}: {'; '.join(parts)}." if parts else ""


# ---- Tables


def section(name: str, dataset: str, cells: Cells) -> list[str]:
    kind = TABLES[name].kind
    frame = filters_table(cells) if kind == "filters" else accuracy_table(cells, kind == "top5")
    parts = [f"### {TABLES[name].title}: {dataset}", table(frame), *footnotes(cells)]
    rivals = pd.DataFrame(
        {
            "grafting": one.row.label,
            "against": other.row.label,
            "epochs of all": f"{one.first('cost'):g} : {other.first('cost'):g}",
            "difference of last": gain(one, other, "last"),
            "difference of best, by validation": gain_by_validation(one, other),
            "n": len(one.results.index.intersection(other.results.index)),
        }
        for one, other in against_rivals(cells)
    )
    if kind != "filters" and len(rivals):
        parts += [f"{RIVALS} (an ensemble costs more to use):", table(rivals)]
    return parts


def accuracy_table(cells: Cells, has_top5: bool) -> pd.DataFrame:
    ran = pd.concat([one.results for one in cells.values()])
    picked = set(ran["validated"].dropna())
    best = f"best, {PICKED[min(picked)]}" if len(picked) == 1 else "best"
    lines = []
    for label, one in cells.items():
        line = {"method": label + " †" * bool(one.first("members")), "paper": paper(one)}
        line |= {best: mean(one, "best"), "last": mean(one, "last")}
        if len(picked) > 1 and line[best][0].isdigit():
            line[best] += f" ({PICKED[one.first('validated')]})"
        line |= {"top-5, last": mean(one, "top5")} if has_top5 else {}
        line |= {f"gain of {figure}": gain(one, cells.get(one.row.baseline), figure) for figure in ("best", "last")}
        if ran[f"invalid_{THRESHOLDS[0]}"].max() > 0:
            line[f"invalid at {THRESHOLDS[0]}"] = count(one, "", THRESHOLDS[0])
        if ran["information"].notna().any():
            line["information (nats)"] = mean(one, "information", 1)
        lines.append(line | {"n": len(one.results)})
    frame = pd.DataFrame(lines)
    return frame if (frame["paper"] != "–").any() else frame.drop(columns="paper")


def filters_table(cells: Cells) -> pd.DataFrame:
    lines = []
    for label, one in cells.items():
        line = {"method": label, "paper": paper(one)}
        line |= {f"invalid at {threshold}": count(one, "", threshold) for threshold in THRESHOLDS}
        beside = ", ".join(count(one, "shortcut_", threshold) for threshold in THRESHOLDS)
        lines.append(line | {"in shortcuts": beside if one.first("shortcut_total") else "–", "n": len(one.results)})
    return pd.DataFrame(lines)


def paper(one: Cell) -> str:
    figure = one.row.paper
    return "–" if figure is None else f"{figure:.2f}" if isinstance(figure, float) else figure


def mean(one: Cell, figure: str, digits: int = 2) -> str:
    return mean_and_deviation(one.results[figure].dropna(), digits) if len(one.results) else "not run"


def count(one: Cell, kind: str, threshold: float) -> str:
    """`36.5 ± 0.7 of 1136`: means over the networks of each seed, mean and deviation over seeds."""
    text = mean(one, f"{kind}invalid_{threshold}", 1)
    return f"{text} of {one.first(f'{kind}total'):g}" if text[0].isdigit() else text


def footnotes(cells: Cells) -> list[str]:
    """What else is known of ensembles, and of scions that were never needed."""
    notes = []
    for label, one in cells.items():
        if bool(one.first("members")):
            alone, average = mean(one, "alone"), mean(one, "weight_average")
            notes.append(f"† {label}: its networks alone {alone} (mean); their uniform weight average {average}.")
        elif len(one.results) and one.first("settings").get("scion", "external") != "external":
            metrics = pd.concat([network.metrics for run in one.results["result"] for network in run.networks])
            if metrics.get(f"invalid_{THRESHOLDS[0]}", pd.Series([1])).max() == 0:
                notes.append(f"{label}: no filter was invalid after any epoch, so that nothing was grafted.")
    return notes


def small_print(cells: Cells) -> list[str]:
    """Everything that the figures depend on: settings, cost, machine."""
    ran = {label: one for label, one in cells.items() if len(one.results)}
    if not ran:
        return []
    settings = {label: settings_of(one) for label, one in ran.items()}
    trained = [own for own in settings.values() if own] or [{}]  # an ensemble has none of its own
    shared = {key: value for key, value in trained[0].items() if all(own.get(key) == value for own in trained)}
    lines = []
    for label, one in ran.items():
        own = flags({key: value for key, value in settings[label].items() if shared.get(key) != value})
        made_of = ", ".join(f"`{member}`" for member in one.first("members"))
        cost, seconds = one.first("cost"), one.results["seconds"].median()
        line = {"method": label, "compared with": one.row.baseline or "–"}
        line["settings of its own"] = f"made of {made_of}" if made_of else own or "–"
        line |= {"networks": one.first("networks"), "epochs of all": "–" if math.isnan(cost) else f"{cost:g}"}
        line["time of a run (median)"] = "–" if math.isnan(seconds) else duration(seconds)
        lines.append(line | {"seeds": ", ".join(map(str, one.results.index))})
    results = pd.concat([one.results for one in ran.values()])
    hardware, versions, precision = (tell(results[column]) for column in ("hardware", "versions", "precision"))
    return [
        *["**These runs were not all trained on the same images.**"] * (len({*results["data"]} - {""}) > 1),
        f"Settings of all rows: {flags(shared) or '–'}. Hardware: {hardware}. Versions: {versions}. "
        f"Precision: {precision}.",
        table(pd.DataFrame(lines)),
    ]


def settings_of(one: Cell) -> dict[str, str]:
    """What a run's seeds were trained with, but the seed; all values where they differ. A cosine has no steps."""
    without = ["seed", "step_epochs"] if one.first("settings").get("cos") else ["seed"]
    frame = pd.DataFrame(list(one.results["settings"])).astype(str).drop(columns=without, errors="ignore")
    return {key: " / ".join(frame[key].unique()) for key in frame}


def flags(settings: dict[str, str]) -> str:
    return ", ".join(f"`{key} {value}`" for key, value in settings.items())


def tell(values: Iterable[str]) -> str:
    """What there is, with the number of runs where there is more than one thing."""
    counts = Counter(filter(None, values))
    return "; ".join(value + f" ({n} runs)" * (len(counts) > 1) for value, n in counts.items())


def extent(counts: Sequence[int]) -> str:
    low, high = min(counts, default=0), max(counts, default=0)
    return str(high) if low == high else f"{low} to {high}"


if __name__ == "__main__":
    sys.exit(program(main))
