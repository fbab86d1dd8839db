"""Counts the invalid filters of checkpoints, those whose L1 norm is below a threshold.

    python analysis/filter_comparison.py --r checkpoint/baseline/final1.t7 checkpoint/two/final1.t7
    python analysis/filter_comparison.py --r checkpoint/two/best1.t7 --threshold 1 0.1 0.01

Checkpoints of CIFAR and ImageNet networks, of the authors' script, and bare state dicts are read. They are loaded
as tensors and plain values only: one that holds anything else is named, and left out.
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed
from analysis.runs import THRESHOLDS, count_filters, program, read_checkpoint, table
from filter_grafting.errors import GraftingError
from filter_grafting.information import SHORTCUT_NAMES
from training.flags import Parser, number, path

CAPTION = f"""
Invalid: filters whose L1 norm is below the threshold; the ratio is to all of them (total).
Shortcuts: the same of the convolutions beside a block (with {" or ".join(SHORTCUT_NAMES)}
in their names), which are not in the columns before."""


def main() -> int:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--r", dest="checkpoints", metavar="CKPT", type=path, nargs="+", required=True, help="checkpoints to compare")
    below, above_0 = "L1 norms below which a filter is invalid", number(float, 0, low_open=True)
    add("--threshold", metavar="T", nargs="+", type=above_0, default=list(THRESHOLDS), help=below)
    add("--format", choices=("markdown", "csv", "latex"), default="markdown", help="of the table")
    args = parser.parse_args()
    rows, status = [], 0
    for file in args.checkpoints:
        try:
            counts = count_filters(read_checkpoint(file)[0], args.threshold)
        except (FileNotFoundError, GraftingError) as error:
            print(error if str(file) in str(error) else f"{file}: {error}", file=sys.stderr)
            status = 1
            continue
        for threshold, invalid in counts["invalid"].items():
            row = {"file": str(file), "threshold": threshold, "invalid": invalid, "total": counts["total"]}
            row["ratio (%)"] = f"{100 * invalid / counts['total']:.2f}"
            beside, total = counts["shortcut_invalid"][threshold], counts["shortcut_total"]
            row["shortcuts"] = f"{beside} of {total}" if total else "–"
            row["shortcuts (%)"] = f"{100 * beside / total:.2f}" if total else "–"
            rows.append(row)
    if rows:
        frame = pd.DataFrame(rows)
        print(table(frame, args.format, right=list(frame)[1:]), flush=True)
        print(CAPTION, file=sys.stdout if args.format == "markdown" else sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(program(main))
