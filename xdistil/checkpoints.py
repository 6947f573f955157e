"""Where training stands, in one file that knows its own checksum."""

import itertools
import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from xdistil import processes
from xdistil.files import save_atomic


@dataclass
class Position:
    """Where training stands, written with every checkpoint."""

    step: int = 0
    epoch: int = 0
    chunk: int = 0
    batch: int = 0  # of this chunk
    seen: int = 0  # windows of this epoch
    updates: int = 0
    best: float | None = None
    bad_epochs: int = 0
    epochs_run: int = 0
    windows: int = 0
    seconds: float = 0.0
    scaler: dict | None = None  # of float16 gradients
    records: list[dict] = field(default_factory=list)  # as in history.jsonl


def part(tensors: dict, prefix: str) -> dict:
    """The entries whose name starts with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _checksum(position: str, tensors: dict[str, torch.Tensor]) -> str:
    found = zlib.crc32(position.encode())
    for name, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), found))
    return f"{found:08x}"


def _gather(state: torch.Tensor) -> list[torch.Tensor]:
    return list(map(torch.from_numpy, processes.gather(state.numpy())))


def checkpoint_bytes(model: nn.Module, keep: int) -> int:
    """Bytes, at most, of `keep` checkpoints of a model, the one that is being written and the model itself."""
    return (4 * (keep + 1) + 1) * sum(p.numel() * p.element_size() for p in model.parameters())


def save_checkpoint(path: Path, at: Position, weights: dict, best: dict, optimizer, keep: int = 1) -> None:
    """One safetensors file with its checksum: weights, best weights, optimizer moments, position, random state of each
    process. The last `keep` - 1 before it stay beside it as NAME-1, NAME-2, ..."""
    tensors = {f"weights/{n}": t.detach() for n, t in weights.items()}
    tensors |= {f"best/{n}": t for n, t in best.items()}
    tensors |= {f"random/cpu/{i}": state for i, state in enumerate(_gather(torch.get_rng_state()))}
    for i, state in optimizer.state_dict()["state"].items() if optimizer else ():
        tensors |= {f"optimizer/{i}/{k}": v for k, v in state.items()}
    if torch.cuda.is_available():
        tensors |= {f"random/cuda/{i}": state for i, state in enumerate(_gather(torch.cuda.get_rng_state()))}
    tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    position = json.dumps(asdict(at))

    def write(temporary):
        save_file(tensors, temporary, {"position": position, "checksum": _checksum(position, tensors)})
        names = [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(1, keep))]
        for newer, older in reversed(list(itertools.pairwise(names))):
            if newer.is_file():
                os.replace(newer, older)

    save_atomic(path, write)


def load_checkpoint(path: Path) -> tuple[Position, dict[str, torch.Tensor]]:
    """The position and tensors of the last checkpoint that is as it was written, damaged ones are said and deleted;
    the start and {} when there is none."""
    for found in filter(Path.is_file, (path, *sorted(path.parent.glob(f"{path.stem}-*{path.suffix}")))):
        try:
            with safe_open(found, "pt") as file:
                said, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
            if _checksum(said["position"], tensors) != said["checksum"]:
                raise ValueError("its checksum differs")
            return Position(**json.loads(said["position"])), tensors
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            print(f"{found} is damaged ({error}) and deleted: training goes on from the checkpoint before it, if "
                  "keep_checkpoints left one, else from the start", flush=True)
            found.unlink(missing_ok=True)
    return Position(), {}
