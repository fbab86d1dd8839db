"""Checkpoints: files that are whole or not there, and loading that trusts nothing."""

import io
import os
import pickle
import re
import secrets
import shutil
import stat
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError, UnreadableError, WriteError

TEMPORARY = ".tmp"  # ending of files under construction: `.NAME.RANDOM.tmp`, in the folder of NAME
OTHER_FORMATS = {b"\x89HDF": "an HDF5 file", b"\x93NUMPY": "a NumPy array", b"GGUF": "a GGUF file", b"\x1f\x8b": "gzip"}


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview, durable: bool = True) -> None:
    """Writes a file under a temporary name of its own in the same folder, then renames it: whole or not at all.

    Args:
        path: an existing file, or a link, is replaced; a link is not followed. The folder must exist.
        durable: flush to the disk first, so that the file survives a crash of the machine as well.

    Raises:
        WriteError: naming the file, the reason and the free space; what stood under `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            _flush_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def flush_to_disk(path: Path) -> None:
    """Makes a file that stands in its place survive a crash of the machine, and its name as well."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        _flush_folder(path.parent)
    except OSError as error:
        raise write_error(path, error) from error


def _flush_folder(folder: Path) -> None:
    with suppress(OSError):  # some file systems cannot; their server decides when a rename is on disk
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_error(path: str | os.PathLike[str], error: OSError, verb: str = "write") -> WriteError:
    """The one sentence for a file that could not be written: which, why, and how much space there is."""
    free = ""
    with suppress(OSError):
        free = f"; {shutil.disk_usage(Path(path).parent).free / 1e6:.1f} MB are free there"
    return WriteError(f"cannot {verb} {path}: {error.strerror or error}{free}; mend that, then resume")


def save(path: str | os.PathLike[str], contents: Mapping[str, Any], durable: bool = True) -> None:
    """`torch.save`s tensors, from the devices they are on, and plain values to a file that is whole or not there.

    Raises:
        CheckpointError: if `load` would refuse the file, for it would hold more than tensors and plain values.
        WriteError: see `write_atomically`.
    """
    buffer = io.BytesIO()  # torch.save straight to a full disk aborts in C++, without naming the file
    try:
        torch.save(dict(contents), buffer)
        buffer.seek(0)
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(buffer)
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        raise CheckpointError(f"{path} cannot be saved ({error}); give tensors and plain values") from error
    if refused:
        names = ", ".join(sorted(refused))
        raise CheckpointError(f"{path} was not saved: it would hold {names}, and could not be loaded; give tensors and "
                              "plain values")  # fmt: skip
    write_atomically(path, buffer.getbuffer(), durable)


def load(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Loads a checkpoint onto the CPU, running nothing that it may contain (`weights_only=True`).

    The CRC-32 that `torch.save` keeps of every record is checked, which `torch.load` does not do: a single flipped
    bit of a weight is found. Files of torch < 1.6 have none.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: naming the file, if it is truncated, damaged, of another format, or holds anything but
            tensors and plain values; as UnreadableError, if it may be good and cannot be read just now.
    """
    try:
        data = _read(path)
        _check_format(data)
        contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from error
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}; it was not loaded") from error
    except Exception as error:  # any exception can come out of bytes that anyone may have written
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UnreadableError(f"{path} cannot be read: it is too large for the memory") from error
        raise CheckpointError(f"{path} {_reason(error)}; it was not loaded") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is not a checkpoint: expected a dict, found a {type(contents).__name__}")
    return contents


def _read(path: str | os.PathLike[str]) -> bytes:
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
        raise OSError("it is not a regular file")
    return Path(path).read_bytes()


def _check_format(data: bytes) -> None:
    if not data:
        raise CheckpointError("is empty: it was not written to its end")
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        raise CheckpointError("is a safetensors file, not one of torch.save")
    for beginning, name in OTHER_FORMATS.items():
        if data.startswith(beginning):
            raise CheckpointError(f"is {name}, not a file of torch.save")
    if zipfile.is_zipfile(io.BytesIO(data)) or data.startswith(b"PK"):  # damage to either end is noticed
        _check_archive(data)
    elif not data.startswith(b"\x80"):  # as files of torch < 1.6 begin
        raise CheckpointError("is no file of torch.save, or its beginning is damaged")


def _check_archive(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if any(name.endswith("constants.pkl") for name in names):
            raise CheckpointError("is a TorchScript archive, which could run code")
        if sum(record.file_size for record in archive.infolist()) > len(data):
            raise CheckpointError("is damaged, or made to fill the memory: its records are larger than the file")
        if any(record.external_attr & 0x10 for record in archive.infolist()):
            # One flipped bit makes a folder of a record, which torch.load then fills with whatever the memory holds.
            raise CheckpointError("is damaged: a record is marked as a folder")
        damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"is damaged: the checksum of its record {damaged!r} is wrong")
        if not any(name.endswith("data.pkl") for name in names):
            raise CheckpointError("is a ZIP archive, not a file of torch.save")


def _reason(error: Exception) -> str:
    """Why torch.load refuses a file."""
    if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported|GLOBAL", str(error)):
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # such as numpy's scalar, for an accuracy beside the weights
        return "holds more than tensors and plain values, and could run code" + (
            f" (asks for {asked[1]})" if asked else ""
        )
    told = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
    return f"is truncated, damaged or no checkpoint ({type(error).__name__}{told})"
