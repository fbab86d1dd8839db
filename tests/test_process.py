"""The device that is chosen, what --amp means on it, and ends in one sentence."""

import argparse
import signal
import time

import pytest
import torch

from filter_grafting.errors import GraftingError, NeighbourTimeout
from training import process
from training.process import Signals, Stopped, UsageError, amp_dtype, deterministic, ending, pick_device

# Ends

FULL = "RuntimeError: unable to write to file </torch_1_2>: No space left on device (28)"
IN_WORKER = (
    f"Caught RuntimeError in worker process 0.\nOriginal Traceback (most recent call last):\n{'  x' * 500}\n{FULL}\n"
)


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (UsageError("no such GPU"), 2, "no such GPU"),
        (NeighbourTimeout("nobody came"), 3, "nobody came (--timeout says how long to wait)"),
        (ZeroDivisionError("division\nby zero"), 1, "ZeroDivisionError: division by zero"),
        (OSError("AF_UNIX path too long"), 1, "OSError: AF_UNIX path too long (choose a shorter TMPDIR)"),
        (RuntimeError(IN_WORKER), 1, f"{FULL} (make /dev/shm larger (docker: --shm-size), or give fewer --workers)"),
        (RuntimeError("x_cuda does not have a deterministic implementation"), 1, "leave out --deterministic)"),
    ],
)
def test_a_failure_is_one_sentence_and_the_log_keeps_the_traceback_of_what_nobody_foresaw(
    capsys, error, status, sentence
):
    with pytest.raises(SystemExit) as end, ending(argparse.Namespace(i=1)):
        raise error
    out, err = capsys.readouterr()
    assert end.value.code == status and err.endswith(sentence + "\n") and err.count("\n") == 1
    assert out.startswith("Traceback") == (not isinstance(error, GraftingError))


def test_what_fails_after_a_signal_is_the_signals_doing(capsys):
    with pytest.raises(SystemExit) as end, ending(argparse.Namespace(i=1)) as signals:
        signals.finish_batch()
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    assert end.value.code == 143
    assert capsys.readouterr().err == "network 1 stopped by SIGTERM; --resume continues it\n"


def test_under_torchrun_the_second_signal_does_not_interrupt_the_end_of_a_start(monkeypatch):
    set_ranks(monkeypatch)
    Signals()
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)


def test_a_rank_whose_connection_broke_can_be_ended_by_torchrun_before_it_says_so(capsys, monkeypatch):
    set_ranks(monkeypatch)
    seen = []
    monkeypatch.setattr(time, "sleep", lambda _: seen.append((*capsys.readouterr(), signal.getsignal(signal.SIGTERM))))
    with pytest.raises(SystemExit) as end, ending(argparse.Namespace(i=1)):
        raise RuntimeError("Connection closed by peer")
    assert seen == [("", "", signal.SIG_DFL)]
    assert end.value.code == 1 and capsys.readouterr().err == "RuntimeError: Connection closed by peer\n"


# Devices


def set_ranks(monkeypatch):
    variables = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "here", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=[0, 2])
def gpus(request, monkeypatch):
    """The number of GPUs; `current` is the one that torch was told to use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(process, "glob", lambda pattern: [])
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(process, "current", device))
    monkeypatch.setattr(process, "current", None, raising=False)
    return request.param


def test_the_device_is_the_gpu_that_was_asked_for_or_the_first_or_the_cpu(gpus, monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=rf"GPU 2 is asked for, and torch can use {gpus} .*--device cpu trains on the"):
        pick_device("cuda", 2)
    if gpus == 0:
        assert pick_device(None) == torch.device("cpu")
    else:
        assert pick_device(None) == process.current == torch.device("cuda:0")
        assert pick_device("cuda", 1) == process.current == torch.device("cuda:1")
        set_ranks(monkeypatch)
        assert pick_device(None) == process.current == torch.device("cuda:1")


@pytest.mark.parametrize("module, name", [(torch.cuda, "set_device"), (torch, "ones")])  # as where it is taken; old
def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(gpus, monkeypatch, module, name):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: busy, or no kernel image is available for execution\nCompile with")

    monkeypatch.setattr(process, "glob", lambda pattern: ["/dev/nvidia0"])  # so it is where the driver is too old
    monkeypatch.setattr(module, name, fail)
    with pytest.raises(UsageError, match="--device cpu trains on the CPU"):
        pick_device(None)
    assert pick_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # the user's wish
    if gpus == 0:
        assert pick_device(None) == torch.device("cpu")


@pytest.mark.parametrize("has", [True, False])
def test_amp_goes_by_what_the_hardware_computes_in(monkeypatch, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has or including_emulation)
    monkeypatch.setattr(process, "cpu_has_bfloat16", lambda: has)
    for device, name in ("cuda", "GPU"), ("cpu", "processor"):
        note = f"--amp: computing in float32, not in bfloat16: this {name} has none"
        assert amp_dtype(True, torch.device(device)) == ((torch.bfloat16, []) if has else (None, [note]))
        assert amp_dtype(False, torch.device(device)) == (None, [])


def test_deterministic_fills_no_memory_and_puts_everything_back():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
