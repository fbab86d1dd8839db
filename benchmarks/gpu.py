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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from training.flags import ROOT, Parser
from training.machine import versions

LEAST_SECONDS = 30  # a step is not begun with less time left
TESTS = "information graft_layer_level graft_filter_level checkpoint cifar_data"
VARIANTS = "ours amp compile amp+compile graph amp+graph"
TRAINING = "benchmarks/training.py --images 50000 --models resnet32"
SMOKE = "benchmarks/ring.py --epochs 2 --images 2000 --model resnet20"
EPOCHS = "benchmarks/ring.py --epochs 6 --model resnet32"
LOADER = "benchmarks/imagenet_loader.py --repetitions 3 --images 12800"
IMAGENET = f"{LOADER} --batch-size 256 --amp"
PLAN = {  # each step and its command, in their order; of words that come twice, the second counts
    "preflight": "benchmarks/preflight.py",
    "tests": "-m pytest -q -p no:cacheprovider -n 0 tests/test_cuda.py tests/test_graphs.py "
    + " ".join(f"tests/test_{name}.py" for name in TESTS.split()),
    "smoke, plain": SMOKE,
    "smoke, amp": f"{SMOKE} --flags=--amp",
    "smoke, amp, compiled": f"{SMOKE} --flags='--amp --compile'",
    "smoke, ema": f"{SMOKE} --networks 1 --flags='--method ema'",
    "smoke, filter level": f"{SMOKE} --model vgg16 --flags='--level filter'",
    "smoke, noise": f"{SMOKE} --networks 1 --flags='--scion noise'",
    "smoke, internal": f"{SMOKE} --networks 1 --flags='--scion internal'",
    "deterministic": f"{SMOKE} --epochs 3 --flags=--deterministic --same --killed",
    "profile": f"{TRAINING} --images 2560 --variants {VARIANTS} --profile",
    "training, resnet32": f"{TRAINING} --variants plain {VARIANTS}",
    "training, mobilenetv2": f"{TRAINING} --models mobilenetv2 --variants plain {VARIANTS}",
    "training, vgg16": f"{TRAINING} --models vgg16 --variants plain {VARIANTS}",
    "training, resnet110": f"{TRAINING} --models resnet110 --variants plain {VARIANTS}",
    "epochs, plain": EPOCHS,
    "epochs, amp": f"{EPOCHS} --flags=--amp",
    "epochs, amp, compiled": f"{EPOCHS} --flags='--amp --compile'",
    "networks": f"{TRAINING} --variants amp --processes 1 2 4 8",
    "networks with MPS": f"{TRAINING} --variants amp --processes 1 2 4 8",
    "networks, amp+compile": f"{TRAINING} --variants amp+compile --processes 1 2 4 8",
    "networks, amp+graph": f"{TRAINING} --variants amp+graph --processes 1 2 4 8",
    "grafting": "benchmarks/grafting.py",
    "exchange": "benchmarks/exchange.py --repetitions 30 --epochs 4",
    "ImageNet loader": LOADER,
    "ImageNet resnet18": f"{IMAGENET} --arch resnet18",
    "ImageNet resnet18, compiled": f"{IMAGENET} --arch resnet18 --compile",
    "ImageNet resnet50": f"{IMAGENET} --arch resnet50",
    "ImageNet resnet50, compiled": f"{IMAGENET} --arch resnet50 --compile",
    "tables": "experiments/run.py all",  # cheapest row first; one that is stopped goes on in the next call
}
TINY = "--repetitions 1 --models resnet20 --images 8 --batch_size 4 --threads 1"
TINY_LOADER = "--repetitions 1 --images 4 --batch-size 2 --size 32 --workers 0"
QUICK = {  # the steps of a dry run, and what makes them small
    "preflight": "",
    "tests": "-k 'cuda or information'",
    "smoke, plain": "--images 8 --warm",
    "smoke, amp": "--images 8 --warm",
    "smoke, ema": "--images 8 --warm",
    "smoke, filter level": "--images 8 --warm",
    "smoke, noise": "--images 8 --warm",
    "smoke, internal": "--images 8 --warm",
    "deterministic": "--images 8 --warm",
    "profile": f"{TINY} --variants graph",
    "training, resnet32": f"{TINY} --variants plain amp graph",
    "epochs, plain": "--model resnet20 --epochs 2 --images 8 --networks 1",
    "networks": f"{TINY} --processes 1 2",
    "networks with MPS": f"{TINY} --processes 1 2",
    "grafting": "--repetitions 1 --models resnet20",
    "exchange": "--repetitions 2 --sizes 0.1 --networks 2 --epochs 2 --rings 1 --sleep 0.1",
    "ImageNet loader": TINY_LOADER,
    "ImageNet resnet18": TINY_LOADER,
    "tables": "--preset smoke --dry-run",
}


def plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """The steps in their order, each with the words of its command."""
    steps = {name: shlex.split(line) for name, line in PLAN.items()}
    if args.quick:
        steps = {name: steps[name] + shlex.split(words) for name, words in QUICK.items()}
    folders = [f"cifar10={args.cifar}"] * bool(args.cifar) + [f"imagenet={args.imagenet}"] * bool(args.imagenet)
    steps["tables"] += ["--work", str(args.out / "work"), "--results", str(args.out / "tables")]
    steps["tables"] += ["--data", *folders] if folders else []
    if not folders and not args.quick:
        del steps["tables"]
    for words in steps.values():
        if words[0].startswith("benchmarks"):
            words += ["--device", args.device, "--json", str(args.results)]
        if words[0] == "benchmarks/ring.py" and args.cifar:
            words += ["--data", str(args.cifar)]
        if words[0] == "benchmarks/imagenet_loader.py" and args.imagenet:
            words += ["--data", str(args.imagenet / "train")]
        words[:] = [str(ROOT / word) if word.endswith(".py") else word for word in words]
    return steps


def execute(words: list[str], log: Path, limit: float, warm: bool = False, **variables: str) -> int | str:
    """The exit status; "out of time" if it took longer than `limit` seconds, and was ended with all its children."""
    process = tools.start(words, log, warm, **variables)

    def has_ended(seconds: float) -> bool:  # not by join, which knows no time once another program has been loaded
        end = time.monotonic() + seconds
        while process.is_alive() and time.monotonic() < end:
            time.sleep(0.05)
        return not process.is_alive()

    try:
        return process.exitcode if has_ended(limit) else "out of time"
    finally:
        for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
                has_ended(patience)


def execute_with_mps(words: list[str], log: Path, limit: float, warm: bool = False) -> int | str:
    """The same, with processes that share the GPU by CUDA's Multi-Process Service."""
    control = shutil.which("nvidia-cuda-mps-control")
    if not control or subprocess.run([control, "-d"], timeout=60).returncode:
        log.write_text("MPS cannot be started here.\n")
        return 0  # that is what there is to say
    try:
        return execute(words, log, limit, warm, MPS="1")
    finally:
        subprocess.run([control], input="quit\n", text=True, timeout=60)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("out", type=Path, metavar="OUT", help="folder of the results")
    flag("--minutes", type=float, default=9.0, help="of this call; what is left is for the next one")
    flag("--only", nargs="+", metavar="STEP", choices=PLAN, default=[], help="of the steps")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for a dry run")
    flag("--cifar", type=Path, metavar="DIR", help="CIFAR-10, as for grafting_cifar (default: glyphs)")
    flag("--imagenet", type=Path, metavar="DIR", help="a folder with train/ (default: made-up images)")
    flag("--quick", action="store_true", help="everything at its smallest, to see that it works")
    args = parser.parse_args(arguments)
    args.out = args.out.resolve()
    args.results = args.out / ("quick.jsonl" if args.quick else "results.jsonl")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.quick:
        import torchvision  # noqa: F401  # warm starts find it imported
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    steps, end, failed = plan(args), time.monotonic() + 60 * args.minutes, 0
    tried = [one for one in tools.read(args.results) if one.get("device") == args.device and "step" in one]
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
            status = (execute_with_mps if "MPS" in name else execute)(steps[name], log, left - 25, args.quick)
            record = {"step": name, "status": status, "seconds": time.monotonic() - began, "command": steps[name]}
            tools.append(args.results, record | {"device": args.device, "versions": versions()})
            outcome = "done" if status == 0 else status if isinstance(status, str) else f"failed ({status}), see {log}"
            print(f"{name}: {outcome}, {record['seconds']:.0f} s", flush=True)
            failed += status != 0
    print(f"{len(wanted) - failed} steps done, {failed} not: {args.results}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
