"""Reads what runs have left: save directories of both scripts, and the results folders of the experiments.

    run = read_run(Path("checkpoint/two"))
    run.networks[0].metrics.plot(x="epoch", y="test_accuracy")

Whatever is missing, damaged or half-written is a sentence in `run.errors`; the rest is read as far as it goes, so
that a run can be looked at while it is alive.
"""

import io
import json
import math
import os
import re
import statistics
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

from filter_grafting.checkpoint import load
from filter_grafting.errors import CheckpointError, GraftingError
from filter_grafting.information import invalid_filters, norms_by_layer
from filter_grafting.membership import Status, networks_of, observe, printable
from filter_grafting.membership import read_run as read_record
from training.process import UsageError, explain

THRESHOLDS = (0.1, 0.01)  # of the L1 norm, below which a filter is invalid
SECONDS = ["train_seconds", "test_seconds", "wait_seconds", "graft_seconds"]
METRICS = ["epoch", "test_accuracy", "best", *SECONDS]
COEFFICIENTS = ["epoch", "layer", "coefficient"]
GRAFTING_SETTINGS = {"num", "a", "c", "level", "method", "scion", "criterion", "difflr"}  # which a baseline lacks
tabulate.MIN_PADDING = 0  # columns no wider than need be
Counts = list[tuple[int, int]]  # (invalid, total) at each threshold


@dataclass(eq=False)
class Network:
    """What one network has left; what could not be read is empty."""

    number: int
    status: Status | None = None  # None of an experiment's result, which is finished
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=METRICS))  # a row per epoch
    coefficients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COEFFICIENTS))
    best_file: Path | None = None  # the checkpoint of its best epoch
    counted_in: str = ""  # the checkpoint that the filters were counted in
    norms: np.ndarray = field(default_factory=lambda: np.empty(0))  # L1, of all filters but the shortcuts'
    invalid: Counts = field(default_factory=list)
    shortcuts: Counts = field(default_factory=list)  # the same of shortcut convolutions

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
        return printable(self.settings.get("model") or self.settings.get("arch") or "", 60)

    @property
    def method(self) -> str:
        if "ensemble" in self.record:
            return f"ensemble of {len(self.record['ensemble'].get('members', ()))}"
        return method(self.settings, len(self.networks))

    @property
    def is_baseline(self) -> bool:
        """A single network that nothing is grafted onto."""
        plain = self.settings.get("method", "grafting") == "grafting"
        return len(self.networks) == 1 and plain and self.settings.get("scion", "external") == "external"


def method(settings: dict[str, Any], num: int) -> str:
    """`baseline`, or `grafting of 2`, with what was not left at its default."""
    name, scion = printable(settings.get("method", "grafting")), printable(settings.get("scion", "external"))
    words = [f"{name} of {num}" if num > 1 else "baseline" if name == "grafting" else name]
    if scion != "external":
        words.append(f"{scion} scions")
    if num > 1 and settings.get("level") == "filter":
        words.append("filter level")
    if num > 1 and settings.get("criterion") == "l1":
        words.append("by L1 norm")
    for coefficient, default in (("a", 0.4), ("c", 500)) if num > 1 and name == "grafting" else ():
        if isinstance(settings.get(coefficient), int | float) and settings[coefficient] != default:
            words.append(f"{coefficient} {settings[coefficient]:g}")
    schedules = {"cos": "cosine", "steplr": "steps"} | ({"difflr": "dlr"} if num > 1 else {})
    return ", ".join(words + [word for key, word in schedules.items() if settings.get(key)])


# ---- Reading


def find_runs(directory: Path) -> list[Path]:
    """The directory itself if a run has left something there, else all such below it; itself if there are none."""
    marks = ("run.json", "result.json", "network*.json", "metrics*.csv")
    if any(next(directory.glob(mark), None) for mark in marks):
        return [directory]
    return sorted({path.parent for mark in marks for path in directory.rglob(mark)}) or [directory]


def read_run(directory: Path, label: str = "") -> Run:
    """Reads a save directory, or a result of the experiments, as far as it can be read."""
    run = Run(directory, label or directory.name)
    if (directory / "result.json").exists():
        _read_result(run)
        return run
    numbers = networks_of(directory)
    if not numbers:
        run.errors.append("not the save directory of a run" if directory.is_dir() else "there is no such directory")
        return run
    try:
        run.settings = read_record(directory)[1]
    except FileNotFoundError:
        run.errors.append("run.json is missing")
    except (OSError, ValueError, RecursionError):
        run.errors.append("run.json is unreadable")
    for status in observe(directory, numbers):
        run.networks.append(_read_network(run, status, len(numbers)))
    return run


def _read_network(run: Run, status: Status, num: int) -> Network:
    network, i = Network(status.network, status), status.network
    checkpoints = find_checkpoints(run.directory, i, num)
    metrics = run.directory / f"metrics{i}.csv"
    is_done = status.state == "done"
    if not is_done and not checkpoints and not metrics.exists():
        return network  # no epoch has ended
    network.metrics = _read_csv(run, metrics, METRICS)
    if is_done and len(network.metrics) and status.epochs and network.metrics["epoch"].iloc[-1] != status.epochs - 1:
        run.errors.append(f"{metrics.name} ends at epoch {network.metrics['epoch'].iloc[-1]} of {status.epochs}")
    if num > 1 and len(network.metrics) > 1:  # nothing is grafted before the first epoch
        network.coefficients = _read_coefficients(run, i, network.metrics)
    if is_done and not any(path.stem == f"final{i}" for path in checkpoints):
        run.errors.append(f"final{i} is missing")
    network.best_file = next((path for path in checkpoints if path.stem == f"best{i}"), None)
    _read_filters(run, network, checkpoints)
    return network


def _read_csv(run: Run, path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A frame of whole rows; a last one without its newline is being written, and is left out."""
    empty = pd.DataFrame(columns=columns)
    try:
        whole, _, rest = path.read_bytes().decode().rpartition("\n")
        frame = pd.read_csv(io.StringIO(whole)) if whole else empty
        if not isinstance(frame.index, pd.RangeIndex):
            raise ValueError("its rows have more fields than its first line")
        if rest and run.record:  # nothing writes to a finished experiment's file any more
            raise ValueError("its last row is half-written")
        for column in columns:
            if column not in frame:
                raise ValueError(f"it has no column {column}")
            if column != "layer":
                frame[column] = pd.to_numeric(frame[column])
                if not np.isfinite(frame[column]).all():
                    raise ValueError(f"column {column} has values that are not finite")
        if not (path.name.startswith("coefficients") or (frame["epoch"].diff().iloc[1:] == 1).all()):
            raise ValueError("its epochs do not follow one another")
    except FileNotFoundError:
        run.errors.append(f"{path.name} is missing")
        return empty
    except (OSError, ValueError, pd.errors.ParserError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        run.errors.append(f"{path.name} is damaged: {reason}")
        return empty
    return frame


def _read_coefficients(run: Run, i: int, metrics: pd.DataFrame) -> pd.DataFrame:
    frame = _read_csv(run, run.directory / f"coefficients{i}.csv", COEFFICIENTS)
    # A network that was killed between the two files writes an epoch's rows once more.
    frame = frame.drop_duplicates(["epoch", "layer"], keep="last")
    return frame[frame["epoch"].isin(metrics["epoch"])].reset_index(drop=True)


def _read_result(run: Run) -> None:
    """results/<preset>/<run>/seed<k>: result.json has the settings and the counts, beside the networks' CSV files."""
    path = run.directory / "result.json"
    try:
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it holds no result")
        run.record, run.settings = record, dict(record.get("settings") or {})
        filters = list(record.get("filters") or [])
        for i, counts in enumerate(filters, 1):
            network = Network(i, counted_in="final")
            network.metrics = _read_csv(run, run.directory / f"metrics{i}.csv", METRICS)
            epochs = run.settings.get("epochs")
            if not len(network.metrics) or network.metrics["epoch"].iloc[-1] + 1 != epochs:
                run.errors.append(f"metrics{i}.csv ends after {len(network.metrics)} epochs, expected {epochs}")
            if (run.directory / f"coefficients{i}.csv").exists():
                network.coefficients = _read_coefficients(run, i, network.metrics)
            for kind, found in ("", network.invalid), ("shortcut_", network.shortcuts):
                invalid = counts[f"{kind}invalid"]
                found += [(int(invalid[f"{k:g}"]), int(counts[f"{kind}total"])) for k in THRESHOLDS]
            run.networks.append(network)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        run.errors.append(f"{path.name} is damaged ({type(error).__name__}: {error})")


def find_checkpoints(directory: Path, i: int, num: int) -> list[Path]:
    """The final network, the best one, then the published ones from the newest: as far as they are there."""
    kept, published = {}, {}
    for path in directory.iterdir():
        if match := re.fullmatch(rf"(final|best){i}\.(t7|tar)", path.name):
            kept[match[1]] = path
        elif match := re.fullmatch(rf"(ckpt|pth){i % num}_(\d{{1,9}})\.(t7|tar)", path.name):
            published[int(match[2])] = path
    newest_first = [published[epoch] for epoch in sorted(published, reverse=True)]
    return [kept[name] for name in ("final", "best") if name in kept] + newest_first


def _read_filters(run: Run, network: Network, checkpoints: Iterable[Path]) -> None:
    """Counts the invalid filters in the first of the checkpoints that can be read."""
    for path in checkpoints:
        try:
            state, contents = read_checkpoint(path)
            norms = norms_by_layer(state, shortcuts=False)
            network.invalid, network.shortcuts = count_invalid(state, THRESHOLDS)
        except FileNotFoundError:
            continue  # a network at work has deleted it in between, and published a newer one
        except (GraftingError, RuntimeError, ValueError) as error:
            run.errors.append(str(error).replace(f"{path.parent}/", ""))
            continue
        network.norms = torch.cat([torch.as_tensor(layer) for layer in norms.values()]).double().numpy()
        network.counted_in = path.stem.rstrip("0123456789") if path.stem.isalnum() else path.name
        settings = contents["settings"] if isinstance(contents.get("settings"), dict) else {}
        data = {"data": contents["data"]} if isinstance(contents.get("data"), str) else {}  # the images' checksum
        run.settings = settings | data | run.settings
        return
    run.errors.append(f"no checkpoint of network {network.number} can be read")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a checkpoint (its `net` or `state_dict`, or all that it holds), and the whole contents.

    Raises FileNotFoundError; CheckpointError, naming the file, if it holds no state dict or cannot be loaded.
    """
    contents = load(path)
    state = contents.get("net", contents.get("state_dict", contents))
    if isinstance(state, dict) and state and all(isinstance(entry, Tensor) for entry in state.values()):
        return state, contents
    keys = printable(", ".join(map(str, contents)), 100)
    raise CheckpointError(f"{path} holds no state dict: it has the keys {keys}; expected net or state_dict")


def count_invalid(state: dict[str, Tensor], thresholds: Sequence[float]) -> list[Counts]:
    """(invalid, total) at each threshold: first of the filters outside shortcuts, then of those in them."""
    return [[invalid_filters(state, threshold, shortcuts) for threshold in thresholds] for shortcuts in (False, True)]


# ---- Comparing


def recipe(run: Run, without: Iterable[str] = ()) -> dict[str, str]:
    """What shaped the run's outcome, but its seed and what belongs to one network alone."""
    left_out = {"seed", "i", "s", "start_lr", *without}
    settings = {key: value for key, value in run.settings.items() if key not in left_out}
    return {key: f"{value:g}" if type(value) in (int, float) else str(value) for key, value in settings.items()}


def baselines_of(run: Run, runs: Iterable[Run]) -> list[Run]:
    """The baselines of the same settings but those of grafting: that of the same seed, or else all."""
    if run.is_baseline or not run.settings:
        return []
    own = recipe(run, GRAFTING_SETTINGS)
    found = [other for other in runs if other.is_baseline and recipe(other, GRAFTING_SETTINGS) == own]
    return [other for other in found if other.settings.get("seed") == run.settings.get("seed")] or found


def groups_of(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of the same settings but the seed, by model, method, and what else tells them apart; baselines first."""
    by_name: dict[str, dict[frozenset, list[Run]]] = {}
    for run in sorted(runs, key=lambda run: (run.model, not run.is_baseline)):
        settings = frozenset(recipe(run).items())
        by_name.setdefault(f"{run.model}, {run.method}", {}).setdefault(settings, []).append(run)
    groups = {}
    for name, parts in by_name.items():
        shared = frozenset.intersection(*parts)
        for settings, alike in parts.items():
            groups[", ".join([name, *(f"{key} {value}" for key, value in sorted(settings - shared))])] = alike
    return groups


# ---- Saying


def ends(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(set(paths)) and not any(re.fullmatch(r"seed\d+", name) for name in names):
            break
    return names


def labels(paths: Sequence[Path]) -> list[str]:
    """Names of runs, shortened to what differs between them: `baseline` and `grafting_num4` of …_cifar10_resnet32."""
    names = ends(paths)
    if len(names) == 1:
        return names
    words = [re.split(r"(?<=[/_])", name) for name in names]
    shared = set.intersection(*({word.strip("/_") for word in own} for own in words))
    short = ["".join(word for word in own if word.strip("/_") not in shared).strip("/_") for own in words]
    if not all(short):  # one that is the others' beginning keeps its first word, and so do they
        shared -= {words[short.index("")][0].strip("/_")}
        short = ["".join(word for word in own if word.strip("/_") not in shared).strip("/_") for own in words]
    return short if all(short) and len(set(short)) == len(set(names)) else names


def mean_and_deviation(values: Iterable[float], digits: int) -> str:
    """Mean ± sample standard deviation of the values that are there: `69.50 ± 1.06`, `69.50 (1 of 2)`."""
    values = list(values)
    there = [value for value in values if not math.isnan(value)]
    if not there:
        return "–"
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.{digits}f}{deviation}{missing}"


def cell(value: object) -> str:
    """Fit for a table, whoever wrote the run's files."""
    return printable(value).replace("|", "\\|")


def table(frame: pd.DataFrame, style: str = "markdown", right: Iterable[str] = ()) -> str:
    """A frame of texts as `markdown`, `csv` or `latex`; the columns named in `right` are flush right."""
    if style == "csv":
        return frame.to_csv(index=False).rstrip("\n")
    align = ["right" if column in set(right) else "left" for column in frame]
    options = {"headers": list(frame), "colalign": align, "disable_numparse": True, "showindex": False}
    if style == "latex":
        return tabulate.tabulate(frame.map(printable).values.tolist(), tablefmt="latex_booktabs", **options)
    return frame.map(cell).to_markdown(index=False, colalign=align, disable_numparse=True)


def program(main: Callable[[], int]) -> int:
    """Runs a program of this folder: what a user can mend is one sentence on stderr and exit status 1."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "±" is no reason to fail
    try:
        status = main()
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except GraftingError as error:
        sentence, status = str(error), 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        sentence, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 1
    except (RuntimeError, MemoryError) as error:
        (sentence, is_known), status = explain(error), 1  # as of a GPU that is full
        if not is_known:
            raise
    print(printable(sentence, 1000), file=sys.stderr)
    return status
