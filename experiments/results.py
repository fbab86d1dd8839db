"""What run.py has left, as one table, and how two of its rows compare: differences by seed and their intervals."""

import itertools
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from analysis.runs import THRESHOLDS, Run, read_run
from experiments import tables
from experiments.tables import SEEDS, TABLES, Row, rows, runs, without_steps
from filter_grafting.errors import GraftingError

# What is known of a run with one seed; NaN where it has no such figure. Accuracies are in %.
COLUMNS = ["run", "seed", "result", "members", "epochs", "seconds", "hardware", "versions", "precision", "data"]
COLUMNS += ["last", "best", "picked", "top5", "information", "alone", "weight_average", "total", "shortcut_total"]
COLUMNS += [f"{kind}invalid_{threshold}" for kind in ("", "shortcut_") for threshold in THRESHOLDS]


class Cell(NamedTuple):
    """A row of a table on one data set, and the figures of its runs: a line for each seed, which is the index."""

    row: Row
    results: pd.DataFrame

    def first(self, column: str) -> Any:
        """What all seeds have in common; None if nothing was run."""
        return self.results[column].iloc[0] if len(self.results) else None


Cells = dict[str, Cell]  # of one table on one data set, by label of the row


class Gain(NamedTuple):
    """Difference of two rows in percentage points, with its 95 % interval; NaN where there are too few values."""

    mean: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 0  # seeds that both have

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "open for want of seeds"
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "level"

    def __str__(self) -> str:
        """`+0.31 [−0.12, +0.74]`, as far as it is known."""
        if math.isnan(self.mean):
            return "–"
        interval = "–" if math.isnan(self.low) else f"{self.low:+.2f}, {self.high:+.2f}"
        return f"{self.mean:+.2f} [{interval}]".replace("-", "−")


# ---- Reading


def read_results(directory: Path, preset: str) -> tuple[pd.DataFrame, list[str]]:
    """A line for each run and seed in a preset's folder of results, and what is wrong with those left out."""
    lines, damages = {}, []
    for run in runs(TABLES, preset, SEEDS):
        if (directory / str(run)).exists():
            try:
                lines[str(run)] = read_result(directory / str(run), run)
            except (ValueError, GraftingError) as error:
                damages.append(f"{run}: {error}")
    frame = pd.DataFrame(lines.values(), index=list(lines), columns=COLUMNS)
    for name, members in frame["members"].items():
        if members:
            frame.loc[name, "precision"] = " and ".join(sorted({*frame["precision"].reindex(members).dropna()}))
    return frame.sort_values(["run", "seed"]), damages


def read_result(folder: Path, expected: tables.Run) -> dict[str, Any]:
    """Every figure of one run with one seed.

    Raises ValueError, in a sentence, if it is missing, damaged or unfinished; GraftingError if it is a good one of
    another command.
    """
    run = read_run(folder)
    if run.errors:
        raise ValueError("; ".join(run.errors))
    command = str(run.record.get("command"))
    # The words behind the script's name, which may have moved: results stay what they are.
    if without_steps(shlex.split(command))[2:] != shlex.split(expected.command)[2:]:
        raise GraftingError(f"{folder}/result.json is of another command, move it elsewhere: {command}")
    found = {"run": expected.name, "seed": expected.seed, "result": run, "members": expected.members}
    found |= {"epochs": expected.epochs, "hardware": run.record["hardware"], "data": run.record.get("data", "")}
    found["versions"] = ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())
    if expected.members:
        ensemble = run.record["ensemble"]
        found |= {"precision": "", "last": ensemble["ensemble"], "weight_average": ensemble["weight_average"]}
        return found | {"alone": pd.Series(ensemble["networks"], dtype=float).mean()}
    return found | of_networks(run)


def of_networks(run: Run) -> dict[str, Any]:
    """`last`, `top5`, `information` and filters are means over the networks; `best` is that of any of them."""
    epochs = pd.concat([network.metrics for network in run.networks], ignore_index=True)
    ends = epochs.groupby("epoch").mean(numeric_only=True).iloc[-1]
    # Of images held out by --val, or of a folder of their own; the best epoch is picked by it, where there is one.
    has_validation = "val_accuracy" in epochs and epochs["val_accuracy"].notna().any()
    best = epochs["test_accuracy"][epochs["val_accuracy" if has_validation else "test_accuracy"].idxmax()]
    found = {
        "precision": "bfloat16" if run.settings.get("amp") else "float32",
        "seconds": max(len(network.metrics) * network.seconds_per_epoch for network in run.networks),
        "last": ends["test_accuracy"],
        "best": best,
        "picked": best if has_validation else math.nan,  # not on the images that it is measured on
        "top5": ends.get("test_top5"),
        "information": ends.get("information"),
    }
    return found | pd.json_normalize([network.filters for network in run.networks], sep="_").mean().to_dict()


def cells_of(table: str, preset: str, results: pd.DataFrame) -> dict[str, Cells]:
    """By data set. Networks that are there for an ensemble alone are not among them."""
    found: dict[str, Cells] = {}
    for row in rows(table, preset):
        own = results[(results["run"] == row.run) & (results["seed"] < SEEDS)].set_index("seed")
        found.setdefault(row.dataset, {})[row.label] = Cell(row, own)
    return found


# ---- Comparing


def gain(one: Cell, other: Cell | None, figure: str) -> Gain:
    """Mean of one row's figure minus another's over the seeds that both have, with its 95 % interval.

    Seed k gives every row the same initial weights, order and augmentation: the two are no independent samples, and
    Student's t is of the differences. The interval is NaN if fewer than 2 seeds are common, or all differ by the same.
    An ensemble is compared with the mean of its own networks, where these are the other row's.
    """
    if other is None:
        return Gain()
    is_made_of_it = one.row.run.startswith(f"{other.row.run}_ensemble")
    partners = one.results["alone"] if is_made_of_it else other.results[figure]
    differences = (one.results[figure].astype(float) - partners.astype(float)).dropna()
    n = len(differences)
    if n < 2 or differences.max() - differences.min() < 1e-9:
        return Gain(differences.mean(), n=n)
    return Gain(differences.mean(), *stats.ttest_1samp(differences, 0).confidence_interval(0.95), n)


def pairs_of(cells: Cells) -> Iterator[tuple[str, Cell, Cell]]:
    """The rows that are compared, as far as both have run: (how they are related, one, other).

    "baseline": grafting, and the single network that its row is compared with; "rival": grafting, and every other row
    of its baseline whose training costs no more, but not an average at other rates, from which it would differ in two
    things; "schedule": a baseline on a cosine, and that of its network on steps.
    """
    ran = [one for one in cells.values() if len(one.results)]
    for one, other in itertools.permutations(ran, 2):
        run, costs_no_more = one.row.run, other.first("epochs") <= one.first("epochs")
        same_rates = ("--difflr" in one.row.flags) == ("--difflr" in other.row.flags)
        is_fair = costs_no_more and (same_rates or "--method average" not in other.row.flags)
        if one.row.is_grafting and other.row.label == one.row.baseline:
            yield "baseline", one, other
        elif one.row.is_grafting > other.row.is_grafting and one.row.baseline == other.row.baseline and is_fair:
            yield "rival", one, other
        elif one.row.baseline is None and (run == f"{other.row.run}_cos" or other.row.run == f"{run}_steplr"):
            yield "schedule", one, other
