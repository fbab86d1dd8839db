#!/usr/bin/env python
"""Proves and measures on a machine with a GPU all that needs one, a call of under nine minutes at a time.

    python benchmarks/gpu.py OUT --cifar DIR --imagenet DIR
    python benchmarks/gpu.py OUT --device cpu --quick

Called again, it goes on where it ended: a step that is done is not done again, one that failed or ran out of time is
tried again after those that have not been tried. What each step prints goes to OUT/logs, every row that it measures,
with hardware and versions, to OUT/results.jsonl (with --quick: OUT/quick.jsonl). Keep an OUT for each kind of GPU.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from benchmarks import tools
from training.machine import ROOT

MADE = Path(tempfile.gettempdir(), "filter_grafting_images")  # kept, as to make 60,000 takes a minute
LEAST_SECONDS = 30  # a step is not begun with less time left
MATHEMATICS = ("information", "graft_layer_level", "graft_filter_level", "checkpoint", "cifar_data")
SMOKE = {
    "plain": "",
    "amp": "--amp",
    "amp, compiled": "--amp --compile",
    "ema": "--method ema",
    "filter level": "--level filter",
    "noise": "--scion noise",
    "internal": "--scion internal",
}


def plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """The steps in their order, each with the command that does it."""
    quick, device = args.quick, ["--device", args.device]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "--rootdir", str(ROOT)]
    mathematics = [str(ROOT / "tests" / f"test_{name}.py") for name in MATHEMATICS[: 1 if quick else None]]
    small, model = ["--images", "64" if quick else "2000"], "resnet20" if quick else "resnet32"
    images = "64" if quick else "50000"
    batch = ["--batch_size", "32"] if quick else []
    few = ["--repetitions", "1" if quick else "3"]
    cifar = ["--data", str(args.cifar)] if args.cifar else ["--images", images, "--made", str(MADE / images)]
    imagenet = ["--data", str(args.imagenet / "train")] if args.imagenet else []

    def benchmark(name: str, *words: str) -> list[str]:
        return [str(ROOT / "benchmarks" / f"{name}.py"), *words, *device, "--json", str(args.results)]

    def training(name: str, *variants: str) -> list[str]:
        return benchmark("training", "--models", name, "--images", images, *few, *batch, "--variants", *variants)

    steps = {"preflight": [str(Path(__file__).resolve()), str(args.out), "--preflight", *device]}
    steps["preflight"] += ["--quick"] * quick
    steps["tests on CUDA"] = [*pytest, "-m", "cuda", str(ROOT / "tests")]
    steps["mathematics"] = [*pytest, *mathematics]
    for name, flags in SMOKE.items():
        if quick and name not in ("plain", "ema", "filter level"):
            continue
        alone = name in ("ema", "noise", "internal")
        chain = "vgg16" if name == "filter level" else "resnet20"
        words = ["--networks", "1" if alone else "2", "--epochs", "2", "--model", chain, f"--flags={flags}"]
        steps[f"smoke, {name}"] = benchmark("ring", *words, *small)
    checked = ["--epochs", "3", "--model", "resnet20", "--flags=--deterministic", "--same", "--killed"]
    steps["deterministic"] = benchmark("ring", *checked, *small)
    ways = ("ours", "amp") if quick else ("ours", "amp", "compile", "amp+compile", "graph", "amp+graph")
    profiled = ["--model", model, "--steps", "2" if quick else "20", *batch, "--variants", *ways]
    steps["profile"] = benchmark("profiling", *profiled)
    for name in [model] if quick else ["resnet32", "mobilenetv2", "vgg16", "resnet110"]:
        steps[f"training, {name}"] = training(name, "plain", *ways)
    for flags in [""] if quick else ["", "--amp", "--amp --compile"]:
        words = ["--model", model, "--epochs", "2" if quick else "6", f"--flags={flags}", *cifar]
        steps[f"epochs, {flags or 'plain'}"] = benchmark("ring", *words)
    several = ["--processes", "1", "2", *([] if quick else ["4", "8"])]
    for name in ("networks", "networks with MPS"):
        steps[name] = [*training(model, "amp"), *several]
    for name in () if quick else ("amp+compile", "amp+graph"):
        steps[f"networks, {name}"] = [*training(model, name), *several]
    graft = ["--models", model] if quick else []
    steps["grafting"] = benchmark("grafting", *few, *graft)
    sizes = [
        "--sizes",
        "0.1",
        "--networks",
        "2",
        "--epochs",
        "2",
        "--rings",
        "1",
        "--sleep",
        "0.1",
        "--repetitions",
        "2",
    ]
    steps["exchange"] = benchmark("exchange", *(sizes if quick else ["--repetitions", "30", "--epochs", "4"]))
    loaded = (
        ["--images", "8", "--size", "32", "--batch-size", "4", "--workers", "1"] if quick else ["--images", "12800"]
    )
    steps["ImageNet loader"] = benchmark("imagenet_loader", *loaded, *few, *imagenet)
    for arch in ["resnet18"] if quick else ["resnet18", "resnet50"]:
        for flags in [["--amp"]] if quick else [["--amp"], ["--amp", "--compile"]]:
            size = loaded if quick else [*loaded, "--batch-size", "256"]
            name = " ".join([arch, *flags])
            steps[f"ImageNet {name}"] = benchmark("imagenet_loader", "--arch", arch, *flags, *size, *few, *imagenet)
    steps |= tables(args)
    return steps


def tables(args: argparse.Namespace) -> dict[str, list[str]]:
    """The published tables, cheapest row first; a stopped row goes on in the next call."""
    folders = [f"cifar10={args.cifar}"] * bool(args.cifar) + [f"imagenet={args.imagenet}"] * bool(args.imagenet)
    if not folders and not args.quick:
        return {}
    what = ["smoke"] if args.quick else ["paper"]
    command = [str(ROOT / "experiments" / "run.py"), "all", "--preset", *what, "--work", str(args.out / "work")]
    command += ["--results", str(args.out / "tables")]
    return {"tables": command + ["--dry-run"] * args.quick + (["--data", *folders] if folders else [])}


def preflight(args: argparse.Namespace) -> int:
    """A row about the machine; a failure if it lacks what all that follows needs."""
    found = {"cores": os.cpu_count(), "compiler": shutil.which("cc") or shutil.which("gcc") or "none"}
    shared = Path("/dev/shm")
    found["/dev/shm free (GB)"] = shutil.disk_usage(shared).free / 1e9 if shared.is_dir() else 0.0
    found["MPS"] = shutil.which("nvidia-cuda-mps-control") or "none"
    if args.device == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"GPU": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        found |= {"GPU memory (GB)": properties.total_memory / 1e9, "CUDA": torch.version.cuda}
        found["cuDNN"] = torch.backends.cudnn.version()
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(asked, capture_output=True, text=True, timeout=60).stdout.strip()
        torch.ones(8, device="cuda").sum().item()
    tools.Table("preflight", "The machine.", args.results, args.device).add(**found)
    return int(args.device == "cuda" and not torch.cuda.is_available())


@contextlib.contextmanager
def mps(wanted: bool) -> Iterator[dict[str, str] | None]:
    """Variables for processes that share the GPU by CUDA's Multi-Process Service; None if it cannot be started."""
    control = shutil.which("nvidia-cuda-mps-control")
    if not wanted or not control:
        yield None if wanted else {}
        return
    with tempfile.TemporaryDirectory() as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder, "MPS": "1"}
        environment = {**os.environ, **variables}
        started = subprocess.run([control, "-d"], env=environment, timeout=60).returncode == 0
        try:
            yield variables if started else None
        finally:
            if started:
                subprocess.run([control], input="quit\n", text=True, env=environment, timeout=60)


def execute(command: list[str], log: Path, limit: float, variables: dict[str, str]) -> int | str:
    """The exit status; "out of time" if it took longer than `limit` seconds, and was ended with all its children."""
    environment = {**os.environ, **variables}
    with open(log, "ab") as output:
        options = {"stdout": output, "stderr": subprocess.STDOUT, "env": environment, "start_new_session": True}
        process = subprocess.Popen([sys.executable, *command], **options)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 5)):  # rows are written when it is asked to end
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(timeout=patience)


def main() -> int:
    parser = tools.parser(__doc__)
    flag = parser.add_argument
    flag("out", type=Path, metavar="OUT", help="folder of the results")
    flag("--minutes", type=float, default=9.0, help="of this call; what is left is for the next one")
    flag("--only", nargs="+", metavar="STEP", default=[], help="of the steps")
    flag("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for a dry run")
    flag("--cifar", type=Path, metavar="DIR", help="CIFAR-10, as for grafting_cifar (default: made-up images)")
    flag("--imagenet", type=Path, metavar="DIR", help="a folder with train/ (default: made-up images)")
    flag("--quick", action="store_true", help="everything at its smallest, to see that it works")
    flag("--preflight", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.results = args.out / ("quick.jsonl" if args.quick else "results.jsonl")
    if args.preflight:
        return preflight(args)
    steps = plan(args)
    if unknown := [name for name in args.only if name not in steps]:
        parser.error(f"argument --only: got {unknown[0]!r}, expected some of {', '.join(map(repr, steps))}")
    (args.out / "logs").mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * args.minutes
    tried = [one for one in tools.read(args.results) if one.get("device") == args.device and "step" in one]
    done = {one["step"] for one in tried if one["status"] == 0}
    tries = {name: sum(one["step"] == name for one in tried) for name in steps}
    wanted = sorted((name for name in steps if name in (args.only or steps)), key=tries.__getitem__)
    failed = []
    for name in wanted:
        if name in done:
            print(f"{name}: done before", flush=True)
            continue
        left = end - time.monotonic()
        if left < min(LEAST_SECONDS, 30 * args.minutes):
            print("out of time; the same command goes on", flush=True)
            return 1
        began, log = time.monotonic(), args.out / "logs" / f"{name.replace(' ', '_')}.log"
        with mps(name.endswith("with MPS")) as variables:
            # Where there is no MPS, that is what there is to say.
            status = 0 if variables is None else execute(steps[name], log, left - 2, variables)
        record = {"step": name, "status": status, "seconds": time.monotonic() - began, "command": steps[name]}
        record |= {"device": args.device, "hardware": tools.hardware(), "versions": tools.versions()}
        tools.append(args.results, record | ({"note": "MPS cannot be started here"} if variables is None else {}))
        outcome = "done" if status == 0 else status if isinstance(status, str) else f"failed ({status}), see {log}"
        print(f"{name}: {outcome}, {record['seconds']:.0f} s", flush=True)
        failed += [name] * (status != 0)
    print(f"{len(wanted) - len(failed)} steps done, {len(failed)} not: {args.results}", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
