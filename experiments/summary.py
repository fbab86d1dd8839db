"""Reads the results that run.py has left, and compares them: values over seeds, differences and their intervals."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.tables import SEEDS, Entry, Row, Table
from grafting_cifar.runs import THRESHOLDS, Damage, Network, convert, read_coefficients, read_csv, read_metrics


@dataclass
class Course(Network):
    """A network of a finished run, with the columns that only comparisons need."""

    validation: list[float] = field(default_factory=list)  # accuracy in %, one per epoch; empty without --val
    top5: list[float] = field(default_factory=list)  # test accuracy in %, one per epoch; empty on CIFAR
    invalid_course: list[list[float]] = field(default_factory=list)  # at each threshold, in % of all, one per epoch


@dataclass
class Result:
    """One run with one seed. Its figures are accuracies on the test set in %, NaN where it has none."""

    run: str
    seed: int
    command: str  # that it is the result of
    settings: dict[str, Any]
    hardware: str
    versions: str
    data: str = ""  # tells the training images from others; empty in results of earlier versions
    courses: list[Course] = field(default_factory=list)  # of an ensemble: none
    members: list[str] = field(default_factory=list)  # of an ensemble: the results that it is made of
    alone: list[float] = field(default_factory=list)  # of an ensemble: the accuracy of each network
    ensemble: float = math.nan
    weight_average: float = math.nan

    @property
    def networks(self) -> int:
        return len(self.courses or self.alone)

    @property
    def seconds(self) -> float:
        """Time of the slowest network, but for the few epochs in which the machine had paused; of an ensemble NaN."""
        return max(
            (len(course.seconds) * statistics.median(course.seconds) for course in self.courses), default=math.nan
        )

    @property
    def is_validated(self) -> bool:
        return bool(self.courses) and all(course.validation for course in self.courses)

    @property
    def is_grafting(self) -> bool:
        """Whether networks are grafted as in the paper, with weights of a neighbour."""
        is_average = self.settings.get("method") == "average" or self.settings.get("a") == 0
        return len(self.courses) > 1 and not self.has_scions and not is_average

    @property
    def has_scions(self) -> bool:
        """Whether each network grafts something onto its own invalid filters."""
        return self.settings.get("scion", "external") != "external"

    @property
    def best(self) -> float:
        """At the network and epoch with the highest validation accuracy; without --val the highest, as published."""
        judged = [
            (judge, accuracy)
            for course in self.courses
            for judge, accuracy in zip(course.validation or course.accuracies, course.accuracies, strict=True)
        ]
        return max(judged, key=lambda pair: pair[0], default=(None, math.nan))[1]

    @property
    def validated_best(self) -> float:
        return self.best if self.is_validated else math.nan

    @property
    def last(self) -> float:
        """Mean over the networks after the last epoch; of an ensemble, its one accuracy."""
        return statistics.mean(course.last for course in self.courses) if self.courses else self.ensemble

    @property
    def top5(self) -> float:
        lasts = [course.top5[-1] for course in self.courses if course.top5]
        return statistics.mean(lasts) if lasts else math.nan


class Cell(NamedTuple):
    """A row of a table on one data set, and what there is of it: a result per seed."""

    row: Row
    entry: Entry
    results: list[Result]

    def by_seed(self, figure: str) -> dict[int, float]:
        """`best`, `last`, … of each seed that has one."""
        found = {result.seed: getattr(result, figure) for result in self.results}
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def values(self, figure: str) -> list[float]:
        return list(self.by_seed(figure).values())


class Difference(NamedTuple):
    """Of two rows, in the values' unit, with its 95 % interval; NaN where there are too few values."""

    gain: float
    low: float = math.nan
    high: float = math.nan

    @property
    def verdict(self) -> str:
        if math.isnan(self.low):
            return "unknown"
        return "above" if self.low > 0 else "below" if self.high < 0 else "level"


class Results:
    """The results of one preset, each read once; what is damaged counts as not run, and is in `damages`.

    Args:
        recipes: the commands that results must be of, by name and seed of the run; others are damage, too.
    """

    def __init__(self, directory: Path, recipes: Mapping[tuple[str, int], str]):
        self.directory, self.recipes = directory, recipes
        self.damages: list[str] = []
        self._runs: dict[str, list[Result]] = {}

    def of(self, run: str) -> list[Result]:
        """The readable results of a run, by seed."""
        if run not in self._runs:
            self._runs[run] = list(self._read(run))
        return self._runs[run]

    def _read(self, run: str) -> Iterator[Result]:
        folders = {int(path.name[4:]): path for path in self.directory.joinpath(run).glob("seed*") if is_seed(path)}
        for seed, folder in sorted(folders.items()):
            try:
                result = read_result(folder, run, seed)
                if result.command != self.recipes.get((run, seed), result.command):
                    raise Damage(f"result.json is of another command: {result.command}")
                yield result
            except Damage as damage:
                self.damages.append(f"{run}/{folder.name}: {damage}")

    def cells(self, table: Table, dataset: str) -> dict[str, Cell]:
        """By label of the row. Networks that are there for an ensemble alone are not among them."""
        entries = [(row, row.cells[dataset]) for row in table.rows if dataset in row.cells]
        return {
            row.label: Cell(row, entry, [result for result in self.of(entry.run) if result.seed < SEEDS])
            for row, entry in entries
        }

    def members(self, result: Result) -> list[Result]:
        """The results that an ensemble is made of, as far as they are there."""
        runs = {name: name.rpartition("/")[0] for name in result.members}
        return [one for name, run in runs.items() for one in self.of(run) if name == f"{run}/seed{one.seed}"]

    def cost(self, result: Result) -> float:
        """Epochs of training, over all networks; of an ensemble, those of its members. NaN if one is missing."""
        if result.courses:
            return sum(len(course.epochs) for course in result.courses)
        members = self.members(result)
        return sum(map(self.cost, members)) if len(members) == len(result.members) else math.nan


def is_seed(path: Path) -> bool:
    number = path.name.removeprefix("seed")
    return number.isascii() and number.isdecimal() and len(number) < 18


def datasets(table: Table) -> list[str]:
    return list(dict.fromkeys(name for row in table.rows for name in row.cells))


def difference(values: Mapping[int, float], others: Mapping[int, float]) -> Difference:
    """Mean of values - others over the seeds that both have, with its 95 % interval (Student's t, paired by seed).

    Seed k gives every row the same initial weights, order and augmentation: the two are no independent samples. The
    interval is NaN if fewer than 2 seeds are common, or all differ by the same.
    """
    from scipy.stats import t  # here, as the queue reads results and compares none

    gains = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not gains:
        return Difference(math.nan)
    gain = statistics.mean(gains)
    if max(gains) - min(gains) < 1e-9:
        return Difference(gain)
    reach = float(t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / math.sqrt(len(gains))
    return Difference(gain, gain - reach, gain + reach)


def beside(cell: Cell, other: Cell, figure: str) -> Difference:
    """Of a row from another one; NaN where either has no values, or they pick their best unlike.

    An ensemble is compared with the mean of its own networks, where these are the other row's.
    """
    ways = {result.is_validated for result in cell.results + other.results if result.courses}
    if figure == "best" and len(ways) > 1:
        return Difference(math.nan)
    partners = other.by_seed(figure)
    for result in cell.results:
        if {name.rpartition("/")[0] for name in result.members} == {other.entry.run}:
            partners[result.seed] = statistics.mean(result.alone)
    return difference(cell.by_seed(figure), partners)


def from_baseline(cells: dict[str, Cell], label: str, figure: str) -> Difference:
    """Of a row from the one that it is compared with, if any."""
    baseline = cells.get(cells[label].row.baseline)
    return beside(cells[label], baseline, figure) if baseline else Difference(math.nan)


class Comparison(NamedTuple):
    """Two rows on one data set, that both have run."""

    dataset: str
    one: Cell
    other: Cell

    @property
    def last(self) -> Difference:
        return beside(self.one, self.other, "last")

    @property
    def best(self) -> Difference:
        """Of those that pick their best by validation: others pick what they are measured on."""
        return beside(self.one, self.other, "validated_best")


def against_baseline(cells: dict[str, Cell], dataset: str) -> Iterator[Comparison]:
    """Each grafting row of a table against the single network that it is compared with."""
    for cell in grafted(cells):
        if (baseline := cells.get(cell.row.baseline)) and baseline.results:
            yield Comparison(dataset, cell, baseline)


def against_rivals(results: Results, cells: dict[str, Cell], dataset: str) -> Iterator[Comparison]:
    """Each grafting row against the others of its baseline whose training costs no more."""
    for cell in grafted(cells):
        for other in cells.values():
            if not other.results or other.results[0].is_grafting or other.row.baseline != cell.row.baseline:
                continue
            if results.cost(other.results[0]) <= results.cost(cell.results[0]):
                yield Comparison(dataset, cell, other)


def against_steps(cells: dict[str, Cell], dataset: str) -> Iterator[Comparison]:
    """Each baseline on a cosine against that of the same network on steps: what the schedule alone does."""
    baselines = [cell for cell in cells.values() if cell.row.baseline is None and cell.results]
    for cell in baselines:
        for other in baselines:
            own, others = cell.results[0].settings, other.results[0].settings
            alike = all(own.get(name) == others.get(name) for name in ("model", "lr"))
            if alike and own.get("cos") is True and others.get("cos") is False:
                yield Comparison(dataset, cell, other)


def grafted(cells: dict[str, Cell]) -> list[Cell]:
    return [cell for cell in cells.values() if cell.results and cell.results[0].is_grafting]


def read_result(folder: Path, run: str, seed: int) -> Result:
    """Reads results/<preset>/<run>/seed<k>. Raises Damage, naming the file."""
    path = folder / "result.json"
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise Damage("result.json is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Damage(f"result.json is unreadable ({error})") from None
    if not isinstance(record, dict):
        raise Damage("result.json holds no result")
    versions = ", ".join(f"{name} {version}" for name, version in expect(record, "versions", dict).items())
    command, hardware = expect(record, "command", str), expect(record, "hardware", str)
    if "ensemble" in record:
        return read_ensemble(Result(run, seed, command, {}, hardware, versions), expect(record, "ensemble", dict))
    settings, data = expect(record, "settings", dict), str(record.get("data", ""))
    result = Result(run, seed, command, settings, hardware, versions, data)
    networks, filters = expect(record, "networks", int), expect(record, "filters", list)
    if networks < 1 or len(filters) != networks:
        raise Damage(f"result.json counts filters of {len(filters)} networks, expected {networks}")
    for i, counts in enumerate(filters, 1):
        result.courses.append(read_course(folder, i, counts, result.settings))
    return result


def read_ensemble(result: Result, record: dict) -> Result:
    result.members = [str(name) for name in expect(record, "members", list)]
    result.alone = expect(record, "networks", list)
    if not result.alone or not all(isinstance(value, int | float) for value in result.alone):
        raise Damage(f"result.json has networks {result.alone!r}, expected accuracies")
    result.ensemble = number(record, "ensemble")
    if record.get("weight_average") is not None:  # networks whose weights cannot be averaged have none
        result.weight_average = number(record, "weight_average")
    return result


def read_course(folder: Path, i: int, counts: object, settings: dict) -> Course:
    course = Course(i)
    path = folder / f"metrics{i}.csv"
    read_metrics(path, course)
    if course.remarks:  # of a finished run, a half-written row is damage, too
        raise Damage("; ".join(course.remarks))
    epochs = expect(settings, "epochs", int)
    if not course.epochs or course.epochs[-1] != epochs - 1:
        raise Damage(f"{path.name} ends after {len(course.epochs)} epochs, expected {epochs}")
    rows, _ = read_csv(path, ())
    if settings.get("val"):
        if "val_accuracy" not in rows[0]:
            raise Damage(f"{path.name} has no column val_accuracy, but --val was {settings['val']}")
        course.validation = convert(rows, "val_accuracy", path)
    if rows[0].get("test_top5"):
        course.top5 = convert(rows, "test_top5", path)
    if not isinstance(counts, dict):
        raise Damage(f"result.json has filters {counts!r}, expected counts")
    total, shortcut_total = number(counts, "total"), number(counts, "shortcut_total")
    for threshold in THRESHOLDS:
        name = f"{threshold:g}"
        course.invalid.append((number(expect(counts, "invalid", dict), name), total))
        course.shortcuts.append((number(expect(counts, "shortcut_invalid", dict), name), shortcut_total))
        if all(f"invalid_{threshold:g}" in rows[0] for threshold in THRESHOLDS) and total:
            course.invalid_course.append([100 * count / total for count in convert(rows, f"invalid_{name}", path)])
    if (folder / f"coefficients{i}.csv").exists():
        read_coefficients(folder / f"coefficients{i}.csv", course)
        if course.is_damaged:
            raise Damage("; ".join(course.remarks))
    return course


def expect(record: dict, key: str, kind: type) -> Any:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise Damage(f"result.json has {key} {value!r}, expected a {kind.__name__}")
    return value


def number(record: dict, key: str) -> float:
    value = record.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1e18 < value < 1e18:
        raise Damage(f"result.json has {key} {value!r}, expected a number")
    return value
