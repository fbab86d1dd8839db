#!/usr/bin/env python
"""Runs what the tables of experiments/tables.py need and is not there yet, several networks side by side.

    python experiments/run.py main fair --preset small --data DIR
    python experiments/run.py all --dry-run

Stopped or killed, the same command goes on where it was. Each finished run leaves its metrics under results/, from
which experiments/report.py makes the tables and plots.
"""

import argparse
import os
import shlex
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags
from common.records import on_terminal
from experiments import tables
from experiments.jobs import Job
from experiments.tables import Run
from filter_grafting.errors import GraftingError
from filter_grafting.exchange import duration

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS, LINE_SECONDS = 0.2, 60.0
NETWORKS_PER_GPU = 4


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("tables", metavar="TABLE", nargs="+", help=f"{', '.join(tables.NAMES)}, or all")
    parser.add_argument("--preset", choices=tables.PRESETS, default="paper",
                        help="paper: as published; small: for hours on 2 cores; smoke: minutes, a test")  # fmt: skip
    parser.add_argument("--seeds", metavar="K", type=flags.number(int, 1, 100), default=3, help="runs of each row")
    parser.add_argument("--data", metavar="[NAME=]DIR", nargs="+", default=[],
                        help="the images: the folder of the standard CIFAR files, or one of class folders, for the "
                             "data set that has as many classes; NAME (cifar10, cifar100, imagenet) says for which "
                             "alone (default: data/ beside README.md, downloaded if absent)")  # fmt: skip
    parser.add_argument("--jobs", metavar="J", type=flags.number(int, 1),
                        help="networks that train at once; a run begins when its own fit in "
                             f"(default: one for each core, or {NETWORKS_PER_GPU} for each GPU)")  # fmt: skip
    parser.add_argument("--only", metavar="RUN", nargs="+",
                        help="of these runs only those named, as NAME or NAME/seedK, see --dry-run")  # fmt: skip
    parser.add_argument("--work", metavar="DIR", type=Path, default=ROOT / "checkpoint" / "experiments",
                        help="where the runs' save directories are")  # fmt: skip
    parser.add_argument("--results", metavar="DIR", type=Path, default=ROOT / "results",
                        help="where finished runs leave their metrics")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the command lines of what is missing")
    parser.add_argument("--slurm", action="store_true", help="print a job array for Slurm, a task for each missing run")
    args = parser.parse_args(arguments)
    for name in args.tables:
        if name not in (*tables.NAMES, "all"):
            parser.error(f"argument TABLE: got {name!r}, expected {', '.join(tables.NAMES)}, or all")
    args.tables = tables.NAMES if "all" in args.tables else args.tables
    args.work, args.results = args.work.resolve(), args.results.resolve()
    args.data = dict(named_folder(parser, text) for text in args.data)
    return args


def named_folder(parser: argparse.ArgumentParser, text: str) -> tuple[str, str]:
    """(name of the data set, or "" for CIFAR-10 and CIFAR-100; folder)."""
    name, equals, folder = text.partition("=")
    if not equals:
        name, folder = "", text
    elif name not in ("cifar10", "cifar100", "imagenet"):
        parser.error(f"argument --data: got {text!r}, expected DIR, cifar10=DIR, cifar100=DIR or imagenet=DIR")
    if not Path(folder).expanduser().is_dir():
        parser.error(f"argument --data: there is no folder {folder}")
    return name, str(Path(folder).expanduser().resolve())


def data_flags(run: Run, data: dict[str, str]) -> list[str] | None:
    """The flags that name the run's images; None if no folder was given that has them."""
    if run.data == "glyphs":
        return ["--data", "glyphs"]
    if run.data in data:
        return ["--data", data[run.data]]
    if run.data == "imagenet":
        return None
    if "" not in data:
        return []
    train = Path(data[""], "train")
    if train.is_dir() and sum(entry.is_dir() for entry in train.iterdir()) != int(run.data.removeprefix("cifar")):
        return None
    return ["--data", data[""]]


def jobs_of(args: argparse.Namespace) -> tuple[list[Job], set[str]]:
    """The jobs of all runs, and the data sets that they lack: runs on those are left out."""
    jobs, lacking = [], set()
    for run in tables.runs(args.tables, args.preset, args.seeds):
        place = Path(args.preset, run.name, f"seed{run.seed}")
        where = data_flags(run, args.data)
        if args.only and not {run.name, f"{run.name}/seed{run.seed}"} & set(args.only):
            continue
        if where is None:
            lacking.add(run.data)
            continue
        if run.members:
            members = [str(args.work / args.preset / name / f"seed{seed}") for name, seed in run.members]
            file = args.work / place / "ensemble.json"
            command = ["grafting_cifar/ensemble.py", *members, *where, "--json", str(file)]
        else:
            command = [f"{run.script}/grafting.py", *run.flags, *where, "--s", str(args.work / place), "--resume"]
        command = [sys.executable, str(ROOT / command[0]), *command[1:]]
        jobs.append(Job(run, args.preset, args.work / place, args.results / place, command))
    return jobs, lacking


# ---- The queue


class Stopped(Exception):
    """A signal asked the queue to end."""


def work(jobs: list[Job], slots: int, threads: int, gpus: list[str], show: "Progress") -> None:
    """Runs jobs, in order and as many at once as their networks fit into the slots; each ends finished or failed."""
    by_run = {(job.run.name, job.run.seed): job for job in jobs}
    waiting, running = list(jobs), []
    try:
        while waiting or running:
            for job in list(waiting):
                members = [by_run[member] for member in job.run.members if member in by_run]
                failed = [member for member in members if member.failure]
                if failed:
                    job.failure = f"{failed[0]} failed, which is one of its networks"
                    waiting.remove(job)
                elif any(member in waiting or member in running for member in members):
                    continue
                elif not running or job.run.networks <= slots - sum(other.run.networks for other in running):
                    waiting.remove(job)
                    job.start(threads, gpus)
                    running.append(job)
                else:
                    break  # the order is kept: a large run is not put off for ever by small ones
            for job in [job for job in running if job.has_ended()]:
                running.remove(job)
                if not job.failure:
                    try:
                        job.collect()
                    except (GraftingError, OSError, ValueError) as error:
                        job.failure = f"its results cannot be collected: {error}"
                show.ended(job)
            show(running, waiting)
            time.sleep(POLL_SECONDS)
    except BaseException:
        for job in running:
            job.stop()
        for job in running:
            for process in job.processes.values():
                process.wait()
        raise


class Progress:
    """A line for each run at work and the time that is left: kept up to date on a terminal, now and then in a log."""

    def __init__(self, total: int):
        self.total = total  # epochs of all networks
        self.done = 0  # by the runs that have ended
        self.began, self.at_start = time.monotonic(), None
        self.shown_at, self.height = -LINE_SECONDS, 0

    def __call__(self, running: list[Job], waiting: list[Job]) -> None:
        now = time.monotonic()
        if now - self.shown_at < (1 if on_terminal() else LINE_SECONDS):
            return
        self.shown_at = now
        progress = [job.progress() for job in running]
        done = self.done + sum(ended for ended, _ in progress)
        if self.at_start is None:
            self.at_start = done  # by earlier queues
        rest = ""
        if done > self.at_start:
            left = (self.total - done) * (now - self.began) / (done - self.at_start)
            rest = f", about {duration(left)} left"
        lines = [line for _, line in progress]
        lines.append(f"{len(running)} running, {len(waiting)} waiting{rest}")
        self._write(lines)

    def ended(self, job: Job) -> None:
        self.done += job.run.networks * job.run.epochs * (not job.is_ensemble)
        self._write([f"{job}: {'failed: ' + job.failure if job.failure else 'done'}"])
        self.height = 0  # that line stays
        self.shown_at = -LINE_SECONDS

    def _write(self, lines: list[str]) -> None:
        if on_terminal():
            width = os.get_terminal_size().columns
            print(f"\033[{self.height}F\033[J" if self.height else "", end="")
            lines, self.height = [line[: width - 1] for line in lines], len(lines)
        print(*lines, sep="\n", flush=True)


# ---- Main


def slurm(args: argparse.Namespace, jobs: list[Job]) -> str:
    """A job array: each task runs one of the runs; ensembles need others' networks, and come with a last call."""
    single = [job for job in jobs if not job.is_ensemble]
    words = ["python", str(ROOT / "experiments" / "run.py"), *args.tables, "--preset", args.preset]
    words += ["--seeds", str(args.seeds), "--work", str(args.work), "--results", str(args.results)]
    folders = [f"{name}={folder}" if name else folder for name, folder in args.data.items()]
    again = shlex.join(words + (["--data", *folders] if folders else []))
    names = "\n".join(f"  {job}" for job in single)
    return f"""#!/bin/bash
#SBATCH --job-name=grafting
#SBATCH --array=0-{len(single) - 1}
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
# A task that is requeued or sent again goes on where it was. When all are done, this makes what remains (ensembles):
#   {again}
runs=(
{names}
)
exec {again} --only "${{runs[$SLURM_ARRAY_TASK_ID]}}"
"""


def main() -> int:
    args = parse()
    jobs, lacking = jobs_of(args)
    missing = [job for job in jobs if not job.is_finished]
    if args.slurm and missing:
        print(slurm(args, missing), end="")
        return 0
    if args.dry_run:
        for job in missing:
            for i in range(1, job.run.networks + 1):
                print(f"{job}: {shlex.join(job.command + ([] if job.is_ensemble else ['--i', str(i)]))}")
        return 0
    if lacking:
        names, example = ", ".join(sorted(lacking)), f"--data {min(lacking)}=DIR"
        print(f"left out, as no images were given: the runs on {names} (as in {example})", flush=True)
    import torch

    gpus = [str(k) for k in range(torch.cuda.device_count())]
    if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    cores = len(os.sched_getaffinity(0))
    slots = args.jobs or (NETWORKS_PER_GPU * len(gpus) if gpus else cores)
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done; {slots} networks at once", flush=True)

    def stop(number: int, frame: object) -> None:
        for other in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, stop)
    show = Progress(sum(job.run.networks * job.run.epochs for job in missing if not job.is_ensemble))
    try:
        work(missing, slots, max(1, cores // slots), gpus, show)
    except Stopped as reason:
        print(f"stopped by {reason}; the same command goes on", file=sys.stderr)
        return 128 + signal.Signals[str(reason)].value
    failed = [job for job in missing if job.failure]
    for job in failed:
        print(f"{job} failed: {job.failure} (log: {job.directory}/)", file=sys.stderr)
    print(f"{len(missing) - len(failed)} runs done, {len(failed)} failed; results: {args.results / args.preset}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
