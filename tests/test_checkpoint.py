import io
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from processes import ROOT, assert_same

from filter_grafting import checkpoint
from filter_grafting.checkpoint import load, save, write_atomically
from filter_grafting.errors import CheckpointError, WriteError

CONTENTS = {
    "net": {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)),
        "bn.num_batches_tracked": torch.tensor(7),
        "half": torch.arange(8, dtype=torch.bfloat16),
    },
    "epoch": 3, "best": 91.25, "settings": {"model": "resnet20", "cos": False}, "optimizer": {"state": {0: None}},
}  # fmt: skip


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


def test_what_is_saved_is_loaded(path):
    assert_same(load(path), CONTENTS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_device_that_tensors_are_brought_to_is_that_of_the_ring_not_that_of_the_save(path):
    """The published script blends what `torch.load` gives it with weights on its GPU."""

    def locations() -> set[str]:
        seen = set()
        torch.load(path, weights_only=True, map_location=lambda storage, location: seen.add(location) or storage)
        return seen

    save(path, CONTENTS, "cuda:0")
    assert locations() == {"cuda:0"}
    assert_same(load(path), CONTENTS)  # ours reads it without a GPU
    save(path, CONTENTS)
    assert locations() == {"cpu"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_tensors_are_brought_to_it(path):
    save(path, {"net": torch.ones(3)}, "cuda:0")
    assert torch.load(path, weights_only=True)["net"].device == torch.device("cuda", 0)


def test_it_is_on_the_disk_before_it_has_its_name_and_the_name_is_before_it_returns(path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def tell_fsync(descriptor: int) -> None:
        calls.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def tell_replace(source: Path, target: Path) -> None:
        calls.append(f"rename {source.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", tell_fsync)
    monkeypatch.setattr(os, "replace", tell_replace)
    save(path, CONTENTS)
    temporary = calls[0].removeprefix("fsync ")
    assert re.fullmatch(r"\.ckpt1_3\.t7\.[0-9a-f]+\.tmp", temporary)
    assert calls == [f"fsync {temporary}", f"rename {temporary}", f"fsync {path.parent.name}"]


def test_readers_never_see_a_part_of_a_file(path):
    sizes, stop, failures = (1, 1000, 300_000), threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                values = load(path)["net"]["w"]
                assert len(values) in sizes and (values == len(values)).all()
            except Exception as error:
                failures.append(error)

    save(path, {"net": {"w": torch.ones(1)}})
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for count in range(30):
        size = sizes[count % 3]
        save(path, {"net": {"w": torch.full((size,), float(size))}})
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before_and_nothing_else(path, monkeypatch, call):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    if call == "write":
        monkeypatch.setattr(checkpoint, "open", lambda *arguments: Failing(), raising=False)

        class Failing(io.BytesIO):
            write = fail
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(WriteError) as failure:
        save(path, {"net": {}})
    monkeypatch.undo()
    said = str(failure.value)
    assert said.startswith(f"cannot write {path}: No space left on device; ")
    assert said.endswith(" MB are free there; mend that, then continue with --resume")
    assert_same(load(path), CONTENTS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "outside").write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "outside").read_bytes() == b"precious"
    assert (tmp_path / "link").read_bytes() == b"new" and not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("has_links", [True, False])
def test_a_new_file_replaces_nothing(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", lambda *arguments: (_ for _ in ()).throw(PermissionError()))
    write_atomically(tmp_path / "file", b"first", new=True)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", b"second", new=True)
    assert (tmp_path / "file").read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_gone_is_a_sentence(tmp_path):
    with pytest.raises(WriteError, match=r"^cannot write .*gone/ckpt1_0\.t7: No such file or directory; mend that"):
        save(tmp_path / "gone" / "ckpt1_0.t7", CONTENTS)


FILE_SIZE = """
import resource, sys
import torch
from filter_grafting.checkpoint import save
from filter_grafting.errors import WriteError
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save(sys.argv[1], {"net": {"w": torch.zeros(100_000)}})
except WriteError as error:
    print(error)
"""


def test_a_file_that_may_not_grow_is_a_sentence(path):
    command = [sys.executable, "-c", FILE_SIZE, str(path)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    assert said.startswith(f"cannot write {path}: File too large; ")
    assert_same(load(path), CONTENTS)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_a_sentence_and_the_file_before_stays_good(small_disk):
    path = small_disk / "ckpt1_3.t7"
    save(path, CONTENTS)
    with pytest.raises(WriteError, match=rf"cannot write {path}: No space left on device; [01]\.\d MB are free there"):
        save(path, {"net": {"w": torch.zeros(1_000_000)}})
    assert_same(load(path), CONTENTS)
    assert [entry.name for entry in small_disk.iterdir()] == [path.name]
    save(path, {"net": {}})


# Damage


def test_a_file_truncated_anywhere_is_refused(path):
    data = path.read_bytes()
    lengths = {*range(0, 200, 7), *range(len(data) - 200, len(data), 3), *range(200, len(data), len(data) // 40)}
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load(path)


def test_an_empty_file_is_refused(path):
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"ckpt1_3\.t7 is empty: it was not written to its end"):
        load(path)


@pytest.mark.parametrize("part", ["header", "middle", "end"])
def test_a_flipped_bit_is_noticed_or_harmless(path, part):
    data = path.read_bytes()
    third = len(data) // 3
    start = {"header": 0, "middle": third, "end": len(data) - third}[part]
    edge = range(0, 64) if part == "header" else range(len(data) - 400, len(data)) if part == "end" else ()
    positions = [*edge, *random.Random(part).sample(range(start, start + third), 150)]
    noticed = 0
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            assert_same(load(path), CONTENTS, f"byte {position}")
        except CheckpointError as error:
            assert path.name in str(error)
            noticed += 1
    assert noticed > len(positions) / 10  # much of a small file is padding


def test_every_flipped_bit_of_a_weight_is_noticed(path):
    data = path.read_bytes()
    start = data.index(CONTENTS["net"]["conv.weight"].numpy().tobytes())
    for bit in range(0, 4 * 108 * 8, 5):
        damaged = bytearray(data)
        damaged[start + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"damaged \(Bad CRC-32 for file"):
            load(path)


def test_two_kinds_of_damage_do_not_hide_each_other(path):
    data = bytearray(path.read_bytes())
    weight = data.index(CONTENTS["net"]["conv.weight"].numpy().tobytes())
    data[weight] ^= 1
    for position in 0, len(data) - 22:  # the marks at the beginning and end by which an archive is known
        damaged = bytearray(data)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            load(path)


def test_blocks_of_zeros_are_noticed(path):
    data = path.read_bytes()
    for start in range(0, len(data), 256):
        damaged = data[:start] + bytes(len(data[start : start + 256])) + data[start + 256 :]
        path.write_bytes(damaged)
        try:
            assert_same(load(path), CONTENTS)
        except CheckpointError:
            continue


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "data",
    [bytes(4096), b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"not a checkpoint\n", b"\x80\x02.", b"\x80\x04\x95",
     random.Random(0).randbytes(4096), b"\x93NUMPY\x01\x00"],
)  # fmt: skip
def test_other_files_are_refused(path, data):
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"ckpt1_3\.t7"):
        load(path)


@pytest.mark.parametrize("value", [[1, 2], torch.zeros(3), "text", None, 5])
def test_something_else_than_a_dict_is_refused(path, value):
    torch.save(value, path)
    with pytest.raises(CheckpointError, match=f"is not a checkpoint: expected a dict, found a {type(value).__name__}"):
        load(path)


# Malice


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
    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Module()), path)
    with pytest.raises(CheckpointError, match="is a TorchScript archive, which could run code"):
        load(path)


def test_a_tar_archive_is_refused(path, tmp_path):
    (tmp_path / "storages").write_bytes(pickle.dumps(Bomb(tmp_path / "it ran")))
    with tarfile.open(path, "w") as archive:
        for name in "storages", "tensors", "pickle", "sys_info":
            archive.add(tmp_path / "storages", name)
    with pytest.raises(CheckpointError, match=r"ckpt1_3\.t7"):
        load(path)
    assert not (tmp_path / "it ran").exists()


def test_an_archive_that_would_grow_in_memory_is_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(10_000_000))
    assert path.stat().st_size < 20_000
    with pytest.raises(CheckpointError, match="its records are larger than the file"):
        load(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"is compressed, as torch\.save does not write it"):
        load(path)


def test_a_file_larger_than_the_memory_is_refused(path, monkeypatch):
    def read(path: Path) -> bytes:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "_read", read)
    with pytest.raises(CheckpointError, match=r"ckpt1_3\.t7 cannot be read: it is larger than the memory"):
        load(path)


def test_neither_a_pipe_nor_a_folder_blocks(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, reason in ("pipe", "not a regular file"), ("folder", "Is a directory"), ("zero", "not a regular file"):
        with pytest.raises(CheckpointError, match=rf"/{name} cannot be read: .*{reason}"):
            load(tmp_path / name)


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "ckpt1_0.t7")


# Other forms


def test_the_form_of_old_torch_is_read_and_its_truncation_noticed(path):
    torch.save(CONTENTS, path, _use_new_zipfile_serialization=False)
    assert_same(load(path), CONTENTS)
    data = path.read_bytes()
    for length in range(1, len(data), 37):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=path.name):
            load(path)


def test_a_checkpoint_larger_than_a_read_is_checked_whole(path):
    save(path, {"net": {"w": torch.ones(1_000_000)}})
    data = bytearray(path.read_bytes())
    data[3_500_000] ^= 16
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="Bad CRC-32"):
        load(path)
