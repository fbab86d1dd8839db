"""Reads what runs have left in their save directories: settings, accuracies, coefficients, filters."""

import csv
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from torch import Tensor

from common.manage import Network as Observed
from common.manage import networks_of, observe
from filter_grafting.checkpoint import load
from filter_grafting.errors import CheckpointError, GraftingError
from filter_grafting.exchange import printable
from filter_grafting.exchange import read_run as read_record
from filter_grafting.information import invalid_filters, norms_by_layer

THRESHOLDS = (0.1, 0.01)  # of the L1 norm, below which a filter is invalid
SECONDS = ("train_seconds", "test_seconds", "wait_seconds", "graft_seconds")


class Damage(Exception):
    """A file of a run that is missing or unreadable; the message names it."""


@dataclass
class Network:
    """What one network has left in the save directory; what could not be read is empty, and in `remarks`."""

    number: int
    state: str = ""
    epochs: list[int] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)  # on the test set in %, one per epoch
    best: float = math.nan  # test accuracy of the best epoch, as the run has chosen it
    seconds: list[float] = field(default_factory=list)  # train + test + wait + graft, one sum per epoch
    coefficients: dict[str, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))  # by layer
    counted_in: str = ""  # the checkpoint that the filters were counted in
    settings: dict = field(default_factory=dict)  # as that checkpoint records them
    norms: list[float] = field(default_factory=list)  # L1 norms of all its filters, but those of shortcut convolutions
    invalid: list[tuple[int, int]] = field(default_factory=list)  # (invalid, total) at each threshold
    shortcuts: list[tuple[int, int]] = field(default_factory=list)  # the same of shortcut convolutions
    remarks: list[str] = field(default_factory=list)
    is_damaged: bool = False

    @property
    def last(self) -> float:
        return self.accuracies[-1] if self.accuracies else math.nan

    @property
    def seconds_per_epoch(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    def damage(self, remark: object) -> None:
        self.remarks.append(str(remark))
        self.is_damaged = True


@dataclass
class Run:
    """What the networks of one save directory have in common."""

    label: str
    networks: list[Network]
    model: str = ""
    method: str = ""
    settings: dict = field(default_factory=dict)  # by flag


def read_run(directory: Path, label: str) -> Run:
    """Reads a save directory as far as it can be read."""
    numbers = networks_of(directory)
    if not numbers:
        nothing = Network(1, state="not the save directory of a run", is_damaged=True)
        return Run(label, [nothing])
    settings, remark = {}, ""
    try:
        _, settings = read_record(directory)
    except FileNotFoundError:
        remark = "run.json is missing"
    except (OSError, ValueError):
        remark = "run.json is unreadable"
    networks = [read_network(directory, seen, len(numbers)) for seen in observe(directory, numbers)]
    if remark:
        networks[0].damage(remark)
    for network in networks:
        settings = network.settings | settings
    model = settings.get("model") or settings.get("arch") or ""
    return Run(label, networks, printable(model), method(settings, len(networks)), settings)


def method(settings: dict, num: int) -> str:
    """`baseline`, or `grafting of 2`, with what was not left at its default."""
    name, scion = printable(settings.get("method", "grafting")), printable(settings.get("scion", "external"))
    words = [f"{name} of {num}" if num > 1 else "baseline" if name == "grafting" else name]
    if scion != "external":
        words.append(f"{scion} scions")
    if num > 1 and settings.get("level") == "filter":
        words.append("filter level")
    for coefficient, default in (("a", 0.4), ("c", 500)) if num > 1 and name == "grafting" else ():
        if isinstance(settings.get(coefficient), int | float) and settings[coefficient] != default:
            words.append(f"{coefficient} {settings[coefficient]:g}")
    schedules = {"cos": "cosine", "steplr": "steps"} | ({"difflr": "dlr"} if num > 1 else {})
    return ", ".join(words + [word for key, word in schedules.items() if settings.get(key)])


def read_network(directory: Path, seen: Observed, num: int) -> Network:
    """Reads what a network has left, as far as it can be read; `seen` says whether more is to come."""
    network = Network(seen.number)
    network.state = str(seen)
    metrics = directory / f"metrics{seen.number}.csv"
    checkpoints = find_checkpoints(directory, seen.number, num)
    if seen.state != "done" and not checkpoints and not metrics.exists():
        network.remarks.append("no epoch has ended")
        return network
    read_metrics(metrics, network)
    ended = len(network.epochs)
    if seen.state != "done":
        network.state = f"epoch {ended} of {seen.epochs or '?'}, {network.state}"
    elif ended and seen.epochs and network.epochs[-1] != seen.epochs - 1:
        network.damage(f"{metrics.name} ends at epoch {network.epochs[-1]} of {seen.epochs}")
    if num > 1 and ended > 1:  # nothing is grafted after the last epoch, which may be the first
        read_coefficients(directory / f"coefficients{seen.number}.csv", network)
    if seen.state == "done" and not any(path.stem == f"final{seen.number}" for path in checkpoints):
        network.damage(f"final{seen.number} is missing")
    read_filters(checkpoints, network)
    return network


def read_csv(path: Path, columns: tuple[str, ...]) -> tuple[list[dict[str, str]], bool]:
    """The rows, and whether a half-written last one was left out (being written, or interrupted)."""
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise Damage(f"{path.name} is missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise Damage(f"{path.name} is unreadable ({error})") from None
    whole, _, rest = text.rpartition("\n")
    try:
        header, *rows = list(csv.reader(whole.split("\n"))) or [[]]
    except csv.Error as error:
        raise Damage(f"{path.name} is damaged ({error})") from None
    for column in columns:
        if column not in header:
            raise Damage(f"{path.name} has no column {column}")
    for line, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise Damage(f"{path.name} has {len(row)} fields in line {line}, expected {len(header)}")
    return [dict(zip(header, row, strict=True)) for row in rows], bool(rest)


def convert(rows: list[dict[str, str]], column: str, path: Path, kind: Callable = float) -> list:
    """A column of finite numbers."""
    try:
        values = [kind(row[column]) for row in rows]
        if not all(map(math.isfinite, values)):
            raise ValueError("a value is not finite")
    except ValueError as error:
        raise Damage(f"{path.name} is damaged in column {column} ({error})") from None
    return values


def read_metrics(path: Path, network: Network) -> None:
    try:
        rows, is_cut = read_csv(path, ("epoch", "test_accuracy", "best", *SECONDS))
        epochs = convert(rows, "epoch", path, int)
        for before, epoch in pairwise(epochs):
            if epoch != before + 1:
                raise Damage(f"{path.name} is damaged: epoch {epoch} follows epoch {before}")
        accuracies, bests = (convert(rows, column, path) for column in ("test_accuracy", "best"))
        seconds = list(zip(*(convert(rows, column, path) for column in SECONDS), strict=True))
    except Damage as remark:
        network.damage(remark)
        return
    network.epochs, network.accuracies, network.seconds = epochs, accuracies, [sum(row) for row in seconds]
    network.best = bests[-1] if bests else math.nan
    if is_cut:
        network.remarks.append(f"the last row of {path.name} is half-written and left out")


def read_coefficients(path: Path, network: Network) -> None:
    try:
        rows, is_cut = read_csv(path, ("epoch", "layer", "coefficient"))
        epochs = convert(rows, "epoch", path, int)
        coefficients = convert(rows, "coefficient", path)
    except Damage as remark:
        network.damage(remark)
        return
    for row, epoch, coefficient in zip(rows, epochs, coefficients, strict=True):
        if epoch not in network.epochs:
            continue  # a network killed between the two files: it writes this epoch's rows once more
        network.coefficients[row["layer"]][epoch] = coefficient
    if is_cut:
        network.remarks.append(f"the last row of {path.name} is half-written and left out")


def find_checkpoints(directory: Path, number: int, num: int) -> list[Path]:
    """The final network, the best one, then the published ones from the newest: as far as they are there."""
    kept, published = {}, {}
    for path in directory.iterdir():
        if match := re.fullmatch(rf"(final|best){number}\.(t7|tar)", path.name):
            kept[match[1]] = path
        elif match := re.fullmatch(rf"(ckpt|pth){number % num}_(\d{{1,9}})\.(t7|tar)", path.name):
            published[int(match[2])] = path
    newest_first = [published[epoch] for epoch in sorted(published, reverse=True)]
    return [kept[name] for name in ("final", "best") if name in kept] + newest_first


def read_filters(checkpoints: list[Path], network: Network) -> None:
    """Counts the invalid filters in the first of the checkpoints that can be read."""
    for path in checkpoints:
        try:
            state, contents = read_checkpoint(path)
            norms = norms_by_layer(state, shortcuts=False)
            invalid, shortcuts = count_invalid(state, THRESHOLDS)
        except FileNotFoundError:
            continue  # a network at work has deleted it in between, and published a newer one
        except (GraftingError, RuntimeError) as error:
            network.damage(str(error).replace(f"{path.parent}/", ""))
            continue
        network.invalid, network.shortcuts = invalid, shortcuts
        network.norms = [norm for layer in norms.values() for norm in layer.tolist() if math.isfinite(norm)]
        network.counted_in = path.stem.rstrip("0123456789") if path.stem.isalnum() else path.name
        epoch, settings = contents.get("epoch"), contents.get("settings")
        if isinstance(epoch, int) and network.epochs and epoch != network.epochs[-1]:
            network.counted_in += f" (epoch {epoch})"
        network.settings = settings if isinstance(settings, dict) else {}
        return
    network.damage("no checkpoint can be read")


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The state dict in a checkpoint (its `net` or `state_dict`, or all that it holds), and the whole contents.

    Raises FileNotFoundError; CheckpointError, naming the file, if it holds no state dict or cannot be loaded.
    """
    contents = load(path)
    state = contents.get("net", contents.get("state_dict", contents))
    if not (isinstance(state, dict) and state and all(map(is_entry, state.items()))):
        raise CheckpointError(f"{path} holds no state dict")
    return state, contents


def is_entry(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def count_invalid(state: dict[str, Tensor], thresholds: Sequence[float]) -> list[list[tuple[int, int]]]:
    """(invalid, total) at each threshold: first of the filters outside shortcuts, then of those in them."""
    return [[invalid_filters(state, threshold, shortcuts) for threshold in thresholds] for shortcuts in (False, True)]
