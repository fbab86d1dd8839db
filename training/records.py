"""What a network tells of itself: its log, metrics{i}.csv and coefficients{i}.csv, best and final, TensorBoard."""

import csv
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from filter_grafting.checkpoint import save, write_atomically
from filter_grafting.errors import GraftingError, RefusedError
from filter_grafting.grafting import Layer
from filter_grafting.information import convolutions, entropy, invalid_filters
from filter_grafting.rings import Checkpoint, FileRing
from training.flags import command
from training.images import Images
from training.loop import Result, check_finite, means

METRICS = (
    *("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "best"),
    *("train_seconds", "test_seconds", "wait_seconds", "graft_seconds"),
    *("val_accuracy", "invalid_0.1", "invalid_0.01", "test_top5", "information"),
)
THRESHOLDS = (0.1, 0.01)  # of the L1 norm, below which a filter is invalid
COEFFICIENTS = ("epoch", "layer", "own_entropy", "neighbour_entropy", "coefficient")
BAR = {
    "bar_format": "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}",
    **{"leave": False, "dynamic_ncols": True, "mininterval": 1},
}


def say(line: str) -> None:
    """Writes one line to the log, which is standard output; raises GraftingError if it cannot."""
    try:
        print(line, flush=True)
    except OSError as error:
        # What is left in the buffer would be tried again, and fail again, when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise GraftingError(f"cannot write the log to standard output: {error.strerror or error}") from error


class Records:
    """Writes the log, tables, best and final of one network; settings, classes and pixels go into best and final."""

    def __init__(
        self,
        ring: FileRing,
        model: nn.Module,
        settings: dict,
        images: Images,
        pixels: dict,
        notes: list[str],
        tensorboard: bool,
    ):
        self.ring = ring
        name, classes = settings.get("model") or settings["arch"], images.classes
        self.about = {"settings": dict(settings), "model": name, "data": settings["data"], "classes": classes}
        self.about |= {**pixels, "command": command()}
        self.best_score = self.best = -1.0  # accuracy by which the best epoch is chosen, and its test accuracy
        self.seconds = {"wait": 0.0, "graft": 0.0}  # since the last epoch
        self.board = make_board(ring.directory / "tensorboard" / f"network{ring.network}") if tensorboard else None
        ring.update("starting", epochs=settings["epochs"])
        parameters = sum(parameter.numel() for parameter in model.parameters())
        values = (f"{key}={f'{value:g}' if isinstance(value, float) else value}" for key, value in settings.items())
        say(f"Network {ring.network} of {ring.networks} in {ring.directory}: {parameters:,} parameters")
        for line in (f"settings: {' '.join(values)}", *notes, *images.notes):
            say(line)

    def timed(self, phase: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Calls a function; its seconds are those of "wait" or "graft"."""
        began = time.perf_counter()
        value = function(*arguments, **options)
        self.seconds[phase] += time.perf_counter() - began
        return value

    def row(
        self, epoch: int, lr: float, train: Result, test: Result, val: Result | None, model: nn.Module
    ) -> dict[str, Any]:
        """The epoch's figures, by column; with val the best epoch is chosen on that, without it on test."""
        check_finite(test.loss, "test")  # the last step's doing, whose loss nobody has seen
        score = (val or test).accuracy
        improved = score > self.best_score
        row = {
            **{"epoch": epoch, "lr": lr, "train_loss": train.loss, "train_accuracy": train.accuracy},
            **{"test_loss": test.loss, "test_accuracy": test.accuracy, "improved": improved},
            "best": test.accuracy if improved else self.best,
            "best_score": score if improved else self.best_score,
            "train_seconds": train.seconds,
            "test_seconds": test.seconds + (val.seconds if val else 0),
            **{f"{phase}_seconds": seconds for phase, seconds in self.seconds.items()},
        }
        if layers := convolutions(model):
            row |= {
                f"invalid_{threshold}": invalid_filters(model, threshold, shortcuts=False)[0]
                for threshold in THRESHOLDS
            }
            row["information"] = sum(entropy(layer.weight) for layer in layers.values())
        if val:
            row["val_accuracy"] = val.accuracy
        if test.top5 is not None:
            row["test_top5"] = test.top5
        return row

    def epoch(self, row: dict[str, Any], layers: Sequence[Sequence[Any]], state: Mapping[str, Tensor]) -> None:
        """Records an epoch that was published; the last one is saved as `final`, too.

        Rows of this epoch and of later ones are replaced: it may be called again after a kill. `layers` are the rows
        that `layer_rows` made of the grafting before this epoch, if there was one.
        """
        epoch, network = row["epoch"], self.ring.network
        self.best_score, self.best = row["best_score"], row["best"]
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        if row["improved"]:
            self.save("best", row, state)
        grafts = write_rows(self.ring.directory / f"coefficients{network}.csv", COEFFICIENTS, epoch - 1, layers)
        figures = [f"{row[column]:.6g}" if column in row else "" for column in METRICS]
        write_rows(self.ring.directory / f"metrics{network}.csv", METRICS, epoch, [figures])
        if self.board:
            self.draw(row, layers, grafts)
        say(f"Network:{network}    epoch:{epoch}    {log_fields(row)}")
        self.ring.update("training", accuracy=row["test_accuracy"], best=row["best"])
        if epoch + 1 == self.about["settings"]["epochs"]:
            self.save("final", row, state)

    def resume(self, checkpoint: Checkpoint | None) -> None:
        """Goes on after that of an earlier process, which may have been killed before it had recorded its epoch.

        Raises RefusedError if there is none and a network of several epochs would be written over. After one epoch
        there is a single checkpoint: if that is damaged, little is lost.
        """
        if checkpoint:
            say(f"continuing after epoch {checkpoint.round}")
            self.epoch(checkpoint.extra["row"], checkpoint.extra["layers"], checkpoint.state)
            return
        network, metrics = self.ring.network, self.ring.directory / f"metrics{self.ring.network}.csv"
        kept = [path for path in map(self.ring.file, ("best", "final")) if path.exists()]
        if kept and metrics.exists() and metrics.read_text().count("\n") > 2:
            raise RefusedError(
                f"network {network} has trained before, and none of its checkpoints is there to go on from; to begin "
                f"again would replace {kept[0]}: give another directory, or move that file away"
            )

    def save(self, kind: str, row: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Writes best or final: tensors on the CPU, and what whoever uses the network needs to know."""
        contents = {self.ring.key: {key: entry.cpu() for key, entry in state.items()}, **self.about}
        contents |= {"epoch": row["epoch"], "accuracy": row["test_accuracy"], "best": row["best"]}
        save(self.ring.file(kind), contents)

    def draw(self, row: Mapping[str, Any], layers: Sequence[Sequence[Any]], grafts: Sequence[Sequence[Any]]) -> None:
        epoch = row["epoch"]
        for column in METRICS[1:]:
            if column in row:
                self.board.add_scalar(column, row[column], epoch)
        if layers:
            shares = torch.tensor([float(one[-1]) for one in grafts]).view(-1, len(layers))
            self.board.add_histogram("coefficients", shares[-1], epoch - 1)
            # One row a layer, one column an epoch; black is 0, white is 1.
            self.board.add_image("coefficients of each layer by epoch", shares.T[None], epoch - 1)
        self.board.flush()


def make_board(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        raise GraftingError("--tensorboard: the package is missing: pip install tensorboard, or leave it out")
    from torch.utils.tensorboard import SummaryWriter  # here, as it is slow to import and need not be there

    return SummaryWriter(folder)


def layer_rows(epoch: int, layers: Mapping[str, Layer]) -> list[list[Any]]:
    """Rows for coefficients{i}.csv of the grafting of an epoch's checkpoints; at filter level the mean coefficient."""
    return [
        [epoch, name, f"{own:.6f}", f"{other:.6f}", f"{torch.as_tensor(share).mean().item():.4g}"]
        for name, (own, other, share) in layers.items()
    ]


def log_fields(row: Mapping[str, Any]) -> str:
    shares = {"accuracy": "test_accuracy", "best": "best", "val": "val_accuracy", "accuracy@5": "test_top5"}
    fields = [f"{name}:{row[column]:.3f}" for name, column in shares.items() if column in row]
    fields += [f"loss:{row['train_loss']:.4f}", f"lr:{row['lr']:.5g}"]
    fields += [f"{phase}:{row[f'{phase}_seconds']:.2f}s" for phase in ("train", "test", "wait", "graft")]
    return "    ".join(fields)


def write_rows(path: Path, columns: Sequence[str], epoch: int, rows: Iterable[Sequence[Any]]) -> list[Sequence[Any]]:
    """Puts the rows of an epoch into a CSV file, in the place of those that it has of it and of later ones.

    The first column is the epoch. The file is replaced as a whole, and never half-written; returns all its rows.
    """
    earlier = list(csv.reader(path.read_text().splitlines()))[1:] if path.exists() else []
    kept = [row for row in earlier if int(row[0]) < epoch] + list(rows)
    if kept or earlier:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([columns, *kept])
        write_atomically(path, text.getvalue().encode())
    return kept


def follow(
    ring: FileRing | None,
    check: Callable[[], None],
    every: int,
    batches: Iterable[Any],
    totals: Tensor,
    steps: int,
    epoch: int,
    lr: float | None,
) -> Iterator[Any]:
    """Yields an epoch's batches: tells the ring, shows a bar on a terminal, or prints a line every so many batches.

    Without a ring, another process speaks for this network. After each batch, which is added to the totals before the
    next is asked for, `check` may raise. lr is None for testing.
    """
    if ring:
        ring.update("testing") if lr is None else ring.update("training", epoch=epoch, steps=steps, lr=lr)
    every = every if ring and lr is not None else 0
    hidden = ring is None or every > 0 or not sys.stdout.isatty()
    began = ended = time.perf_counter()
    data_seconds = 0.0
    label = f"epoch {epoch}" + (" test" if lr is None else "")
    with tqdm(total=steps, desc=label, disable=hidden, file=sys.stdout, **BAR) as bar:
        for step, batch in enumerate(batches):
            prints = every > 0 and step % every == 0
            before = totals.clone() if prints else totals
            waited = time.perf_counter() - ended
            data_seconds += waited
            yield batch
            # The host waits for the device to print a line, or to show the bar once a second, and in no other step.
            figures = (means(totals - before), means(totals)) if prints else ()
            last, ended = ended, time.perf_counter()  # with the device's part of a batch that is printed
            if prints:
                seconds = (ended - last, (ended - began) / (step + 1)), (waited, data_seconds / (step + 1))
                say(progress_line(f"[{epoch}][{step:{len(str(steps))}d}/{steps}]", *seconds, *figures))
            elif (bar.update() or step == 0) and not hidden:
                so_far = means(totals)
                bar.set_postfix_str(f"loss {so_far.loss:.4f}, accuracy {so_far.accuracy:.2f}")
            if ring:
                ring.progress(step)
            check()


def progress_line(
    where: str, seconds: tuple[float, float], data_seconds: tuple[float, float], batch: Result, mean: Result
) -> str:
    """A line as PyTorch's ImageNet example prints it: each figure of the last batch, then its mean so far."""
    figures = [("Time", "6.3f", *seconds), ("Data", "6.3f", *data_seconds), ("Loss", ".4e", batch.loss, mean.loss)]
    figures += [("Acc@1", "6.2f", batch.accuracy, mean.accuracy), ("Acc@5", "6.2f", batch.top5, mean.top5)]
    fields = [f"{name} {last:{form}} ({so_far:{form}})" for name, form, last, so_far in figures if so_far is not None]
    return "    ".join([f"Epoch: {where}", *fields])
