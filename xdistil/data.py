"""Text to ids and back: TSV files, ragged examples, windows, length-grouped batches.

A labelled line is `words<TAB>tags[<TAB>language]`, words and tags separated by single spaces, no
quoting; a transfer line is text (further columns are ignored).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from xdistil.files import save_atomic
from xdistil.losses import IGNORED

CACHED_WORDS = 2_000_000  # distinct words whose pieces are remembered, some 300 MB at the most


class DataError(ValueError):
    """A data file is missing, empty or malformed; the message names file and line."""


@dataclass(frozen=True)
class Sentences:
    """N sentences: words, tags of the same lengths (None for plain text) and languages."""

    words: list[list[str]]
    tags: list[list[str]] | None
    languages: list[str]

    def __len__(self) -> int:
        return len(self.words)


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers from 1 and lines without their ends. Raises DataError for invalid UTF-8."""
    if str(path) == "-":
        path = Path("/dev/stdin")
    path = Path(path)
    if not path.exists() or path.is_dir():
        there = sorted(p.name for p in path.parent.glob("*.tsv")) if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist; {path.parent} holds {there or 'no .tsv file'}")
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}:{number}: invalid UTF-8 at byte {error.start + 1} of the line; "
                    "save the file as UTF-8"
                ) from None
            yield number, text.rstrip("\r\n")


def read_labels(path: Path) -> list[str]:
    """Label names, one a line: O, B-TYPE and I-TYPE. Raises DataError for anything else."""
    labels = [line.strip() for _, line in read_lines(path) if line.strip()]
    wrong = [x for x in labels if x != "O" and x[:2] not in ("B-", "I-")]
    if not labels or wrong or len(set(labels)) != len(labels):
        raise DataError(
            f"{path}: found {wrong or labels}; expected distinct labels O, B-TYPE, I-TYPE, one a line"
        )
    return labels


def repair_iob2(tags: list[str]) -> tuple[list[str], int]:
    """Tags in which every I-TYPE follows B-TYPE or I-TYPE, and how many had to become B-TYPE."""
    fixed, previous = [], "O"
    for tag in tags:
        if tag[:2] == "I-" and previous[2:] != tag[2:]:
            tag = "B-" + tag[2:]
        fixed.append(tag)
        previous = tag
    return fixed, sum(a != b for a, b in zip(fixed, tags, strict=True))


def subset(n: int, limit: int | None, seed: int) -> np.ndarray:
    """Ascending indices of a seeded random subset of `limit` out of n (all without a limit)."""
    if limit is None or limit >= n:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, limit, replace=False))


def read_tagged(path: Path, labels: list[str], limit: int | None = None, seed: int = 0) -> Sentences:
    """Read a labelled file; blank lines are skipped, broken IOB2 is repaired and counted.

    Raises DataError with file and line for a missing file, wrong columns, unequal counts of words
    and tags, empty words, unknown labels, invalid UTF-8 or no sentence at all.
    """
    known, rows, repaired = set(labels), [], 0
    for number, line in read_lines(path):
        if not line.strip():
            continue
        columns = line.split("\t")
        if not 2 <= len(columns) <= 3:
            raise DataError(
                f"{path}:{number}: found {len(columns)} columns, "
                "expected words<TAB>tags[<TAB>language]"
            )
        words, tags = columns[0].split(" "), columns[1].split(" ")
        if len(words) != len(tags) or not all(words):
            raise DataError(
                f"{path}:{number}: {len(words)} words but {len(tags)} tags; both are separated by "
                "single spaces"
            )
        unknown = [tag for tag in tags if tag not in known]
        if unknown:
            raise DataError(f"{path}:{number}: unknown label {unknown[0]!r}; labels.tsv has {labels}")
        tags, wrong = repair_iob2(tags)
        repaired += wrong
        rows.append((words, tags, columns[2].strip() if len(columns) == 3 else ""))
    if not rows:
        raise DataError(f"{path}: no sentence in this file; expected words<TAB>tags lines")
    if repaired:
        print(f"[data] warning: {path}: {repaired} tags broke IOB2 (I- without B-), read as B-")
    rows = [rows[i] for i in subset(len(rows), limit, seed)]
    return Sentences(*map(list, zip(*rows, strict=True)))


def read_text(path: Path, limit: int | None = None, seed: int = 0) -> Sentences:
    """Read transfer text: the first column of each line, split at white space."""
    words = [line.split("\t")[0].split() for _, line in read_lines(path)]
    words = [sentence for sentence in words if sentence]
    if not words:
        raise DataError(f"{path}: no sentence in this file; expected one sentence a line")
    words = [words[i] for i in subset(len(words), limit, seed)]
    return Sentences(words, None, [""] * len(words))


def typical_sentence(sentences: Sentences) -> list[str]:
    """The words of the first sentence of 8 to 16 words with two entities, else of the first."""
    for words, tags in zip(sentences.words, sentences.tags, strict=True):
        if 8 <= len(words) <= 16 and sum(tag[:2] == "B-" for tag in tags) >= 2:
            return words
    return sentences.words[0]


def write_tagged(path: Path, sentences: Sentences, tags: list[list[str]]) -> None:
    """Write words, the given tags and the language, a line each (format of the labelled files)."""
    rows = zip(sentences.words, tags, sentences.languages, strict=True)
    text = "".join(f"{' '.join(w)}\t{' '.join(t)}\t{x}\n" for w, t, x in rows)
    save_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def word_pieces(tokenizer, sentences: Iterable[list[str]]) -> Iterator[list[list[int]]]:
    """The sub-word ids of each word of each sentence; a word without pieces gets the unknown id.

    Distinct words are tokenised once and remembered where that is exact, which is checked on the
    first sentences; else (pieces depend on neighbours) whole sentences are tokenised in batches.
    """
    unknown = [tokenizer.unk_token_id if tokenizer.unk_token_id is not None else 0]

    def whole(batch):
        encoded = tokenizer(
            batch, is_split_into_words=True, add_special_tokens=False, verbose=False
        )
        for i, sentence in enumerate(batch):
            ids = [[] for _ in sentence]
            for piece, word in zip(encoded["input_ids"][i], encoded.word_ids(i), strict=True):
                ids[word].append(piece)
            yield [pieces or unknown for pieces in ids]

    cache: dict[str, list[int]] = {}

    def remembered(batch):
        new = list(dict.fromkeys(w for sentence in batch for w in sentence if w not in cache))
        if len(cache) + len(new) > CACHED_WORDS:
            cache.clear()
            new = list(dict.fromkeys(w for sentence in batch for w in sentence))
        if new:
            found = whole([[word] for word in new])
            cache.update((word, pieces[0]) for word, pieces in zip(new, found, strict=True))
        return ([cache[word] for word in sentence] for sentence in batch)

    source, split = iter(sentences), None
    while batch := list(islice(source, 2000)):
        if split is None:
            sample = batch[:200]
            split = remembered if list(whole(sample)) == list(remembered(sample)) else whole
        yield from split(batch)


def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a single text."""
    bare = tokenizer([["a"]], is_split_into_words=True, add_special_tokens=False)["input_ids"][0]
    full = tokenizer([["a"]], is_split_into_words=True)["input_ids"][0]
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def windows(sizes: list[int], capacity: int) -> list[tuple[int, int, int, int]]:
    """Overlapping windows of whole words, (start, end, first owned, end of owned), in words.

    Neighbours share up to a quarter of the capacity; each word is owned by exactly one window, the
    one that shows more of its context. `sizes` are pieces per word, `capacity` pieces per window.
    """
    n, spans, start = len(sizes), [], 0
    sizes = [min(size, capacity) for size in sizes]
    while start < n:
        end = used = 0
        for end in range(start, n + 1):
            if end == n or used + sizes[end] > capacity:
                break
            used += sizes[end]
        spans.append((start, end))
        if end == n:
            break
        start, shared = end, 0
        while start - 1 > spans[-1][0] and shared + sizes[start - 1] <= capacity // 4:
            start -= 1
            shared += sizes[start]
    cuts = [0, *((b[0] + a[1] + 1) // 2 for a, b in zip(spans, spans[1:], strict=False)), n]
    return [(*span, cuts[i], cuts[i + 1]) for i, span in enumerate(spans)]


@dataclass(frozen=True)
class Examples:
    """N windows of token ids, flat and ragged: window i is `input_ids[offsets[i]:offsets[i+1]]`.

    `labels` holds label ids on the first sub-word of owned words, IGNORED elsewhere; `words` the
    word's index in its sentence on the same positions, -1 elsewhere; `sentences` [N] says which
    sentence a window is of.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    offsets: np.ndarray
    sentences: np.ndarray

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def lengths(self) -> np.ndarray:
        """Sub-words per window, special tokens included."""
        return np.diff(self.offsets)


def encode(sentences: Sentences, tokenizer, seq_len: int, labels: list[str] = ()) -> Examples:
    """Token ids of sentences; longer ones become overlapping windows of at most seq_len pieces.

    Raises DataError if seq_len leaves no room between the special tokens.
    """
    before, after = special_tokens(tokenizer)
    capacity = seq_len - len(before) - len(after)
    if capacity < 1:
        raise DataError(f"seq_len: {seq_len} leaves no room for words; set it to 8 or more")
    label_id = {label: i for i, label in enumerate(labels)}
    ids, tags, words, offsets, owners = [], [], [], [0], []
    for i, pieces in enumerate(word_pieces(tokenizer, sentences.words)):
        for start, end, first, last in windows([len(p) for p in pieces], capacity):
            ids.extend(before)
            tags.extend([IGNORED] * len(before))
            words.extend([-1] * len(before))
            for w in range(start, end):
                piece, owned = pieces[w][:capacity], first <= w < last
                ids.extend(piece)
                tag = label_id[sentences.tags[i][w]] if owned and label_id else IGNORED
                tags.extend([tag] + [IGNORED] * (len(piece) - 1))
                words.extend([w if owned else -1] + [-1] * (len(piece) - 1))
            ids.extend(after)
            tags.extend([IGNORED] * len(after))
            words.extend([-1] * len(after))
            offsets.append(len(ids))
            owners.append(i)
    return Examples(
        np.asarray(ids, np.int32), np.asarray(tags, np.int16), np.asarray(words, np.int32),
        np.asarray(offsets, np.int64), np.asarray(owners, np.int32),
    )


def batches(
    lengths: np.ndarray, batch_size: int, seed: int | None = None, multiple: int = 8
) -> list[np.ndarray]:
    """Indices of length-grouped batches with about the same number of token slots each.

    Windows are shuffled, grouped by length within large pools, and packed until a batch holds
    `batch_size` times the mean length in slots: `batch_size` windows of average length, more short
    ones, fewer long ones. Without a seed: sorted by length, longest first, for evaluation.
    """
    padded = -(-np.asarray(lengths) // multiple) * multiple
    slots = max(batch_size * padded.mean(), padded.max())
    if seed is None:
        pools = [np.argsort(-padded, kind="stable")]
    else:
        order = np.random.default_rng(seed).permutation(len(padded))
        pools = [order[i : i + 64 * batch_size] for i in range(0, len(order), 64 * batch_size)]
        pools = [pool[np.argsort(-padded[pool], kind="stable")] for pool in pools]
    packed = []
    for pool in pools:
        while len(pool):
            n = max(1, int(slots // padded[pool[0]]))  # the first is the longest
            packed.append(pool[:n])
            pool = pool[n:]
    if seed is not None:
        packed = [packed[i] for i in np.random.default_rng(seed).permutation(len(packed))]
    return packed


def collate(examples: Examples, indices, pad_id: int, multiple: int = 8) -> dict[str, torch.Tensor]:
    """One batch: input_ids, attention_mask, labels and words, each [B, S], S a multiple of 8."""
    width = -(-int(examples.lengths[indices].max()) // multiple) * multiple
    fields = {"input_ids": (examples.input_ids, pad_id), "labels": (examples.labels, IGNORED),
              "words": (examples.words, -1)}
    batch = {name: np.full((len(indices), width), pad, np.int64) for name, (_, pad) in fields.items()}
    batch["attention_mask"] = np.zeros((len(indices), width), np.int64)
    for row, i in enumerate(indices):
        span = slice(examples.offsets[i], examples.offsets[i + 1])
        length = span.stop - span.start
        batch["attention_mask"][row, :length] = 1
        for name, (flat, _) in fields.items():
            batch[name][row, :length] = flat[span]
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def split_transfer(n: int, chunk_size: int, holdout_ratio: float, seed: int):
    """The held-out windows of a transfer set and its chunks, as index arrays (2004.05686 stages).

    At most 2,000 windows are held out: enough for a loss, without wasting text.
    """
    order = np.random.default_rng(seed).permutation(n)
    n_held_out = min(2000, max(1, round(n * holdout_ratio)))
    rest = order[n_held_out:]
    return order[:n_held_out], [rest[i : i + chunk_size] for i in range(0, len(rest), chunk_size)]
