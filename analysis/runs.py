"""Reads what runs have left: save directories of both scripts, and the results folders of the experiments.

    run = read_run(Path("checkpoint/two"))
    run.networks[0].metrics.plot(x="epoch", y="test_accuracy")

Whatever is missing or damaged is a sentence in `run.errors`; the rest is read, so that a run can be looked at while it
is alive.
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import tabulate
import torch
from torch import Tensor

from filter_grafting.errors import GraftingError
from filter_grafting.information import invalid_filters, norms_by_layer
from filter_grafting.membership import observe, printable, read_json
from filter_grafting.membership import read_run as read_record
from training.models import read_checkpoint
from training.process import UsageError
from training.records import THRESHOLDS
from training.view import SECONDS

METRICS = ["epoch", "test_accuracy", "best", *SECONDS]  # columns that every version has written
COEFFICIENTS = ["epoch", "layer", "coefficient"]
USUAL = {"cos": False, "steplr": False, "difflr": False, "level": "layer", "scion": "external", "criterion": "entropy"}
USUAL |= {"a": 0.4, "c": 500}  # settings that a method's name leaves out
tabulate.MIN_PADDING = 0  # columns no wider than need be


@dataclass(eq=False)
class Network:
    """What one network has left; what is not there is empty."""

    number: int
    state: str = "done"  # or how far it is: epoch 50 of 200, waiting for network 1
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=METRICS, dtype=float))  # a row per epoch
    coefficients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COEFFICIENTS))  # and layer
    filters: dict[str, Any] = field(default_factory=dict)  # see `count_filters`
    norms: Tensor = field(default_factory=lambda: torch.empty(0))  # L1, of all filters but the shortcuts'
    best_file: Path | None = None  # the checkpoint of its best epoch

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
    def model(self) -> str:
        return str(self.settings.get("model") or self.settings.get("arch") or "")

    @property
    def method(self) -> str:
        """`baseline`, or `grafting of 2, cos, a 0.6`: with the settings that are not at their defaults."""
        if "ensemble" in self.record:
            return f"ensemble of {len(self.record['ensemble']['members'])}"
        if not self.networks:
            return "unreadable"
        method, num = method_and_number(self.settings)
        name = f"{method} of {num}" if num > 1 else "baseline" if method == "grafting" else method
        usual = USUAL | ({"a": 0.0} if method == "average" else {})  # which is grafting with this A
        said = {key: self.settings.get(key, value) for key, value in usual.items()}
        unusual = [f"{key} {value}" for key, value in said.items() if value != usual[key]]
        return ", ".join([name, *unusual]).replace(" True", "")

    @property
    def is_baseline(self) -> bool:
        """A single network that nothing is grafted onto."""
        return self.method.startswith("baseline") and "scion" not in self.method

    @property
    def last(self) -> float:
        """Mean test accuracy of its networks after the last epoch, in %; 0 if none is known."""
        ends = [network.metrics["test_accuracy"].iloc[-1] for network in self.networks if len(network.metrics)]
        return sum(ends) / len(ends) if ends else 0.0


def method_and_number(settings: Mapping[str, Any]) -> tuple[str, int]:
    """(grafting or a rival of it, how many networks it trains), though experiments/together.py leaves one of them."""
    method = settings.get("together") or settings.get("method", "grafting")
    return method, settings.get("networks") or settings.get("num", 1)


# ---- Reading


def find_runs(directory: Path) -> list[Path]:
    """All runs in a directory and below it; the directory itself if there are none."""
    records = [record for name in ("run.json", "result.json") for record in directory.rglob(name)]
    return sorted({record.parent for record in records}) or [directory]


def read_run(directory: Path, label: str = "") -> Run:
    """Reads a save directory, or a result of the experiments, as far as it can be read."""
    run = Run(directory, label or directory.name)
    try:
        if (directory / "result.json").exists():
            run.record = read_json(directory / "result.json")
            run.settings = run.record.get("settings", {})
            run.networks = [Network(i, filters=found) for i, found in enumerate(run.record.get("filters", ()), 1)]
        else:
            run.settings = read_record(directory)[1]
            run.networks = [Network(one.network, str(one)) for one in observe(directory)]
    except (OSError, ValueError, TypeError, AttributeError):
        run.errors.append("not the save directory of a run: there is no run.json or result.json that can be read")
    for network in run.networks:
        i, epochs = network.number, run.settings.get("epochs")
        network.metrics = _read_csv(run, f"metrics{i}.csv", network.metrics)
        network.coefficients = _read_csv(run, f"coefficients{i}.csv", network.coefficients)
        done = network.metrics["epoch"].iloc[-1] + 1 if len(network.metrics) else 0
        ended = f"epoch {done} of {epochs}"
        if network.state != "done":
            network.state = f"{ended}, {network.state}"
            run.errors.append(f"network {i}: {network.state}")
        elif done != epochs:
            run.errors.append(f"metrics{i}.csv ends after {ended}")
        if not run.record:
            _read_checkpoints(run, network)
    return run


def _read_csv(run: Run, name: str, empty: pd.DataFrame) -> pd.DataFrame:
    """A frame of whole rows: a last one without its newline is half of one, and is left out.

    There is no file before the first epoch, and of what a network does not do.
    """
    try:
        whole = (run.directory / name).read_text().rpartition("\n")[0]
        frame = pd.read_csv(io.StringIO(whole), dtype=dict.fromkeys(empty, float) | {"epoch": int, "layer": str})
        if missing := [column for column in empty if column not in frame]:
            raise ValueError(f"it has no column {missing[0]}")
        return frame
    except FileNotFoundError:
        return empty
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        run.errors.append(f"{name} is damaged: {error}")
        return empty


def _read_checkpoints(run: Run, network: Network) -> None:
    """Counts the filters of the last checkpoint that is kept, and takes what it says of the settings."""
    files = {path.stem: path for path in run.directory.iterdir() if path.suffix in (".t7", ".tar")}
    network.best_file, final = files.get(f"best{network.number}"), files.get(f"final{network.number}")
    if network.state == "done" and not final:
        run.errors.append(f"final{network.number} is missing")
    if path := final or network.best_file:
        try:
            state, contents = read_checkpoint(path)
            network.filters = count_filters(state)
            network.norms = torch.cat(list(norms_by_layer(state, shortcuts=False).values()))
            # With the images' checksum: accuracies on other images are not compared.
            run.settings = contents["settings"] | {"data": contents.get("data", "")} | run.settings
        except (OSError, GraftingError) as error:
            run.errors.append(str(error))


def count_filters(state: dict[str, Tensor], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """`total` filters and `invalid` ones by threshold, and the same of shortcut convolutions with `shortcut_` before.

    {"total": 688, "invalid": {"0.1": 3, "0.01": 0}, "shortcut_total": 0, "shortcut_invalid": {"0.1": 0, "0.01": 0}}
    """
    counts: dict[str, Any] = {}
    for kind, shortcuts in ("", False), ("shortcut_", True):
        found = {f"{threshold:g}": invalid_filters(state, threshold, shortcuts) for threshold in thresholds}
        counts[f"{kind}total"] = next(total for _, total in found.values())
        counts[f"{kind}invalid"] = {threshold: invalid for threshold, (invalid, _) in found.items()}
    return counts


# ---- Saying


def labels(paths: Sequence[Path]) -> list[str]:
    """Names of runs, shortened to what differs between them: `num2` and `num4` of grafting_num2 and grafting_num4."""
    shared_folder = os.path.commonpath([path.parent for path in paths])
    names = [str(path.relative_to(shared_folder)) for path in paths]
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
    sides = ["right" if column in set(right) else "left" for column in frame]
    form = {"markdown": "pipe", "latex": "latex_booktabs"}[style]
    return frame.map(printable).to_markdown(index=False, tablefmt=form, colalign=sides, disable_numparse=True)


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
