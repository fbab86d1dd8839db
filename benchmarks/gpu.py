#!/usr/bin/env python
"""All that needs a GPU, in one call of under ten minutes; called again, it goes on where it ended.

    python benchmarks/gpu.py OUT
    python benchmarks/gpu.py OUT --ring
    python benchmarks/gpu.py OUT --device cpu --quick

ResNet-32 on 50,000 images, ours against plain.py (images per second, seconds per epoch); 1, 2 and 4 networks at the
same time on one GPU; the grafting step; where an epoch's time goes; with --ring, a ring of 2 for 200 epochs. Tables go
to standard output, every row to OUT/results.jsonl, and a step that has been done is not done again.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent


def plan(args: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each step."""
    model, images = ("resnet20", 256) if args.quick else ("resnet32", 50_000)
    images = str(args.images or images)
    repetitions = ["--repetitions", "1" if args.quick else "3"]
    trained = ["training.py", "--models", model, "--images", images, *repetitions]
    graft = ["grafting.py", *repetitions] if args.quick else ["grafting.py", "--repetitions", "15"]
    ring = ["phases.py", "--model", model, "--images", images, "--amp"]
    steps = {
        "eager": [*trained, "--variants", "plain", "ours", "amp"],
        "grafting": [*graft, "--models", model] if args.quick else graft,
        "compiled": [*trained, "--variants", "plain", "amp", "amp+compile"],
        "networks": [*trained, "--variants", "amp", "--processes", "1", "2", "4"],
        "networks, compiled": [*trained, "--variants", "amp+compile", "--processes", "1", "2", "4"],
        "phases": ring,
        "phases, as it is": [*ring, "--compile", "--whole"],
    }
    if args.quick:
        del steps["compiled"], steps["networks, compiled"], steps["phases, as it is"]
    if args.ring:
        epochs = "3" if args.quick else "200"
        options = [] if args.quick else ["--compile"]
        steps["ring"] = [*ring, *options, "--whole", "--epochs", epochs, "--s", str(args.out / "ring")]
    only = set(args.only or steps)
    return {name: command for name, command in steps.items() if name in only}


def done(results: Path) -> set[str]:
    with contextlib.suppress(FileNotFoundError):
        records = [json.loads(line) for line in results.read_text().splitlines()]
        return {record["step"] for record in records if record.get("step") and record["status"] == 0}
    return set()


def execute(command: list[str], limit: float) -> int | str:
    """The exit status; "out of time" if it took longer than `limit` seconds, and was ended with all its children."""
    process = subprocess.Popen([sys.executable, str(HERE / command[0]), *command[1:]], start_new_session=True)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            time.sleep(1)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for results.jsonl")
    parser.add_argument("--minutes", type=float, default=9.5, help="what is left is for the next call (default: 9.5)")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="of the steps (default: all)")
    parser.add_argument("--ring", action="store_true", help="also the ring of 2 for 200 epochs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="(default: cuda)")
    parser.add_argument("--images", type=int, help="(default: 50000; 256 with --quick)")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that everything works")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results, end, failed = args.out / "results.jsonl", time.monotonic() + 60 * args.minutes, 0
    before = done(results)
    for name, command in plan(args).items():
        if name in before:
            print(f"{name}: done before", flush=True)
            continue
        command += ["--device", args.device, "--json", str(results)]
        print(f"# {name}: {' '.join(command)}\n", flush=True)
        began = time.monotonic()
        status = execute(command, end - began)
        record = {"step": name, "command": command, "status": status, "seconds": time.monotonic() - began}
        with open(results, "a") as file:
            file.write(json.dumps(record) + "\n")
        failed += status != 0
        if time.monotonic() > end - 5:
            print("out of time; call again to go on", flush=True)
            return 1
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
