import os
import pickle
import random
import re
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy
import pytest
import torch

from filter_grafting.checkpoint import load, save, write_atomically
from filter_grafting.errors import CheckpointError, UnreadableError, WriteError

CONTENTS = {
    "net": {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.arange(8, dtype=torch.bfloat16),
    },
    "epoch": 3,
    "extra": {"best": 91.25, "settings": {"model": "resnet20", "cos": False}, "optimizer": {"state": {0: None}}},
}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "ckpt1_3.t7"
    save(path, CONTENTS)
    return path


def assert_same(found, expected=CONTENTS) -> None:
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    else:
        assert found == expected and type(found) is type(expected)


class Bomb:
    """Unpickled, it runs a command that makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


# Writing


def test_what_is_saved_is_loaded_and_nothing_else_is_left(path):
    assert_same(load(path))
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize(
    "value",
    [None, (1, (2.5, "é")), {1: [True]}, {1, 2}, b"bytes", 1j, 2**80, OrderedDict(a=1), Counter("ab"), torch.float16],
)
def test_plain_values_come_back_as_they_were(tmp_path, value):
    save(tmp_path / "file", {"extra": value})
    assert_same(load(tmp_path / "file")["extra"], value)


@pytest.mark.parametrize(
    ("value", "named"),
    [(numpy.float64(1), "numpy"), (Path("x"), "pathlib"), (lambda: 1, "lambda"), (Bomb, "Bomb"), (sys, "module")],
)
def test_what_could_not_be_loaded_again_is_refused_before_it_is_written(path, value, named):
    with pytest.raises(CheckpointError, match=rf"ckpt1_3\.t7 was not saved: .*{named}.*; give tensors"):
        save(path, {"net": {}, "extra": {"more": value}})
    assert_same(load(path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_are_saved_from_the_device_that_they_are_on(path):
    save(path, {"net": torch.ones(3, device="cuda")})
    assert torch.load(path, weights_only=True)["net"].is_cuda  # as the published script reads it
    assert load(path)["net"].device.type == "cpu"


def test_a_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def tell_fsync(descriptor: int) -> None:
        calls.append("fsync" if os.path.isfile(f"/dev/fd/{descriptor}") else "fsync folder")
        fsync(descriptor)

    def tell_replace(source: Path, target: Path) -> None:
        assert re.fullmatch(r"\.ckpt1_3\.t7\.[0-9a-f]+\.tmp", source.name)
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", tell_fsync)
    monkeypatch.setattr(os, "replace", tell_replace)
    save(path, CONTENTS)
    assert calls == ["fsync", "rename", "fsync folder"]


def test_readers_never_see_a_part_of_a_file(path):
    sizes, stop, failures = (1, 1000, 300_000), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                values = load(path)["w"]
                assert len(values) in sizes and (values == len(values)).all()
            except Exception as error:
                failures.append(error)

    save(path, {"w": torch.ones(1)})
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for count in range(30):
        save(path, {"w": torch.full((sizes[count % 3],), float(sizes[count % 3]))})
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError) as failure:
        save(path, {"net": {}})
    monkeypatch.undo()
    said = str(failure.value)
    assert said.startswith(f"cannot write {path}: No space left on device; ") and said.isprintable()
    assert said.endswith(" MB are free there; mend that, then resume")
    assert_same(load(path))
    assert os.listdir(path.parent) == [path.name]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "outside").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "outside").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new" and not (tmp_path / "link").is_symlink()


# Damage


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_truncated_anywhere_is_refused(path, is_new):
    torch.save(CONTENTS, path, _use_new_zipfile_serialization=is_new)
    assert_same(load(path))
    data = path.read_bytes()
    for length in {*range(0, 200, 17), *range(len(data) - 200, len(data), 19), *range(200, len(data), len(data) // 20)}:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load(path)


def test_a_flipped_bit_is_noticed_or_harmless(path):
    data = path.read_bytes()
    positions = [*range(64), *range(len(data) - 400, len(data)), *random.Random(0).sample(range(len(data)), 200)]
    start = data.index(CONTENTS["net"]["conv.weight"].numpy().tobytes())
    weights = range(start, start + 4 * 108, 5)
    noticed = set()
    for position in [*positions, *weights]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert_same(load(path))
        except CheckpointError as error:
            assert path.name in str(error)
            noticed.add(position)
    assert noticed.issuperset(weights)


# What it is instead


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "is empty: it was not written to its end"),
        (bytes(4096), "is no file of torch.save"),
        (b"PK\x03\x04", "truncated"),
        (b"not a checkpoint\n", "is no file of torch.save"),
        (b"\x80\x02.", "no checkpoint"),
        (random.Random(0).randbytes(4096), "is no file of torch.save"),
        (b"\x89HDF\r\n\x1a\n", "is an HDF5 file"),
        ((2).to_bytes(8, "little") + b"{}", "is a safetensors file"),
    ],
)
def test_other_files_are_named_as_what_they_are(path, data, named):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"ckpt1_3\.t7 .*{named}"):
        load(path)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), "text", None])
def test_something_else_than_a_dict_is_refused(path, value):
    torch.save(value, path)
    with pytest.raises(CheckpointError, match=f"is not a checkpoint: expected a dict, found a {type(value).__name__}"):
        load(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(path, tmp_path):
    mark = tmp_path / "it ran"
    bomb = {"net": CONTENTS["net"], "more": Bomb(mark)}
    for form in True, False:
        torch.save(bomb, path, _use_new_zipfile_serialization=form)
        with pytest.raises(CheckpointError, match=r"ckpt1_3\.t7 holds more than tensors and plain values, and could"):
            load(path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(bomb["more"], protocol))
        with pytest.raises(CheckpointError, match=r"ckpt1_3\.t7"):
            load(path)
    assert not mark.exists()
    function, arguments = bomb["more"].__reduce__()
    function(*arguments)
    assert mark.exists()  # as it would have


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_torchscript_archive_is_refused(path):
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which could run code"):
        load(path)


def test_an_archive_of_something_else_or_one_that_would_fill_the_memory_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="its records are not as torch"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("weights.npy", bytes(100))
    with pytest.raises(CheckpointError, match=r"is a ZIP archive, not a file of torch\.save"):
        load(path)


def test_a_file_that_cannot_be_read_just_now_is_told_from_a_bad_one(path, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in "pipe", "folder", "zero":
        with pytest.raises(UnreadableError, match=rf"/{name} cannot be read: it is not a regular file"):
            load(tmp_path / name)

    for error, reason in (MemoryError(), "it is too large for the memory"), (OSError(5, "I/O error"), "I/O error"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(UnreadableError, match=rf"ckpt1_3\.t7 cannot be read: {reason}"):
                load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "ckpt1_0.t7")
