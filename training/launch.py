"""Starts the networks of a run, shows how they are, ends them and continues them: what grafting.sh calls.

    python training/launch.py grafting_cifar --model resnet20 --num 2

The script's own parser checks the flags, and network{i}.json says how a run goes on: there is no second rule here.
"""

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from os.path import relpath
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from training.commands import parse

if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads this, as `head`, may have read enough
    ASKED = parse(*sys.argv[1:])  # ahead of torch, whose import takes seconds: --help and a wrong flag answer at once
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as does Ctrl-C, until something has been started

import torch

from filter_grafting.membership import ENDED, HOST, Status, is_held, networks_of, observe
from training import view
from training.flags import ROOT, cores, torchrun

SUFFIXES = {"grafting_cifar": "log", "grafting_imagenet": "out"}  # of the logs of each script's networks
STOP_SECONDS = 120.0  # within which a network finishes its batch


def main(asked: argparse.Namespace) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    commands = {"start": start, "status": status, "stop": stop, "resume": resume, "demo": demo}
    try:
        return commands[asked.command](asked)
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        sys.exit(f"{error.filename or 'grafting.sh'}: {error.strerror or error}")


# Starting


@dataclass
class Network:
    """One network, before it is started and after."""

    name: str
    folder: str  # of its script
    directory: Path
    i: int
    words: Sequence[str]  # its flags
    cwd: str | None = None

    def start(self, variables: dict[str, str], ranks: int = 1) -> str:
        """Starts it, in so many processes; returns the line with which a shell would."""
        command = [sys.executable, *torchrun(ranks), str(ROOT / self.folder / "grafting.py"), *self.words]
        self.log = self.directory / f"{self.i}.{SUFFIXES[self.folder]}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.size = self.log.stat().st_size if self.log.exists() else 0
        self.process = detached(command, self.log, variables, self.cwd)
        values = [f"{key}={shlex.quote(value)}" for key, value in variables.items()]
        return " ".join([*values, f"nohup {shlex.join(command)} >>{shlex.quote(str(self.log))} 2>&1 </dev/null &"])

    def ending(self) -> str:
        return f"{self.name} ended with status {self.process.returncode}: {view.last_words(self.log, self.size)}"


def start(asked: argparse.Namespace) -> int:
    check_data(asked)
    folder, args = asked.folder, asked.args
    statuses = observe(args.s, range(1, args.num + 1))
    for one in [] if args.resume else statuses:
        if one.alive or one.epoch is not None:
            place = f"network {one.network} {'runs' if one.alive else 'has run'} in {args.s}"
            sys.exit(f"{place}: grafting.sh resume {args.s} continues it; or choose another directory (--s)")
    words, ranks = [*asked.words, "--s", str(args.s), "--i"], asked.gpus_per_network or 1
    if folder == "grafting_imagenet":  # ahead of the user's own, which counts if it is given
        words = ["--workers", str(max(1, cores() // (args.num * ranks))), *words]
    pending = [one.network for one in statuses if may_start(one, args.epochs)]
    networks = [Network(f"network {i}", folder, args.s, i, [*words, str(i)]) for i in pending]
    return launch(networks, args, ranks, asked.verbose)


def check_data(asked: argparse.Namespace) -> None:
    """Ends the launcher if there are no images, rather than each network."""
    data = asked.args.data
    if str(data) not in ("glyphs", str(asked.default_data)) and not data.is_dir():
        sys.exit(f"there is no folder {data} (--data)")


def may_start(one: Status, epochs: int | None) -> bool:
    """Whether a network is neither alive nor done, or done with fewer epochs."""
    return not one.alive and (one.state != "done" or (epochs or 0) > (one.epochs or 0))


def launch(
    networks: Sequence[Network], args: argparse.Namespace, ranks: int, verbose: bool, to_end: bool = True
) -> int:
    """Starts networks of one run, each in so many processes, and watches them; 1 if one fails meanwhile."""
    if not networks:
        print("nothing to start: all networks are alive or done")
        return 0
    for one in networks:
        line = one.start(environment(one.i, args, ranks), ranks)
        print(line if verbose else f"{one.name}: {relpath(one.log)}")
    directory = networks[0].directory
    try:
        failed = view.watch(directory, args.num, networks, to_end)
    except KeyboardInterrupt:
        print("\nno longer watching; the training goes on")
        failed = 130
    if any(one.process.poll() is None for one in networks):
        print(f"grafting.sh status, stop or resume {shlex.quote(relpath(directory))}")
    return failed


def environment(i: int, args: argparse.Namespace, ranks: int = 1) -> dict[str, str]:
    """The variables that give network i its GPUs, counted round and round, and its share of the cores."""
    names, share = gpus(args.device), str(max(1, cores() // (args.num * ranks)))
    if ranks > len(names) > 0:
        found = f"torch can use {len(names)} here (see CUDA_VISIBLE_DEVICES)"
        sys.exit(f"each network is to have {ranks} GPUs (--gpus-per-network), and {found}")
    shares = {"OMP_NUM_THREADS": not names, "TORCHINDUCTOR_COMPILE_THREADS": args.compile}
    variables = {name: share for name, matters in shares.items() if matters and not os.environ.get(name)}
    if names and getattr(args, "gpu", None) is None:  # a resumed network may have said itself which it takes
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[k % len(names)] for k in range((i - 1) * ranks, i * ranks))
    return variables


def gpus(device: str | None) -> list[str]:
    """The GPUs to train on, as CUDA_VISIBLE_DEVICES names them; none: the CPU."""
    if device == "cpu" or not torch.cuda.is_available():
        return []
    names = [str(k) for k in range(torch.cuda.device_count())]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in visible.split(",")][: len(names)] if visible else names


def detached(
    command: Sequence[str], log: Path, variables: Mapping[str, str], cwd: str | None = None
) -> subprocess.Popen:
    """Starts a process as nohup does: in a session of its own, it hears neither Ctrl-C nor the terminal's end."""
    with open(log, "ab") as output:
        with suppress(OSError):  # held until the last of its processes has gone, torchrun's among them
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
        return subprocess.Popen(command, cwd=cwd, env={**os.environ, **variables}, **options)


# Runs that have been started


def folders() -> list[Path]:
    """Where runs are looked for: below checkpoint/ here, and in the scripts' folders."""
    return [Path.cwd(), ROOT, *(ROOT / folder for folder in SUFFIXES)]


def runs() -> list[Path]:
    found = {path.resolve().parent for folder in folders() for path in (folder / "checkpoint").rglob("run.json")}
    return sorted(found)


def find(name: str) -> Path:
    """The save directory of a run, by its path, or by that below checkpoint/, from whichever folder one is in."""
    for folder in folders():
        for path in (folder / Path(name).expanduser(), folder / "checkpoint" / name):
            if networks_of(path) or running(path):
                return path.resolve()
    sys.exit(f"{name} is not the save directory of a run: nothing has started there")


def running(directory: Path) -> set[int]:
    """The networks of which a process that grafting.sh has started lives, though it may not have said so yet."""
    logs = [path for suffix in SUFFIXES.values() for path in directory.glob(f"[0-9]*.{suffix}")]
    return {int(log.stem) for log in logs if log.stem.isdecimal() and is_held(log)}


def status(asked: argparse.Namespace) -> int:
    directories = [find(name) for name in asked.directories] or runs()
    if not directories:
        print("there is no run below checkpoint/")
    with ThreadPoolExecutor(16) as pool:  # a network on another machine takes seconds to tell
        for directory, statuses in zip(directories, pool.map(observe, directories), strict=True):
            print(f"{relpath(directory)}:", view.table(directory, statuses), sep="\n")
    return 0


def stop(asked: argparse.Namespace) -> int:
    directories = [find(name) for name in asked.directories]
    if not directories:
        directories = [run for run in runs() if any(one.alive for one in observe(run))]
        if len(directories) > 1:
            print(f"several runs are alive, say which: {', '.join(map(relpath, directories))}", file=sys.stderr)
            return 2
        if not directories:
            print("no run below checkpoint/ is alive")
    return max([end(directory) for directory in directories], default=0)


def end(directory: Path) -> int:
    """Sends SIGTERM to a run's networks on this host, and waits until they have ended; 1 if not all have.

    One that has only just started is asked as soon as it has said who it is.
    """
    asked: set[int] = set()
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        alive = [one for one in observe(directory) if one.alive]
        here = [one for one in alive if one.host == HOST]
        for one in here:
            if one.pid not in asked and one.state not in ENDED:
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(one.pid, signal.SIGTERM)
                asked.add(one.pid)
                print(f"network {one.network} (process {one.pid}) is asked to stop", flush=True)
        if not (here or running(directory)) or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    for one in alive:
        print(f"network {one.network} (process {one.pid} on {one.host}) is still alive")
    if not alive:
        print(f"no network of {relpath(directory)} is alive")
    return int(bool(alive))


def resume(asked: argparse.Namespace) -> int:
    return max([go_on(directory, asked) for directory in [find(name) for name in asked.directories]])


def go_on(directory: Path, asked: argparse.Namespace) -> int:
    """Continues networks of a run, as far as `may_start` has it, with the flags that network{i}.json holds."""
    changes = [*(["--epochs", str(asked.epochs)] if asked.epochs else []), "--s", str(directory), "--resume"]
    networks, args, ranks = [], None, 1
    for one in observe(directory):
        if not may_start(one, asked.epochs):
            continue
        place = next((k for k, word in enumerate(one.command) if Path(word).name == "grafting.py"), None)
        folder = "" if place is None else Path(one.cwd, one.command[place]).resolve().parent.name
        if folder not in SUFFIXES:
            sentence = f"network {one.network} has left no command of grafting.py"
            sys.exit(
                f"{sentence}: start the run with the flags that it had, and --resume, which continues all networks"
            )
        words, before = one.command[place + 1 :], one.command[:place]
        words += changes if words[-len(changes) :] != changes else []
        args = import_module(f"{folder}.flags").parse(words)
        ranks = asked.gpus_per_network or max([int(word) for word in before if word.isdecimal()], default=1)
        networks.append(Network(f"network {one.network}", folder, directory, one.network, words, one.cwd))
    to_end = len(asked.directories) == 1  # or the next run would have to wait for this one's end
    return launch(networks, args, ranks, asked.verbose, to_end)


# The demo


def demo(asked: argparse.Namespace) -> int:
    """Trains a baseline and two grafted networks on images that are drawn on the spot, and compares them."""
    check_data(asked)
    names = ["demo", *(f"demo{k}" for k in range(2, 1000))]
    base = next(path for name in names if not (path := Path("checkpoint", name)).exists())
    networks = []
    for name, num, i in (("baseline", 1, 1), ("grafted 1", 2, 1), ("grafted 2", 2, 2)):
        directory = base / name.split()[0]
        words = [*asked.words, "--s", str(directory), "--num", str(num), "--i", str(i)]
        networks.append(Network(name, asked.folder, directory, i, words))
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda number, frame: sys.exit(128 + number))
    asked.args.num, started = len(networks), []  # which share the cores
    try:
        for one in networks:
            line = one.start(environment(one.i, asked.args))
            started.append(one)
            print(line if asked.verbose else f"{one.name}: {one.log}", flush=True)
        failed = view.follow(started, asked.args.epochs)
    except KeyboardInterrupt:
        print("stopped")
        return 130
    finally:
        for one in started:
            one.process.terminate()
        for one in started:
            one.process.wait()
    if failed:
        sys.exit(failed.ending())
    print("comparing them …", flush=True)
    report = [ROOT / "analysis" / "report.py", base / "baseline", base / "grafted", "--plots", base / "plots"]
    return subprocess.run([sys.executable, *report]).returncode


if __name__ == "__main__":
    sys.exit(main(ASKED))
