"""A smaller vocabulary: the pieces that a task's text uses, and enough beside them to read any other text.

Most rows of a multilingual vocabulary are never looked up in one task, and they are most of a small student's weight.
To drop them costs nothing, before fine-tuning or after it (Abdaoui et al. 2020, Ushio et al. 2023).
"""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from xdistil.data import word_pieces
from xdistil.files import save_json
from xdistil.models import CheckpointError
from xdistil.unfreeze import word_embedding


def _letters(piece: str, prefix: str) -> list[str]:
    """The single characters that spell a piece, with the mark of those that continue a word (WordPiece's ##)."""
    text, mark = piece.removeprefix(prefix), prefix if piece.startswith(prefix) else ""
    return [mark + text[:1], *(prefix + x for x in text[1:])]


def _merged(piece: str, ranks: dict[tuple[str, str], int]) -> Iterable[str]:
    """What byte-pair encoding builds on its way to a piece, itself included."""
    parts = list(piece)
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        yield parts[i]


def kept_pieces(model: dict, used: set[str]) -> set[str]:
    """The pieces to keep of the `model` part of a tokenizer.json: those used and what they are merged from, single
    characters, and whatever single characters cannot spell."""
    vocab, prefix = dict(model["vocab"]), model.get("continuing_subword_prefix") or ""  # piece to score or id
    kept = {p for p in vocab if p in used or any(x == p or x not in vocab for x in _letters(p, prefix))}
    if model["type"] == "Unigram":  # its least score sets the price of an unknown character
        kept |= {min(vocab, key=vocab.get), *(p for i, p in enumerate(vocab) if i == model["unk_id"])}
    if model["type"] == "BPE":
        ranks = {tuple(merge): rank for rank, merge in enumerate(model["merges"])}
        kept |= {part for piece in used for part in _merged(piece, ranks) if part in vocab}
    kept |= {p for p in vocab if model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", p)}
    return kept | ({model.get("unk_token")} & set(vocab))


def _renumber(node, new: dict[int, int]):
    """A post-processor with new ids for its special tokens."""
    if isinstance(node, list):
        return [_renumber(x, new) for x in node]
    if not isinstance(node, dict):
        return node
    return {key: [new[i] for i in x] if key == "ids" else [x[0], new[x[1]]]
            if key in ("cls", "sep") and isinstance(x, list) else _renumber(x, new) for key, x in node.items()}


def trim_tokenizer(tokenizer, used: Iterable[int]):
    """A copy of a WordPiece, BPE or Unigram tokenizer with the pieces of the `used` ids, see `kept_pieces`, and its
    special tokens; and the old ids in the order of the new ones. Raises CheckpointError for other kinds."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = state["model"], {token["content"]: token["id"] for token in state["added_tokens"]}
    marks = model.get("end_of_word_suffix") or (model["type"] == "BPE" and model.get("continuing_subword_prefix"))
    if model["type"] not in ("WordPiece", "BPE", "Unigram") or marks:
        raise CheckpointError(f"trim_vocab: {type(tokenizer).__name__} is a {model['type']} tokenizer of a kind that "
                              "cannot be trimmed; set trim_vocab: false")
    unigram = model["type"] == "Unigram"
    ids = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if unigram else model["vocab"]
    names = {i: piece for piece, i in ids.items()}
    pieces = kept_pieces(model, {names[i] for i in used if i in names}) | (set(added) & set(ids))
    kept = sorted(ids[piece] for piece in pieces) + sorted(set(added.values()) - set(ids.values()))
    new = {old: i for i, old in enumerate(kept)}
    if unigram:
        model["vocab"] = [model["vocab"][i] for i in sorted(map(ids.get, pieces))]
        model["unk_id"] = new.get(model["unk_id"])
    else:
        model["vocab"] = {piece: new[i] for piece, i in ids.items() if piece in pieces}
    if model["type"] == "BPE":
        model["merges"] = [m for m in model["merges"] if {*m, "".join(m)} <= pieces]
    for token in state["added_tokens"]:
        token["id"] = new[token["id"]]
    state |= {"post_processor": _renumber(state["post_processor"], new), "padding": None}
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        save_json(Path(folder) / "tokenizer.json", state)
        return type(tokenizer).from_pretrained(folder), kept


@torch.no_grad()
def trim_model(model, kept: list[int]):
    """The model, in place, with the rows of its word embeddings that `kept` names, in that order."""
    rows, new, pad = word_embedding(model)[kept], {old: i for i, old in enumerate(kept)}, model.config.pad_token_id
    if "roberta" in model.config.model_type and new[pad] != pad:  # it counts positions from there
        raise CheckpointError(f"trim_vocab: the padding id {pad} of this model would change; set trim_vocab: false")
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    word_embedding(model).copy_(rows)
    for name, old in model.config.to_dict().items():
        if name.endswith("_token_id") and old in new:
            setattr(model.config, name, new[old])
    return model


def share_cut_differently(full, trimmed, kept: list[int], sentences: list[list[str]]) -> float:
    """The share of words (0..1) that the trimmed tokenizer cuts into other pieces than the full one."""
    (a, a_starts, words), (b, b_starts, again) = (word_pieces(t, sentences) for t in (full, trimmed))
    b = np.asarray(kept)[b]
    differ = [not np.array_equal(a[a_starts[i] : a_starts[i + 1]], b[b_starts[j] : b_starts[j + 1]])
              for i, j in zip(words, again, strict=True)]
    return sum(differ) / len(differ)
