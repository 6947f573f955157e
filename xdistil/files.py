"""Files that are whole or absent: written under a temporary name, flushed, renamed. Locks, and what is wrong with a
disk, in words."""

import errno
import functools
import hashlib
import json
import os
import re
import shutil
import socket
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import psutil
from filelock import SoftFileLock, Timeout

from xdistil import processes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class DamagedError(ValueError):
    """A file of a run holds something else than what was written."""


def save_atomic(path: Path, write) -> Path:
    """Call `write(temporary_path)`, flush it to disk, then rename it to `path`; of several processes only the first
    does."""
    if processes.rank() > 0:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def save_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically."""
    return save_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_json(path: Path, value) -> Path:
    """Write JSON atomically."""
    return save_text(path, json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path, default=None, lenient: bool = False, parse=json.loads):
    """The JSON value of a file, or `default` if there is no such file. Raises DamagedError if it holds no JSON, unless
    `lenient` takes the default for that as well."""
    try:
        return parse(path.read_text(encoding="utf-8")) if path.is_file() else default
    except ValueError as error:
        if lenient:
            return default
        raise DamagedError(f"{path} is damaged ({error}); delete it and run its stage again") from None


def read_jsonl(path: Path) -> list[dict]:
    """The records of a .jsonl file, oldest first; [] if there is no such file. Raises DamagedError."""
    return read_json(path, [], parse=lambda text: list(map(json.loads, text.splitlines())))


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, 16 hex digits; remembered for as long as its size and time are the same."""
    found = path.stat()
    return _hash(path, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4096)  # a transfer set may have many files
def _hash(path: Path, _modified_ns: int, _size: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder, checkpoints left out: new ones take their place."""
    return sum(x.stat().st_size for x in folder.rglob("*") if x.is_file() and not x.name.startswith("checkpoint"))


def reserve(path: Path, n_bytes: int) -> None:
    """Make a file of so many bytes that the disk has set aside: a mapped file that a full disk cannot fill ends the
    process without a word (SIGBUS)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as handle:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, n_bytes)
        else:
            handle.truncate(n_bytes)


def clear_temporaries(folder: Path) -> None:
    """Delete what killed processes left half written in a run's folder, two folders deep."""
    for path in (path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}.*.tmp")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def hold(path: Path, wait: float = 3.0):
    """Hold a lock: a file that says which process of which host has it. That of a process of this host that is dead is
    taken over. Raises RuntimeError, naming the holder, after `wait` seconds: a kernel outlives a killed command by
    one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = SoftFileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        if not (holder := _read_holder(path)):  # killed before it wrote its name
            path.unlink(missing_ok=True)
            lock.acquire(timeout=0)
        else:
            raise RuntimeError(f"{path.parent} is in use by {holder}; wait until it ends, stop it, or choose another "
                               f"model_dir (if there is no such process any more, delete {path})") from None
    for left in path.parent.glob(f"{path.name}.break.*"):  # of a process that was killed as it took over
        left.unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.release()


def _read_holder(path: Path) -> str:
    """Who holds a lock, in words; "" if nobody signed it."""
    pid, host, *_ = [*path.read_text(encoding="utf-8").split(), "", ""] if path.is_file() else ["", ""]
    holder = f"process {pid} on {host.partition('?')[0]}" if pid else ""
    with suppress(psutil.Error, ValueError):
        process = psutil.Process(int(pid)) if host.partition("?")[0] == socket.gethostname() else None
        since = datetime.fromtimestamp(process.create_time()).isoformat(" ", "seconds") if process else ""
        holder += f" since {since} ({' '.join(process.cmdline())[:200]})" if process else ""
    return holder


@contextmanager
def explained(folder: Path):
    """An error of a disk that is full, or of a folder that may not be written, says what to do. Raises OSError."""
    try:
        yield
    except Exception as error:  # OSError, safetensors' own, what tokenizers raise
        said = re.search(r"os error (\d+)", str(error))
        code, name = int(said[1]) if said else getattr(error, "errno", None), getattr(error, "filename", None)
        if code in FULL:
            raise OSError(f"{folder}: no room to write there ({error}); free some of this disk, or lower "
                          "targets_cache_gb or keep_checkpoints, then run the same again: it goes on from its last "
                          "checkpoint") from error
        if code in REFUSED and Path(str(name or folder)).is_relative_to(folder):
            raise OSError(f"{folder}: may not be written ({error}); let this user write there, or choose another "
                          "model_dir, then run the same again") from error
        raise
