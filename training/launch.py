"""Starts the networks of a run, shows how they are, ends them and continues them: what grafting.sh calls.

    python training/launch.py grafting_cifar --model resnet20 --num 2

The script's own parser checks the flags, and network{i}.json says how a run goes on: there is no second rule here.
"""

import argparse
import fcntl
import importlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from any folder, without being installed
from training.flags import Parser, did_you_mean, number

view: ModuleType  # training.view, from `set_up` on: with it comes torch, which takes seconds, or is not installed yet

ROOT = Path(__file__).resolve().parent.parent
USAGE = """\
usage: grafting.sh [FLAG...]                   start the networks of a run; on a terminal, watch them
       grafting.sh status [DIR...]             how they are; without DIR: all runs below checkpoint/
       grafting.sh stop [DIR...]               end them; without DIR: those of the only run that is alive
       grafting.sh resume DIR... [--epochs E]  continue those that are neither alive nor done, with the flags
                                               that they had; with more epochs, those that are done, too
       grafting.sh demo [FLAG...]              train a baseline and two grafted networks, and compare them

All networks of a run share its save directory, DIR. --num says how many they are (1: a baseline). With
--gpus-per-network G each has G GPUs of its own, a process each under torchrun; without GPUs, G processes.
-v prints the commands that are started. All other flags are grafting.py's, which explains them:
       python {script} --help
"""
SUFFIXES = {"grafting_cifar": "log", "grafting_imagenet": "out"}  # of the logs of each script's networks
STOP_SECONDS = 120.0  # within which a network finishes its batch
DEMO = ("--model", "resnet20", "--epochs", "5", "--batch_size", "32", "--cos", "--amp")  # --amp: where hardware has it
DEMO_DATA = ("--data", "glyphs", "--images", "2000", "--test_images", "500")


def main(arguments: Sequence[str]) -> int:
    sys.argv[0] = "grafting.sh"  # the name in the parsers' messages
    sys.stdout.reconfigure(errors="replace")  # a terminal that knows no "é" is no reason to fail
    try:
        status = run(*arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        fail(f"{error.filename or 'grafting.sh'}: {error.strerror or error}")
    return status


def run(folder: str, *words: str) -> int:
    if {"-h", "--help"} & set(words) or words[:1] == ("help",):
        print(USAGE.format(script=shlex.quote(str(ROOT / folder / "grafting.py"))), end="")
        return 0
    commands = {"status": status, "stop": stop, "resume": resume, "demo": demo, "slurm": slurm}
    if not words or words[0].startswith("-"):
        return start(folder, words)
    if words[0] not in commands:
        wrong(f"there is no command {words[0]!r}{did_you_mean(words[0], commands)}")
    return commands[words[0]](folder, words[1:])


def fail(sentence: str, status: int = 1) -> NoReturn:
    print(sentence, file=sys.stderr)
    raise SystemExit(status)


def wrong(what: str) -> NoReturn:
    fail(f"grafting.sh: error: {what} (see grafting.sh --help)", 2)


def set_up() -> None:
    """Goes on in a Python that has all that requirements.txt lists, if this one has not; loads what needs torch."""
    global view
    finder = ["sh", str(ROOT / "training" / "venv.sh"), "requirements.txt"]
    found = subprocess.run(finder, stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise SystemExit(found.returncode)
    python = found.stdout.strip()
    if python != sys.executable:
        os.execv(python, [python, *sys.orig_argv[1:]])
    view = importlib.import_module("training.view")


# Flags


def own_flags(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """(the launcher's own flags, all others)."""
    parser = Parser(add_help=False)
    parser.add_argument("--gpus-per-network", metavar="G", type=number(int, 1, 1000))
    parser.add_argument("-v", "--verbose", action="store_true")
    return parser.parse_known_args(words)


def check(folder: str, words: Sequence[str], ranks: int | None = 1, cwd: str = "") -> argparse.Namespace:
    """The flags as a network's ranks will read them; a wrong one, or data that is not there, ends the launcher."""
    flags = importlib.import_module(f"{folder}.flags")
    world = {"WORLD_SIZE": str(ranks), "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "0"}
    with patch.dict(os.environ, world if (ranks or 1) > 1 else {}):
        args = flags.parse(list(words))
    if getattr(args, "gpu", None) is not None:
        wrong("argument --gpu: each network has a GPU of its own; CUDA_VISIBLE_DEVICES says which there are")
    if getattr(args, "evaluate", False):
        wrong("argument -e: networks are evaluated by grafting.py itself")
    default = flags.parser().get_default("data")
    needs_none = folder == "grafting_cifar" and str(args.data) in ("glyphs", str(default))
    if not needs_none and not Path(cwd, args.data).is_dir():
        fail(f"there is no folder {args.data} (--data)")
    return args


# Starting


class Job(NamedTuple):
    """A network that is to be started."""

    name: str
    directory: Path
    i: int
    words: Sequence[str]  # its flags
    k: int  # which of all that are started side by side it is, from 1: so it has its GPUs
    cwd: str | None = None


def start(folder: str, words: Sequence[str]) -> int:
    own, words = own_flags(words)
    args = check(folder, words, own.gpus_per_network)
    if any(word.partition("=")[0] == "--i" for word in words):
        wrong("argument --i: all networks are started; for a single one there is grafting.py")
    set_up()
    statuses = view.look(args.s, range(1, args.num + 1))
    for status in [] if args.resume else statuses:
        if status.alive or status.epoch is not None:
            runs, again = "runs" if status.alive else "has run", how(folder, "resume", args.s)
            place = f"network {status.network} {runs} in {view.short(args.s)}"
            fail(f"{place}: {again} continues it; or choose another directory (--s)")
    words = [*workers_of(folder, (own.gpus_per_network or 1) * args.num), *words, "--s", str(args.s), "--i"]
    pending = [status.network for status in statuses if may_start(status, args.epochs)]
    if pending:
        return launch(folder, args, [Job(f"network {i}", args.s, i, [*words, str(i)], i) for i in pending], own)
    print(f"nothing to start: all networks in {view.short(args.s)} are alive or done")
    return 0


def may_start(status: "view.Status", epochs: int | None) -> bool:
    """Whether a network is neither alive nor done, or done with fewer epochs."""
    return not status.alive and (status.state != "done" or (epochs or 0) > (status.epochs or 0))


def launch(folder: str, args: argparse.Namespace, jobs: Sequence[Job], own: argparse.Namespace) -> int:
    """Starts networks of one run, and shows how they are; 1 if one fails meanwhile."""
    started = list(spawn_all(folder, jobs, args, own, args.num))
    for one in started:  # not before all are started: whoever reads this may stop reading
        print(one.line if own.verbose else f"{one.name}: {view.short(one.log)}")
    again = f"look again: {how(folder, 'status', args.s)}\nend them:   {how(folder, 'stop', args.s)}"
    try:
        failed = view.watch(args.s, {job.i: one for job, one in zip(jobs, started, strict=True)})
    except KeyboardInterrupt:
        print(f"\nno longer watching; the training goes on\n{again}")
        return 130
    if any(one.process.poll() is None for one in started):
        print(f"start it again: {how(folder, 'resume', args.s)}" if failed else again)
    return failed


def spawn_all(
    folder: str, jobs: Iterable[Job], args: argparse.Namespace, own: argparse.Namespace, num: int
) -> Iterator["view.Started"]:
    """Starts jobs, each with its GPUs, or with its share of the cores as one of num."""
    ranks, names = own.gpus_per_network or 1, gpus(args.device)
    if 0 < len(names) < ranks:
        wrong(f"argument --gpus-per-network: got {ranks}, but there are {len(names)} GPUs")
    share = share_of(args, ranks * num, names)
    for job in jobs:
        command, log = command_of(folder, job.words, ranks), job.directory / f"{job.i}.{SUFFIXES[folder]}"
        yield spawn(job.name, command, log, gpus_of(job.k, ranks, names) | share, job.cwd)


def cores() -> int:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return int(os.environ.get("SLURM_CPUS_ON_NODE") or allowed)


def share_of(args: argparse.Namespace, processes: int, gpus: Sequence[str]) -> dict[str, str]:
    """Variables that keep each of several processes from taking all cores, where the user has not set them."""
    names = ["OMP_NUM_THREADS"] * (not gpus) + ["TORCHINDUCTOR_COMPILE_THREADS"] * args.compile
    return {name: str(max(1, cores() // processes)) for name in names if not os.environ.get(name)}


def workers_of(folder: str, processes: int) -> list[str]:
    """The same for the processes that decode images: a flag that stands before the user's, which has the last word."""
    return ["--workers", str(max(1, cores() // processes))] if folder == "grafting_imagenet" else []


def gpus_of(k: int, ranks: int, names: Sequence[str]) -> dict[str, str]:
    """The variable that gives the k-th network, from 1, its GPUs, counted round and round; none: the CPU."""
    mine = [names[n % len(names)] for n in range((k - 1) * ranks, k * ranks)] if names else []
    return {"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {}


def gpus(device: str | None) -> list[str]:
    """The GPUs to train on, as CUDA_VISIBLE_DEVICES names them; none: the CPU."""
    if device == "cpu":
        return []
    cuda, visible = importlib.import_module("torch").cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    count = cuda.device_count() if cuda.is_available() else 0
    return [name.strip() for name in visible.split(",")][:count] if visible else [str(k) for k in range(count)]


def command_of(folder: str, words: Sequence[str], ranks: int = 1, nodes: Sequence[str] = ()) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", *(nodes or ["--standalone"]), "--nproc_per_node", str(ranks), "--"]
    is_one = ranks == 1 and not nodes
    return [sys.executable, *([] if is_one else torchrun), str(ROOT / folder / "grafting.py"), *words]


def spawn(
    name: str, command: Sequence[str], log: Path, variables: Mapping[str, str], cwd: str | None = None
) -> "view.Started":
    """Starts a network as nohup does, but in a session of its own, so that it does not hear Ctrl-C either.

    It holds its log locked, as do all processes that inherit it: the lock tells that the network lives from the first
    moment on, and until the last of torchrun's has gone.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as output:
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(f"{name} is alive: a process writes to {log}")
        except OSError:  # a file system without locks: the network's own tells later
            pass
        size, heard = output.tell(), signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which the process inherits
        options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output, "start_new_session": True}
        process = subprocess.Popen(command, cwd=cwd, env=os.environ | variables, **options)
        signal.signal(signal.SIGHUP, heard)
        values = " ".join(f"{key}={shlex.quote(value)}" for key, value in variables.items())
        line = f"{values} nohup {shlex.join(command)} >>{shlex.quote(str(log))} 2>&1 </dev/null &".lstrip()
        return view.Started(name, process, log, size, line)


def how(folder: str, command: str, directory: Path) -> str:
    """What to type for a command of the launcher."""
    script = view.short(ROOT / folder / "grafting.sh")
    return shlex.join([script if "/" in script else f"./{script}", command, view.short(directory)])


# Runs that have been started


def bases() -> list[Path]:
    return [Path.cwd(), ROOT, *(ROOT / folder for folder in SUFFIXES)]


def runs() -> list[Path]:
    """The runs below checkpoint/, here and in the scripts' folders."""
    folders = {Path(place).resolve() for base in bases() for place, _, _ in os.walk(base / "checkpoint")}
    found = [folder for folder in folders if view.networks(folder)]
    return sorted(found, key=lambda folder: (not folder.is_relative_to(Path.cwd()), folder))  # those below come first


def find(name: str) -> Path:
    """The save directory of a run, by its path or name, from whichever folder one is in."""
    for base in bases():
        for path in (base / name, base / "checkpoint" / name):
            if view.networks(path):
                return path.resolve()
    fail(f"{view.printable(name)} is not the save directory of a run: nothing has started there")


def which(command: str, words: Sequence[str]) -> tuple[list[Path], int | None]:
    """The directories of a command, and --epochs of resume."""
    parser = Parser(prog=f"grafting.sh {command}", add_help=False)
    parser.add_argument("directories", metavar="DIR", nargs="+" if command == "resume" else "*")
    if command == "resume":
        parser.add_argument("--epochs", metavar="E", type=number(int, 1))
    args = parser.parse_args(words)
    set_up()
    return [find(name) for name in args.directories], getattr(args, "epochs", None)


def status(folder: str, words: Sequence[str]) -> int:
    directories, _ = which("status", words)
    if not directories:
        found = runs()
        print(*(view.listing(found) if found else ["there is no run below checkpoint/"]), sep="\n")
    for directory in directories:
        if len(directories) > 1:
            print(f"{view.short(directory)}:")
        print(*view.table(directory, view.look(directory)), sep="\n")
    return 0


def stop(folder: str, words: Sequence[str]) -> int:
    directories, _ = which("stop", words)
    if not directories:
        directories = [run for run in runs() if any(one.alive for one in view.look(run))]
        if len(directories) > 1:
            fail(f"several runs are alive, say which one to stop: {', '.join(map(view.short, directories))}", 2)
        if not directories:
            print("no run below checkpoint/ is alive")
    return max([end(directory) for directory in directories], default=0)


def end(directory: Path, seconds: float = STOP_SECONDS) -> int:
    """Sends SIGTERM to a run's networks on this host, and waits until all their processes have ended.

    A process that has only just started has not said yet who it is, and is asked as soon as it has.
    """
    asked, deadline = set(), time.monotonic() + seconds
    while alive := view.living(directory):
        here = [one for one in alive if one.host in ("", socket.gethostname())]
        for one in here:
            if one.alive and one.pid and one.state not in view.ENDED and one.pid not in asked:
                asked.add(one.pid)
                with suppress(ProcessLookupError):  # it has just ended by itself
                    os.kill(one.pid, signal.SIGTERM)
                    print(f"network {one.network} (process {one.pid}) is asked to stop", flush=True)
        if not here or time.monotonic() > deadline:
            break
        time.sleep(0.1)
    else:
        print(f"no network of {view.short(directory)} is alive")
        return 0
    for one in alive:
        late = f"still there after {seconds:g} s; asked again, it ends at once"
        where = late if one in here else f"on {one.host}: stop it there"
        print(f"network {one.network} (process {one.pid}) is {where}")
    return 1


def resume(folder: str, words: Sequence[str]) -> int:
    own, words = own_flags(words)
    directories, epochs = which("resume", words)
    return max([go_on(directory, epochs, argparse.Namespace(**vars(own))) for directory in directories])


def go_on(directory: Path, epochs: int | None, own: argparse.Namespace) -> int:
    """Continues the networks of a run, as far as `may_start` has it, with the flags that network{i}.json holds."""
    jobs, changes = [], [*(["--epochs", str(epochs)] if epochs else []), "--s", str(directory), "--resume"]
    for one in [one for one in view.look(directory) if may_start(one, epochs)]:
        place = next((k for k, word in enumerate(one.command) if Path(word).name == "grafting.py"), None)
        folder = "" if place is None else Path(one.cwd, one.command[place]).resolve().parent.name
        if folder not in SUFFIXES:
            fail(f"network {one.network} has left no command in {view.short(directory)}: start it with its flags")
        words, torchrun = one.command[place + 1 :], one.command[:place]
        words += changes if words[-len(changes) :] != changes else []
        had = [int(word) for word in torchrun if word.isdecimal()]
        own.gpus_per_network = own.gpus_per_network or max(had, default=1)
        cwd = one.cwd if Path(one.cwd).is_dir() else os.curdir
        args = check(folder, words, own.gpus_per_network, cwd)
        jobs.append(Job(f"network {one.network}", directory, one.network, words, one.network, cwd))
    if jobs:
        return launch(folder, args, jobs, own)
    print(f"nothing to continue in {view.short(directory)}")
    return 0


# The demo, and Slurm


def demo(folder: str, words: Sequence[str]) -> int:
    """Trains a baseline and two grafted networks on images that are drawn on the spot, and compares them."""
    flags = {word.partition("=")[0] for word in words}
    if taken := sorted(flags & {"--s", "--save_dir", "--num", "--networks", "--i", "--resume"}):
        wrong(f"argument {taken[0]}: the demo says itself what it trains, and where")
    own, words = own_flags([*DEMO, *(() if "--data" in flags else DEMO_DATA), *words])
    folder, base = "grafting_cifar", Path("checkpoint", "demo")
    directories, jobs = [base / "baseline", base / "grafted"], []
    for name, place, num, i in (("baseline", 0, 1, 1), ("grafted 1", 1, 2, 1), ("grafted 2", 1, 2, 2)):
        own_words = [*words, "--s", str(directories[place]), "--num", str(num), "--i", str(i)]
        jobs.append(Job(name, directories[place], i, own_words, len(jobs) + 1))
        args = check(folder, own_words)
    set_up()
    replace(base, directories)
    try:
        failed = train_side_by_side(folder, jobs, args, own)
    except KeyboardInterrupt:
        fail("stopped", 130)
    if failed:
        fail(failed.sentence())
    print("comparing them …", flush=True)
    report = [ROOT / "analysis" / "report.py", *directories, "--plots", base / "plots"]
    return subprocess.run([sys.executable, *report]).returncode


def train_side_by_side(
    folder: str, jobs: Sequence[Job], args: argparse.Namespace, own: argparse.Namespace
) -> "view.Started | None":
    """Trains the demo's networks and follows them; returns one that has failed. All have ended when it ends."""
    for kind in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(kind, lambda number, frame: sys.exit(128 + number))
    started = []
    try:
        started.extend(spawn_all(folder, jobs, args, own, len(jobs)))
        for one in started:
            print(one.line if own.verbose else f"{one.name}: {one.log}")
        return view.follow(started, list(dict.fromkeys(job.directory for job in jobs)), args.epochs)
    finally:
        for one in started:
            one.process.terminate()
        for one in started:
            one.process.wait()


def replace(base: Path, directories: Sequence[Path]) -> None:
    """Makes an empty folder in the place of the last demo's; any other folder stays as it is."""
    marker = base / "made by grafting.sh demo, which replaces this folder"
    if base.exists() and not marker.exists():
        fail(f"{base.resolve()} was not made by the demo: move it away")
    if any(view.living(directory) for directory in directories):
        fail(f"a demo is at work in {base.resolve()}: wait for its end, or stop it")
    shutil.rmtree(base, ignore_errors=True)
    base.mkdir(parents=True)
    marker.touch()


def slurm(folder: str, words: Sequence[str]) -> int:
    """Trains network i in task i of a Slurm job array; at the time limit, the task is queued again."""
    args, variables = check(folder, words), os.environ
    first, last, count = (variables.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("MIN", "MAX", "COUNT"))
    if (first, last, count) != ("1", str(args.num), str(args.num)):
        array = f"{first}-{last}, {count} tasks" if count else "none"
        fail(f"the array of this job is {array}, and --num is {args.num}: submit it with --array=1-{args.num}", 2)
    set_up()
    i, job, nodes = int(variables["SLURM_ARRAY_TASK_ID"]), variables["SLURM_JOB_ID"], []
    ranks, machines = int(variables.get("SLURM_GPUS_ON_NODE") or 1), int(variables.get("SLURM_NNODES") or 1)
    if machines > 1:  # a torchrun on each; they meet on the first one, at a port of this job's own
        names = subprocess.run(["scontrol", "show", "hostnames"], capture_output=True, text=True, check=True).stdout
        meeting = f"{names.split()[0]}:{20000 + int(job) % 40000}"
        nodes = ["--nnodes", str(machines), "--rdzv_backend", "c10d", "--rdzv_id", job, "--rdzv_endpoint", meeting]
    words = [*workers_of(folder, ranks), *words, "--s", str(args.s), "--i", str(i), "--resume"]
    command = ["srun"] * (machines > 1) + command_of(folder, words, ranks, nodes)
    at_limit, log = [], args.s / f"{i}.{SUFFIXES[folder]}"
    # SIGTERM comes from Slurm to all processes, and is waited for; SIGUSR1, before the time limit, to this one alone.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    signal.signal(signal.SIGUSR1, lambda number, frame: at_limit.append(number) or network.process.terminate())
    network = spawn(f"network {i}", command, log, share_of(args, ranks, ()))
    print(f"{shlex.join(command)} >>{log} (start {variables.get('SLURM_RESTART_COUNT', 0)} of job {job})", flush=True)
    if (result := network.process.wait()) and at_limit:
        subprocess.run(["scontrol", "requeue", job])
    return result if result >= 0 else 128 - result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
