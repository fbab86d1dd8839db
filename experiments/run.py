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
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from common import flags
from common.records import on_terminal
from experiments import tables
from experiments.jobs import Job
from experiments.tables import Run
from filter_grafting.exchange import duration

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS, LINE_SECONDS = 0.2, 60.0
NETWORKS_PER_GPU = 4


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("tables", metavar="TABLE", nargs="+", help=f"{', '.join(tables.NAMES)}, or all")
    parser.add_argument("--preset", choices=tables.PRESETS, default="paper",
                        help="paper: as published; small: for hours on 2 cores; smoke: minutes, a test")  # fmt: skip
    parser.add_argument("--seeds", metavar="K", type=flags.number(int, 1, tables.SEEDS), default=3,
                        help="runs of each row")  # fmt: skip
    parser.add_argument("--data", metavar="[NAME=]DIR", nargs="+",
                        help="the images: the folder of the standard CIFAR files, or one of class folders, for the "
                             "data set that has as many classes; NAME (cifar10, cifar100, imagenet) says for which "
                             "alone (default: data/ beside README.md, downloaded if absent)")  # fmt: skip
    parser.add_argument("--jobs", metavar="J", type=flags.number(int, 1),
                        help="networks that train at once; a run begins when its own fit in, one that has more begins "
                             f"alone (default: one for each core, or {NETWORKS_PER_GPU} for each GPU, where one of "
                             f"ImageNet counts as {NETWORKS_PER_GPU})")  # fmt: skip
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
    folders = [named_folder(parser, text) for text in args.data or ()]
    args.data = dict(folders)
    if len(args.data) < len(folders):
        parser.error("argument --data: got two folders for the same images, expected one")
    runs = tables.runs(args.tables, args.preset, args.seeds)
    if not runs:
        parser.error(f"argument --preset: {args.preset} runs nothing of {', '.join(args.tables)}")
    known = {name for run in runs for name in (run.name, f"{run.name}/seed{run.seed}")}
    if unknown := [name for name in args.only or () if name not in known]:
        parser.error(f"argument --only: {unknown[0]} is none of these tables' runs, see --dry-run")
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
        if where is None:
            if is_chosen(run, args):
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


def is_chosen(run: Run, args: argparse.Namespace) -> bool:
    return not args.only or bool({run.name, f"{run.name}/seed{run.seed}"} & set(args.only))


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs without results, and those whose networks an ensemble among them needs, if their weights are gone."""
    missing = [job for job in jobs if not job.is_finished]
    needed = {member for job in missing for member in job.run.members}
    return [
        job for job in jobs
        if job in missing or ((job.run.name, job.run.seed) in needed and not job.has_weights)
    ]  # fmt: skip


# ---- The queue


class Stopped(Exception):
    """A signal asked the queue to end."""


class Signals:
    """SIGTERM, Ctrl-C and the end of the terminal stop the queue, at a place that it chooses."""

    def __init__(self):
        self.received = None
        # Those that nohup and shells (for jobs in the background) ignore stay ignored.
        every = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        self.heard = [number for number in every if signal.getsignal(number) is not signal.SIG_IGN]
        for number in self.heard:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = self.received or number

    def check(self) -> None:
        if self.received:
            raise Stopped(signal.Signals(self.received).name)

    def give_up(self) -> None:
        """From here on a signal ends the queue at once."""
        for number in self.heard:
            signal.signal(number, signal.SIG_DFL)


def work(jobs: list[Job], slots: int, threads: int, gpus: list[str], show: "Progress", signals: Signals) -> None:
    """Runs jobs, in order and as many at once as their networks fit into the slots; each ends finished or failed."""

    def size(job: Job) -> int:
        return job.run.networks * (NETWORKS_PER_GPU if gpus and job.run.data == "imagenet" else 1)

    by_run = {(job.run.name, job.run.seed): job for job in jobs}
    # Networks that live on from an earlier queue hold their cores already.
    waiting, running = sorted(jobs, key=lambda job: not any(network.alive for network in job.observe())), []
    try:
        while waiting or running:
            signals.check()
            blocked = False
            for job in list(waiting):
                members = [by_run[member] for member in job.run.members if member in by_run]
                failed = [member for member in members if member.failure]
                if failed:
                    job.failure = f"{failed[0]} failed, which is one of its networks"
                    waiting.remove(job)
                    show.ended(job)
                elif any(member in waiting or member in running for member in members):
                    continue
                elif running and size(job) > slots - sum(map(size, running)):
                    blocked = True
                # A smaller run goes first where it makes no larger one wait longer.
                elif not blocked or job.run.epochs <= 1.1 * max(other.epochs_left() for other in running):
                    waiting.remove(job)
                    used = Counter(gpu for other in running for gpu in other.gpus)
                    job.begin(threads, sorted(gpus, key=used.__getitem__))  # the least used first
                    running.append(job)
            show(running, waiting)
            for job in [job for job in running if job.has_ended()]:
                running.remove(job)
                if not job.failure:
                    job.collect()
                show.ended(job)
            time.sleep(POLL_SECONDS)
    except BaseException:
        for job in running:
            job.stop()
        signals.give_up()
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
        ended, _ = job.progress()
        self.done += ended
        if job.failure and not job.is_ensemble:
            self.total -= job.run.networks * job.run.epochs - ended  # they are not to be waited for
        self._write([f"{job}: {'failed: ' + job.failure if job.failure else 'done'}"])
        self.height = 0  # that line stays
        self.shown_at = -LINE_SECONDS

    def _write(self, lines: list[str]) -> None:
        above = ""
        if on_terminal():
            width, height = shutil.get_terminal_size()
            if len(lines) > height - 1:  # what has left the screen cannot be written over
                lines = [*lines[: height - 3], f"and {len(lines) - height + 2} more", lines[-1]]
            above = f"\033[{self.height}F\033[J" if self.height else ""
            lines, self.height = [line[: width - 1] for line in lines], len(lines)
        with suppress(OSError):  # a full disk or a closed pipe stops no training
            print(above + "\n".join(lines), flush=True)


# ---- Main


def slurm(args: argparse.Namespace, jobs: list[Job]) -> str:
    """A job array: each task runs one of the jobs, none of which is an ensemble; those come with a last call."""
    words = [sys.executable, str(ROOT / "experiments" / "run.py"), *args.tables, "--preset", args.preset]
    words += ["--seeds", str(args.seeds), "--work", str(args.work), "--results", str(args.results)]
    folders = [f"{name}={folder}" if name else folder for name, folder in args.data.items()]
    again = shlex.join(words + (["--data", *folders] if folders else []))
    names = "\n".join(f"  {job}" for job in jobs)
    return f"""#!/bin/bash
#SBATCH --job-name=grafting
#SBATCH --array=0-{len(jobs) - 1}
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


def main() -> int:
    args = parse()
    jobs, lacking = jobs_of(args)
    missing = [job for job in unfinished(jobs) if is_chosen(job.run, args)]
    jobs = [job for job in jobs if is_chosen(job.run, args)]
    if lacking:
        names, example = ", ".join(sorted(lacking)), f"--data {min(lacking)}=DIR"
        print(f"left out, as no images were given: the runs on {names} (as in {example})", file=sys.stderr)
    if not jobs:
        return 2
    if args.slurm:
        single = [job for job in missing if not job.is_ensemble]
        if single:
            print(slurm(args, single), end="")
        else:
            print("no run is missing but ensembles: nothing for a job array", file=sys.stderr)
        return 0
    if args.dry_run:
        for job in missing:
            for i in range(1, job.run.networks + 1):
                print(f"{job}: {shlex.join(job.command + ([] if job.is_ensemble else ['--i', str(i)]))}")
        return 0
    for folder in args.work, args.results:  # before the hours that training takes
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            print(f"{folder} cannot be written: {error.strerror or error}; nothing was started", file=sys.stderr)
            return 2
    gpus = [str(k) for k in range(torch.cuda.device_count())]
    if gpus and "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(gpus)]
    cores = len(os.sched_getaffinity(0))
    slots = args.jobs or (NETWORKS_PER_GPU * len(gpus) if gpus else cores)
    print(f"{len(jobs)} runs, {len(jobs) - len(missing)} of them done; {slots} networks at once", flush=True)
    if again := sum(job.is_finished for job in missing):
        print(f"{again} of the rest had been done: ensembles need their weights, which are gone", flush=True)

    signals = Signals()
    show = Progress(sum(job.run.networks * job.run.epochs for job in missing if not job.is_ensemble))
    try:
        work(missing, slots, max(1, cores // slots), gpus, show, signals)
    except Stopped as reason:
        with suppress(OSError):  # the terminal may be gone
            print(f"stopped by {reason}; the same command goes on", file=sys.stderr)
        return 128 + signals.received
    failed = [job for job in missing if job.failure]
    for job in failed:
        print(f"{job} failed: {job.failure} (log: {job.directory}/)", file=sys.stderr)
    print(f"{len(missing) - len(failed)} runs done, {len(failed)} failed; results: {args.results / args.preset}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
