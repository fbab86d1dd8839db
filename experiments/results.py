"""What run.py has left, as one table, and how two of its rows compare: differences by seed and their intervals."""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from scipy import stats

from analysis.runs import THRESHOLDS, read_run
from experiments.tables import SEEDS, TABLES, Row, Run, rows, runs, without_steps

# Figures that some results have none of: NaN there.
SOME = ["best", "validated", "top5", "information", "cost", "seconds", "alone", "weight_average", "total"]
SOME += [f"{kind}invalid_{threshold}" for kind in ("", "shortcut_") for threshold in THRESHOLDS]


class OtherCommand(ValueError):
    """Results of other settings than the run's."""


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

    mean: float
    low: float = math.nan
    high: float = math.nan

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
    expected = {str(run): run for run in runs(TABLES, preset, SEEDS)}
    lines, damages = {}, []
    for folder in sorted(directory.glob("*/seed*")):
        name = f"{folder.parent.name}/{folder.name}"
        if name in expected:
            try:
                lines[name] = read_result(folder, expected[name])
            except ValueError as error:
                damages.append(f"{name}: {error}")
    frame = pd.DataFrame.from_dict(lines, orient="index")
    frame = frame.reindex(columns=list(dict.fromkeys([*frame, "run", "seed", *SOME])))
    for name, members in frame.get("members", pd.Series()).items():
        if members:  # an ensemble costs what its networks do
            frame.loc[name, "cost"] = frame["cost"].reindex(members).sum(skipna=False)
    return frame.sort_values(["run", "seed"]), damages


def read_result(folder: Path, expected: Run) -> dict[str, Any]:
    """Every figure of one run with one seed, accuracies in %.

    Raises ValueError, in a sentence, if it is missing, damaged, unfinished or of another command.
    """
    run = read_run(folder)
    if run.errors:
        raise ValueError("; ".join(run.errors))
    try:
        # The words behind the script's name, which may have moved: results stay what they are.
        if without_steps(shlex.split(str(run.record["command"])))[2:] != shlex.split(expected.command)[2:]:
            raise OtherCommand(f"result.json is of another command: {run.record['command']}")
        found = {"run": expected.name, "seed": expected.seed, "result": run, "settings": run.settings, "precision": ""}
        found |= {"hardware": str(run.record["hardware"]), "data": str(run.record.get("data", ""))}
        found["versions"] = ", ".join(f"{name} {version}" for name, version in run.record["versions"].items())
        return found | (of_ensemble(run.record["ensemble"]) if expected.members else of_networks(run))
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"result.json is damaged ({type(error).__name__}: {error})") from None


def of_ensemble(record: dict[str, Any]) -> dict[str, Any]:
    alone = pd.Series(record["networks"], dtype=float)
    found = {"members": [str(member) for member in record["members"]], "networks": len(alone), "is_grafting": False}
    return found | {"alone": alone.mean(), "last": record["ensemble"], "weight_average": record["weight_average"]}


def of_networks(run: Any) -> dict[str, Any]:
    networks, settings = run.networks, run.settings
    if len(networks) != run.record["networks"]:
        raise ValueError(f"result.json counts filters of {len(networks)} networks, not {run.record['networks']}")
    epochs = pd.concat([network.metrics for network in networks], ignore_index=True)
    judge = epochs["val_accuracy" if settings.get("val") else "test_accuracy"]
    if judge.isna().any():
        raise ValueError(f"metrics1.csv has gaps in {judge.name}")
    ends = epochs.groupby("epoch").mean(numeric_only=True).iloc[-1]  # means over the networks
    is_external = settings.get("scion", "external") == "external"
    is_average = settings.get("method", "grafting") != "grafting" or settings.get("a") == 0
    found = {
        "members": [],
        "networks": len(networks),
        "is_grafting": len(networks) > 1 and is_external and not is_average,
        "validated": bool(settings.get("val")),  # whether the best epoch was picked on held-out images
        "best": epochs["test_accuracy"][judge.idxmax()],
        "last": ends["test_accuracy"],
        "top5": ends.get("test_top5"),
        "information": ends.get("information"),
        "cost": float(len(epochs)),  # epochs of training, over all networks
        "seconds": max(len(network.metrics) * network.seconds_per_epoch for network in networks),
        "precision": "bfloat16" if settings.get("amp") else "float32",
    }
    return found | pd.json_normalize([network.filters for network in networks], sep="_").mean().to_dict()


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
    An ensemble is compared with the mean of its own networks, where these are the other row's. Rows that pick their
    best epoch unlike have no difference of it.
    """
    if other is None or not len(one.results) or not len(other.results):
        return Gain(math.nan)
    partners = other.results[figure]
    if {member.rpartition("/")[0] for member in one.first("members")} == {other.row.run}:
        partners = one.results["alone"]
    elif figure == "best" and one.first("validated") != other.first("validated"):
        return Gain(math.nan)
    pairs = pd.concat([one.results[figure], partners], axis=1, keys=["one", "other"]).astype(float).dropna()
    differences = pairs["one"] - pairs["other"]
    if len(pairs) < 2 or differences.max() - differences.min() < 1e-9:
        return Gain(differences.mean())
    interval = stats.ttest_rel(pairs["one"], pairs["other"]).confidence_interval(0.95)
    return Gain(differences.mean(), interval.low, interval.high)


def gain_by_validation(one: Cell, other: Cell) -> Gain:
    """That of the best epochs, of rows that pick them by validation: others pick what they are measured on."""
    is_fair = one.first("validated") == 1 and other.first("validated") == 1
    return gain(one, other, "best") if is_fair else Gain(math.nan)


Pairs = Iterator[tuple[Cell, Cell]]  # of rows on one data set that both have run


def against_baseline(cells: Cells) -> Pairs:
    """Each grafting row against the single network that it is compared with."""
    for one in cells.values():
        baseline = cells.get(one.row.baseline)
        if one.first("is_grafting") and baseline and len(baseline.results):
            yield one, baseline


def against_rivals(cells: Cells) -> Pairs:
    """Each grafting row against the others of its baseline whose training costs no more."""
    for one in cells.values():
        for other in cells.values() if one.first("is_grafting") else ():
            is_rival = len(other.results) and not other.first("is_grafting") and other.row.baseline == one.row.baseline
            if is_rival and other.first("cost") <= one.first("cost"):
                yield one, other


def against_steps(cells: Cells) -> Pairs:
    """Each baseline on a cosine against that of the same network on steps: what the schedule alone does."""
    baselines = [one for one in cells.values() if one.row.baseline is None and len(one.results)]
    for one in baselines:
        for other in baselines:
            own, others = one.first("settings"), other.first("settings")
            alike = all(own.get(name) == others.get(name) for name in ("model", "lr"))
            if alike and own.get("cos") is True and others.get("cos") is False:
                yield one, other
