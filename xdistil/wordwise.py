"""A teacher and a student that cut the same text with two tokenizers: their windows hold the same words (see
`data.encode`), and they are compared at the first sub-words of those that a window owns. With one tokenizer all this
changes nothing."""

import numpy as np
import torch

from xdistil import processes
from xdistil.data import IGNORED, Examples, collate
from xdistil.grouping import grid


def compared(batch: dict) -> torch.Tensor:
    """Where teacher and student are compared, 1 or 0, [B, S]: at real tokens or, with two tokenizers, first sub-words
    of owned words; nowhere in a batch that counts for nothing, see `count_own`."""
    mask = batch.get("compared", batch["attention_mask"])
    return mask * batch["counts"] if "counts" in batch else mask


def count_own(examples: Examples, windows: np.ndarray, rows: np.ndarray, width: int, pad_id: int) -> dict:
    """The batch of some rows of `windows`, as `data.collate` makes it; of several processes the part of this one, with
    `of`, how many windows the batch has. Where nothing is left for it a window stands in, `counts` is 0, and labels
    are ignored."""
    own, counts = processes.own_part(rows)
    batch = collate(examples, windows[own], pad_id, width)
    batch |= {"of": torch.tensor(len(rows))} if processes.size() > 1 else {}
    return batch if counts else batch | {
        "counts": torch.zeros(1, 1, dtype=torch.long), "labels": torch.full_like(batch["labels"], IGNORED)}


def as_teacher_reads(examples: Examples, batch: dict, teacher, shapes: str = "exact") -> dict:
    """The windows of a batch of `data.collate` as the teacher reads them, on the batch's device; the batch itself with
    one tokenizer. `shapes`: see `grouping.grid`."""
    if "compared" not in batch:
        return batch
    rows, (widths, _) = batch["windows"].cpu().numpy(), grid(examples.teacher.lengths, 32, shapes)
    width = int(widths[np.searchsorted(widths, examples.teacher.lengths[rows].max())])
    found = collate(examples.teacher, rows, teacher.config.pad_token_id or 0, width)
    return {name: values.to(batch["input_ids"].device) for name, values in found.items()}


def move_states(states: torch.Tensor, read: dict, batch: dict) -> torch.Tensor:
    """States (or logits) [B, T, ...] of the batch `read`, at the first sub-words of the same words in `batch`, zeros
    elsewhere: [B, S, ...]; as they are with one tokenizer."""
    if "compared" not in batch:
        return states
    words, others = (x["words"].to(states.device) for x in (batch, read))
    place = (words[:, :, None] == others[:, None]).int().argmax(-1)
    found = states[torch.arange(len(states), device=states.device)[:, None], place]
    return found.where((words >= 0).view(*words.shape, *[1] * (states.dim() - 2)), 0)


def pool_maps(maps: torch.Tensor, read: dict, batch: dict) -> torch.Tensor:
    """Attention of words to words [B, A, S, S], at their first sub-words in `batch`, of maps [B, A, T, T] of the batch
    `read`: summed over the sub-words of the key, mean over those of the query, and scaled so that rows sum to 1, as
    what goes to special tokens and to words that other windows own is left out. As they are with one tokenizer."""
    if "compared" not in batch:
        return maps
    words, others = (x["words"].to(maps.device) for x in (batch, read))
    owners = others.cummax(1).values.where(others != -1, -3)  # the word of each sub-word; -3: none
    with torch.autocast(maps.device.type, enabled=False):
        pieces = (words[:, None, :, None] == owners[:, None, None]).float()  # [B, 1, S, T]
        pooled = pieces @ maps.float() @ pieces.mT  # the sum over a query's sub-words is its mean once it is scaled
        return pooled / pooled.sum(-1, keepdim=True).clamp(min=1e-9)
