"""Files that are whole or not there, and loading that trusts nothing."""

import os
import pickle
import random
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest.mock import Mock

import numpy
import pytest
import torch
from processes import assert_same

from filter_grafting import CheckpointError, UnreadableError, WriteError
from filter_grafting.checkpoint import load, save, write_atomically

CONTENTS = {
    "net": {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.arange(8, dtype=torch.bfloat16),
    },
    "epoch": 3,
    "extra": {
        "best": 91.25,
        "settings": OrderedDict(model="resnet20", cos=False, betas=(0.9, {1, 2}), dtype=torch.float16),
        "optimizer": {"state": {0: None}},
    },
}


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "ckpt1_3.t7"
    save(path, CONTENTS)
    return path


class Bomb:
    """Unpickled, it runs a command that makes a file."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


# Writing


@pytest.mark.parametrize(("value", "named"), [(numpy.float64(1), "numpy"), (Path("x"), "pathlib"), (Bomb, "Bomb")])
def test_what_could_not_be_loaded_again_is_refused_before_it_is_written(path, value, named):
    with pytest.raises(CheckpointError, match=rf"ckpt1_3\.t7 was not saved: .*{named}.*; give tensors"):
        save(path, {"net": {}, "extra": {"more": value}})
    assert_same(load(path), CONTENTS)


def test_a_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    calls = Mock()
    for name in "fsync", "replace":
        calls.attach_mock(Mock(wraps=getattr(os, name)), name)
        monkeypatch.setattr(os, name, getattr(calls, name))
    save(path, CONTENTS)
    assert [name for name, *_ in calls.mock_calls] == ["fsync", "replace", "fsync"]  # the last is of the folder
    assert re.fullmatch(r"\.ckpt1_3\.t7\.[0-9a-f]+\.tmp", calls.replace.call_args.args[0].name)
    calls.reset_mock()
    write_atomically(path, b"", durable=False)
    assert [name for name, *_ in calls.mock_calls] == ["fsync", "replace"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_is_a_sentence_and_leaves_the_file_before_and_nothing_else(path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError, match=rf"^cannot write {path}: No space left on device; .* MB are free there"):
        save(path, {"net": {}})
    monkeypatch.undo()
    assert_same(load(path), CONTENTS)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("option", [{"load.mmap": True}, {"save.compute_crc32": False}], ids=str)
def test_what_the_process_has_set_for_torchs_own_saving_and_loading_changes_nothing(path, option):
    with torch.utils.serialization.config.patch(option):
        save(path, CONTENTS)
        assert_same(load(path), CONTENTS)
        assert all(getattr(torch.utils.serialization.config, name) == value for name, value in option.items())


# Loading


@pytest.mark.parametrize("is_new", [True, False])
def test_a_file_truncated_anywhere_is_refused(path, is_new):
    torch.save(CONTENTS, path, _use_new_zipfile_serialization=is_new)
    assert_same(load(path), CONTENTS)
    data = path.read_bytes()
    for length in {0, 4, *range(17, len(data), len(data) // 50), len(data) - 1}:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load(path)


def test_a_flipped_bit_is_noticed_or_harmless(path):
    data = path.read_bytes()
    start = data.index(CONTENTS["net"]["conv.weight"].numpy().tobytes())
    weights = range(start, start + 4 * 108, 20)
    for position in [*random.Random(0).sample(range(len(data)), 60), *weights]:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert_same(load(path), CONTENTS)
        except CheckpointError as error:
            assert path.name in str(error)
        else:
            assert position not in weights


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (random.Random(0).randbytes(4096), "is .*; it was not loaded"),
        ([1, 2], "is not a checkpoint: expected a dict, found a list"),
    ],
    ids=["random", "list"],
)
def test_a_file_that_is_no_checkpoint_is_refused(path, data, reason):
    path.write_bytes(data) if isinstance(data, bytes) else torch.save(data, path)
    with pytest.raises(CheckpointError, match=f"{path} {reason}"):
        load(path)


def test_a_pickle_that_would_run_a_command_is_refused_and_runs_nothing(path, tmp_path):
    mark = tmp_path / "it ran"
    for form in True, False:
        torch.save({"net": CONTENTS["net"], "more": Bomb(mark)}, path, _use_new_zipfile_serialization=form)
        with pytest.raises(CheckpointError, match=rf"{path} holds more than tensors and plain values, and could"):
            load(path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # as it would have


def test_an_archive_that_would_fill_the_memory_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match=rf"{path} "):
        load(path)


def test_a_file_that_cannot_be_read_just_now_is_told_from_a_bad_one(path, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableError, match="/pipe cannot be read: it is not a regular file"):
        load(tmp_path / "pipe")
    for error, reason in (MemoryError(), "it is too large for the memory"), (OSError(5, "I/O error"), "I/O error"):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, error=error, **__: (_ for _ in ()).throw(error))
            with pytest.raises(UnreadableError, match=rf"{path} cannot be read: {reason}"):
                load(path)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "ckpt1_0.t7")
