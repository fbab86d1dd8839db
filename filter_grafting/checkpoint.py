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


def write_atomically(path: str | os.PathLike[str], data: bytes | memoryview, durable: bool = True) -> None:
    """Writes a file under a temporary name of its own in the same folder, then renames it: whole or not at all.

    Args:
        path: an existing file, or a link, is replaced; a link is not followed. The folder must exist.
        durable: the new file also survives a crash of the machine. Otherwise the one before it may come back, whole.

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
                os.fsync(file.fileno())  # before it has its name, which a crash of the machine may keep
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        raise write_error(path, error) from error
    if durable:
        with suppress(OSError):  # some file systems cannot; their server decides when a rename is on disk
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_error(path: str | os.PathLike[str], error: OSError) -> WriteError:
    """The one sentence for a file that could not be written: which, why, and how much space there is."""
    free = ""
    with suppress(OSError):
        free = f"; {shutil.disk_usage(Path(path).parent).free / 1e6:.1f} MB are free there"
    return WriteError(f"cannot write {path}: {error.strerror or error}{free}; mend that, then resume")


def save(path: str | os.PathLike[str], contents: Mapping[str, Any]) -> None:
    """`torch.save`s tensors, from the devices they are on, and plain values to a file that is whole or not there.

    Raises:
        CheckpointError: if `load` would refuse the file, for it would hold more than tensors and plain values.
        WriteError: see `write_atomically`.
    """
    buffer = io.BytesIO()  # torch.save straight to a full disk aborts in C++, without naming the file
    has_crc32 = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(True)  # `load` checks it, so that the process may not have it off
        torch.save(dict(contents), buffer)
        buffer.seek(0)
        refused = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(buffer)))
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError) as error:
        refused = str(error)
    finally:
        torch.serialization.set_crc32_options(has_crc32)
    if refused:
        raise CheckpointError(
            f"{path} was not saved: it could not be loaded ({refused}); give tensors and plain values"
        )
    write_atomically(path, buffer.getbuffer())


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
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would block for ever
            raise OSError("it is not a regular file")
        data = Path(path).read_bytes()
        _check(data)
        contents = torch.load(io.BytesIO(data), map_location="cpu", mmap=False, weights_only=True)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # any exception can come out of bytes that anyone may have written
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UnreadableError(f"{path} cannot be read: it is too large for the memory") from error
        raise CheckpointError(f"{path} {_reason(error)}; it was not loaded") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is not a checkpoint: expected a dict, found a {type(contents).__name__}")
    return contents


def _check(data: bytes) -> None:
    """Raises a CheckpointError that says what is wrong, unless this looks like a whole file of torch.save."""
    if not data:
        raise CheckpointError("is empty: it was not written to its end")
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        raise CheckpointError("is a safetensors file, not one of torch.save")
    if data.startswith(b"\x89HDF"):
        raise CheckpointError("is an HDF5 file, as of Keras, not one of torch.save")
    if not data.startswith(b"PK") and not zipfile.is_zipfile(io.BytesIO(data)):  # damage to either end is noticed
        if not data.startswith(b"\x80"):  # as files of torch < 1.6 begin
            raise CheckpointError("is no file of torch.save, or its beginning is damaged")
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        records = archive.infolist()
        if any(record.filename.endswith("constants.pkl") for record in records):
            raise CheckpointError("is a TorchScript archive, which could run code")
        if not any(record.filename.endswith("data.pkl") for record in records):
            raise CheckpointError("is a ZIP archive, not a file of torch.save")
        # A bomb of zeros; or a flipped bit that makes a folder of a record, which torch.load fills with any memory.
        if sum(record.file_size for record in records) > len(data) or any(r.external_attr & 0x10 for r in records):
            raise CheckpointError("is damaged: its records are not as torch.save writes them")
        if damaged := archive.testzip():
            raise CheckpointError(f"is damaged: the checksum of its record {damaged!r} is wrong")


def _reason(error: Exception) -> str:
    """What is wrong with a file that does not load."""
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, pickle.UnpicklingError) and re.search("Unsupported|GLOBAL", str(error)):
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # such as numpy's scalar, for an accuracy beside the weights
        return (
            f"holds more than tensors and plain values, and could run code{f' (asks for {asked[1]})' if asked else ''}"
        )
    told = f": {error}" if isinstance(error, zipfile.BadZipFile) else ""
    return f"is truncated, damaged or no checkpoint ({type(error).__name__}{told})"
