"""Tabulates runs as Markdown, a row per network of each save directory and the mean of each run; plots them.

    python grafting_cifar/report.py checkpoint/demo/baseline checkpoint/demo/grafted
    python grafting_cifar/report.py checkpoint/* --plots plots >results.md

Runs on ImageNet are read as well. What is unfinished or damaged is said in the last column; anything that is
missing or unreadable makes the exit status 1.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from anywhere, without being installed

CAPTION = (
    "Best and last: test accuracy; the best epoch is chosen on the images of --val or, without, on the test images. "
    "Invalid: filters whose L1 norm is below the threshold. s/epoch: median, with test, wait and graft. ±: sample "
    "standard deviation over the networks of a run."
)


def main() -> int:
    description, _, more = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="save directory of a run")
    parser.add_argument("--plots", metavar="OUT", type=Path, help="folder for PNG files (default: none are drawn)")
    args = parser.parse_args()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no "±" is no reason to fail

    from grafting_cifar.runs import read_run  # imports torch: not for --help

    directories = list(dict.fromkeys(directory.resolve() for directory in args.directories))
    runs = [read_run(directory, label) for directory, label in zip(directories, labels(directories), strict=True)]
    print(*table(runs), sep="\n", flush=True)
    if args.plots:
        from grafting_cifar.plots import plot

        try:
            args.plots.mkdir(parents=True, exist_ok=True)
            paths = list(plot(runs, args.plots))
        except OSError as error:
            print(f"the plots cannot be written: {error}", file=sys.stderr)
            return 1
        print("", *(f"- {path}" for path in paths), sep="\n")
    return int(any(network.is_damaged for run in runs for network in run.networks))


def labels(directories: list[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(directory.parts) for directory in directories) + 1):
        ends = ["/".join(directory.parts[-depth:]) for directory in directories]
        if len(set(ends)) == len(ends):
            break
    return ends


def table(runs: list) -> list[str]:
    """The lines of a Markdown table of the runs, aligned so that it can be read as it is, too."""
    from grafting_cifar.runs import THRESHOLDS

    heading = ["run", "network", "model", "method", "epochs", "best (%)", "last (%)"]
    heading += [f"invalid at {threshold:g}" for threshold in THRESHOLDS]
    rows = [[*heading, "counted in", "s/epoch", "state"]]
    for run in runs:
        rows += [network_row(run, network) for network in run.networks]
        rows.append(mean_row(run))
    return [*markdown(rows), "", CAPTION]


def markdown(rows: list[list], right: Sequence[int] = ()) -> list[str]:
    """The lines of a Markdown table with the first row as its heading, and these columns flush right."""
    cells = [[cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    sides = [str.rjust if column in right else str.ljust for column in range(len(widths))]
    head, *body = [
        "| " + " | ".join(pad(*column) for pad, *column in zip(sides, row, widths, strict=True)) + " |" for row in cells
    ]
    rule = ["-" * (width + 1) + ("-", ":")[column in right] for column, width in enumerate(widths)]
    return [head, "|" + "|".join(rule) + "|", *body]


def network_row(run, network) -> list:
    counts = [
        f"{invalid} of {total}" + (f", shortcuts {beside[0]} of {beside[1]}" if beside[1] else "")
        for (invalid, total), beside in zip(network.invalid, network.shortcuts, strict=True)
    ]
    return [
        run.label,
        network.number,
        run.model,
        run.method,
        len(network.epochs),
        mean([network.best], 2),
        mean([network.last], 2),
        *(counts or ["–", "–"]),
        network.counted_in or "–",
        mean([network.seconds_per_epoch], 2),
        "; ".join([network.state, *network.remarks]),
    ]


def mean_row(run) -> list:
    """Means over the networks that have a value."""
    counts = zip(
        *([invalid for invalid, _ in network.invalid] for network in run.networks if network.invalid),
        strict=True,
    )
    return [
        run.label,
        f"mean of {len(run.networks)}",
        run.model,
        run.method,
        "",
        mean([network.best for network in run.networks], 2),
        mean([network.last for network in run.networks], 2),
        *([mean(count, 1) for count in counts] or ["–", "–"]),
        "",
        mean([network.seconds_per_epoch for network in run.networks], 2),
        "",
    ]


def mean(values: list[float], digits: int) -> str:
    """Mean ± sample standard deviation of the values that are there."""
    there = [value for value in values if not math.isnan(value)]
    if not there:
        return "–"
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    missing = f" ({len(there)} of {len(values)})" if len(there) < len(values) else ""
    return f"{statistics.mean(there):.{digits}f}{deviation}{missing}"


def cell(value: object) -> str:
    """Fit for a Markdown table, whoever wrote the run's files."""
    from common.manage import printable

    return printable(value).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
