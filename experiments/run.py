#!/usr/bin/env python
"""Runs what the tables of experiments/tables.py need and is not there yet, several networks side by side.

    python experiments/run.py main fair --preset small --data DIR
    python experiments/run.py all --dry-run

Stopped or killed, the same command goes on where it was. Each finished run leaves its metrics under results/, from
which experiments/report.py makes the tables and plots.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from analysis.runs import THRESHOLDS, count_invalid, read_checkpoint
from experiments.results import OtherCommand, read_result
from experiments.tables import PRESETS, SEEDS, TABLES, Run, runs
from filter_grafting.checkpoint import write_atomically
from filter_grafting.membership import Status, duration, observe, read_status
from training import launch
from training.flags import Parser, number, path
from training.machine import hardware, versions
from training.process import Signals

ROOT = Path(__file__).resolve().parent.parent
NETWORKS_PER_GPU = 4  # on CIFAR; one on ImageNet
POLL_SECONDS, LINE_SECONDS, END_SECONDS = 0.5, 60.0, 120.0
SLURM = """\
#!/bin/bash
#SBATCH --job-name=grafting
#SBATCH --array=0-{last}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
# A task that is preempted, requeued, at its time limit or sent again goes on where it was. When all are done, this
# makes what remains (ensembles):
#   {again}
runs=(
{names}
)
{again} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}" &
queue=$! at_limit= status=0
trap 'kill -TERM "$queue"' TERM
trap 'at_limit=yes; kill -TERM "$queue"' USR1
while kill -0 "$queue" 2>/dev/null; do  # a signal ends a wait before its time
    wait "$queue" && status=0 || status=$?
done
if [ -n "$at_limit" ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("tables", metavar="TABLE", nargs="+", help=f"{', '.join(TABLES)}, or all")
    presets = "paper: as published; small: for hours on 2 cores; smoke: a test"
    flag("--preset", choices=PRESETS, default="paper", help=presets)
    flag("--seeds", metavar="K", type=number(int, 1, SEEDS), default=3, help="runs of each row")
    images = (
        "the images: the folder of the standard CIFAR files, or one of class folders, for the data set that has as "
        "many classes; NAME (cifar10, cifar100, imagenet) says for which alone (default: the script's own)"
    )
    flag("--data", metavar="[NAME=]DIR", nargs="+", default=[], help=images)
    at_once = (
        "networks that train at once; a run begins when its own fit in, one that has more begins alone (default: one "
        f"for each core, or {NETWORKS_PER_GPU} for each GPU, where one of ImageNet counts as that many)"
    )
    flag("--jobs", metavar="J", type=number(int, 1), help=at_once)
    only = "of these runs only those named, as NAME or NAME/seedK, see --dry-run"
    flag("--only", metavar="RUN", nargs="+", default=[], help=only)
    saved, left = ROOT / "checkpoint" / "experiments", ROOT / "results"
    flag("--work", metavar="DIR", type=path, default=saved, help="where the runs' save directories are")
    flag("--results", metavar="DIR", type=path, default=left, help="where finished runs leave their metrics")
    flag("--dry-run", action="store_true", help="print the command lines of what is missing")
    flag("--slurm", action="store_true", help="print a job array for Slurm, a task for each missing run")
    args = parser.parse_args(arguments)
    for name in args.tables:
        if name not in (*TABLES, "all"):
            parser.error(f"argument TABLE: got {name!r}, expected {', '.join(TABLES)}, or all")
    args.tables = list(TABLES) if "all" in args.tables else args.tables
    args.work, args.results = args.work.resolve(), args.results.resolve()
    folders: dict[str, str] = {}
    for text in args.data:
        named = re.fullmatch(r"(?:(cifar10|cifar100|imagenet)=)?(.*)", text)
        folder = Path(named[2]).expanduser().resolve()
        if not folder.is_dir():
            parser.error(f"argument --data: there is no folder {folder}")
        if folders.setdefault(named[1] or "", str(folder)) != str(folder):
            parser.error("argument --data: got two folders for the same images, expected one")
    args.data, args.runs = folders, runs(args.tables, args.preset, args.seeds)
    if not args.runs:
        parser.error(f"argument --preset: {args.preset} runs nothing of {', '.join(args.tables)}")
    known = {name for run in args.runs for name in (run.name, str(run))}
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"argument --only: {unknown[0]} is none of these tables' runs, see --dry-run")
    return args


def data_flags(run: Run, folders: dict[str, str]) -> list[str] | None:
    """The flags that name the run's images; None if no folder was given that has them."""
    if run.data == "glyphs":
        return ["--data", "glyphs"]
    if run.data in folders:
        return ["--data", folders[run.data]]
    if run.data == "imagenet":
        return None
    if "" not in folders:
        return []
    train = Path(folders[""], "train")
    if train.is_dir() and sum(entry.is_dir() for entry in train.iterdir()) != int(run.data.removeprefix("cifar")):
        return None
    return ["--data", folders[""]]


# ---- A run


class Job:
    """A run of the tables, its folders, and the processes that train its networks."""

    def __init__(self, run: Run, args: argparse.Namespace, images: list[str]):
        self.run, self.preset, self.failure = run, args.preset, ""
        self.save, self.results = args.work / args.preset / str(run), args.results / args.preset / str(run)
        if run.members:
            self.numbers = [1]  # one process
            members = [str(args.work / args.preset / name) for name in run.member_names]
            command = ["analysis/ensemble.py", *members, *images, "--json", str(self.save / "ensemble.json")]
        else:
            self.numbers = list(range(1, run.networks + 1))
            command = [f"{run.script}/grafting.py", *run.flags, *images, "--s", str(self.save), "--resume"]
        self.command = [sys.executable, str(ROOT / command[0]), *command[1:]]
        self.gpus: list[str] = []

    def command_of(self, i: int) -> list[str]:
        return self.command if self.run.members else [*self.command, "--i", str(i)]

    def is_finished(self) -> bool:
        """Whether its results are there, and such as a report takes."""
        with suppress(ValueError):
            return bool(read_result(self.results, self.run))
        return False

    def final(self, i: int) -> Path:
        return self.save / f"final{i}.{'tar' if self.run.data == 'imagenet' else 't7'}"

    def share(self) -> float:
        """How much of its training is done."""
        statuses = [read_status(self.save, i) for i in self.numbers]
        shares = [
            1 if one.get("state") == "done" else (one.get("epoch") or 0) / (self.run.epochs or 1) for one in statuses
        ]
        return min(1.0, sum(shares) / len(shares))

    def execute(self, threads: int, signals: Signals) -> str:
        """Trains what is missing and leaves the results; in a thread of its own. A sentence if it failed."""
        self.save.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.save / "queue.lock", timeout=0):
                return self.refusal() or self.train(threads, signals) or self.collect()
        except Timeout:
            return "another queue is at work on it"

    def refusal(self) -> str:
        """Results of another command are not written over."""
        try:
            read_result(self.results, self.run)
        except OtherCommand as error:
            return f"{self.results}: {error}; move it and {self.save} elsewhere"
        except ValueError:  # none, or damaged
            pass
        return ""

    def train(self, threads: int, signals: Signals) -> str:
        """Starts the networks that neither are done nor live on from a killed queue, and waits for all of them."""
        living = {status.network for status in self.observe(self.numbers) if status.alive}
        done = {i for i in self.numbers if read_status(self.save, i).get("state") == "done" and self.final(i).exists()}
        processes: dict[int, subprocess.Popen] = {}
        try:
            for k, i in enumerate(sorted({*self.numbers} - living - done)):
                processes[i] = self.start(i, threads, self.gpus[k : k + 1])
            while not signals.received:
                running = [i for i, process in processes.items() if process.poll() is None]
                lost = [i for i, process in processes.items() if process.returncode]
                # Not ours, or lost because a killed queue had only just started it as well.
                others = self.observe([i for i in self.numbers if i not in processes or i in lost])
                for status in others:
                    if not status.alive and status.state != "done":
                        return self.reason(status.network, processes) or f"network {status.network}: {status}"
                if lost and not others:
                    return self.reason(lost[0], processes)
                if not running and not any(status.alive for status in others):
                    return ""
                time.sleep(POLL_SECONDS)
            return "stopped"
        finally:
            self.end(processes)

    def observe(self, numbers: Sequence[int]) -> list[Status]:
        return [] if self.run.members or not numbers else observe(self.save, numbers)

    def start(self, i: int, threads: int, gpu: list[str]) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        environment |= {"CUDA_VISIBLE_DEVICES": gpu[0]} if gpu else {}
        # In a session of its own: Ctrl-C is for the queue, which passes it on.
        options = {"stdin": subprocess.DEVNULL, "env": environment, "start_new_session": True}
        with open(self.save / f"{i}.log", "ab") as log:
            return subprocess.Popen(self.command_of(i), stdout=log, stderr=log, **options)

    def reason(self, i: int, processes: dict[int, subprocess.Popen]) -> str:
        """Why a process of ours has failed, with its last words."""
        status = processes[i].returncode if i in processes else None
        if status is None:
            return ""
        how = f"exit status {status}" if status > 0 else f"signal {-status}" + " (out of memory?)" * (status == -9)
        lines = (self.save / f"{i}.log").read_text(errors="replace").strip().splitlines() or ["without a word"]
        return f"network {i} ended with {how}: {lines[-1]}"

    def end(self, processes: dict[int, subprocess.Popen]) -> None:
        """Asks networks that still run to end, as they do after their batch: they would wait for one another."""
        for process in processes.values():
            process.terminate()
        for status in self.observe([i for i in self.numbers if i not in processes]):
            if status.alive and status.pid and status.host == socket.gethostname():
                with suppress(ProcessLookupError):
                    os.kill(status.pid, signal.SIGTERM)
        for process in processes.values():
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()

    def collect(self) -> str:
        """Leaves what a report needs in the folder of results; result.json last: it says that all is there."""
        record = {"name": self.run.name, "preset": self.preset, "seed": self.run.seed, "command": self.run.command}
        record |= {"networks": self.run.networks, "hardware": hardware(), "versions": versions()}
        record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.results.mkdir(parents=True, exist_ok=True)
        if self.run.members:
            found = json.loads((self.save / "ensemble.json").read_text())
            record["ensemble"] = found | {"members": self.run.member_names}
        else:
            record["filters"] = []
            for i in self.numbers:
                state, contents = read_checkpoint(self.final(i))
                counts = {}
                for which, pairs in zip(("", "shortcut_"), count_invalid(state, THRESHOLDS), strict=True):
                    counts[f"{which}total"] = pairs[0][1]
                    counts[f"{which}invalid"] = {f"{t:g}": n for t, (n, _) in zip(THRESHOLDS, pairs, strict=True)}
                record["filters"].append(counts)
                record |= {"settings": contents["settings"], "data": contents.get("data", "")}
                copied = [self.save / f"metrics{i}.csv"]
                if self.run.seed == 0:  # coefficients are the most of it, and a plot needs those of one seed
                    copied += self.save.glob(f"coefficients{i}.csv")
                for file in copied:
                    write_atomically(self.results / file.name, file.read_bytes())
        write_atomically(self.results / "result.json", (json.dumps(record, indent=1) + "\n").encode())
        return ""


# ---- The queue


def work(jobs: list[Job], slots: int, threads: int, gpus: list[str], signals: Signals) -> None:
    """Runs the jobs, cheapest first and as many at once as their networks fit into the slots, until all have ended."""
    waiting, running = sorted(jobs, key=lambda job: job.run.cost), {}
    progress = Progress(jobs)
    with ThreadPoolExecutor(slots) as pool:
        while running or (waiting and not signals.received):
            while not signals.received and (job := next_job(waiting, list(running.values()), slots, bool(gpus))):
                waiting.remove(job)
                used = Counter(gpu for other in running.values() for gpu in other.gpus)
                free = sorted(gpus, key=used.__getitem__)  # the least used first
                job.gpus = [free[k % len(free)] for k in range(len(job.numbers))] if free else []
                running[pool.submit(job.execute, threads, signals)] = job
            for future in wait(running, POLL_SECONDS, FIRST_COMPLETED).done:
                job = running.pop(future)
                error = future.exception()
                job.failure = f"{type(error).__name__}: {error}" if error else future.result()
                if not signals.received:
                    progress.say(f"{job.run}: {'failed: ' + job.failure if job.failure else 'done'}")
            progress(list(running.values()), waiting)


def next_job(waiting: list[Job], running: list[Job], slots: int, on_gpus: bool) -> Job | None:
    """The first whose networks fit in, or which would have to run alone; an ensemble waits for its members."""

    def size(job: Job) -> int:
        return len(job.numbers) * (NETWORKS_PER_GPU if on_gpus and job.run.data == "imagenet" else 1)

    unfinished = {(job.run.name, job.run.seed) for job in (*waiting, *running)}
    ready = next((job for job in waiting if not unfinished & {*job.run.members}), None)
    return ready if ready and (not running or size(ready) + sum(map(size, running)) <= slots) else None


class Progress:
    """A line about the runs at work and the time that is left: kept up to date on a terminal, now and then in a log."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.on_terminal = jobs, sys.stdout.isatty()
        self.began, self.shown, self.at_start = time.monotonic(), -LINE_SECONDS, self.cost(jobs)  # by earlier queues

    def cost(self, jobs: list[Job]) -> float:
        return sum(job.run.cost * job.share() for job in jobs if not job.failure)

    def __call__(self, running: list[Job], waiting: list[Job]) -> None:
        now = time.monotonic()
        if not running or now - self.shown < (1 if self.on_terminal else LINE_SECONDS):
            return
        self.shown, done = now, self.cost(self.jobs) - self.at_start
        left = sum(job.run.cost for job in (*running, *waiting)) - self.cost([*running, *waiting])
        rest = f", about {duration(left * (now - self.began) / done)} left" if done > 0 else ""
        parts = ", ".join(f"{job.run} {100 * job.share():.0f} %" for job in running)
        line = f"{len(running)} running, {len(waiting)} waiting{rest}: {parts}"
        if self.on_terminal:
            line = line[: shutil.get_terminal_size().columns - 1]
        self.say(line, end="" if self.on_terminal else "\n")

    def say(self, text: str, end: str = "\n") -> None:
        with suppress(OSError):  # a full disk or a closed pipe stops no training
            print(("\r\033[K" if self.on_terminal else "") + text, end=end, flush=True)


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs without results, and those whose networks an ensemble among them needs, if their weights are gone."""
    missing = [job for job in jobs if not job.is_finished()]
    needed = {member for job in missing for member in job.run.members}
    gone = [job for job in jobs if not job.run.members and not all(job.final(i).exists() for i in job.numbers)]
    return [job for job in jobs if job in missing or ((job.run.name, job.run.seed) in needed and job in gone)]


def slurm(args: argparse.Namespace, jobs: list[Job]) -> str:
    """A job array: each task runs one of the jobs, none of which is an ensemble; those come with a last call."""
    words = [sys.executable, str(ROOT / "experiments" / "run.py"), *args.tables, "--preset", args.preset]
    words += ["--seeds", str(args.seeds), "--work", str(args.work), "--results", str(args.results)]
    folders = [f"{name}={folder}" if name else folder for name, folder in args.data.items()]
    again = shlex.join(words + (["--data", *folders] if folders else []))
    return SLURM.format(last=len(jobs) - 1, again=again, names="\n".join(f"  {job.run}" for job in jobs))


def plan(args: argparse.Namespace) -> tuple[list[Job], list[Job]]:
    """(all jobs that were asked for, those of them that are to be run); says which lack images."""
    chosen = {run for run in args.runs if not args.only or not {run.name, str(run)}.isdisjoint(args.only)}
    images = {run: data_flags(run, args.data) for run in args.runs}
    jobs = [Job(run, args, images[run]) for run in args.runs if images[run] is not None]
    if lacking := sorted({run.data for run in chosen if images[run] is None}):
        example = f"--data {lacking[0]}=DIR"
        print(f"left out, as no images were given: the runs on {', '.join(lacking)} (as in {example})", file=sys.stderr)
    return [job for job in jobs if job.run in chosen], [job for job in unfinished(jobs) if job.run in chosen]


def main() -> int:
    args = parse()
    jobs, missing = plan(args)
    if not jobs:
        return 2
    if args.slurm:
        single = [job for job in missing if not job.run.members]
        if not single:
            print("no run is missing but ensembles: nothing for a job array", file=sys.stderr)
        print(slurm(args, single) if single else "", end="")
        return 0
    if args.dry_run:
        print("".join(f"{job.run}: {shlex.join(job.command_of(i))}\n" for job in missing for i in job.numbers), end="")
        return 0
    for folder in args.work, args.results:  # before the hours that training takes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            print(f"{folder} cannot be written: {error.strerror or error}; nothing was started", file=sys.stderr)
            return 2
    gpus = launch.gpus(None)
    slots = args.jobs or NETWORKS_PER_GPU * len(gpus) or launch.cores()
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done; {slots} networks at once", flush=True)
    signals = Signals()
    signals.finish_batch()  # they end the networks, and these the queue; a second one ends it at once
    work(missing, slots, max(1, launch.cores() // slots), gpus, signals)
    if signals.received:
        print(f"stopped by {signal.Signals(signals.received).name}; the same command goes on", file=sys.stderr)
        return 128 + signals.received
    failed = [job for job in missing if job.failure]
    for job in failed:
        print(f"{job.run} failed: {job.failure} (log: {job.save}/)", file=sys.stderr)
    print(f"{len(missing) - len(failed)} runs done, {len(failed)} failed; results: {args.results / args.preset}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
