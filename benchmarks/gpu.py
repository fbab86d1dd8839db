#!/usr/bin/env python
"""Proves and measures on a machine with a GPU all that needs one, a call of under nine minutes at a time.

    python benchmarks/gpu.py OUT --cifar DIR --imagenet DIR
    python benchmarks/gpu.py OUT --device cpu --quick

Called again, it goes on where it ended: a step that is done is not done again, one that failed or ran out of time is
tried again after those that have not been tried. What each step prints goes to OUT/logs, every row that it measures,
with hardware and versions, to OUT/results.jsonl (with --quick: OUT/quick.jsonl). Keep an OUT for each kind of GPU.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from training.flags import ROOT, cores
from training.machine import versions

LEAST_SECONDS = 60  # a step is not begun with less time left
VARIANTS = "eager amp+eager ours amp compile amp+compile"
TRAINING = "benchmarks/training.py --images 12800 --models resnet32"
SMOKE = "benchmarks/ring.py --epochs 2 --images 2000 --model resnet20"
EPOCHS = "benchmarks/ring.py --epochs 6 --model resnet32"
IMAGENET = "--dataset imagenet --repetitions 3 --images 6400"
TRAINING_IMAGENET = f"benchmarks/training.py {IMAGENET} --batch_size 256"
TINY = "--repetitions 1 --images 8 --batch_size 4 --threads 1 --models resnet20"
TINY_IMAGENET = "--repetitions 1 --images 4 --batch_size 2 --size 32 --workers 0 --threads 1"
# Each step in its order: its command, and what makes it small; a dry run leaves out those without. Of words that come
# twice, the second counts.
PLAN = {
    "tests": (f"-m pytest -q -n 2 -m cuda {shlex.quote(str(ROOT / 'tests'))}", None),
    "smoke, plain": (SMOKE, "--images 8"),
    "smoke, amp": (f"{SMOKE} --flags=--amp", None),
    "smoke, amp, compiled": (f"{SMOKE} --flags='--amp --compile'", None),
    "smoke, ema": (f"{SMOKE} --networks 1 --flags='--method ema'", "--images 8"),
    "smoke, filter level": (f"{SMOKE} --model vgg16 --flags='--level filter'", None),
    "smoke, noise": (f"{SMOKE} --networks 1 --flags='--scion noise'", "--images 8"),
    "smoke, internal": (f"{SMOKE} --networks 1 --flags='--scion internal'", None),
    "deterministic": (f"{SMOKE} --epochs 3 --flags=--deterministic --killed", "--images 8"),
    "training, resnet32": (f"{TRAINING} --variants plain {VARIANTS}", f"{TINY} --variants plain amp"),
    "networks": (f"{TRAINING} --variants amp --processes 1 2 4 8", f"{TINY} --processes 2"),
    "networks with MPS": (f"{TRAINING} --variants amp --processes 1 2 4 8", f"{TINY} --processes 1"),
    "epochs, amp": (f"{EPOCHS} --flags=--amp", "--model resnet20 --epochs 2 --images 8"),
    "grafting": ("benchmarks/grafting.py", "--repetitions 1 --models resnet20"),
    "ImageNet loader": (f"benchmarks/data.py {IMAGENET} --batch_size 64", TINY_IMAGENET),
    "ImageNet resnet50": (
        f"{TRAINING_IMAGENET} --variants amp --models resnet50",
        f"{TINY_IMAGENET} --models resnet18",
    ),
    "profile": (f"{TRAINING} --images 2560 --variants {VARIANTS} --profile", f"{TINY} --variants eager"),
    "exchange": (
        "benchmarks/exchange.py --sizes 2 20 200 --networks 2 --sleep 0.1 --repetitions 1 --epochs 30",
        "--sizes 2 --epochs 2",
    ),
    "training, mobilenetv2": (f"{TRAINING} --models mobilenetv2 --variants plain {VARIANTS}", None),
    "training, vgg16": (f"{TRAINING} --models vgg16 --variants plain {VARIANTS}", None),
    "epochs, plain": (EPOCHS, None),
    "epochs, amp, compiled": (f"{EPOCHS} --flags='--amp --compile'", None),
    "networks, amp+compile": (f"{TRAINING} --variants amp+compile --processes 1 2 4 8", None),
    "networks, eager": (f"{TRAINING} --variants amp+eager --processes 1 2 4 8", None),
    "ImageNet resnet50, compiled": (f"{TRAINING_IMAGENET} --variants amp+compile --models resnet50", None),
    "ImageNet resnet18": (f"{TRAINING_IMAGENET} --variants amp amp+compile --models resnet18", None),
    "training, resnet110": (f"{TRAINING} --models resnet110 --variants plain {VARIANTS}", None),
    "rings": ("benchmarks/exchange.py --epochs 4", None),
    "tables": ("experiments/run.py all", "--preset smoke --dry-run"),  # cheapest row first; goes on in the next call
}


def plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """The steps in their order, each with the words of its command."""
    if args.quick:
        steps = {name: shlex.split(f"{line} {small}") for name, (line, small) in PLAN.items() if small is not None}
    else:
        steps = {name: shlex.split(line) for name, (line, _) in PLAN.items()}
    folders = [f"cifar10={args.cifar}"] * bool(args.cifar) + [f"imagenet={args.imagenet}"] * bool(args.imagenet)
    steps["tables"] += ["--work", str(args.out / "work"), "--results", str(args.out / "tables")]
    steps["tables"] += ["--data", *folders] if folders else []
    if not folders and not args.quick:
        del steps["tables"]
    for words in steps.values():
        if words[0].startswith("benchmarks"):
            words += ["--device", args.device.type, "--json", str(args.json)]
        if words[0] == "benchmarks/ring.py" and args.cifar:
            words += ["--data", str(args.cifar)]
        if "imagenet" in words:
            words += ["--data", str(args.imagenet / "train")] if args.imagenet else []
            words += [] if args.quick else ["--workers", str(cores())]
        words[:] = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    return steps


def execute(words: list[str], log: Path, limit: float, **variables: str) -> int | str:
    """The exit status; "out of time" if it took longer than `limit` seconds, and was ended with all its children."""
    process = tools.start(words, log, **variables)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(patience)


def execute_with_mps(words: list[str], log: Path, limit: float) -> int | str:
    """The same, with processes that share the GPU by CUDA's Multi-Process Service."""
    control = shutil.which("nvidia-cuda-mps-control")
    if not control or subprocess.run([control, "-d"], timeout=60).returncode:
        log.write_text("MPS cannot be started here.\n")
        return 0  # that is what there is to say
    try:
        return execute(words, log, limit, MPS="1")
    finally:
        subprocess.run([control], input="quit\n", text=True, timeout=60)


def preflight(args: argparse.Namespace) -> None:
    """What this machine has; where torch cannot use its GPU, the flags have been refused before."""
    shared = Path("/dev/shm")
    found = {
        "cores": os.cpu_count(),
        "compiler": shutil.which("cc") or shutil.which("gcc") or "none",
        "/dev/shm free (GB)": shutil.disk_usage(shared).free / 1e9 if shared.is_dir() else 0.0,
        "MPS": shutil.which("nvidia-cuda-mps-control") or "none",
    }
    if args.device.type == "cuda":
        about = torch.cuda.get_device_properties(args.device)
        found |= {"GPU": about.name, "capability": f"{about.major}.{about.minor}", "CUDA": torch.version.cuda}
        found |= {"GPU memory (GB)": about.total_memory / 1e9, "cuDNN": torch.backends.cudnn.version()}
        found["driver"] = subprocess.getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader")
    tools.Table("preflight", "The machine.", args).add(**found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = tools.parser(__doc__)
    flag = parser.add_argument
    flag("out", type=Path, metavar="OUT", help="folder of the results")
    flag("--minutes", type=float, default=9.0, help="of this call; what is left is for the next one")
    flag("--only", nargs="+", metavar="STEP", choices=PLAN, default=[], help="of the steps")
    flag("--cifar", type=Path, metavar="DIR", help="CIFAR-10, as for grafting_cifar (default: glyphs)")
    flag("--imagenet", type=Path, metavar="DIR", help="a folder with train/ (default: made-up images)")
    flag("--quick", action="store_true", help="everything at its smallest, to see that it works")
    parser.set_defaults(device="cuda")
    args = tools.parse(parser, arguments)
    args.out = args.out.resolve()
    args.json = args.json or args.out / ("quick.jsonl" if args.quick else "results.jsonl")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    steps, end, failed = plan(args), time.monotonic() + 60 * args.minutes, 0
    preflight(args)
    tried = [one for one in tools.read(args.json) if one.get("device") == str(args.device) and "step" in one]
    done = {one["step"] for one in tried if one["status"] == 0}
    tries = Counter(one["step"] for one in tried)
    wanted = sorted((name for name in steps if name in (args.only or steps)), key=tries.__getitem__)
    for name in wanted:
        if name in done:
            print(f"{name}: done before", flush=True)
        elif (left := end - time.monotonic()) < LEAST_SECONDS:
            print("out of time; the same command goes on", flush=True)
            return 1
        else:
            began, log = time.monotonic(), args.out / "logs" / f"{name.replace(' ', '_')}.log"
            status = (execute_with_mps if "MPS" in name else execute)(steps[name], log, left - 25)
            record = {"step": name, "status": status, "seconds": time.monotonic() - began, "command": steps[name]}
            tools.append(args.json, record | {"device": str(args.device), "versions": versions()})
            outcome = "done" if status == 0 else status if isinstance(status, str) else f"failed ({status}), see {log}"
            print(f"{name}: {outcome}, {record['seconds']:.0f} s", flush=True)
            failed += status != 0
    print(f"{len(wanted) - failed} steps done, {failed} not: {args.json}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
