"""Files that are whole or absent: written under a temporary name, flushed, renamed."""

import functools
import hashlib
import json
import os
from pathlib import Path


def save_atomic(path: Path, write) -> Path:
    """Call `write(temporary_path)`, flush it to disk, then rename it to `path`."""
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


def read_json(path: Path, default=None):
    """The JSON value of a file, or `default` if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else default


def read_jsonl(path: Path) -> list[dict]:
    """The records of a .jsonl file, oldest first; [] if there is no such file."""
    return [json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


@functools.lru_cache(maxsize=4096)  # a transfer set may have many files
def hash_file(path: Path, _modified_ns: int, _size: int) -> str:
    """sha256 of a file's bytes, 16 hex digits; remembered for as long as the caller finds the file unchanged."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]
