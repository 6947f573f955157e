"""What the teacher says of a chunk: computed once, kept without padding, read back per batch. Kinds: `hidden`
[T, P, H_t] for T tokens and P layers, `attention` (each window's P x A x S x S maps, end to end), both in float16, and
`logits` [T, C] in float32."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap

from xdistil.data import Examples, batches, collate
from xdistil.models import run_model

DTYPES = {"hidden": np.float16, "attention": np.float16, "logits": np.float32}
HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class TargetSpec:
    """Which teacher outputs to keep: hidden-state indices 0..L, attention layers 1..L; always logits."""

    hidden: tuple[int, ...] = ()
    attention: tuple[int, ...] = ()

    def shapes(self, lengths: np.ndarray, config) -> dict[str, tuple[int, ...]]:
        """Array shape of each kind for windows of these lengths."""
        tokens, squares = int(lengths.sum()), int((lengths.astype(np.int64) ** 2).sum())
        shapes = {"hidden": (tokens, len(self.hidden), config.hidden_size), "logits": (tokens, config.num_labels),
                  "attention": (squares * len(self.attention) * config.num_attention_heads,)}
        return {kind: shape for kind, shape in shapes.items() if np.prod(shape)}

    def n_bytes(self, lengths: np.ndarray, config) -> int:
        """Bytes that the outputs for windows of these lengths take."""
        shapes = self.shapes(lengths, config).items()
        return sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[kind]).itemsize for kind, shape in shapes)


class Targets:
    """The teacher's outputs for windows of known lengths: flat arrays by kind, read back padded."""

    def __init__(self, lengths: np.ndarray, arrays: dict[str, np.ndarray]):
        squares = lengths.astype(np.int64) ** 2
        self.lengths, self.n_maps = lengths, len(arrays.get("attention", ())) // max(1, int(squares.sum()))
        sizes = {kind: squares * self.n_maps if kind == "attention" else lengths for kind in arrays}
        self.parts = {kind: np.split(flat, np.cumsum(sizes[kind])[:-1]) for kind, flat in arrays.items()}  # views

    def put(self, rows: np.ndarray, outputs: dict[str, torch.Tensor]) -> None:
        """Store the padded outputs ([B, S, ...], attention [B, P, A, S, S]) without their padding."""
        for kind, tensor in outputs.items():
            half = DTYPES[kind] is np.float16
            values = (tensor.float().clamp(-HALF_MAX, HALF_MAX).half() if half else tensor.float()).cpu().numpy()
            for value, row in zip(values, rows, strict=True):
                n = int(self.lengths[row])
                self.parts[kind][row][:] = value[:, :, :n, :n].ravel() if kind == "attention" else value[:n]

    def padded(self, rows: np.ndarray, width: int, n_heads: int) -> dict[str, torch.Tensor]:
        """The outputs of some windows as `teacher_<kind>` tensors, zero on padding up to `width`."""
        batch = {}
        for kind, parts in self.parts.items():
            maps = (self.n_maps // n_heads, n_heads, width, width)
            out = np.zeros((len(rows), *(maps if kind == "attention" else (width, *parts[0].shape[1:]))), DTYPES[kind])
            for padded, row in zip(out, rows, strict=True):
                n = int(self.lengths[row])
                real = padded[:, :, :n, :n] if kind == "attention" else padded[:n]
                real[...] = parts[row].reshape(real.shape)
            batch[f"teacher_{kind}"] = torch.from_numpy(out)
        return batch


class TargetStore:
    """Teacher outputs of named chunks: within `budget_bytes` on disk in `folder` (one .npy per kind and chunk, renamed
    when whole), past it computed for each batch."""

    def __init__(self, teacher, spec: TargetSpec, examples: Examples, pad_id: int, accelerator, batch_size: int,
                 budget_bytes: float, folder: Path):
        self.teacher, self.spec, self.config, self.examples = teacher, spec, teacher.config, examples
        self.pad_id, self.accelerator, self.batch_size = pad_id, accelerator, batch_size
        self.left, self.folder, self.kept = budget_bytes, Path(folder), {}

    def compute(self, windows: np.ndarray, arrays: dict[str, np.ndarray] | None = None) -> Targets:
        """Run the teacher over windows; the outputs go to the given arrays or to new ones."""
        lengths, spec = self.examples.lengths[windows], self.spec
        shapes = spec.shapes(lengths, self.config).items()
        targets = Targets(lengths, arrays or {kind: np.empty(shape, DTYPES[kind]) for kind, shape in shapes})
        for rows in batches(lengths, self.batch_size):
            batch = collate(self.examples, windows[rows], self.pad_id)
            batch = {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()}
            with torch.inference_mode(), self.accelerator.autocast():
                logits, states, maps = run_model(self.teacher, batch, bool(spec.hidden), bool(spec.attention))
                found = {"logits": logits}
                if spec.hidden:
                    found["hidden"] = torch.stack([states[i] for i in spec.hidden], dim=2)
                if spec.attention:
                    found["attention"] = torch.stack([maps[i - 1] for i in spec.attention], dim=1)
            targets.put(rows, found)
        return targets

    def chunk(self, name: str, windows: np.ndarray) -> Targets | None:
        """The kept outputs of a chunk, computed when first asked for; None if there is no room."""
        lengths = self.examples.lengths[windows]
        need = self.spec.n_bytes(lengths, self.config)
        if name not in self.kept and need > self.left:
            self.kept[name] = None
        if name not in self.kept:
            self.left -= need
            shapes = self.spec.shapes(lengths, self.config)
            paths = {kind: self.folder / f"{kind}-{name}.npy" for kind in shapes}
            if not all(path.is_file() for path in paths.values()):
                self.folder.mkdir(parents=True, exist_ok=True)
                arrays = {kind: open_memmap(path.with_suffix(".partial"), "w+", DTYPES[kind], shapes[kind])
                          for kind, path in paths.items()}
                self.compute(windows, arrays)
                for kind, array in arrays.items():
                    array.flush()
                    os.replace(array.filename, paths[kind])
            self.kept[name] = Targets(lengths, {kind: np.load(path, mmap_mode="r") for kind, path in paths.items()})
        return self.kept[name]

    def batches(self, name: str, windows: np.ndarray, batch_size: int, seed: int | None = None) -> Iterator[dict]:
        """Batches of a chunk, as `data.collate` makes them, with the teacher's outputs beside the ids."""
        kept = self.chunk(name, windows)
        for rows in batches(self.examples.lengths[windows], batch_size, seed):
            batch = collate(self.examples, windows[rows], self.pad_id)
            targets, places = (kept, rows) if kept else (self.compute(windows[rows]), np.arange(len(rows)))
            yield batch | targets.padded(places, batch["input_ids"].shape[1], self.config.num_attention_heads)

    def drop(self, *kinds: str) -> None:
        """Delete the files of these kinds."""
        self.kept.clear()
        for path in (path for kind in kinds for path in self.folder.glob(f"{kind}-*")):
            path.unlink()
