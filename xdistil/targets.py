"""What the teacher says of a chunk: computed in the first pass over it, kept without padding, read back per batch.
Kinds: `hidden` [T, P, H_t] for T tokens and P layers, `qkv` [T, P, 3, H_t] and `attention` [sum of S^2, P, A] (each
window's P x A x S x S maps, end to end), in bfloat16, and `logits` [T, C], or [N, C] of N texts or pairs, in float32,
which all caches but "none" keep for later stages."""

import ctypes
import functools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xdistil import processes
from xdistil.data import Examples
from xdistil.devices import asking
from xdistil.files import hash_file, read_json, reserve, save_json
from xdistil.grouping import batches, grid, shapes_for
from xdistil.models import keep_qkv, model_inputs, run_model, unit_of
from xdistil.processes import own_part
from xdistil.wordwise import as_teacher_reads, count_own, move_states, pool_maps

# bfloat16 has the range of float32: no outlying dimension overflows
DTYPES = dict.fromkeys(("hidden", "attention", "qkv"), torch.bfloat16) | {"logits": torch.float32}
PAGE = 4096  # places: of any kind a whole number of the pages that memory is mapped by
RELEASE_EVERY = 4  # batches between two calls of `Targets.release`
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class TargetSpec:
    """Which teacher outputs to keep: hidden-state indices 0..L, layers 1..L of attention maps and of queries, keys and
    values; always logits."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    qkv: tuple[int, ...] = ()

    def shapes(self, lengths: np.ndarray, config, parts: tuple = ()) -> dict[str, tuple[int, ...]]:
        """Array shape of each kind for windows of these lengths, in `parts`, see `lay_out`."""
        tokens, squares, rows = (end for _, end in lay_out(lengths, parts))
        answers = tokens if unit_of(config) == "word" else rows
        shapes = {"hidden": (tokens, len(self.hidden), config.hidden_size), "logits": (answers, config.num_labels),
                  "attention": (squares, len(self.attention), config.num_attention_heads),
                  "qkv": (tokens, len(self.qkv), 3, config.hidden_size)}
        return {kind: shape for kind, shape in shapes.items() if math.prod(shape)}

    def n_bytes(self, lengths: np.ndarray, config) -> int:
        """Bytes that the outputs for windows of these lengths take."""
        return sum(DTYPES[kind].itemsize * math.prod(shape) for kind, shape in self.shapes(lengths, config).items())


def lay_out(lengths: np.ndarray, parts=()) -> list[tuple[np.ndarray, int]]:
    """Where each of N windows starts, and how many places there are, counted in tokens, in their squares and in
    windows. `parts`: the windows that each process writes, in its order; each part starts on a page of its own, as two
    hosts must not write to one page."""
    order, found = np.concatenate(parts) if parts else np.arange(len(lengths)), []
    ends = np.cumsum([len(part) for part in parts[:-1]], dtype=int)
    for sizes in (lengths.astype(np.int64), lengths.astype(np.int64) ** 2, np.ones(len(lengths), np.int64)):
        place = np.cumsum(sizes[order]) - sizes[order]
        for end in ends[ends < len(order)]:
            place[end:] += -place[end] % PAGE
        starts = np.empty_like(place)
        starts[order] = place
        found.append((starts, int(place[-1] + sizes[order[-1]])))
    return found


def _array(kind: str, shape: tuple[int, ...], path: Path | None = None) -> torch.Tensor:
    """Room for one kind: in memory, or mapped from a file, which is made if it is not there."""
    if path is None:
        return torch.empty(shape, dtype=DTYPES[kind])
    return torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=DTYPES[kind]).view(shape)


class Targets:
    """What was said of windows of known lengths: flat arrays by kind, written and read as padded batches.

    Args:
        paths: files that arrays are mapped from.
        whole: whether the arrays are filled to the last window.
        parts: see `lay_out`.
    """

    def __init__(self, lengths: np.ndarray, arrays: dict[str, torch.Tensor], paths: dict[str, Path] | None = None,
                 whole: bool = False, parts=()):
        self.lengths, self.arrays, self.paths, self.whole, self.parts = lengths, arrays, paths or {}, whole, parts
        (self.starts, _), (self.corners, _), (self.rows, self.n_rows) = lay_out(lengths, parts)

    def _maps(self, row: int) -> torch.Tensor:
        """A view of one window's attention maps [P, A, S, S]."""
        n, start, array = int(self.lengths[row]), int(self.corners[row]), self.arrays["attention"]
        return array[start : start + n * n].view(*array.shape[1:], n, n)

    def _places(self, array: torch.Tensor, rows: np.ndarray, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places of the windows' tokens in an array, [B, width], and which are real; [B, 1] where it has a row for
        each window."""
        if len(array) == self.n_rows:
            return torch.from_numpy(self.rows[rows])[:, None], torch.ones(len(rows), 1, dtype=torch.bool)
        column = np.arange(width)
        places = self.starts[rows, None] + np.minimum(column, self.lengths[rows, None] - 1)
        return torch.from_numpy(places), torch.from_numpy(column < self.lengths[rows, None])

    def put(self, rows: np.ndarray, outputs: dict[str, torch.Tensor]) -> None:
        """Store padded outputs ([B, S, ...], attention [B, P, A, S, S]) without their padding."""
        for kind, padded in outputs.items():
            if kind == "attention":
                for maps, own in zip(padded, map(self._maps, rows), strict=True):
                    own.copy_(maps[..., : own.shape[-1], : own.shape[-1]])
            else:
                places, real = self._places(self.arrays[kind], rows, padded.shape[1])
                self.arrays[kind].index_copy_(0, places[real], padded[real])

    def padded(self, rows: np.ndarray, width: int) -> dict[str, torch.Tensor]:
        """The outputs of some windows as padded batches of `width`; on padding stands anything finite."""
        found = {}
        for kind, array in self.arrays.items():
            if kind == "attention":
                found[kind] = array.new_zeros(len(rows), *array.shape[1:], width, width)
                for maps, own in zip(found[kind], map(self._maps, rows), strict=True):
                    maps[..., : own.shape[-1], : own.shape[-1]] = own
            else:
                places, _ = self._places(array, rows, width)
                found[kind] = array.index_select(0, places.flatten()).view(*places.shape, *array.shape[1:])
        return found

    def flush(self) -> None:
        """Write what is only mapped so far, for other hosts, if there are several processes; go on when all have."""
        for path in self.paths.values() if processes.size() > 1 else ():
            with open(path, "rb+") as file:
                os.fsync(file)
        processes.wait()

    def release(self) -> None:
        """Map files anew, as the pages that were touched stay resident; and give back the holes that batches of ever
        new shapes leave in the heap (glibc's)."""
        self.arrays |= {kind: _array(kind, self.arrays[kind].shape, path) for kind, path in self.paths.items()}
        if MALLOC_TRIM:
            MALLOC_TRIM(0)


class TargetStore:
    """Teacher outputs of named chunks. The first pass over a chunk runs the teacher, batch by batch, and keeps what it
    says as far as the budget reaches; later passes read it back. On disk a chunk is one memory-mapped file per kind
    and, written last, their checksums: an interrupted chunk is done again. Of several processes each asks for its part
    of every batch, and all read what all have written: they keep it on disk, or not at all.

    Args:
        load_teacher: called when the teacher is first needed, if ever; gives it in eval mode.
        mode: "disk", "memory" or "none"; or "auto": disk, but hidden states and attention only if they will be read
            again (`n_passes` > 1) and reading the first chunk back is faster than the teacher was.
        budget_bytes: for hidden states and attention; logits are small and always kept, except by "none".
        room: gives the bytes that may still be written at any time, for the same.
    """

    def __init__(self, load_teacher: Callable, config, spec: TargetSpec, examples: Examples, pad_id: int, accelerator,
                 *, folder: Path, mode: str = "disk", budget_bytes: float = 4e9, n_passes: int = 2,
                 room: Callable[[], float] = lambda: math.inf):
        self.load_teacher, self.config = functools.cache(load_teacher), config
        self.spec, self.examples, self.kind = spec, examples, shapes_for(accelerator)
        self.pad_id, self.accelerator, self.folder, self.room = pad_id, accelerator, Path(folder), room
        self.mode = "disk" if mode == "memory" and processes.size() > 1 else mode
        self.left, self.chunks, self.asked = budget_bytes, {}, 0
        verdict = read_json(self.folder / "auto.json", {}, lenient=True).get("keep")  # of the run resumed
        self.keep_all = True if mode != "auto" else n_passes > 1 and verdict is not False
        self.grid = functools.cache(lambda batch_size: grid(examples.lengths, batch_size, self.kind))  # is of all
        self.undecided = mode == "auto" and self.keep_all and verdict is None

    @property
    def all_asked(self) -> int:
        """How many windows the teachers of all processes were asked for."""
        return int(sum(processes.gather(np.array([self.asked])))[0])

    def ask(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The teacher's outputs for a batch of `collate`, at the student's positions, rounded as they are stored, on
        the accelerator."""
        teacher, spec, self.asked = self.load_teacher(), self.spec, self.asked + len(batch["input_ids"])
        read = as_teacher_reads(self.examples, batch, teacher, self.kind)
        inputs = model_inputs(teacher, read, self.accelerator.device)
        with asking(self.accelerator.device), self.accelerator.autocast(), keep_qkv(teacher, spec.qkv) as qkv:
            logits, states, maps = run_model(teacher, inputs, bool(spec.hidden), bool(spec.attention))
        found = {"logits": logits.float()}
        if spec.hidden:
            found["hidden"] = torch.stack([states[i].to(DTYPES["hidden"]) for i in spec.hidden], dim=2)
        if spec.qkv:
            found["qkv"] = torch.stack([qkv[i].to(DTYPES["qkv"]) for i in spec.qkv], dim=2)
        found = {kind: move_states(values, read, batch) for kind, values in found.items()}
        if spec.attention:
            pooled = [pool_maps(maps[i - 1], read, batch).to(DTYPES["attention"]) for i in spec.attention]
            found["attention"] = torch.stack(pooled, dim=1)
        return found

    def _open(self, name: str, windows: np.ndarray, batch_size: int, seed: int | None) -> Targets:
        """A chunk as it lies on disk, whole; else room for what will be kept of it, laid out for this pass."""
        lengths, now = self.examples.lengths[windows], [batch_size, seed, self.kind, processes.size()]
        kinds = list(self.spec.shapes(lengths, self.config)) if self.mode != "none" else []
        size = self.spec.n_bytes(lengths, self.config) if self.keep_all else math.inf
        room = processes.agree(lambda: self.room() + sum(x.stat().st_size for x in self.folder.glob(f"*-{name}.bin")))
        if size <= self.left and (self.mode == "memory" or size <= room):
            self.left -= size
        else:
            kinds = [kind for kind in kinds if kind == "logits"]
        paths = {kind: self.folder / f"{kind}-{name}.bin" for kind in kinds if self.mode != "memory"}

        def find_whole():
            sums = read_json(self.folder / f"{name}.json", {}, lenient=True)
            if paths and all(path.is_file() and kind in sums for kind, path in paths.items()):
                if all(sums[kind] == self._checksum(kind, path) for kind, path in paths.items()):
                    return sums.get("cut", now)
                print(f"[targets] {name}: the files do not match their checksums and are made again", flush=True)
            shapes = self.spec.shapes(lengths, self.config, self._parts(lengths, *now))
            for kind, path in paths.items():
                path.unlink(missing_ok=True)
                reserve(path, DTYPES[kind].itemsize * math.prod(shapes[kind]))

        cut = processes.agree(find_whole)
        parts = self._parts(lengths, *(cut or now))
        shapes = self.spec.shapes(lengths, self.config, parts)
        arrays = {kind: _array(kind, shapes[kind], paths.get(kind)) for kind in kinds}
        return Targets(lengths, arrays, paths, cut is not None, parts)

    def _parts(self, lengths: np.ndarray, batch_size: int, seed: int | None, kind: str, n: int) -> list[np.ndarray]:
        """The windows of a chunk that each of n processes asks the teacher for in a pass; [] for one."""
        shapes = grid(self.examples.lengths, batch_size, kind)
        grouped = batches(lengths, shapes, seed) if n > 1 else ()
        return [np.concatenate([rows[i::n] for rows, _ in grouped]) for i in range(n)] if grouped else []

    def _checksum(self, kind: str, path: Path) -> list:
        """What a finished file is known by: the layers of the teacher that it holds, and its bytes."""
        return [*getattr(self.spec, kind, ()), hash_file(path)]

    def batches(self, name: str, windows: np.ndarray, batch_size: int, seed: int | None = None) -> Iterator[dict]:
        """Batches of a chunk, as `data.collate` makes them, with the teacher's outputs beside the ids."""
        targets = self.chunks[name] = self.chunks.get(name) or self._open(name, windows, batch_size, seed)
        asking = 0.0
        read = targets.whole and set(targets.arrays) == set(self.spec.shapes(targets.lengths, self.config))
        grouped = batches(targets.lengths, self.grid(batch_size), seed)
        for i, (rows, width) in enumerate(grouped):
            batch, (rows, counts) = count_own(self.examples, windows, rows, width, self.pad_id), own_part(rows)
            if read:
                found = targets.padded(rows, width)
            else:
                start, found = time.perf_counter(), self.ask(batch)
                if counts and not targets.whole:
                    targets.put(rows, {kind: found[kind].cpu() for kind in targets.arrays})
                asking += time.perf_counter() - start
            if i % RELEASE_EVERY == 0:
                targets.release()
            yield batch | {f"teacher_{kind}": values for kind, values in found.items()}
        if not targets.whole:
            if self.undecided and len(targets.arrays) > 1:
                start, some = time.perf_counter(), grouped[:RELEASE_EVERY]
                for rows, width in some:
                    targets.padded(rows, width)
                reading = (time.perf_counter() - start) / sum(len(rows) for rows, _ in some) * len(windows)
                self.undecided, self.keep_all = False, processes.agree(lambda: reading < asking)
                save_json(self.folder / "auto.json", {"keep": self.keep_all, "teacher": asking, "reading": reading})
            targets.flush()
            cut = [batch_size, seed, self.kind, processes.size()]
            if targets.paths:
                processes.agree(lambda: save_json(self.folder / f"{name}.json", {"cut": cut} | {
                    kind: self._checksum(kind, path) for kind, path in targets.paths.items()}))
            targets.whole = True
        targets.release()

    def drop(self, *kinds: str) -> None:
        """Delete the files of these kinds."""
        self.chunks.clear()
        for path in (path for kind in kinds for path in self.folder.glob(f"{kind}-*") if processes.rank() == 0):
            path.unlink()
