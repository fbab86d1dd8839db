"""The process that trains a network: the device it computes on, the signals it hears, and an end in one sentence."""

import argparse
import logging
import math
import os
import platform
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

import torch

from filter_grafting.errors import AlreadyRunError, GraftingError, NeighbourTimeout, SettingsError, UnreadableError
from filter_grafting.membership import printable
from filter_grafting.rings import FileRing
from training.flags import command, settings_of, world

# What torch and Python report though the program is not at fault, and what to do.
REPORTS = {
    r"out of memory|can't allocate memory": "give a smaller batch or model, or another device",
    r"C\+\+ compiler|C compiler|working triton": "--compile needs a C++ compiler (and on CUDA, triton)",
    r"Expected more than 1 value per channel": "a batch of one image has no statistics: choose another batch size",
    r"deterministic implementation": "a layer of this model has no deterministic gradient: leave out --deterministic",
    r"captur": "there is no CUDA graph with --eager (on CIFAR), and without --compile",
    r"AF_UNIX path too long": "choose a shorter TMPDIR",
    r"Too many open files": "raise `ulimit -n`, or give fewer --workers",
    r"out of shared memory|</torch_": "make /dev/shm larger (docker: --shm-size), or give fewer --workers",
}
# What to do about an error of the library, in words of flags, of which the library knows none.
HINTS = {
    AlreadyRunError: "--resume continues it, --s names another directory",
    SettingsError: "a resumed run may raise --epochs alone, while no other network is at work, and if neither a cosine "
    "nor an average depends on them",
    UnreadableError: "mend that, then continue with --resume",
    NeighbourTimeout: "--timeout says how long to wait",
}
TORCHRUN_SECONDS = 5.0  # within which torchrun notices that a rank has ended, and ends the others


class UsageError(GraftingError):
    """A wrong flag that shows only once torch is there."""


# Signals


class Stopped(BaseException):
    """A signal asked this process to end; no `except Exception` on the way takes it for a failure."""


class Signals:
    """SIGTERM and Ctrl-C end the run: at once while it starts, later after the current batch; a second one at once.

    Under torchrun each often comes twice (from whoever signals a whole job, and from torchrun): there the second
    changes nothing, as torchrun itself kills what does not end within half a minute.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._finishes_batch = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as shells set it for background jobs
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if world()[1] == 1:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.received is None:  # a second one does not break into what ends the first one's start
            self.received = signal.Signals(number)
            if not self._finishes_batch:
                self.check()

    def finish_batch(self) -> None:
        """From now on a signal ends the run at the next `check`, after a batch or during a wait, and nowhere else."""
        self._finishes_batch = True

    def check(self) -> None:
        if self.received is not None:
            raise Stopped(f"by {self.received.name}")


@contextmanager
def join_ring(
    args: argparse.Namespace, signals: Signals, shared: Sequence[str], may_raise: Sequence[str] = (), **options: Any
) -> Iterator[FileRing]:
    """This network's place in the ring that its flags name; `shared` are those that all networks have in common."""
    # What the library has to say, as whom it waits for, belongs into the log.
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("filter_grafting").setLevel(logging.INFO)
    options |= {"settings": settings_of(args, shared), "resume": args.resume, "may_raise": may_raise}
    options |= {"timeout": 60 * args.timeout, "keep": math.inf if args.keep_all else 0, "check": signals.check}
    options["details"] = {"command": command(), "cwd": os.getcwd(), **options.get("details", {})}
    options["start_command"] = lambda network: shlex.join(command(network))
    with FileRing(args.s, args.i, args.num, **options) as ring:
        try:
            yield ring
        except Exception as error:
            if not isinstance(error, GraftingError):
                signals.check()  # what fails after a signal, as a lost connection, follows from it
            raise


@contextmanager
def ending(args: argparse.Namespace) -> Iterator[Signals]:
    """Within it, every failure becomes one sentence on standard error and an exit status.

    2 for a wrong flag, 3 for a neighbour that makes no progress, 143 or 130 for a signal, 1 for all else. The log
    keeps the traceback of what nobody has foreseen.
    """
    signals = Signals()
    try:
        yield signals
    except (Stopped, Exception) as error:
        if isinstance(error, GraftingError):
            hint = next((hint for kind, hint in HINTS.items() if isinstance(error, kind)), "")
            sentence = str(error)
            if re.search(r"\b(layers|exclude)=|use level 'layer'", sentence):  # arguments of graft()
                hint = "in a script: another --model (ImageNet: -a), or --level layer"
            status = 2 if isinstance(error, UsageError) else 3 if isinstance(error, NeighbourTimeout) else 1
        elif signals.received is not None:  # what fails after a signal, as a lost connection, follows from it
            sentence, hint = f"network {args.i} stopped by {signals.received.name}; --resume continues it", ""
            status = 128 + signals.received
        else:
            if world()[1] > 1:
                # If a connection broke as another rank ended, that one has said why, and torchrun ends this one now.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(TORCHRUN_SECONDS)
            said, status = f"{type(error).__name__}: {' '.join(str(error).split())}", 1
            # What a worker of a DataLoader raises comes with its traceback, and the reason stands at the end.
            sentence = (str(error).strip().splitlines()[-1] if "Original Traceback" in said else said)[:500]
            hint = next((hint for words, hint in REPORTS.items() if re.search(words, sentence)), "")
            with suppress(OSError):
                traceback.print_exc(file=sys.stdout)
                sys.stdout.flush()
        print(printable(f"{sentence} ({hint})" if hint else sentence, 2000), file=sys.stderr, flush=True)
        raise SystemExit(status) from None


# The device


def pick_device(name: str | None, gpu: int | None = None) -> torch.device:
    """The device to train on, which is made torch's current one: without a name, cuda where there is a GPU.

    `gpu` says which; without it, that is the first, or this rank's of those that torchrun has started on this machine.
    Raises UsageError if there is no such GPU, or one that this torch cannot use.
    """
    # A GPU that the user has not hidden is there though its driver may be too old for this torch.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    sees_gpu = torch.cuda.is_available() or (glob("/dev/nvidia[0-9]*") and not hidden)
    if name == "cpu" or (name is None and gpu is None and not sees_gpu):
        return torch.device("cpu")
    if gpu is None:
        gpu = int(os.environ["LOCAL_RANK"]) if world()[1] > 1 else 0
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu >= count:
        found = f"torch can use {count} here (see CUDA_VISIBLE_DEVICES, and nvidia-smi for the driver)"
        raise UsageError(f"GPU {gpu} is asked for, and {found}; --device cpu trains on the CPU")
    device = torch.device("cuda", gpu)
    try:
        torch.cuda.set_device(device)  # first of all: else memory, streams and messages would be of GPU 0
        torch.ones(1, device=device)  # the first kernel, which a torch that was built for other GPUs lacks
    except RuntimeError as error:
        problem = f"this torch cannot use GPU {gpu} ({str(error).splitlines()[0]})"
        raise UsageError(f"{problem}: choose another, or another torch; --device cpu trains on the CPU") from error
    return device


def amp_dtype(amp: bool, device: torch.device) -> tuple[torch.dtype | None, list[str]]:
    """(the type for autocast, None for float32; lines for the log): bfloat16 where the hardware computes in it.

    Elsewhere it is emulated, at several times the cost of float32 on CPUs.
    """
    if not amp:
        return None, []
    is_cuda = device.type == "cuda"
    if torch.cuda.is_bf16_supported(including_emulation=False) if is_cuda else cpu_has_bfloat16():
        return torch.bfloat16, []
    which = "GPU" if is_cuda else "processor"
    return None, [f"--amp: computing in float32, not in bfloat16: this {which} has none"]


def cpu_has_bfloat16() -> bool:
    """Whether Linux says that the processor has instructions for bfloat16: AVX-512 BF16, AMX, or ARM's BF16."""
    cpus = Path("/proc/cpuinfo")
    words = set(re.findall(r"\w+", cpus.read_text())) if cpus.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


def computer(device: torch.device, ranks: int = 1) -> str:
    """What a network is trained on, as a line for the log."""
    name = f"cpu, {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    name = f"{ranks} processes, each on {name}" if ranks > 1 else name
    return f"device: {name}; torch {torch.__version__}, Python {platform.python_version()}"


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Within it, operations without a deterministic implementation raise, and cuDNN does not choose by timing."""
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # older torch multiplies no matrices without it
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled)
    torch.backends.cudnn.benchmark = not enabled
    torch.utils.deterministic.fill_uninitialized_memory = False  # all memory is written before it is read
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]
