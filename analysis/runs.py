"""Reads what runs have left: save directories of both scripts, and the results folders of the experiments.

    run = read_run(Path("checkpoint/two"))
    run.networks[0].metrics.plot(x="epoch", y="test_accuracy")

Whatever is missing or damaged is a sentence in `run.errors`; the rest is read, so that a run can be looked at while it
is alive.
"""

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tabulate
import torch
from torch import Tensor

from filter_grafting.errors import GraftingError
from filter_grafting.information import invalid_filters, norms_by_layer
from filter_grafting.membership import Status, observe, printable
from filter_grafting.membership import read_run as read_record
from training.models import read_checkpoint
from training.process import UsageError
from training.records import THRESHOLDS

SECONDS = ["train_seconds", "test_seconds", "wait_seconds", "graft_seconds"]
METRICS = ["epoch", "test_accuracy", "best", *SECONDS]  # columns that every version has written
COEFFICIENTS = ["epoch", "layer", "coefficient"]
tabulate.MIN_PADDING = 0  # columns no wider than need be


@dataclass(eq=False)
class Network:
    """What one network has left; what could not be read is empty."""

    number: int
    status: Status | None = None  # None of an experiment's result, which is finished
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=METRICS, dtype=float))  # a row per epoch
    coefficients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COEFFICIENTS, dtype=float))
    best_file: Path | None = None  # the checkpoint of its best epoch
    filters: dict[str, Any] = field(default_factory=dict)  # see `count_filters`
    norms: np.ndarray = field(default_factory=lambda: np.empty(0))  # L1, of all filters but the shortcuts'

    @property
    def last(self) -> float:
        """Test accuracy after the last epoch, in %."""
        return float(self.metrics["test_accuracy"].iloc[-1]) if len(self.metrics) else math.nan

    @property
    def best(self) -> float:
        """Test accuracy of the best epoch, as the run has chosen it (by validation, if it had such images), in %."""
        return float(self.metrics["best"].iloc[-1]) if len(self.metrics) else math.nan

    @property
    def seconds_per_epoch(self) -> float:
        """By the median, which leaves out the few epochs in which the machine had paused."""
        return float(self.metrics[SECONDS].sum(axis=1).median())


@dataclass(eq=False)
class Run:
    """What the networks of one directory have in common."""

    directory: Path
    label: str
    settings: dict[str, Any] = field(default_factory=dict)  # by flag
    networks: list[Network] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)  # result.json of an experiment

    @property
    def last(self) -> float:
        """Mean test accuracy of its networks after the last epoch, in %; 0 if it is not known."""
        return float(np.nan_to_num(np.mean([network.last for network in self.networks] or [0])))

    @property
    def model(self) -> str:
        return str(self.settings.get("model") or self.settings.get("arch") or "")

    @property
    def method(self) -> str:
        """`baseline`, or `grafting of 2`, with what was not left at its default."""
        if "ensemble" in self.record:
            return f"ensemble of {len(self.record['ensemble']['members'])}"
        settings, num = self.settings, len(self.networks)
        name, scion = settings.get("method", "grafting"), settings.get("scion", "external")
        a, c = settings.get("a", 0.4), settings.get("c", 500)
        words = {
            f"{name} of {num}" if num > 1 else "baseline" if name == "grafting" else name: True,
            f"{scion} scions": scion != "external",
            "cosine": settings.get("cos"),
            "steps": settings.get("steplr"),
            "dlr": settings.get("difflr"),
            "filter level": settings.get("level") == "filter",
            "by L1 norm": settings.get("criterion") == "l1",
            f"a {a:g}": name == "grafting" and a != 0.4,
            f"c {c:g}": name == "grafting" and c != 500,
        }
        return ", ".join(word for word, is_said in words.items() if is_said)

    @property
    def is_baseline(self) -> bool:
        """A single network that nothing is grafted onto."""
        plain = self.settings.get("method", "grafting") == "grafting"
        return len(self.networks) == 1 and plain and self.settings.get("scion", "external") == "external"

    def recipe(self, without: Iterable[str] = ()) -> dict[str, str]:
        """The settings that shaped its outcome: all but the seed and what belongs to one network alone."""
        left_out = {"seed", "i", "s", "start_lr", *without}
        return {key: str(value) for key, value in self.settings.items() if key not in left_out}


# ---- Reading


def find_runs(directory: Path) -> list[Path]:
    """All runs in a directory and below it; the directory itself if there are none."""
    records = [record for name in ("run.json", "result.json") for record in directory.rglob(name)]
    return sorted({record.parent for record in records}) or [directory]


def read_run(directory: Path, label: str = "") -> Run:
    """Reads a save directory, or a result of the experiments, as far as it can be read."""
    run = Run(directory, label or directory.name)
    if (directory / "result.json").exists():
        _read_result(run)
        return run
    try:
        run.settings = read_record(directory)[1]
    except (OSError, ValueError):
        run.errors.append("not the save directory of a run: there is no run.json that can be read")
        return run
    run.networks = [_read_network(run, status) for status in observe(directory)]
    return run


def _read_network(run: Run, status: Status) -> Network:
    i, is_done = status.network, status.state == "done"
    network = Network(i, status)
    paths = {path.stem: path for path in run.directory.iterdir() if path.suffix in (".t7", ".tar")}
    final, network.best_file = paths.get(f"final{i}"), paths.get(f"best{i}")
    if is_done or network.best_file:  # else no epoch has ended
        _read_tables(run, network, status.epochs if is_done else None)
    if is_done and not final:
        run.errors.append(f"final{i} is missing")
    if path := final or network.best_file:
        _read_filters(run, network, path)
    return network


def _read_result(run: Run) -> None:
    """results/<preset>/<run>/seed<k>: result.json has the settings and the counts, beside the networks' CSV files."""
    try:
        run.record = dict(json.loads((run.directory / "result.json").read_bytes()))
        run.settings = dict(run.record.get("settings") or {})
        for i, filters in enumerate(run.record.get("filters") or (), 1):
            network = Network(i, filters=dict(filters))
            _read_tables(run, network, run.settings["epochs"])
            run.networks.append(network)
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.errors.append(f"result.json is damaged ({type(error).__name__}: {error})")


def _read_tables(run: Run, network: Network, epochs: int | None) -> None:
    """The CSV files of a network; epochs: how many there must be."""
    i = network.number
    network.metrics = _read_csv(run, f"metrics{i}.csv", METRICS)
    if epochs and len(network.metrics) and (ended := network.metrics["epoch"].iloc[-1] + 1) != epochs:
        run.errors.append(f"metrics{i}.csv ends after {ended} of {epochs} epochs")
    if (run.directory / f"coefficients{i}.csv").exists():
        network.coefficients = _read_csv(run, f"coefficients{i}.csv", COEFFICIENTS)


def _read_csv(run: Run, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """A frame of whole rows; a last one without its newline is being written, and is left out."""
    try:
        whole = (run.directory / name).read_text().rpartition("\n")[0]
        frame = pd.read_csv(io.StringIO(whole), dtype=dict.fromkeys(columns, float) | {"epoch": int, "layer": str})
        if missing := [column for column in columns if column not in frame]:
            raise ValueError(f"it has no column {missing[0]}")
        return frame
    except FileNotFoundError:
        run.errors.append(f"{name} is missing")
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        run.errors.append(f"{name} is damaged: {error}")
    return pd.DataFrame(columns=columns, dtype=float)


def _read_filters(run: Run, network: Network, path: Path) -> None:
    """Counts the invalid filters in a checkpoint, and takes what it says of the settings."""
    try:
        state, contents = read_checkpoint(path)
        network.filters = count_filters(state)
        network.norms = torch.cat(list(norms_by_layer(state, shortcuts=False).values())).double().numpy()
    except (GraftingError, OSError) as error:
        run.errors.append(str(error).replace(f"{path.parent}/", ""))
        return
    data = {"data": contents["data"]} if isinstance(contents.get("data"), str) else {}  # the images' checksum
    run.settings = contents["settings"] | data | run.settings


def count_filters(state: dict[str, Tensor], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """`total` filters and `invalid` ones by threshold, and the same of shortcut convolutions with `shortcut_` before.

    {"total": 688, "invalid": {"0.1": 3, "0.01": 0}, "shortcut_total": 0, "shortcut_invalid": {"0.1": 0, "0.01": 0}}
    """
    counts: dict[str, Any] = {}
    for kind, shortcuts in ("", False), ("shortcut_", True):
        found = {threshold: invalid_filters(state, threshold, shortcuts) for threshold in thresholds}
        counts[f"{kind}total"] = next(total for _, total in found.values())
        counts[f"{kind}invalid"] = {f"{threshold:g}": invalid for threshold, (invalid, _) in found.items()}
    return counts


# ---- Saying


def ends(paths: Sequence[Path]) -> list[str]:
    """The paths from where they part: `one/final1.t7` and `two/final1.t7`."""
    paths = [path.absolute() for path in paths]
    shared = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(shared)) for path in paths]


def labels(paths: Sequence[Path]) -> list[str]:
    """Names of runs, shortened to what differs between them: `num2` and `num4` of grafting_num2 and grafting_num4."""
    names = ends(paths)
    words = [re.findall(r"[^/_]+[/_]?", name) for name in names]
    shared = set.intersection(*({word.strip("/_") for word in own} for own in words))
    short = ["".join(word for word in own if word.strip("/_") not in shared).strip("/_") for own in words]
    return short if all(short) and len(set(short)) == len(names) else names


def mean_and_deviation(values: Iterable[float], digits: int) -> str:
    """Mean ± sample standard deviation of the values that are there: `69.50 ± 1.06`, `69.50 (1 of 2)`."""
    values = pd.Series(list(values), dtype=float)
    there = values.dropna()
    if there.empty:
        return "–"
    deviation = f" ± {there.std():.{digits}f}" * (len(there) > 1)
    return f"{there.mean():.{digits}f}{deviation}" + f" ({len(there)} of {len(values)})" * (len(there) < len(values))


def table(frame: pd.DataFrame, style: str = "markdown", right: Iterable[str] = ()) -> str:
    """A frame of texts as `markdown`, `csv` or `latex`; the columns named in `right` are flush right."""
    if style == "csv":
        return frame.to_csv(index=False).rstrip("\n")
    return tabulate.tabulate(
        frame.map(printable).values.tolist(),  # whoever wrote the run's files
        headers=list(frame),
        tablefmt={"markdown": "pipe", "latex": "latex_booktabs"}[style],
        colalign=["right" if column in set(right) else "left" for column in frame],
        disable_numparse=True,
    )


def program(main: Callable[[], int]) -> int:
    """Runs a program of this folder: what a user can mend is one sentence on stderr and exit status 1."""
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except (OSError, GraftingError, torch.OutOfMemoryError) as error:
        has_place = isinstance(error, OSError) and error.filename
        print(printable(f"{error.filename}: {error.strerror}" if has_place else error, 1000), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
