"""The process that trains a network: the device it computes on, the signals it hears, and an end in one sentence."""

import argparse
import logging
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import Any

import torch

from filter_grafting.errors import GraftingError, NeighbourTimeout
from filter_grafting.membership import printable
from filter_grafting.rings import FileRing
from training.flags import HINTS, REPORTS, command, settings_of, world

LOST_CONNECTION = re.compile("gloo|nccl|connection|socket|store", re.IGNORECASE)


class UsageError(GraftingError):
    """A wrong flag that shows only once torch is there."""


# Signals


class Stopped(BaseException):
    """A signal asked this process to end; no `except Exception` on the way takes it for a failure."""

    def __init__(self, number: int):
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number


class Signals:
    """SIGTERM and Ctrl-C end the run: at once while it starts, later after the current batch; a second one at once.

    Under torchrun each often comes twice (from whoever signals a whole job, and from torchrun): there the second
    changes nothing, as torchrun itself kills what does not end within half a minute.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._finishes_batch = False
        for number in (signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as shells set it for background jobs
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is None and world()[1] == 1:
            for other in (signal.SIGTERM, signal.SIGINT):
                signal.signal(other, signal.SIG_DFL)
        self.received = self.received or number
        if not self._finishes_batch:
            raise Stopped(number)

    def finish_batch(self) -> None:
        """From now on a signal ends the run at the next `check`, after a batch or during a wait, and nowhere else."""
        self._finishes_batch = True

    def check(self) -> None:
        if self.received is not None:
            raise Stopped(self.received)


def join_ring(
    args: argparse.Namespace, signals: Signals, shared: Sequence[str], may_raise: Sequence[str] = (), **options: Any
) -> FileRing:
    """This network's place in the ring that its flags name.

    Args:
        shared: the flags that all networks of the ring must have in common.
        may_raise: those of them that a resumed run may raise.
        options: further ones of FileRing.
    """
    # What the library has to say, as whom it waits for, belongs into the log.
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("filter_grafting").setLevel(logging.INFO)
    return FileRing(
        args.s,
        args.i,
        args.num,
        settings=settings_of(args, shared),
        resume=args.resume,
        may_raise=may_raise,
        timeout=60 * args.timeout,
        keep=math.inf if args.keep_all else 0,
        start_command=lambda network: shlex.join(command(network)),
        details={"command": command(), "cwd": os.getcwd(), **options.pop("details", {})},
        check=signals.check,
        **options,
    )


# Ends


@contextmanager
def ending(args: argparse.Namespace) -> Iterator[Signals]:
    """Within it, every failure becomes one sentence on standard error and an exit status.

    2 for a wrong flag, 3 for a neighbour that makes no progress, 143 or 130 for a signal, 1 for all else. The log
    keeps the traceback of what torch reports and of what nobody has foreseen.
    """
    signals = Signals()
    try:
        yield signals
    except (Stopped, Exception) as error:
        if isinstance(error, Stopped) or (signals.received is not None and not isinstance(error, GraftingError)):
            number = signals.received or signal.SIGTERM  # what fails after it, as a lost connection, follows from it
            sentence = f"network {args.i} stopped by {signal.Signals(number).name}; --resume continues it"
            status = 128 + number
        else:
            status = 2 if isinstance(error, UsageError) else 3 if isinstance(error, NeighbourTimeout) else 1
            sentence, known = explain(error)
            if not isinstance(error, GraftingError) and not (known and sys.stdout.isatty()):
                with suppress(OSError):
                    traceback.print_exc(file=sys.stdout)
        with suppress(OSError):
            sys.stdout.flush()
            print(printable(sentence, 2000), file=sys.stderr, flush=True)
        raise SystemExit(status) from None


def explain(error: Exception) -> tuple[str, bool]:
    """(the sentence for the user, whether it says what to do)."""
    text = " ".join(str(error).split())
    if isinstance(error, GraftingError):
        hint = next((HINTS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in HINTS), "")
        return text + (f" ({hint})" if hint else ""), True
    text = f"{type(error).__name__}: {text}"
    sentences = [sentence for words, sentence in REPORTS.items() if re.search(words, text)]
    if world()[1] > 1 and LOST_CONNECTION.search(text):
        sentences.append("the connection to another process of this network was lost: see what that one said last")
    return (f"{sentences[0]} ({text[:200]})", True) if sentences else (text[:500], False)


# The device


def pick_device(name: str | None, gpu: int | None = None) -> torch.device:
    """The device to train on, which is made torch's current one.

    Args:
        name: "cuda", "cpu", or None: cuda where there is a GPU.
        gpu: which GPU; None: the first, or this rank's of those that torchrun has started on this machine.

    Raises:
        UsageError: if there is no such device, or a GPU that this torch cannot use.
    """
    if name == "cpu" or (name is None and gpu is None and not torch.cuda.is_available() and not _sees_gpu()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = "torch finds none"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            problem = " ".join(str(error).split())[:200]
        raise UsageError(f"argument --device: no GPU can be used here ({problem}); --device cpu trains on the CPU")
    count, flag = torch.cuda.device_count(), "--gpu"
    if gpu is None and world()[1] > 1:
        gpu, flag = int(os.environ.get("LOCAL_RANK") or 0), "--nproc_per_node of torchrun"
    if gpu is not None and gpu >= count:
        raise UsageError(f"argument {flag}: asks for GPU {gpu}, expected 0 to {count - 1} (see CUDA_VISIBLE_DEVICES)")
    device = torch.device("cuda", gpu or 0)
    torch.cuda.set_device(device)  # first of all: else memory, streams and messages would be of GPU 0
    major, minor = torch.cuda.get_device_capability(device)
    if not _runs_on(major, minor, torch.cuda.get_arch_list()):
        kinds = " ".join(torch.cuda.get_arch_list())
        raise UsageError(
            f"argument --device: {torch.cuda.get_device_name(device)} has capability {major}.{minor}, and torch "
            f"{torch.__version__} is built for {kinds}: install another torch; --device cpu trains on the CPU"
        )
    return device


def _sees_gpu() -> bool:
    """Whether there is an NVIDIA GPU that the user has not hidden."""
    return bool(glob("/dev/nvidia[0-9]*")) and os.environ.get("CUDA_VISIBLE_DEVICES", "0") not in ("", "-1")


def _runs_on(major: int, minor: int, built_for: list[str]) -> bool:
    """Whether a GPU of this capability runs what was built for these: sm_80 is for 8.0 to 8.9, compute_80 from 8.0."""
    for name in built_for:
        kind, _, digits = name.partition("_")
        built = divmod(int(re.sub(r"\D", "", digits) or 0), 10)
        if built <= (major, minor) and (kind == "compute" or built[0] == major):
            return True
    return not built_for


def amp_dtype(amp: bool, device: torch.device) -> tuple[torch.dtype | None, list[str]]:
    """(the type for autocast, None for float32; lines for the log): bfloat16 where the hardware computes in it.

    Elsewhere it is emulated, at several times the cost of float32 on CPUs.
    """
    if not amp:
        return None, []
    if device.type == "cuda":
        # Not is_bf16_supported(), which counts emulation as well.
        major, minor = torch.cuda.get_device_capability(device)
        lacks = f"a GPU of capability {major}.{minor} has none, 8.0 and newer have" if major < 8 else ""
    else:
        lacks = "" if cpu_has_bfloat16() else "this processor has none"
    return (None, [f"--amp: computing in float32, not in bfloat16: {lacks}"]) if lacks else (torch.bfloat16, [])


def cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16: AVX-512 BF16, AMX, or ARM's BF16."""
    if platform.system() == "Darwin":
        asked = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
        return subprocess.run(asked, capture_output=True, text=True).stdout.strip() == "1"
    try:
        words = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})


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
