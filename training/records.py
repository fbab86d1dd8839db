"""What a network tells of itself: its log, metrics{i}.csv and coefficients{i}.csv, best and final, TensorBoard."""

import csv
import importlib.util
import io
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from filter_grafting.checkpoint import save, write_atomically, write_error
from filter_grafting.errors import GraftingError, WriteError
from filter_grafting.grafting import Layer
from filter_grafting.information import convolutions, entropy, invalid_filters
from filter_grafting.rings import FileRing
from training import loop
from training.flags import command
from training.loop import Result, check_finite

METRICS = (
    *("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "best"),
    *("train_seconds", "test_seconds", "wait_seconds", "graft_seconds"),
    *("val_accuracy", "invalid_0.1", "invalid_0.01", "test_top5", "information"),
)
COEFFICIENTS = ("epoch", "layer", "own_entropy", "neighbour_entropy", "coefficient")
PHASES = ("train", "test", "wait", "graft")


def say(line: str) -> None:
    """Writes one line to the log, which is standard output.

    Raises:
        WriteError: if it cannot.
    """
    try:
        print(line, flush=True)
    except OSError as error:
        # What is left in the buffer would be tried again, and fail again, when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise WriteError(f"cannot write the log to standard output: {error.strerror or error}") from error


class Records:
    """Of one network: rank 0's, where several processes train it.

    Args:
        ring: whose directory holds the files.
        settings: of this network, by flag.
        about: what else best and final are to say: the model's name, its classes and the like.
        notes: further lines for the head of the log.
        tensorboard: whether to write for TensorBoard as well.
    """

    def __init__(
        self,
        ring: FileRing,
        model: nn.Module,
        settings: Mapping[str, Any],
        about: Mapping[str, Any],
        notes: Iterable[str],
        tensorboard: bool = False,
    ):
        self.ring, self.about = ring, {"settings": dict(settings), **about, "command": command()}
        self.best_score = self.best = -1.0
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.metrics = Table(ring.directory / f"metrics{ring.network}.csv", METRICS)
        self.coefficients = Table(ring.directory / f"coefficients{ring.network}.csv", COEFFICIENTS)
        if tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise GraftingError("the package tensorboard is missing: pip install tensorboard, or do without its curves")
        self.tensorboard, self.board = tensorboard, None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        with suppress(AttributeError):  # names of files need not fit the terminal's encoding
            sys.stdout.reconfigure(errors="backslashreplace")
        say(f"Network {ring.network} of {ring.networks} in {ring.directory}: {parameters:,} parameters")
        shown = (
            f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
        )
        say(f"settings: {' '.join(shown)}")
        for note in notes:
            say(note)

    @contextmanager
    def timing(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[phase] += time.perf_counter() - began

    def row(
        self, epoch: int, lr: float, train: Result, test: Result, val: Result | None, model: nn.Module
    ) -> dict[str, Any]:
        """The epoch's figures, by column; with val the best epoch is chosen on that, without it on test.

        Raises:
            Diverged: if the test loss is not finite.
        """
        check_finite(test.loss, "test", lr)  # the last step's doing, whose loss nobody has seen
        score = (val or test).accuracy
        improved = score > self.best_score
        if improved:
            self.best_score, self.best = score, test.accuracy
        seconds = {**self.seconds, "train": train.seconds, "test": test.seconds + (val.seconds if val else 0)}
        self.seconds = dict.fromkeys(PHASES, 0.0)
        row = {"epoch": epoch, "lr": lr, "train_loss": train.loss, "train_accuracy": train.accuracy}
        row |= {"test_loss": test.loss, "test_accuracy": test.accuracy, "best": self.best}
        row |= {f"{phase}_seconds": seconds[phase] for phase in PHASES}
        row |= {"best_score": self.best_score, "improved": improved}
        if layers := convolutions(model):
            row |= {f"invalid_{threshold}": invalid_filters(model, threshold, False)[0] for threshold in (0.1, 0.01)}
            row["information"] = sum(entropy(layer.weight) for layer in layers.values())
        row |= {"val_accuracy": val.accuracy} if val else {}
        return row | ({"test_top5": test.top5} if test.top5 is not None else {})

    def epoch(self, row: dict[str, Any], layers: Sequence[Sequence[Any]], state: Mapping[str, Tensor]) -> None:
        """Records an epoch that was published, and leaves nothing of it or of later ones twice; the last is `final`.

        Args:
            row: see `row`.
            layers: the rows that `layer_rows` made of the grafting before this epoch, if there was one.
            state: the state dict that was published.
        """
        self.best_score, self.best, epoch = row["best_score"], row["best"], row["epoch"]
        if row["improved"]:
            self.save("best", row, state)
        self.coefficients.write(epoch - 1, layers)
        self.metrics.write(epoch, [[as_text(column, row.get(column)) for column in METRICS]])
        if self.tensorboard:
            self._write_board(row, layers)
        say(f"Network:{self.ring.network}    epoch:{epoch}    {log_fields(row)}")
        self.ring.update("training", accuracy=row["test_accuracy"], best=row["best"])
        if epoch + 1 == self.about["settings"]["epochs"]:
            self.save("final", row, state)

    def resume(self, row: dict[str, Any], layers: Sequence[Sequence[Any]], state: Mapping[str, Tensor]) -> None:
        """Goes on after an epoch of an earlier process, which may have been killed before it had recorded it."""
        say(f"continuing after epoch {row['epoch']}")
        self.epoch(row, layers, state)

    def save(self, kind: str, row: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        """Writes best or final: tensors on the CPU, and what whoever uses the network needs to know."""
        on_cpu = {key: entry.cpu() for key, entry in state.items()}
        figures = {"epoch": row["epoch"], "accuracy": row["test_accuracy"], "best": row["best"]}
        save(self.ring.file(kind), {self.ring.key: on_cpu, **figures, **self.about})

    def _write_board(self, row: Mapping[str, Any], layers: Sequence[Sequence[Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, as it is slow to import and need not be there

        epoch = row["epoch"]
        if self.board is None:
            place = self.ring.directory / "tensorboard" / f"network{self.ring.network}"
            self.board = SummaryWriter(place, purge_step=epoch)
        for column in METRICS[1:]:
            if row.get(column) is not None:
                self.board.add_scalar(column, row[column], epoch)
        if layers:
            self.board.add_histogram("coefficients", torch.tensor([float(row[-1]) for row in layers]), epoch - 1)
            names = dict.fromkeys(row[1] for row in self.coefficients.rows)
            columns = torch.tensor([float(row[-1]) for row in self.coefficients.rows]).view(-1, len(names))
            # One row a layer, one column an epoch; black is 0, white is 1.
            self.board.add_image("coefficients of each layer by epoch", columns.T[None], epoch - 1)
        self.board.flush()


def layer_rows(epoch: int, layers: Mapping[str, Layer]) -> list[list[Any]]:
    """Rows for coefficients{i}.csv of the grafting of an epoch's checkpoints; at filter level the mean coefficient."""
    return [
        [epoch, name, f"{own:.6f}", f"{other:.6f}", f"{torch.as_tensor(share).mean().item():.4g}"]
        for name, (own, other, share) in layers.items()
    ]


def log_fields(row: Mapping[str, Any]) -> str:
    fields = [f"accuracy:{row['test_accuracy']:.3f}", f"best:{row['best']:.3f}"]
    fields += [
        f"{name}:{row[key]:.3f}" for name, key in (("val", "val_accuracy"), ("accuracy@5", "test_top5")) if key in row
    ]
    fields += [f"loss:{row['train_loss']:.4f}", f"lr:{row['lr']:.5g}"]
    return "    ".join(fields + [f"{phase}:{row[f'{phase}_seconds']:.2f}s" for phase in PHASES])


def as_text(column: str, value: float | None) -> str:
    if value is None or isinstance(value, int):
        return "" if value is None else str(value)
    is_rounded = column.endswith(("_seconds", "accuracy")) or column in ("best", "test_top5")
    return f"{value:.3f}" if is_rounded else f"{value:.6g}"


class Table:
    """A CSV file whose first column is the epoch; it is replaced as a whole, and never half-written."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self.columns = path, list(columns)
        self.rows: list[list[Any]] | None = None  # not read before the first row is written

    def write(self, epoch: int, rows: Iterable[Sequence[Any]]) -> None:
        """Puts the rows of an epoch in the place of those that the file has of it and of later ones."""
        if self.rows is None:
            self.rows = self._read()
        self.rows = [row for row in self.rows if int(row[0]) < epoch] + [list(row) for row in rows]
        if self.rows or self.path.exists():
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([self.columns, *self.rows])
            write_atomically(self.path, text.getvalue().encode())

    def _read(self) -> list[list[str]]:
        """The rows that are whole; an earlier version of the program may have had fewer columns."""
        try:
            lines = self.path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise write_error(self.path, error, "read") from error
        rows = list(csv.reader(lines))
        missing = len(self.columns) - len(rows[0]) if rows else 0
        rows = [row + [""] * missing for row in rows[1:]]
        return [row for row in rows if len(row) == len(self.columns) and row[0].isdecimal()]


class Progress:
    """Follows one epoch: tells the ring, hears signals, shows a bar on a terminal, or prints a line every few batches.

    Args:
        ring: None where another process speaks for this network.
        check: called after each batch; raises to end the run.
        lr: the learning rate at the beginning; None for testing, which has a bar of its own, and no lines.
        epochs: how many there will be.
        every: print a line every so many batches; 0 for none, and a bar on a terminal.
    """

    def __init__(
        self,
        ring: FileRing | None,
        check: Callable[[], None],
        epoch: int,
        batches: Sized,
        lr: float | None = None,
        *,
        epochs: int | None = None,
        every: int = 0,
    ):
        self.ring, self.check, self.epoch, self.steps = ring, check, epoch, len(batches)
        self.every = every if lr is not None else 0
        self.step, self.data, self.data_total, self.bar = 0, 0.0, 0.0, None
        if ring and lr is None:
            ring.update("testing")
        elif ring:
            ring.update("training", epoch=epoch, epochs=epochs, steps=self.steps, lr=lr)
        if ring and not self.every and sys.stdout.isatty():
            from tqdm import tqdm  # here, as only who watches needs it

            label = f"epoch {epoch}" + (" test" if lr is None else "")
            self.bar = tqdm(total=self.steps, desc=label, leave=False, dynamic_ncols=True, file=sys.stdout)
        self.began = self.last = self.shown = time.perf_counter()

    def follow(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
        with self.bar or nullcontext():
            asked = time.perf_counter()
            for batch in batches:
                self.data = time.perf_counter() - asked
                self.data_total += self.data
                yield batch
                if self.ring:
                    self.ring.progress(self.step)
                self.check()
                self.step += 1
                asked = time.perf_counter()

    def report(self, batch: Tensor, totals: Tensor) -> None:
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update()
            if now - self.shown >= 1 or self.step == 0:  # the host waits for the device here, and in no other step
                self.shown, so_far = now, loop.means(totals)
                self.bar.set_postfix_str(f"loss {so_far.loss:.4f}, accuracy {so_far.accuracy:.2f}")
        elif self.ring and self.every and self.step % self.every == 0:
            say(self._line(now, loop.means(batch), loop.means(totals)))
        self.last = now

    def _line(self, now: float, batch: Result, mean: Result) -> str:
        """A line as the PyTorch ImageNet example prints it: each figure of the last batch, then its mean so far."""
        count = self.step + 1
        fields = [
            f"Epoch: [{self.epoch}][{self.step:{len(str(self.steps))}d}/{self.steps}]",
            f"Time {now - self.last:6.3f} ({(now - self.began) / count:6.3f})",
            f"Data {self.data:6.3f} ({self.data_total / count:6.3f})",
            f"Loss {batch.loss:.4e} ({mean.loss:.4e})",
            f"Acc@1 {batch.accuracy:6.2f} ({mean.accuracy:6.2f})",
        ]
        if mean.top5 is not None:
            fields.append(f"Acc@5 {batch.top5:6.2f} ({mean.top5:6.2f})")
        return "    ".join(fields)
