"""Counts the invalid filters of checkpoints, those whose L1 norm is below a threshold, as a Markdown table.

A baseline beside a grafted network, and at thresholds of one's own:

    python filter_comparison.py --r checkpoint/baseline/final1.t7 checkpoint/two/final1.t7
    python filter_comparison.py --r checkpoint/two/best1.t7 --threshold 1 0.1 0.01

Checkpoints of CIFAR and ImageNet networks, of the authors' script, and bare state dicts are read. They are loaded
as tensors and plain values only: one that holds anything else is named, and left out.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags
from filter_grafting.errors import GraftingError
from filter_grafting.exchange import printable
from filter_grafting.information import SHORTCUT_NAMES
from grafting_cifar.report import labels, markdown
from grafting_cifar.runs import THRESHOLDS, count_invalid, read_checkpoint

CAPTION = "Invalid: filters whose L1 norm is below the threshold; the ratio is to all of them (total)."
SHORTCUTS = f"""Shortcuts: the same of the convolutions beside a block (with {" or ".join(SHORTCUT_NAMES)}
in their names), which are not in the columns before."""
NO_SHORTCUTS = "No shortcut of these networks has a convolution."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--r", dest="checkpoints", metavar="CKPT", type=Path, nargs="+", required=True,
                        help="checkpoints to compare")  # fmt: skip
    parser.add_argument("--threshold", dest="thresholds", metavar="T", nargs="+",
                        type=flags.number(float, 0, low_open=True),
                        help="L1 norms below which a filter is invalid "
                             f"(default: {' '.join(map(str, THRESHOLDS))})")  # fmt: skip
    return parser.parse_args(arguments)


def table(checkpoints: list[tuple[str, list, list]], thresholds: list[float]) -> list[str]:
    """The lines of the table and its caption, from each one's label and what `count_invalid` returns."""
    has_shortcuts = any(total for _, _, shortcuts in checkpoints for _, total in shortcuts)
    rows = [["file", "threshold", "invalid", "total", "ratio (%)"] + ["shortcuts", "shortcuts (%)"] * has_shortcuts]
    for label, main_path, shortcuts in checkpoints:
        for threshold, (invalid, total), beside in zip(thresholds, main_path, shortcuts, strict=True):
            row = [label, f"{threshold:g}", invalid, total, percent(invalid, total)]
            apart = ["{} of {}".format(*beside) if beside[1] else "–", percent(*beside)]
            rows.append(row + apart * has_shortcuts)
    return [*markdown(rows, right=range(1, 7)), "", CAPTION, SHORTCUTS if has_shortcuts else NO_SHORTCUTS]


def percent(invalid: int, total: int) -> str:
    return f"{100 * invalid / total:.2f}" if total else "–"


def main() -> int:
    args = parse()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "–" is no reason to fail
    paths, thresholds = (list(dict.fromkeys(given)) for given in (args.checkpoints, args.thresholds or THRESHOLDS))
    counted, failures = [], []
    for label, path in zip(labels(paths), paths, strict=True):
        try:
            counted.append((label, *count_invalid(read_checkpoint(path)[0], thresholds)))
        except FileNotFoundError:
            failures.append(f"{path}: there is no such file")
        except (GraftingError, RuntimeError) as error:
            failures.append(str(error) if str(path) in str(error) else f"{path}: {error}")
    if counted:
        print(*table(counted, thresholds), sep="\n", flush=True)
    for failure in failures:
        print(printable(failure), file=sys.stderr)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
