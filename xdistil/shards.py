"""Transfer text of any size: streamed, tokenised once by several processes, read batch by batch from files of token
ids. One plain file of less than IN_MEMORY bytes is not worth that."""

import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import compress, islice
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed

from xdistil import texts
from xdistil.data import PER_PART, PER_PROCESS, Examples, Sentences, chosen, special_tokens
from xdistil.files import hash_file, read_json, save_json
from xdistil.losses import IGNORED
from xdistil.params import fingerprint
from xdistil.sources import KINDS, DataError, facts_of, files_of, read_lines

IN_MEMORY = 200_000_000
PER_LINE = 100  # bytes of text, about: how many sentences files hold, before they are read
TYPES = {"input_ids": np.int32, "words": np.int32, "offsets": np.int64, "sentences": np.int32,
         "token_type_ids": np.int32}
_process = {}  # what a process encodes with: a tokenizer that came with each part would take longer than its work


def is_small(path) -> bool:
    """Whether a path names one plain file that fits in memory."""
    file, *more = files_of(path)
    return not more and file.suffix not in KINDS[2:] and file.is_file() and file.stat().st_size < IN_MEMORY


class Text:
    """The sentences of the files that `path` names, read anew from there whenever they are gone through: lists of
    words, or of the one text or pair. Memory: none, but 9 bytes a line with `limit` or `extra`.

    Args:
        limit: so many of them, chosen as `data.subset` does.
        extra: sentences that follow; with these, each is there once.
    """

    def __init__(self, path, unit: str, limit: int | None = None, seed: int = 0, extra: list[list[str]] | None = None):
        self.path, self.unit, self.limit, self.seed, self.extra = path, unit, limit, seed, extra

    def _rows(self) -> Iterator[list[str]]:
        empty = True
        for file in files_of(self.path):
            for number, line in read_lines(file):
                if words := texts.units_of(line, self.unit, f"{file}:{number}"):
                    yield words
                    empty = False
        if empty:
            raise DataError(f"{self.path}: no sentence in this file; expected one sentence a line")

    @functools.cached_property
    def _selected(self) -> tuple[np.ndarray | None, list[list[str]]]:
        """Which rows are used (None: all), and what follows them."""
        if self.limit is None and self.extra is None:
            return None, []
        keys = np.fromiter((hash(tuple(words)) for words in self._rows()), np.int64)
        used, extra = chosen(len(keys), self.limit, self.seed), dict.fromkeys(map(tuple, self.extra or ()))
        if self.extra is not None:
            rows = np.flatnonzero(used)
            used[np.delete(rows, np.unique(keys[rows], return_index=True)[1])] = False
            new = np.isin(np.fromiter(map(hash, extra), np.int64), keys[rows], invert=True)
            extra = compress(extra, new)
        return used, list(map(list, extra))

    def __iter__(self) -> Iterator[list[str]]:
        used, extra = self._selected
        yield from self._rows() if used is None else compress(self._rows(), used)
        yield from extra

    def __len__(self) -> int:
        used, extra = self._selected
        return sum(1 for _ in self._rows()) if used is None else int(used.sum()) + len(extra)


class Flat:
    """A flat array in a file, of which no more is in memory than what is asked for, a slice or places. Mapped
    files are slower, and their pages stay resident, up to 2 MB for each place that is touched."""

    def __init__(self, path: Path, kind):
        self.path, self.kind, self.n = path, np.dtype(kind), path.stat().st_size // np.dtype(kind).itemsize

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, places) -> np.ndarray:
        places = np.arange(*places.indices(self.n)) if isinstance(places, slice) else places
        runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1)
        with open(self.path, "rb", buffering=0) as file:
            return np.concatenate([np.frombuffer(os.pread(file.fileno(), len(run) * self.kind.itemsize, int(
                run[0]) * self.kind.itemsize), self.kind) for run in runs if len(run)] or [np.zeros(0, self.kind)])


@dataclass(frozen=True)
class Shards(Examples):
    """Examples of which ids and words are read from files. `digest`: of these."""

    digest: str = ""


def known_as(tokenizer) -> str:
    """A fingerprint of how a tokenizer cuts text; how it pads and truncates, which calls change, is left out."""
    state = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None} if (
        tokenizer.is_fast) else tokenizer.get_vocab()
    return fingerprint([type(tokenizer).__name__, state, special_tokens(tokenizer), tokenizer.unk_token_id])


def encode(text: Text, folder: Path, unit: str, tokenizer, seq_len: int, teachers=None, n_jobs: int = 0):
    """Windows of a text, and how many texts or pairs were cut, as `texts.encode` gives them, from files in a subfolder
    of `folder`, which is named after all that they follow from: if they are not there, whole, they are made, in parts
    of PER_PART sentences, by `n_jobs` processes (default: one for every PER_PROCESS sentences, as far as there are
    cores). An interrupted call goes on after the last part. manifest.json says what they are made from and how many
    sentences, windows and bytes they have; hashes, which come last, that they are whole. DataError: for a line of the
    text, or a file that changed meanwhile."""
    facts = {"unit": unit, "seq_len": seq_len, "tokenizers": [known_as(x) for x in (tokenizer, teachers) if x],
             "limit": text.limit and [text.limit, text.seed], "extra": text.extra and fingerprint(text.extra),
             "files": (sources := facts_of(text.path))}
    folder = folder / fingerprint(facts)
    path, new = folder / "manifest.json", facts | {"sentences": 0, "windows": 0, "cut": 0, "bytes": {}}
    found = read_json(path, new)
    if not _is_intact(folder, found):
        print(f"[data] {folder}: the files do not match manifest.json and are made again", flush=True)
        shutil.rmtree(folder)
        found = new
    if "sha256" not in found:
        n_bytes = sum(x.get("bytes", 0) for x in sources) or PER_LINE * PER_PROCESS * os.cpu_count()
        n_jobs = n_jobs or min(os.cpu_count(), max(1, n_bytes // (PER_LINE * PER_PROCESS)))
        for examples, n_cut, n in _parts(text, found["sentences"], (unit, tokenizer, seq_len, (), teachers), n_jobs):
            _append(folder, found, examples)
            found |= {"sentences": found["sentences"] + n, "windows": found["windows"] + len(examples),
                      "cut": found["cut"] + n_cut}
            save_json(path, found)
        if facts_of(text.path) != sources:
            shutil.rmtree(folder)
            raise DataError(f"{text.path}: changed while it was read; leave it as it is, and run this again")
        save_json(path, found := found | {"sha256": _sums(folder)})
    return _mapped(folder, found), found["cut"]


def _parts(text: Text, n_done: int, how: tuple, n_jobs: int) -> Iterator[tuple[Examples, int, int]]:
    """Windows of the parts of a text after the first `n_done` sentences, in order; how many texts were cut; size."""
    failed = []

    def parts():
        rows = islice(text, n_done, None)
        try:  # what is raised here, another thread would lose
            while part := [" ".join(words) for words in islice(rows, PER_PART)]:
                yield delayed(_encode)(part)
        except Exception as error:
            failed.append(error)

    _begin(*(begin := (how, os.getpid())))
    yield from Parallel(n_jobs, return_as="generator", initializer=_begin, initargs=begin)(parts())
    for error in failed:
        raise error


def _begin(how: tuple, parent: int) -> None:
    """Keep what to encode with; a process of the parent ends with it, as joblib's outlive one that is killed."""
    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    _process["how"] = how
    if os.getpid() != parent:
        threading.Thread(target=watch, daemon=True).start()


def _encode(part: list[str]) -> tuple[Examples, int, int]:
    unit = _process["how"][0]
    words = [text.split() if unit == "word" else [text] for text in part]
    return *texts.encode(Sentences(words), *_process["how"]), len(part)


def _arrays(examples: Examples, prefix: str = "") -> dict[str, np.ndarray]:
    found = {prefix + name: getattr(examples, name) for name in TYPES if getattr(examples, name) is not None}
    return found | (_arrays(examples.teacher, "teacher_") if examples.teacher else {})


def _append(folder: Path, found: dict, examples: Examples) -> None:
    """Add windows to the files, of which `found["bytes"]` count; what an interrupted call left after these goes."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes, before = found["bytes"], dict(found["bytes"])
    for name, array in _arrays(examples).items():
        if name.endswith("offsets"):  # only the first part has the 0
            array = array[name in sizes :] + before.get(name.replace("offsets", "input_ids"), 0) // 4
        elif name.endswith("sentences"):
            array = array + np.int32(found["sentences"])
        with open(folder / f"{name}.bin", "r+b" if name in sizes else "wb") as file:
            file.truncate(file.seek(before.get(name, 0)))
            file.write(array.tobytes())
            file.flush()
            os.fsync(file.fileno())
        sizes[name] = before.get(name, 0) + array.nbytes


def _is_intact(folder: Path, found: dict) -> bool:
    """Whether the files have what the manifest says: their hashes or, before these are known, enough bytes."""
    if "sha256" in found:
        return _sums(folder) == found["sha256"]
    sizes = {path.stem: path.stat().st_size for path in folder.glob("*.bin")}
    return all(sizes.get(name, 0) >= size for name, size in found["bytes"].items())


def _sums(folder: Path) -> dict[str, str]:
    return {path.stem: hash_file(path) for path in sorted(folder.glob("*.bin"))}


def _mapped(folder: Path, found: dict, prefix: str = "") -> Shards:
    fields = {name: np.memmap(path, kind, "r") if name in ("offsets", "sentences") else Flat(path, kind)
              for name, kind in TYPES.items() if (path := folder / f"{prefix}{name}.bin").is_file()}
    labels = np.broadcast_to(np.int16(IGNORED), len(fields["input_ids"]))  # the same one everywhere
    teacher = _mapped(folder, found, "teacher_") if not prefix and "teacher_input_ids" in found["bytes"] else None
    return Shards(labels=labels, teacher=teacher, digest=fingerprint(found["sha256"]), **fields)
