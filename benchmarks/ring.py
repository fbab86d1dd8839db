#!/usr/bin/env python
"""A ring from the command line, as a user starts it: seconds to the end of the first epoch, and of an epoch.

    python benchmarks/ring.py --networks 2 --epochs 5 --model resnet32 --flags=--amp
    python benchmarks/ring.py --epochs 3 --model resnet20 --flags=--deterministic --killed

--killed runs the ring once more, with network 1 killed after its first epoch and resumed: the weights and momentum must
be the same, bit for bit.
"""

import argparse
import shlex
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from grafting_cifar import data
from training.flags import ROOT, number

PHASES = ("train", "test", "wait", "graft")


def run(args: argparse.Namespace, folder: Path, kill: bool = False) -> float:
    """Runs a ring to its end; returns the seconds until all networks had published their first epoch."""
    words = [str(ROOT / "grafting_cifar" / "grafting.py"), "--s", str(folder), "--num", str(args.networks)]
    words += ["--epochs", str(args.epochs), "--model", args.model, "--data", args.data, "--device", args.device.type]
    words += ["--images", str(args.images), "--test_images", str(args.images)] if args.images else []
    words += ["--keep_all", "--timeout", "2", *args.flags]
    networks, began = {}, time.time()
    folder.mkdir()
    try:
        for i in range(1, args.networks + 1):
            networks[i] = tools.start([*words, "--i", str(i)], folder / f"{i}.log")
        if kill:
            while networks[1].poll() is None and not (folder / f"ckpt{1 % args.networks}_0.t7").exists():
                time.sleep(0.02)
            networks[1].kill()
            networks[1].wait()
            networks[1] = tools.start([*words, "--i", "1", "--resume"], folder / "1.log")
        for i, network in networks.items():
            if network.wait():
                raise SystemExit((folder / f"{i}.log").read_text(errors="replace")[-2000:])
    finally:
        for network in networks.values():
            network.kill()
    return max((folder / f"ckpt{i}_0.t7").stat().st_ctime for i in range(args.networks)) - began


def phases(folder: Path) -> dict[str, float]:
    """Median seconds that the phases of an epoch take, over all networks and epochs but the first."""
    rows = pd.concat(map(pd.read_csv, folder.glob("metrics*.csv"))).query("epoch > 0")
    return {f"{phase} (s)": float(rows[f"{phase}_seconds"].fillna(0).median()) for phase in PHASES}


def outcome(args: argparse.Namespace, folder: Path) -> list[torch.Tensor]:
    """Weights and momentum of all networks after the last epoch."""
    tensors = []
    for i in range(args.networks):
        contents = torch.load(folder / f"ckpt{i}_{args.epochs - 1}.t7", map_location="cpu", weights_only=True)
        momenta = [state["momentum_buffer"] for state in contents["extra"]["optimizer"]["state"].values()]
        tensors += [*contents["net"].values(), *momenta]
    return tensors


def main(arguments: list[str] | None = None) -> int:
    parser = tools.parser(__doc__)
    flag = parser.add_argument
    flag("--networks", type=tools.count, default=2, metavar="N", help="in the ring")
    flag("--epochs", type=number(int, 2), default=3, help="of each")
    flag("--model", default="resnet20", help="as for grafting_cifar/grafting.py")
    flag("--flags", type=shlex.split, default=[], metavar="WORDS", help="further ones of grafting_cifar/grafting.py")
    flag("--data", default="glyphs", metavar="DIR", help="as for grafting_cifar/grafting.py")
    flag("--images", type=tools.count, metavar="N", help="to train and to test on (default: all)")
    flag("--killed", action="store_true", help="once more, with network 1 killed and resumed: must come to the same")
    args = tools.parse(parser, arguments)
    images = args.images or len(data.load(args.data).train.labels)  # decodes them, which is not to be measured
    caption = f"Rings from the command line, {images:,} images, on {args.device}; {args.epochs} epochs."
    table = tools.Table("ring", caption, args)
    row = {"networks": args.networks, "model": args.model, "flags": shlex.join(args.flags), "images": images}
    with tempfile.TemporaryDirectory() as made:
        once = Path(made, "once")
        row["s to the first epoch's end"] = run(args, once)
        row |= phases(once)
        if args.killed:
            run(args, Path(made, "killed"), kill=True)
            pairs = zip(outcome(args, once), outcome(args, Path(made, "killed")), strict=True)
            row["same"] = all(torch.equal(one, other) for one, other in pairs)
    table.add(**row)
    return int(not row.get("same", True))


if __name__ == "__main__":
    sys.exit(main())
