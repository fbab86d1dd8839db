"""Files that are whole or not there: atomic writing, and loading that trusts nothing."""

import functools
import io
import os
import pickle
import re
import secrets
import shutil
import stat
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import CheckpointError, UnreadableError, WriteError

TEMPORARY = ".tmp"  # ending of files under construction: `.NAME.RANDOM.tmp`, in the folder of NAME


def write_atomically(
    path: str | os.PathLike, data: bytes | memoryview, durable: bool = True, new: bool = False
) -> None:
    """Writes a file under a temporary name of its own in the same folder, then renames it: whole or not at all.

    Args:
        path: an existing file, or a link, is replaced; a link is not followed. The folder must exist.
        durable: flush to the disk first, so that the file survives a crash of the machine as well.
        new: replace nothing; of several processes that do this at the same moment one succeeds.

    Raises:
        FileExistsError: if `new`, and there is such a file already.
        WriteError: naming the file, the reason and the free space; what stood under `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        try:
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            if new:
                _rename_to_new(temporary, path)
            else:
                os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        if durable:
            _sync_folder(path.parent)  # the rename itself must survive, too
    except FileExistsError:
        raise
    except OSError as error:
        raise write_error(path, error) from error


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # unlike a rename, fails if there is such a file
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def _sync_folder(folder: Path) -> None:
    # Some network file systems cannot; their server decides when a rename is on disk.
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_error(path: str | os.PathLike, error: OSError, verb: str = "write") -> WriteError:
    """The one sentence for a file that could not be written: which, why, and how much space there is."""
    path = Path(path)
    free = ""
    with suppress(OSError):
        free = f"; {shutil.disk_usage(path.parent).free / 1e6:.1f} MB are free there"
    return WriteError(f"cannot {verb} {path}: {error.strerror or error}{free}; mend that, then continue with --resume")


def save(path: str | os.PathLike, contents: Mapping[str, Any], location: str = "cpu") -> None:
    """`torch.save`s to a file that appears whole or not at all (see `write_atomically`).

    Args:
        contents: plain values and CPU tensors.
        location: the device that a `torch.load` without `map_location` shall bring the tensors to.
    """
    import torch  # here, so that the status of a run can be read in the blink of an eye

    buffer = io.BytesIO()  # torch.save straight to a full disk aborts in C++, without naming the file
    with _tagged(location):
        torch.save(dict(contents), buffer)
    write_atomically(path, buffer.getbuffer())


_tag = threading.local()  # location: what this thread's torch.save says of CPU tensors


@contextmanager
def _tagged(location: str) -> Iterator[None]:
    if location == "cpu":  # as torch.save says by itself
        yield
        return
    _register_tag()
    _tag.location = location
    try:
        yield
    finally:
        del _tag.location


@functools.cache
def _register_tag() -> None:
    import torch

    def tag(storage: Any) -> str | None:
        return getattr(_tag, "location", None) if storage.device.type == "cpu" else None

    # Asked before torch's own, whose priorities begin at 10. Loading is left to those.
    torch.serialization.register_package(5, tag, lambda storage, location: None)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Loads a checkpoint onto the CPU, running nothing that it may contain (`weights_only=True`).

    The CRC-32 that `torch.save` keeps of every record is checked, which `torch.load` does not do: a single flipped
    bit of a weight is found. Files of torch < 1.6 have none.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: naming the file, if it is truncated, damaged, not a checkpoint, or holds anything but
            tensors and plain values; as UnreadableError, if it may be good and cannot be read just now.
    """
    import torch

    path = Path(path)
    try:
        data = _read(path)
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or str(error) or "it is larger than the memory"
        raise UnreadableError(f"{path} cannot be read: {reason}") from error
    if not data:
        raise CheckpointError(f"{path} is empty: it was not written to its end")
    try:
        # By its first bytes, as torch.load tells the formats apart, or by its last: damage to either is noticed.
        if data.startswith(b"PK") or zipfile.is_zipfile(io.BytesIO(data)):
            data = _checked_archive(path, data)
        # From memory: given a file, torch < 2.6 would also unpack a tar archive, whose contents it trusts.
        contents = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); it was not loaded") from error
    except pickle.UnpicklingError as error:
        reason = "is truncated or damaged"
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            reason = "holds more than tensors and plain values, and could run code"
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))  # such as numpy's scalar, for an accuracy beside the weights
        told = f" (it asks for {asked[1]})" if asked else ""
        raise CheckpointError(f"{path} {reason}; it was not loaded{told}") from error
    except Exception as error:  # any exception can come out of bytes that anyone may have written
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise UnreadableError(f"{path} cannot be read: there is too little memory for it") from error
        raise CheckpointError(f"{path} is truncated or damaged ({type(error).__name__}); it was not loaded") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{path} is not a checkpoint: expected a dict, found a {type(contents).__name__}")
    return contents


def _checked_archive(path: Path, data: bytes) -> bytes:
    """The records of an archive as `torch.save` writes it, each with its right checksum, in an archive of our own.

    Of its own, since torch reads archives by other rules than `zipfile`: what was checked need not be what it reads, be
    it for a flipped bit between the records or by malice.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    checked = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(checked, "w") as copy:
        # torch < 2.6 hands a TorchScript archive to torch.jit.load, which runs what is in it, whatever weights_only
        # says (CVE-2025-32434).
        if any(name.endswith("constants.pkl") for name in archive.namelist()):
            raise CheckpointError(f"{path} is a TorchScript archive, which could run code; it was not loaded")
        if sum(record.file_size for record in archive.infolist()) > len(data):
            raise CheckpointError(f"{path} is damaged: its records are larger than the file; it was not loaded")
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{path} is compressed, as torch.save does not write it; it was not loaded")
            copy.writestr(record.filename, archive.read(record))
    return checked.getvalue()


def _read(path: Path) -> bytes:
    # Not to be blocked for ever by a pipe that lies where a file should.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("it is not a regular file")
        return file.read()
