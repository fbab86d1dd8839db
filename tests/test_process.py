"""The device that is chosen, what --amp means on it, and ends in one sentence."""

import argparse
import re
import signal
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from filter_grafting.errors import NeighbourTimeout, RefusedError
from training import process
from training.loop import Diverged
from training.process import UsageError, amp_dtype, cpu_has_bfloat16, deterministic, ending, pick_device

ARGS = argparse.Namespace(i=1)


def ended(error):
    """(exit status, what the user is told, what the log keeps)."""
    with pytest.raises(SystemExit) as end, ending(ARGS):
        raise error
    return end.value.code


@pytest.fixture(autouse=True)
def restored_handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# Ends


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UsageError("no such GPU"), 2, "no such GPU"),
        (NeighbourTimeout("nobody came"), 3, "nobody came (--timeout says how long to wait)"),
        (RefusedError("no"), 1, "no"),
        (Diverged("the loss became nan"), 1, "the loss became nan (try a lower --lr"),
    ],
)
def test_a_failure_that_was_foreseen_is_one_sentence(capsys, error, status, words):
    assert ended(error) == status
    out, err = capsys.readouterr()
    assert err.startswith(words) and err.count("\n") == 1 and out == ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0"),
            "the memory of the device is",
        ),
        (MemoryError(), "the memory of the device is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "the memory of the device is full"),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCUDA"), "the GPU is taken by"),
        (RuntimeError("No working C++ compiler found in config.cpp.cxx: (None, 'g++')"), "--compile needs"),
        (RuntimeError("Cannot find a working triton installation."), "--compile needs a C++ compiler (and on CUDA,"),
        (ValueError("Expected more than 1 value per channel when training, got [1, 8]"), "a batch of one image"),
        (RuntimeError("x_backward_cuda does not have a deterministic implementation, but"), "a layer of"),
    ],
)
def test_what_torch_says_is_one_sentence_and_the_log_keeps_the_traceback(capsys, error, words):
    assert ended(error) == 1
    out, err = capsys.readouterr()
    assert err.startswith(words) and err.count("\n") == 1
    assert out.startswith("Traceback") and str(error).split("\n")[0] in out


def test_on_a_terminal_there_is_no_traceback_of_what_is_known(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    ended(MemoryError())
    assert capsys.readouterr().out == ""
    ended(ZeroDivisionError("division by zero"))
    out, err = capsys.readouterr()
    assert "Traceback" in out and err == "ZeroDivisionError: division by zero\n"


def test_a_lost_connection_counts_among_several_ranks_only(capsys, monkeypatch):
    for size, words in (
        ("1", "RuntimeError: [gloo]"),
        ("2", "the connection to another process of this network was lost"),
    ):
        for name, value in {"WORLD_SIZE": size, "RANK": "0", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
            monkeypatch.setenv(name, value)
        ended(RuntimeError("[gloo] Connection closed by peer"))
        assert capsys.readouterr().err.startswith(words)


def test_what_fails_after_a_signal_is_the_signals_doing(capsys):
    with pytest.raises(SystemExit) as end, ending(ARGS) as signals:
        signals.finish_batch()
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")
    assert end.value.code == 143
    assert capsys.readouterr().err == "network 1 stopped by SIGTERM; --resume continues it\n"


# Devices


class GPU:
    """Stands in for torch.cuda."""

    def __init__(self, monkeypatch, capability=(9, 0), count=2, usable=True, archs=("sm_75", "sm_80", "sm_90")):
        self.current = None
        fakes = {
            "is_available": lambda: usable,
            "device_count": lambda: count,
            "get_device_capability": lambda device: capability,
            "get_device_name": lambda device: "a GPU",
            "get_arch_list": lambda: list(archs),
            "set_device": lambda device: setattr(self, "current", device),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_a_gpu_is_made_the_current_device_first(monkeypatch):
    gpu = GPU(monkeypatch)
    assert pick_device(None) == gpu.current == torch.device("cuda:0")
    assert pick_device("cuda", 1) == gpu.current == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"--gpu: asks for GPU 2, expected 0 to 1 .*CUDA_VISIBLE_DEVICES"):
        pick_device(None, 2)


def test_without_a_gpu_it_is_the_cpu(monkeypatch):
    GPU(monkeypatch, usable=False)
    monkeypatch.setattr(process, "_sees_gpu", lambda: False)
    assert pick_device(None) == torch.device("cpu")
    for arguments in ("cuda",), (None, 0):
        with pytest.raises(UsageError, match=r"no GPU can be used here .*--device cpu trains on the CPU"):
            pick_device(*arguments)


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_on_the_cpu(monkeypatch):
    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040)")

    GPU(monkeypatch, usable=False)
    monkeypatch.setattr(process, "_sees_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UsageError, match=r"driver on your system is too old.*--device cpu"):
        pick_device(None)


@pytest.mark.parametrize(
    ("capability", "archs", "works"),
    [
        ((8, 6), ["sm_75", "sm_80"], True),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((9, 0), ["sm_80"], False),
        ((6, 1), ["sm_75", "sm_80", "compute_80"], False),
        ((10, 0), ["sm_90a", "sm_100"], True),
        ((7, 5), ["sm_80"], False),
    ],
)
def test_a_gpu_that_torch_is_not_built_for_is_a_sentence(monkeypatch, capability, archs, works):
    GPU(monkeypatch, capability, archs=archs)
    words = rf"a GPU has capability {capability[0]}\.{capability[1]}, and torch .* is built for"
    with nullcontext() if works else pytest.raises(UsageError, match=words):
        pick_device(None)


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)])
def test_amp_goes_by_what_the_gpu_computes_in(monkeypatch, capability, dtype):
    GPU(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)  # which counts emulation
    found, notes = amp_dtype(True, torch.device("cuda"))
    assert found == dtype
    assert [bool(re.search("computing in float32.*capability 7.5", note)) for note in notes] == [True] * (dtype is None)


@pytest.mark.parametrize("has", [True, False])
def test_amp_goes_by_what_the_processor_computes_in(monkeypatch, has):
    monkeypatch.setattr(process, "cpu_has_bfloat16", lambda: has)
    found, notes = amp_dtype(True, torch.device("cpu"))
    assert found == (torch.bfloat16 if has else None)
    assert notes == ([] if has else ["--amp: computing in float32, not in bfloat16: this processor has none"])
    assert amp_dtype(False, torch.device("cpu")) == (None, [])


@pytest.mark.parametrize(
    ("flags", "has"),
    [("avx2 avx512f", False), ("avx512f avx512_bf16", True), ("amx_bf16", True), ("fp asimd bf16 i8mm", True)],
)
def test_a_processors_flags(monkeypatch, flags, has):
    monkeypatch.setattr(process.platform, "system", lambda: "Linux")
    monkeypatch.setattr(process, "Path", lambda name: types.SimpleNamespace(read_text=lambda: f"flags\t\t: {flags}\n"))
    assert cpu_has_bfloat16() == has


def test_deterministic_fills_no_memory_and_puts_everything_back():
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
