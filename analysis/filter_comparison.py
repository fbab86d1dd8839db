"""Counts the invalid filters of checkpoints, those whose L1 norm is below a threshold.

    python analysis/filter_comparison.py --r checkpoint/baseline/final1.t7 checkpoint/two/final1.t7
    python analysis/filter_comparison.py --r checkpoint/two/best1.t7 --threshold 1 0.1 0.01

Checkpoints of CIFAR and ImageNet networks, of the authors' script, and bare state dicts are read. They are loaded
as tensors and plain values only: one that holds anything else is named, and left out.
"""

import argparse
import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.runs import THRESHOLDS, count_invalid, ends, program, read_checkpoint, table
from filter_grafting.errors import GraftingError
from filter_grafting.information import SHORTCUT_NAMES
from filter_grafting.membership import printable
from training.flags import Parser, number, path

CAPTION = "Invalid: filters whose L1 norm is below the threshold; the ratio is to all of them (total)."
SHORTCUTS = f"""Shortcuts: the same of the convolutions beside a block (with {" or ".join(SHORTCUT_NAMES)}
in their names), which are not in the columns before."""
NO_SHORTCUTS = "No shortcut of these networks has a convolution."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--r", dest="checkpoints", metavar="CKPT", type=path, nargs="+", required=True, help="checkpoints to compare")
    below = f"L1 norms below which a filter is invalid (default: {' '.join(map(str, THRESHOLDS))})"
    add("--threshold", metavar="T", nargs="+", type=number(float, 0, low_open=True), help=below)
    add("--format", choices=("markdown", "csv", "latex"), default="markdown", help="of the table")
    return parser.parse_args(arguments)


def percent(invalid: int, total: int) -> str:
    return f"{100 * invalid / total:.2f}" if total else "–"


def main() -> int:
    args = parse()
    paths, thresholds = (list(dict.fromkeys(given)) for given in (args.checkpoints, args.threshold or THRESHOLDS))
    rows, failures = [], []
    for label, file in zip(ends(paths), paths, strict=True):
        try:
            counts = count_invalid(read_checkpoint(file)[0], thresholds)
        except FileNotFoundError:
            failures.append(f"{file}: there is no such file")
        except (GraftingError, RuntimeError) as error:
            failures.append(str(error) if str(file) in str(error) else f"{file}: {error}")
        else:
            for threshold, (invalid, total), beside in zip(thresholds, *counts, strict=True):
                row = {"file": label, "threshold": f"{threshold:g}", "invalid": invalid, "total": total}
                row |= {"ratio (%)": percent(invalid, total)}
                apart = "{} of {}".format(*beside) if beside[1] else "–"
                rows.append(row | {"shortcuts": apart, "shortcuts (%)": percent(*beside)})
    if rows:
        frame = pd.DataFrame(rows)
        has_shortcuts = (frame["shortcuts"] != "–").any()
        frame = frame if has_shortcuts else frame.drop(columns=["shortcuts", "shortcuts (%)"])
        print(table(frame, args.format, right=list(frame)[1:]), flush=True)
        about = sys.stdout if args.format == "markdown" else sys.stderr
        print("", CAPTION, SHORTCUTS if has_shortcuts else NO_SHORTCUTS, sep="\n", file=about)
    for failure in failures:
        print(printable(failure), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(program(main))
