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
from training.process import UsageError

THRESHOLDS = (0.1, 0.01)  # of the L1 norm, below which a filter is invalid
SECONDS = ["train_seconds", "test_seconds", "wait_seconds", "graft_seconds"]
METRICS = ["epoch", "test_accuracy", "best", *SECONDS]
COEFFICIENTS = ["epoch", "layer", "coefficient"]
FILTERS = ["total", "invalid", "shortcut_total", "shortcut_invalid"]  # see `count_filters`
MARKS = ("run.json", "result.json", "network*.json", "metrics*.csv")  # files that only a run leaves
tabulate.MIN_PADDING = 0  # columns no wider than need be


@dataclass(eq=False)
class Network:
    """What one network has left; what could not be read is empty."""

    number: int
    status: Status | None = None  # None of an experiment's result, which is finished
    metrics: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=METRICS))  # a row per epoch
    coefficients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COEFFICIENTS))
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
    words += [f"{scion} scions"] * (scion != "external") + ["cosine"] * bool(settings.get("cos"))
    words += ["steps"] * bool(settings.get("steplr"))
    if num > 1:
        words += ["dlr"] * bool(settings.get("difflr"))
        words += ["filter level"] * (settings.get("level") == "filter")
        words += ["by L1 norm"] * (settings.get("criterion") == "l1")
        own = [(key, settings.get(key, default), default) for key, default in (("a", 0.4), ("c", 500))]
        words += [f"{key} {value:g}" for key, value, default in own if value != default and name == "grafting"]
    return ", ".join(words)


# ---- Reading


def find_runs(directory: Path) -> list[Path]:
    """The directory itself if a run has left something there, else all such below it; itself if there are none."""
    if any(next(directory.glob(mark), None) for mark in MARKS):
        return [directory]
    return sorted({path.parent for mark in MARKS for path in directory.rglob(mark)}) or [directory]


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
    except (OSError, ValueError):
        run.errors.append("run.json is unreadable")
    run.networks = [_read_network(run, status, len(numbers)) for status in observe(directory, numbers)]
    return run


def _read_network(run: Run, status: Status, num: int) -> Network:
    network, i, is_done = Network(status.network, status), status.network, status.state == "done"
    checkpoints = find_checkpoints(run.directory, i, num)
    if not is_done and not checkpoints and not (run.directory / f"metrics{i}.csv").exists():
        return network  # no epoch has ended
    _read_tables(run, network, status.epochs if is_done else None)
    if is_done and not any(path.stem == f"final{i}" for path in checkpoints):
        run.errors.append(f"final{i} is missing")
    network.best_file = next((path for path in checkpoints if path.stem == f"best{i}"), None)
    _read_filters(run, network, checkpoints)
    return network


def _read_result(run: Run) -> None:
    """results/<preset>/<run>/seed<k>: result.json has the settings and the counts, beside the networks' CSV files."""
    try:
        run.record = dict(json.loads((run.directory / "result.json").read_bytes()))
        run.settings = dict(run.record.get("settings") or {})
        for i, filters in enumerate(run.record.get("filters") or (), 1):
            network = Network(i, filters={key: filters[key] for key in FILTERS})
            _read_tables(run, network, run.settings["epochs"])
            run.networks.append(network)
    except (OSError, ValueError, KeyError, TypeError) as error:
        run.errors.append(f"result.json is damaged ({type(error).__name__}: {error})")


def _read_tables(run: Run, network: Network, epochs: int | None) -> None:
    """The CSV files of a network; epochs: how many there must be."""
    i = network.number
    network.metrics = _read_csv(run, f"metrics{i}.csv", METRICS)
    ended = network.metrics["epoch"].iloc[-1] + 1 if len(network.metrics) else epochs
    if epochs and ended != epochs:
        run.errors.append(f"metrics{i}.csv ends after {ended} of {epochs} epochs")
    if (run.directory / f"coefficients{i}.csv").exists():
        # A network that was killed between the two files writes an epoch's rows once more.
        frame = _read_csv(run, f"coefficients{i}.csv", COEFFICIENTS).drop_duplicates(["epoch", "layer"], keep="last")
        network.coefficients = frame[frame["epoch"].isin(network.metrics["epoch"])].reset_index(drop=True)


def _read_csv(run: Run, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """A frame of whole rows; a last one without its newline is being written, and is left out."""
    try:
        whole = (run.directory / name).read_bytes().decode().rpartition("\n")[0]
        frame = pd.read_csv(io.StringIO(whole), dtype=dict.fromkeys(columns, float) | {"epoch": int, "layer": str})
        if not isinstance(frame.index, pd.RangeIndex) or not {*columns} <= {*frame}:
            raise ValueError(f"expected rows of {', '.join(columns)} and others")
        if not np.isfinite(frame[[column for column in columns if column != "layer"]]).all(axis=None):
            raise ValueError("it has values that are not finite")
        return frame
    except FileNotFoundError:
        run.errors.append(f"{name} is missing")
    except (OSError, ValueError) as error:  # pandas' errors are ValueErrors
        run.errors.append(f"{name} is damaged: {str(error).partition(chr(10))[0]}")
    return pd.DataFrame(columns=columns)


def find_checkpoints(directory: Path, i: int, num: int) -> list[Path]:
    """The final network, the best one, then the published ones from the newest: as far as they are there."""
    name = re.compile(rf"(?:(final|best){i}|(?:ckpt|pth){i % num}_(\d{{1,9}}))\.(?:t7|tar)")
    found = [match for path in directory.iterdir() if (match := name.fullmatch(path.name))]
    found.sort(key=lambda match: (match[1] or "", int(match[2] or 0)), reverse=True)  # "final" > "best" > ""
    return [directory / match[0] for match in found]


def _read_filters(run: Run, network: Network, checkpoints: Iterable[Path]) -> None:
    """Counts the invalid filters in the first of the checkpoints that can be read."""
    for path in checkpoints:
        try:
            state, contents = read_checkpoint(path)
            network.filters = count_filters(state)
            norms = norms_by_layer(state, shortcuts=False)
        except FileNotFoundError:
            continue  # a network at work has deleted it in between, and published a newer one
        except (GraftingError, RuntimeError, ValueError) as error:
            run.errors.append(str(error).replace(f"{path.parent}/", ""))
            continue
        network.norms = torch.cat(list(norms.values())).double().numpy()
        data = {"data": contents["data"]} if isinstance(contents.get("data"), str) else {}  # the images' checksum
        run.settings = contents["settings"] | data | run.settings
        return
    run.errors.append(f"no checkpoint of network {network.number} can be read")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a checkpoint (its `net` or `state_dict`, or all that it holds), and the whole contents.

    These have `settings` in any case, empty where the file has none.
    Raises FileNotFoundError; CheckpointError, naming the file, if it holds no state dict or cannot be loaded.
    """
    contents = load(path)
    state = contents.get("net", contents.get("state_dict", contents))
    if isinstance(state, dict) and state and all(isinstance(entry, Tensor) for entry in state.values()):
        settings = contents.get("settings")
        return state, {**contents, "settings": settings if isinstance(settings, dict) else {}}
    keys = printable(", ".join(map(str, contents)), 100)
    raise CheckpointError(f"{path} holds no state dict: it has the keys {keys}; expected net or state_dict")


def count_filters(state: dict[str, Tensor], thresholds: Sequence[float] = THRESHOLDS) -> dict[str, Any]:
    """`total` filters and `invalid` ones by threshold, and the same of shortcut convolutions with `shortcut_` before.

    {"total": 688, "invalid": {"0.1": 3, "0.01": 0}, "shortcut_total": 0, "shortcut_invalid": {"0.1": 0, "0.01": 0}}
    """
    counts: dict[str, Any] = {}
    for kind, shortcuts in ("", False), ("shortcut_", True):
        pairs = {f"{t:g}": invalid_filters(state, t, shortcuts) for t in thresholds}
        counts[f"{kind}total"] = max(total for _, total in pairs.values())
        counts[f"{kind}invalid"] = {threshold: invalid for threshold, (invalid, _) in pairs.items()}
    return counts


# ---- Comparing


def recipe(run: Run, without: Iterable[str] = ()) -> dict[str, str]:
    """What shaped the run's outcome, but its seed and what belongs to one network alone."""
    left_out = {"seed", "i", "s", "start_lr", *without}
    settings = {key: value for key, value in run.settings.items() if key not in left_out}
    return {key: f"{value:g}" if type(value) in (int, float) else str(value) for key, value in settings.items()}


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
    words = [re.findall(r"[^/_]*[/_]?", name) for name in names]
    shared = set.intersection(*({word.strip("/_") for word in own} for own in words))
    for kept in (0, 1):  # a name that is the others' beginning keeps its first word, and so do they
        short = [
            "".join(word for k, word in enumerate(own) if k < kept or word.strip("/_") not in shared).strip("/_")
            for own in words
        ]
        if len(names) > 1 and all(short) and len(set(short)) == len(names):
            return short
    return names


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
    cells = frame.map(printable)  # whoever wrote the run's files
    if style == "markdown":
        cells = cells.map(lambda text: text.replace("|", "\\|"))
    align = ["right" if column in set(right) else "left" for column in frame]
    form = {"markdown": "pipe", "latex": "latex_booktabs"}[style]
    options = {"headers": list(frame), "colalign": align, "disable_numparse": True}
    return tabulate.tabulate(cells.values.tolist(), tablefmt=form, **options)


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
    except (OSError, GraftingError, torch.OutOfMemoryError) as error:
        sentence = str(error)
        if isinstance(error, OSError) and error.filename:
            sentence = f"{error.filename}: {error.strerror}"
        print(printable(sentence, 1000), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
