"""The flags that both scripts share, and one-line errors."""

import argparse
import math

import torch


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and whose help shows every default."""

    def __init__(self, **options):
        super().__init__(formatter_class=Formatter, allow_abbrev=False, **options)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:  # the help says it itself, or it is a switch
            return action.help
        return super()._get_help_string(action)


def number(kind: type, low: float, high: float = math.inf, low_open: bool = False):
    """A converter for argparse: a finite number within [low, high], or (low, high] if low_open."""

    def convert(text: str):
        bounds = f"{'above' if low_open else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (low_open and value == low):
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {what} {bounds}")
        return value

    return convert


def add_ring_flags(parser: argparse.ArgumentParser, directory_help: str) -> None:
    group = parser.add_argument_group("grafting")
    group.add_argument("--s", dest="directory", metavar="DIR", help=directory_help)
    group.add_argument("--num", dest="networks", metavar="N", type=number(int, 1, 1000), default=2,
                       help="number of networks in the ring; 1 is the baseline, which exchanges nothing")  # fmt: skip
    group.add_argument("--i", dest="network", metavar="I", type=number(int, 1, 1000), default=1,
                       help="which of the networks this process trains, 1 to N")  # fmt: skip
    group.add_argument("--a", dest="amplitude", metavar="A", type=number(float, 0, 1), default=0.4,
                       help="A: the coefficient stays within (1-A)/2 and (1+A)/2")  # fmt: skip
    group.add_argument("--c", dest="steepness", metavar="C", type=number(float, 0), default=500.0,
                       help="c: how steeply the coefficient follows the difference of the entropies")  # fmt: skip
    group.add_argument("--timeout", metavar="MINUTES", type=number(float, 0), default=60.0,
                       help="end, with exit status 3, when the neighbour has given no sign of life for so long (0.25 "
                            "at the least); 0 waits for ever")  # fmt: skip
    group.add_argument("--keep_all", action="store_true", help="keep the checkpoints of all epochs")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("cuda", "cpu"), help="where to train (default: cuda where there is one)")
    group.add_argument("--seed", metavar="K", type=number(int, 0, 2**53), default=0,
                       help="seed of weights, order and augmentation; each network makes its own of it")  # fmt: skip
    group.add_argument("--deterministic", action="store_true",
                       help="the same results on every run on CUDA too, at some cost of speed")  # fmt: skip
    group.add_argument("--amp", action="store_true", help="compute in bfloat16 where that is safe: faster")
    group.add_argument("--compile", action="store_true", help="torch.compile the network: a slow start, then faster")
    # For the launcher: check all flags, start nothing, print what it has to know.
    group.add_argument("--plan", action="store_true", help=argparse.SUPPRESS)


def run_name(parser: argparse.ArgumentParser, args: argparse.Namespace, what: str, shown: dict[str, str]) -> str:
    """Name of a run's folder: grafting_... (baseline_... of a single network), then what differs from the defaults.

    Args:
        what: what is trained, such as cifar10_resnet32.
        shown: the settings that may appear, by attribute, with the short name to show.
    """
    name = f"{'grafting' if args.networks > 1 else 'baseline'}_{what}"
    for key, short in shown.items():
        value = getattr(args, key)
        if value == parser.get_default(key) or (key, value) == ("networks", 1):
            continue
        name += f"_{short}" + ("" if value is True else f"{value:g}" if isinstance(value, float) else str(value))
    return name


def check_common(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """The checks that need more than one flag."""
    if args.network > args.networks:
        parser.error(f"argument --i: got {args.network}, expected 1 to {args.networks} (--num)")
    check_device(parser, args)


def check_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in the device where none was given, and refuses one that is not there."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: got cuda, but torch finds no CUDA device here; expected cpu")
