"""What the teacher says of a chunk: computed once, kept without padding, read back per batch.

Kinds: `hidden` [T, P, H_t] for T tokens and P layers, `attention` (each window's maps end to end),
`relation` [T, 3 H_t] (queries, keys, values of one layer) in float16, `logits` [T, C] in float32.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xdistil.data import Examples, batches, collate
from xdistil.models import Recorder, run_model

DTYPES = {"logits": np.float32}  # few numbers; the rest is stored in half precision
HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class TargetSpec:
    """Which teacher outputs to keep: hidden-state layers 0..L, attention layers 1..L, and so on."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()
    relation_layer: int | None = None
    logits: bool = True

    def shapes(self, lengths: np.ndarray, config) -> dict[str, tuple[int, ...]]:
        """Array shape of each kind for windows of these lengths."""
        tokens, pairs = int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
        width, heads = config.hidden_size, config.num_attention_heads
        shapes = {
            "hidden": (tokens, len(self.hidden), width) if self.hidden else None,
            "attention": (pairs * len(self.attention) * heads,) if self.attention else None,
            "relation": (tokens, 3 * width) if self.relation_layer is not None else None,
            "logits": (tokens, config.num_labels) if self.logits else None,
        }
        return {kind: shape for kind, shape in shapes.items() if shape is not None}

    def n_bytes(self, lengths: np.ndarray, config) -> int:
        """Bytes that the teacher outputs of windows of these lengths take."""
        return sum(
            int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES.get(kind, np.float16)).itemsize
            for kind, shape in self.shapes(lengths, config).items()
        )


def teacher_outputs(teacher, spec: TargetSpec) -> Callable[[dict], dict[str, torch.Tensor]]:
    """A function from a batch to the teacher's outputs of each kind, padded, [B, S, ...] first
    (attention [B, P, A, S, S])."""
    recorder = Recorder(teacher, spec.relation_layer) if spec.relation_layer is not None else None

    def outputs(batch: dict) -> dict[str, torch.Tensor]:
        with torch.inference_mode():
            logits, states, maps = run_model(
                teacher, batch, bool(spec.hidden), bool(spec.attention)
            )
            found = {}
            if spec.hidden:
                found["hidden"] = torch.stack([states[i] for i in spec.hidden], dim=2)
            if spec.attention:
                found["attention"] = torch.stack([maps[i - 1] for i in spec.attention], dim=1)
            if recorder:
                found["relation"] = recorder.take()
            if spec.logits:
                found["logits"] = logits
            return found

    return outputs


class Targets:
    """The teacher's outputs for windows of known lengths: flat arrays, read back padded."""

    def __init__(self, lengths: np.ndarray, arrays: dict[str, np.ndarray]):
        self.lengths, self.arrays = lengths, arrays
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        squares = np.concatenate([[0], np.cumsum(lengths.astype(np.int64) ** 2)])
        self.map_starts = squares

    def _map_span(self, row: int, flat: np.ndarray) -> slice:
        per_pair = len(flat) // max(1, int(self.map_starts[-1]))
        return slice(self.map_starts[row] * per_pair, self.map_starts[row + 1] * per_pair)

    def put(self, rows: np.ndarray, outputs: dict[str, torch.Tensor]) -> None:
        """Store the padded outputs of some windows without their padding."""
        for kind, tensor in outputs.items():
            flat = self.arrays[kind]
            values = tensor.detach().float()
            if flat.dtype == np.float16:
                values = values.clamp(-HALF_MAX, HALF_MAX).half()
            values = values.cpu().numpy()
            for i, row in enumerate(rows):
                n = int(self.lengths[row])
                if kind == "attention":
                    flat[self._map_span(row, flat)] = values[i, :, :, :n, :n].ravel()
                else:
                    flat[self.starts[row] : self.starts[row + 1]] = values[i, :n]

    def padded(self, rows: np.ndarray, width: int, n_heads: int) -> dict[str, torch.Tensor]:
        """The outputs of some windows as `teacher_*` tensors, zero on padding up to `width`."""
        batch = {}
        for kind, flat in self.arrays.items():
            for i, row in enumerate(rows):
                n = int(self.lengths[row])
                if kind == "attention":
                    maps = flat[self._map_span(row, flat)].reshape(-1, n_heads, n, n)
                    if i == 0:
                        out = np.zeros((len(rows), len(maps), n_heads, width, width), flat.dtype)
                    out[i, :, :, :n, :n] = maps
                else:
                    if i == 0:
                        out = np.zeros((len(rows), width, *flat.shape[1:]), flat.dtype)
                    out[i, :n] = flat[self.starts[row] : self.starts[row + 1]]
            batch[f"teacher_{kind}"] = torch.from_numpy(out)
        return batch


class TargetStore:
    """Teacher outputs of named chunks: on disk or in memory within a byte budget, else afresh.

    Args:
        outputs: from `teacher_outputs`; run in the accelerator's precision by the caller.
        where: "disk", "memory" or "none"; budget_bytes: most that is kept.
        folder: for "disk"; one .npy file per kind and chunk, renamed when whole.
    """

    def __init__(self, outputs, spec: TargetSpec, config, examples: Examples, pad_id: int, *,
                 accelerator, batch_size: int, where: str, budget_bytes: float, folder: Path):
        self.outputs, self.spec, self.config, self.examples = outputs, spec, config, examples
        self.pad_id, self.accelerator, self.batch_size = pad_id, accelerator, batch_size
        self.where, self.left, self.folder = where, budget_bytes, Path(folder)
        self.kept: dict[str, Targets | None] = {}

    def _compute(self, windows: np.ndarray, targets: Targets) -> Targets:
        for rows in batches(targets.lengths, self.batch_size):
            batch = collate(self.examples, windows[rows], self.pad_id)
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with self.accelerator.autocast():
                targets.put(rows, self.outputs(batch))
        return targets

    def _blank(self, windows: np.ndarray, name: str | None = None) -> Targets:
        lengths = self.examples.lengths[windows]
        arrays = {}
        for kind, shape in self.spec.shapes(lengths, self.config).items():
            dtype = DTYPES.get(kind, np.float16)
            if name is None:
                arrays[kind] = np.empty(shape, dtype)
            else:
                self.folder.mkdir(parents=True, exist_ok=True)
                path = self.folder / f".{kind}-{name}.npy"
                arrays[kind] = np.lib.format.open_memmap(path, "w+", dtype, shape)
        return Targets(lengths, arrays)

    def _read(self, windows: np.ndarray, name: str) -> Targets | None:
        lengths = self.examples.lengths[windows]
        shapes = self.spec.shapes(lengths, self.config)
        paths = {kind: self.folder / f"{kind}-{name}.npy" for kind in shapes}
        if not all(path.is_file() for path in paths.values()):
            return None
        arrays = {kind: np.load(path, mmap_mode="r") for kind, path in paths.items()}
        fits = all(arrays[kind].shape == shape for kind, shape in shapes.items())
        return Targets(lengths, arrays) if fits else None

    def chunk(self, name: str, windows: np.ndarray) -> Targets | None:
        """The kept targets of a chunk, computed at the first call; None if there is no room."""
        if name not in self.kept:
            need = self.spec.n_bytes(self.examples.lengths[windows], self.config)
            if self.where == "none" or need > self.left:
                self.kept[name] = None
            else:
                self.left -= need
                on_disk = self.where == "disk"
                found = self._read(windows, name) if on_disk else None
                if found is None:
                    found = self._compute(windows, self._blank(windows, name if on_disk else None))
                    if on_disk:
                        for kind, array in found.arrays.items():
                            array.flush()
                            os.replace(self.folder / f".{kind}-{name}.npy",
                                       self.folder / f"{kind}-{name}.npy")
                        found = self._read(windows, name)
                self.kept[name] = found
        return self.kept[name]

    def batches(self, name: str, windows: np.ndarray, batch_size: int,
                seed: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of a chunk with the teacher's outputs beside the ids."""
        kept = self.chunk(name, windows)
        for rows in batches(self.examples.lengths[windows], batch_size, seed):
            batch = collate(self.examples, windows[rows], self.pad_id)
            targets = kept or self._compute(windows[rows], self._blank(windows[rows]))
            places = rows if kept else np.arange(len(rows))
            width = batch["input_ids"].shape[1]
            yield batch | targets.padded(places, width, self.config.num_attention_heads)

    def drop(self, kinds: tuple[str, ...]) -> None:
        """Delete the files of these kinds."""
        self.kept.clear()
        for kind in kinds:
            for path in self.folder.glob(f"*{kind}-*.npy"):
                path.unlink()
