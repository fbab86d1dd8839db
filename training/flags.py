"""The flags that both scripts share. No torch here: --help and a wrong flag answer at once."""

import argparse
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # of the checkout


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, that guesses what was meant, and whose help shows every default."""

    def __init__(self, **options: Any):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            self.error(f"unrecognized argument {name}{did_you_mean(name, self._option_string_actions)}")
        return args

    def _check_value(self, action, value):
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, none_of(value, action.choices))

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:  # the help says it itself, or it is a switch
            return action.help
        return super()._get_help_string(action)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, known, 1, 0.7)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def none_of(value: Any, known: Iterable[Any]) -> str:
    """What is said of a value that is none of those known."""
    words = [str(word) for word in known]
    return f"got {value!r}" + (did_you_mean(str(value), words) or f", expected one of {', '.join(words)}")


def one_of(known: Iterable[str]) -> Callable[[str], str]:
    """A converter for argparse: one of some words, or package.module:function, for whoever takes it from there."""

    def convert(text: str) -> str:
        if text not in known and ":" not in text:
            raise argparse.ArgumentTypeError(none_of(text, known))
        return text

    return convert


def number(
    kind: type, low: float, high: float = math.inf, low_open: bool = False, high_open: bool = False
) -> Callable[[str], Any]:
    """A converter for argparse: a finite number from low to high, without the ends that are open."""
    what = "an integer" if kind is int else "a number"
    bounds = f"{'above' if low_open else 'at least'} {low}"
    bounds += f" and {'below' if high_open else 'at most'} {high}" if high < math.inf else ""

    def convert(text: str) -> Any:
        with suppress(ValueError):
            value = kind(text)
            is_inside = low <= value <= high and math.isfinite(value)
            if is_inside and not (low_open and value == low) and not (high_open and value == high):
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {what} {bounds}")

    return convert


def path(text: str) -> Path:
    """A converter for argparse: a path, with ~ expanded, which shells leave alone in --s=~/run."""
    return Path(text).expanduser()


def add_recipe_flags(group: argparse._ArgumentGroup) -> None:
    """Momentum, and what the paper's recipe does without and others use."""
    flag, share = group.add_argument, number(float, 0, 1, high_open=True)
    flag("--momentum", metavar="M", type=share, default=0.9, help="of SGD")
    flag("--nesterov", action="store_true", help="Nesterov's momentum")
    flag("--label_smoothing", metavar="S", type=share, default=0.0, help="share of a label spread over all classes")
    rises = "epochs in which the learning rate rises from 0 to its first value"
    flag("--warmup", metavar="E", type=number(float, 0), default=0.0, help=rises)


def add_run_flags(parser: argparse.ArgumentParser, directory: str) -> None:
    """Of the ring and of the machine."""
    flag, count = parser.add_argument_group("grafting").add_argument, number(int, 1, 1000)
    # The second names are for torchrun, whose own parser would take --s and --num for beginnings of its flags.
    flag("--s", "--save_dir", metavar="DIR", type=path, help=directory)
    networks = "number of networks in the ring; 1 is the baseline, which exchanges nothing"
    flag("--num", "--networks", metavar="N", type=count, default=2, help=networks)
    flag("--i", metavar="I", type=count, default=1, help="which of the networks this process trains, 1 to N")
    within = "A: the coefficient stays within (1-A)/2 and (1+A)/2"
    flag("--a", metavar="A", type=number(float, 0, 1), default=0.4, help=within)
    steepness = "c: how steeply the coefficient follows the difference of the entropies"
    flag("--c", metavar="C", type=number(float, 0), default=500.0, help=steepness)
    # A further one is a function in filter_grafting.information.CRITERIA, and a name here, where there is no torch.
    compared = "what is compared of two layers: their entropies, or their L1 norms"
    flag("--criterion", choices=("entropy", "l1"), default="entropy", help=compared)
    ends = "end with status 3 when the neighbour has made no progress for so long (0.25 at the least); 0 waits for ever"
    flag("--timeout", metavar="MINUTES", type=number(float, 0), default=60.0, help=ends)
    flag("--keep_all", action="store_true", help="keep the checkpoints of all epochs")
    flag("--tensorboard", action="store_true", help="write curves and coefficients into DIR/tensorboard as well")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", choices=("cuda", "cpu"), help="where to train (default: cuda where there is one)")
    seed = "seed of weights, order and augmentation; each network makes its own of it"
    flag("--seed", metavar="K", type=number(int, 0, 2**53), default=0, help=seed)
    same = "the same results on every run on CUDA too, at some cost of speed"
    flag("--deterministic", action="store_true", help=same)
    bfloat16 = "compute in bfloat16 where the hardware does (GPUs since Ampere, CPUs with AVX-512 BF16 or AMX): faster"
    flag("--amp", action="store_true", help=f"{bfloat16}; elsewhere in float32, and a line says so")
    compiled = "torch.compile the model: a slow start, then faster on a GPU (not on the CPUs that we measured)"
    flag("--compile", action="store_true", help=compiled)


def checked(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The flags, after the checks that both scripts have in common and that need more than one of them."""
    args = parser.parse_args(argv)
    if args.i > args.num:
        parser.error(f"argument --i: got {args.i}, expected 1 to {args.num} (--num)")
    if args.warmup and args.warmup >= args.epochs:
        parser.error(f"argument --warmup: got {args.warmup:g}, expected less than {args.epochs} (--epochs)")
    if args.nesterov and args.momentum == 0:
        parser.error("argument --nesterov: got --momentum 0, expected a number above 0")
    return args


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def world(variables: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number of ranks) of this process among those that train one network, from what torchrun sets.

    Variables that another job has left behind do not count unless all are there.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    if not variables.get("MASTER_ADDR") or not all(variables.get(name, "").isdecimal() for name in names):
        return 0, 1
    return int(variables["RANK"]), int(variables["WORLD_SIZE"])


def run_name(parser: argparse.ArgumentParser, args: argparse.Namespace, what: str, shown: Iterable[str]) -> str:
    """Name of a run's folder: grafting_ (or baseline_) and what is trained, then what differs from the defaults."""
    name = f"{'grafting' if args.num > 1 else 'baseline'}_{what}"
    for flag in shown:
        value = getattr(args, flag)
        if value == parser.get_default(flag) or (flag, value) == ("num", 1):
            continue
        number = f"{value:g}" if isinstance(value, float) else value
        name += f"_{value}" if isinstance(value, str) else f"_{flag}" if value is True else f"_{flag}{number}"
    return name


def settings_of(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names}


def ranks_here() -> int:
    """How many of the processes that train this network run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world()[1] > 1 else 1


def torchrun(ranks: int) -> list[str]:
    """What stands between python and a script that is to run in so many processes."""
    # Without the -- torchrun would take the script's --s and --num for beginnings of its own flags.
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "--"] if ranks > 1 else []


def command(network: int | None = None) -> list[str]:
    """The command line that started this process; with a number, that which continues another network of its run."""
    words = sys.argv[1:]
    if network is not None:
        words += ["--i", str(network), "--resume"]  # of a flag, the last counts
    return [os.path.basename(sys.executable), *torchrun(ranks_here()), sys.argv[0], *words]
