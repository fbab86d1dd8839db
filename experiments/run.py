#!/usr/bin/env python
"""Runs what the tables of experiments/tables.py need and is not there yet, several networks side by side.

    python experiments/run.py main fair --preset small --data DIR
    python experiments/run.py all --dry-run

Stopped or killed, the same command goes on where it was. Each finished run leaves its metrics under results/, from
which experiments/report.py makes the tables and plots.
"""

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from analysis.runs import count_filters, program, read_checkpoint
from experiments.results import read_result
from experiments.tables import PRESETS, SEEDS, TABLES, Run, runs
from filter_grafting.checkpoint import write_atomically
from filter_grafting.errors import GraftingError
from filter_grafting.membership import observe
from training import launch
from training.flags import ROOT, Parser, cores, number, path
from training.machine import hardware, versions
from training.process import Signals
from training.view import last_words

NETWORKS_PER_GPU = 4  # on CIFAR; one on ImageNet
POLL_SECONDS = 0.5
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
trap 'kill $!; wait $!; exit 143' TERM
trap 'kill $!; wait $!; scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"; exit 143' USR1
wait $!
"""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("tables", metavar="TABLE", nargs="+", choices=[*TABLES, "all"], help=f"{', '.join(TABLES)}, or all")
    presets = "paper: the published schedules; small, medium: for hours on 2 cores; smoke: a test"
    flag("--preset", choices=PRESETS, default="paper", help=presets)
    flag("--seeds", metavar="K", type=number(int, 1, SEEDS), default=3, help="runs of each row")
    of = "the images, of class folders or CIFAR's files; NAME: of cifar10, cifar100 or imagenet alone"
    flag("--data", metavar="[NAME=]DIR", type=images, nargs="+", default=[], help=of)
    at_once = (
        f"networks at once (default: one a core, or {NETWORKS_PER_GPU} a GPU, of ImageNet one); a larger run goes alone"
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
    args.tables = list(TABLES) if "all" in args.tables else args.tables
    args.work, args.results = args.work.resolve(), args.results.resolve()
    if len({names for names, _ in args.data}) < len(args.data):
        parser.error("argument --data: got two folders for the same images, expected one")
    one_last = sorted(args.data, key=lambda given: -len(given[0]))
    args.data = {"glyphs": "glyphs"} | {name: folder for names, folder in one_last for name in names}
    args.runs = runs(args.tables, args.preset, args.seeds)
    if not args.runs:
        parser.error(f"argument --preset: {args.preset} runs nothing of {', '.join(args.tables)}")
    known = {name for run in args.runs for name in (run.name, str(run))}
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"argument --only: {unknown[0]} is none of these tables' runs, see --dry-run")
    return args


def images(text: str) -> tuple[tuple[str, ...], str]:
    """A converter for argparse: the names of data sets, and the folder of their images."""
    name, _, folder = text.partition("=")
    if name not in ("cifar10", "cifar100", "imagenet"):
        name, folder = "", text
    if not path(folder).is_dir():
        raise argparse.ArgumentTypeError(f"got {text}, expected a folder, or cifar10=, cifar100= or imagenet= and one")
    return (name,) if name else ("cifar10", "cifar100"), str(path(folder).resolve())


# ---- A run


class Job:
    """A run of the tables, its folders, and the processes that train its networks."""

    def __init__(self, run: Run, args: argparse.Namespace):
        self.run, self.preset, self.failure, self.gpus = run, args.preset, "", []
        self.saved = args.work / args.preset  # of all runs
        self.save, self.results = self.saved / str(run), args.results / args.preset / str(run)
        self.ensemble = self.save / "ensemble.json"
        self.images = args.data.get(run.data)
        self.lock = FileLock(self.save / "queue.lock", timeout=0)  # a run belongs to one queue at a time
        self.numbers = range(1, run.networks + 1)
        self.alive: set[int] = set()  # networks of a killed queue
        self.processes: dict[int, subprocess.Popen] = {}

    def command_of(self, i: int) -> list[str]:
        given, own = self.run.flags, ["--s", str(self.save), "--resume", "--i", str(i)]
        if self.run.members:
            given, own = [str(self.saved / member) for member in self.run.members], ["--json", str(self.ensemble)]
        images = ["--data", self.images] if self.images else []
        return [sys.executable, str(ROOT / self.run.script), *given, *images, *own]

    def final(self, i: int) -> Path:
        return self.save / f"final{i}.{'tar' if self.run.data == 'imagenet' else 't7'}"

    def is_finished(self) -> bool:
        """Whether its results are there, and such as a report takes. Raises GraftingError: not to be written over."""
        try:
            return bool(read_result(self.results, self.run))
        except ValueError:  # there are none, or they are damaged
            return False

    def start(self, threads: int) -> None:
        """Starts the networks that do not live on from a killed queue. Raises Timeout: another has it.

        One that is done ends at once, if it was trained with these settings, and otherwise says in which it differs.
        """
        self.save.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        self.about = {"hardware": hardware(), "versions": versions()}  # not those of its end
        self.alive = {one.network for one in observe(self.save, self.numbers) if one.alive}
        for i in {*self.numbers} - self.alive:
            variables = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), str(threads))
            variables |= {"CUDA_VISIBLE_DEVICES": self.gpus[i - 1]} if self.gpus else {}
            # Detached: Ctrl-C is for the queue, which passes it on.
            self.processes[i] = launch.detached(self.command_of(i), self.save / f"{i}.log", variables)

    def has_ended(self, threads: int) -> bool:
        """Starts it, when first asked; later whether its results are there. Raises RuntimeError if a network failed."""
        if not self.lock.is_locked:
            self.start(threads)
        for i, process in self.processes.items():
            if status := process.poll():
                how = f"exit status {status}" if status > 0 else f"signal {-status}"
                how += " (out of memory?)" * (status == -signal.SIGKILL)
                raise RuntimeError(f"network {i} ended with {how}: {last_words(self.save / f'{i}.log')}")
        self.alive = {one.network for one in observe(self.save, self.alive) if one.alive}
        if self.alive or any(process.poll() is None for process in self.processes.values()):
            return False
        self.collect()
        return True

    def collect(self) -> None:
        """Leaves what a report needs in the folder of results; result.json last: it says that all is there."""
        if self.is_finished():  # trained again for an ensemble's sake: the results stay what they are
            return
        record = {"name": self.run.name, "preset": self.preset, "seed": self.run.seed, "command": self.run.command}
        record |= {"networks": self.run.networks, **self.about}
        record["finished"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.results.mkdir(parents=True, exist_ok=True)
        if self.run.members:
            found = json.loads(self.ensemble.read_text())
            record["ensemble"] = found | {"members": self.run.members}
        for i in self.numbers if not self.run.members else ():
            state, contents = read_checkpoint(self.final(i))
            record.setdefault("filters", []).append(count_filters(state))
            record |= {"settings": contents["settings"], "data": contents.get("data", "")}
            copied = [self.save / f"metrics{i}.csv"]
            if self.run.seed == 0:  # coefficients are the most of it, and a plot needs those of one seed
                copied += self.save.glob(f"coefficients{i}.csv")
            for file in copied:
                write_atomically(self.results / file.name, file.read_bytes())
        write_atomically(self.results / "result.json", (json.dumps(record, indent=1) + "\n").encode())


# ---- The queue


def work(jobs: list[Job], slots: int, threads: int, gpus: list[str], signals: Signals) -> None:
    """Runs the jobs, cheapest first and as many at once as their networks fit into the slots, until all have ended."""
    waiting, running = sorted(jobs, key=lambda job: job.run.cost), []
    total, form = sum(job.run.cost for job in jobs), "{l_bar}{bar}| {remaining} left{postfix}"
    # disable=None: in a log there is no bar, but a line for each run.
    bar = tqdm(total=total, disable=None, smoothing=0, bar_format=form)
    try:
        while (running or waiting) and not signals.received:
            while job := next_job(waiting, running, slots, gpus):
                waiting.remove(job)
                running.append(job)
            bar.set_postfix_str(", ".join(str(job.run) for job in running))
            for job in list(running):
                try:
                    if not job.has_ended(threads):
                        continue
                except Exception as error:  # the others go on
                    job.failure = str(error) if type(error) is RuntimeError else f"{type(error).__name__}: {error}"
                stop([job])
                running.remove(job)
                outcome = f"failed: {job.failure}" if job.failure else "done"
                tqdm.write(f"{job.run}: {outcome} ({len(waiting) + len(running)} to go)")
                sys.stdout.flush()
                bar.update(job.run.cost)
            time.sleep(POLL_SECONDS)
    finally:
        stop(running)
        bar.close()


def stop(jobs: list[Job]) -> None:
    """Ends the networks that still run, a killed queue's among them, which would wait for those that have ended."""
    processes = [process for job in jobs for process in job.processes.values()]
    for process in processes:
        process.terminate()
    for process in processes:
        process.wait()
    for job in jobs:
        if job.alive:
            launch.end(job.save)
        job.lock.release()


def next_job(waiting: list[Job], running: list[Job], slots: int, gpus: list[str]) -> Job | None:
    """The first that is ready, as an ensemble is after its members, if its networks fit in or would run alone.

    They have the GPUs that the fewest others are on.
    """

    def size(job: Job) -> int:
        return len(job.numbers) * (NETWORKS_PER_GPU if gpus and job.run.data == "imagenet" else 1)

    missing = {str(job.run) for job in waiting + running}
    ready = next((job for job in waiting if missing.isdisjoint(job.run.members)), None)
    if ready is None or (running and size(ready) + sum(map(size, running)) > slots):
        return None
    used = Counter(gpu for job in running for gpu in job.gpus)
    free = sorted(gpus, key=used.__getitem__)
    ready.gpus = [free[k % len(free)] for k in range(len(ready.numbers))] if free else []
    return ready


def unfinished(jobs: list[Job]) -> list[Job]:
    """The jobs without results, and those whose networks an ensemble among them needs, if their weights are gone."""
    missing = [job for job in jobs if not job.is_finished()]
    needed = {member for job in missing for member in job.run.members}
    return [job for job in jobs if job in missing or (str(job.run) in needed and not job.final(1).exists())]


def slurm(args: argparse.Namespace, jobs: list[Job]) -> str:
    """A job array: each task runs one of the jobs but for the ensembles, which come with a last call."""
    words = [sys.executable, str(ROOT / "experiments" / "run.py"), *args.tables, "--preset", args.preset]
    words += ["--seeds", str(args.seeds), "--work", str(args.work), "--results", str(args.results)]
    folders = [f"{name}={folder}" for name, folder in args.data.items() if name != "glyphs"]
    words += ["--data", *folders] * bool(folders) + ["--jobs", str(args.jobs)] * bool(args.jobs)
    again = shlex.join(words + ["--only", *args.only] * bool(args.only))  # of two --only the second counts
    tasks = [job.run for job in jobs if not job.run.members]
    if not tasks:
        raise GraftingError(f"there is nothing for a job array; what remains, this makes: {again}")
    return SLURM.format(last=len(tasks) - 1, again=again, names="\n".join(f"  {run}" for run in tasks))


def main() -> int:
    args = parse()
    chosen = {run for run in args.runs if not args.only or not {run.name, str(run)}.isdisjoint(args.only)}
    if "imagenet" not in args.data and any(run.data == "imagenet" for run in chosen):
        print("left out, as no images were given: the runs on imagenet (--data imagenet=DIR)", file=sys.stderr)
        chosen = {run for run in chosen if run.data != "imagenet"}
    if not chosen:
        return 2
    missing = [job for job in unfinished([Job(run, args) for run in args.runs]) if job.run in chosen]
    if args.dry_run:
        for job in missing:
            for i in job.numbers:
                print(f"{job.run}: {shlex.join(job.command_of(i))}")
        return 0
    if args.slurm:
        print(slurm(args, missing), end="")
        return 0
    gpus = launch.gpus(None)
    slots = args.jobs or NETWORKS_PER_GPU * len(gpus) or cores()
    print(f"{len(chosen)} runs, {len(chosen) - len(missing)} of them done; {slots} networks at once", flush=True)
    signals = Signals()
    signals.finish_batch()  # they end the networks, and these the queue; a second one ends it at once
    work(missing, slots, max(1, cores() // slots), gpus, signals)
    if signals.received:
        print(f"stopped by {signal.Signals(signals.received).name}; the same command goes on", file=sys.stderr)
        return 128 + signals.received
    failed = [job for job in missing if job.failure]
    for job in failed:
        print(f"{job.run} failed: {job.failure} (log: {job.save}/)", file=sys.stderr)
    print(f"{len(missing) - len(failed)} runs done, {len(failed)} failed; results: {args.results / args.preset}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(program(main))
