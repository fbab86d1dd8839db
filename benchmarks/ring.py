#!/usr/bin/env python
"""A ring from the command line, as a user starts it: seconds to the end of the first epoch, and of an epoch.

    python benchmarks/ring.py --networks 2 --epochs 5 --model resnet32 --flags=--amp
    python benchmarks/ring.py --epochs 3 --model resnet20 --flags=--deterministic --same --killed

--same runs the ring twice, and --killed once more with network 1 killed after its first epoch and resumed: the weights
and momentum must be the same, bit for bit. Without --data, images are made up.
"""

import argparse
import csv
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from grafting_cifar import data
from training.machine import ROOT

END_SECONDS = 500  # for a ring


class Failed(Exception):
    """A network ended with an error; the message is the end of its log."""


class Ring:
    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.processes = args, folder, {}
        folder.mkdir(parents=True)

    def start(self, i: int, *flags: str) -> None:
        args = self.args
        words = ["--s", str(self.folder), "--i", str(i), "--num", str(args.networks), "--epochs", str(args.epochs)]
        words += ["--data", str(args.data), "--model", args.model, "--device", args.device, *args.flags, *flags]
        with open(self.folder / f"{i}.log", "ab") as log:
            command = [sys.executable, str(ROOT / "grafting_cifar" / "grafting.py"), *words]
            self.processes[i] = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def has_trained(self, i: int) -> bool:
        return f"Network:{i}    epoch:0" in (self.folder / f"{i}.log").read_text(errors="replace")

    def run(self, kill: bool = False) -> float:
        """Runs it to its end; returns the seconds from its start to the end of the last network's first epoch."""
        began, first, numbers = time.monotonic(), 0.0, range(1, self.args.networks + 1)
        try:
            for i in numbers:
                self.start(i)
            while any(process.poll() is None for process in self.processes.values()):
                time.sleep(0.02)
                if not first and all(map(self.has_trained, numbers)):
                    first = time.monotonic() - began
                if kill and self.has_trained(1):
                    kill = False
                    self.processes[1].kill()
                    self.processes[1].wait()
                    self.start(1, "--resume")
                lost = [i for i, process in self.processes.items() if process.poll()]
                if lost or time.monotonic() - began > END_SECONDS:
                    raise Failed((self.folder / f"{(lost or [1])[0]}.log").read_text(errors="replace")[-2000:])
            return first or time.monotonic() - began
        finally:
            for process in self.processes.values():
                process.kill()
                process.wait()

    def column(self, name: str) -> list[float]:
        """Of all networks and epochs but the first."""
        rows = [row for path in self.folder.glob("metrics*.csv") for row in csv.DictReader(path.open())]
        return [float(row[name]) for row in rows if int(row["epoch"]) and row[name]]

    def outcome(self) -> list[torch.Tensor]:
        """Weights and momentum of all networks after the last epoch."""
        tensors = []
        for i in range(1, self.args.networks + 1):
            path = self.folder / f"ckpt{i % self.args.networks}_{self.args.epochs - 1}.t7"
            contents = torch.load(path, map_location="cpu", weights_only=True)
            tensors += contents["net"].values()
            tensors += [one["momentum_buffer"] for one in contents["extra"]["optimizer"]["state"].values()]
        return tensors

    def is_same(self, other: "Ring") -> bool:
        return all(torch.equal(own, their) for own, their in zip(self.outcome(), other.outcome(), strict=True))


def main() -> int:
    parser = tools.parser(__doc__)
    tools.add_device(parser)
    flag = parser.add_argument
    flag("--networks", type=tools.count, default=2, metavar="N", help="in the ring")
    flag("--epochs", type=tools.count, default=3, help="of each")
    flag("--model", default="resnet20", help="as for grafting_cifar/grafting.py")
    flag("--flags", type=shlex.split, default=[], metavar="WORDS", help="further ones of grafting_cifar/grafting.py")
    flag("--data", metavar="DIR", help="as for grafting_cifar/grafting.py (default: made-up images)")
    flag("--images", type=tools.count, default=50_000, metavar="N", help="made-up images")
    flag("--made", type=Path, metavar="DIR", help="where to keep these for the next time (default: nowhere)")
    flag("--same", action="store_true", help="run it twice: the outcome must be the same")
    flag("--killed", action="store_true", help="kill and resume network 1: the outcome must be the same")
    args = parser.parse_args()
    args.device = tools.device_of(parser, args).type
    with tempfile.TemporaryDirectory() as made:
        args.data = args.data or tools.make_images(args.made or Path(made) / "images", args.images, (32, 32))
        images = len(data.load(args.data).train.labels)  # decodes them, which is not to be measured
        caption = f"Rings from the command line, {images:,} images, on {args.device}; {args.epochs} epochs."
        table, rings, result = tools.Table("ring", caption, args.json, args.device), {}, {}
        row = {"networks": args.networks, "model": args.model, "flags": shlex.join(args.flags)}
        try:
            for name in ["once"] + ["same"] * args.same + ["killed"] * args.killed:
                rings[name] = Ring(args, Path(made) / name)
                first = rings[name].run(kill=name == "killed")
                if name == "once":
                    result["s to the first epoch's end"] = first
                    for phase in ("train", "test", "wait", "graft"):
                        seconds = rings[name].column(f"{phase}_seconds") or [0.0]
                        result[f"{phase} (s)"] = statistics.median(seconds)
                else:
                    result[name] = rings[name].is_same(rings["once"])
            result["outcome"] = "done"
        except Failed as error:
            result["outcome"] = str(error).strip().splitlines()[-1]
            print(error, file=sys.stderr)
        finally:
            table.add(**row, **result, MPS=bool(os.environ.get("MPS")))
    return int(result["outcome"] != "done" or False in (result.get("same"), result.get("killed")))


if __name__ == "__main__":
    sys.exit(main())
