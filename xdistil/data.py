"""Text to ids and back: TSV files, ragged examples, windows, padded batches. A labelled line is
`words<TAB>tags[<TAB>language]`, words and tags separated by single spaces, no quoting; a transfer line
`text[<TAB>language]`."""

import functools
import hashlib
import os
import weakref
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, compress, islice, pairwise, product
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed

from xdistil.files import save_text
from xdistil.losses import IGNORED
from xdistil.sources import DataError, files_of, read_lines

REMEMBERED = weakref.WeakKeyDictionary()  # by tokenizer: places of words, their flat pieces, offsets of these
EXACT = weakref.WeakKeyDictionary()  # by tokenizer: whether they may be remembered
EMPTY = {}, np.zeros(0, np.int32), np.zeros(1, np.int64)
PER_PROCESS = 250_000  # sentences: fewer are encoded before another process has started
PER_PART = 10_000  # sentences that are encoded at once
CACHED_WORDS = 300_000  # distinct words are remembered before the next part starts anew: some 50 MB


@dataclass(frozen=True)
class Sentences:
    """N sentences: their words and, unless they are plain text, their tags and languages."""

    words: list[list[str]]
    tags: list[list[str]] | None = None
    languages: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.words)


def read_labels(path: Path, unit: str = "word") -> list[str]:
    """Two or more labels, one a line: of words O, B-TYPE and I-TYPE. Raises DataError for anything else."""
    labels = [line.strip() for _, line in read_lines(path) if line.strip()]
    wrong = [x for x in labels if unit == "word" and x != "O" and x[:2] not in ("B-", "I-")]
    if wrong or len(labels) < 2 or len(set(labels)) != len(labels):
        due = "distinct O, B-TYPE, I-TYPE" if unit == "word" else "two or more distinct classes"
        raise DataError(f"{path}: found {wrong or labels}; expected {due}, one a line")
    return labels


def repair_iob2(tags: list[str]) -> tuple[list[str], int]:
    """Tags in which every I-TYPE follows B-TYPE or I-TYPE, and how many had to become B-TYPE."""
    wrong = [tag[:2] == "I-" and tag[2:] != last[2:] for last, tag in pairwise(["O", *tags])]
    return [f"B-{tag[2:]}" if bad else tag for tag, bad in zip(tags, wrong, strict=True)], sum(wrong)


def chosen(n: int, limit: int | None, seed: int) -> np.ndarray:
    """Which of n rows a seeded random subset of `limit` has, [n]; all without a limit."""
    if limit is None or limit >= n:
        return np.ones(n, bool)
    return np.bincount(np.random.default_rng(seed).choice(n, limit, replace=False), minlength=n) > 0


def subset(rows, limit: int | None, seed: int):
    """The rows `chosen`, in their order, as a list; without a limit, or below it, the rows themselves."""
    return rows if limit is None or limit >= len(rows) else list(compress(rows, chosen(len(rows), limit, seed)))


def read_tagged(path: Path, labels: list[str], limit: int | None = None, seed: int = 0) -> Sentences:
    """Read a labelled file; blank lines are skipped, broken IOB2 is repaired and counted. Raises DataError naming file
    and line for wrong columns, unequal counts of words and tags, unknown labels and invalid UTF-8; naming the file if
    it is missing or holds no sentence."""
    rows, repaired = [], 0
    usual = {(last, tag) for last, tag in product(["O", *labels], labels) if tag[:2] != "I-" or tag[2:] == last[2:]}
    for number, line in ((number, line) for number, line in read_lines(path) if line.strip()):
        words, tags, language, *more = [*line.split("\t"), "", ""]
        words, tags = words.split(" "), tags.split(" ")
        if len(more) > 2 or len(words) != len(tags) or not all(words):
            raise DataError(f"{path}:{number}: {len(words)} words and {len(tags)} tags; expected "
                            "words<TAB>tags[<TAB>language] with as many of each, single spaces between")
        if not usual.issuperset(zip(["O", *tags], tags, strict=False)):
            if unknown := [tag for tag in tags if tag not in labels]:
                raise DataError(f"{path}:{number}: unknown label {unknown[0]!r}; labels.tsv has {labels}")
            tags, wrong = repair_iob2(tags)
            repaired += wrong
        rows.append((words, tags, language.strip()))
    if not rows:
        raise DataError(f"{path}: no sentence in this file; expected words<TAB>tags lines")
    if repaired:
        print(f"[data] warning: {path}: {repaired} tags broke IOB2 (I- without its B-) and are read as B-")
    return Sentences(*map(list, zip(*subset(rows, limit, seed), strict=True)))


def read_text(path: Path, limit: int | None = None, seed: int = 0) -> Sentences:
    """Read transfer text, of all files of the path, split at white space; the language is "" unless there are two
    columns. Raises DataError."""
    lines = (line.split("\t") for file in files_of(path) for _, line in read_lines(file))
    rows = [(words, more[0] if len(more) == 1 else "") for text, *more in lines if (words := text.split())]
    if not rows:
        raise DataError(f"{path}: no sentence in this file; expected one sentence a line")
    words, languages = zip(*subset(rows, limit, seed), strict=True)
    return Sentences(list(words), languages=languages)


def write_tagged(path: Path, sentences: Sentences, tags: list[list[str]]) -> None:
    """Write words, the given tags and the language, a line each (format of the labelled files)."""
    rows = zip(sentences.words, tags, sentences.languages, strict=True)
    save_text(path, "".join(f"{' '.join(w)}\t{' '.join(t)}\t{language}\n" for w, t, language in rows))


def word_pieces(tokenizer, sentences: Sequence[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat sub-word ids, the offsets [U + 1] of U words in them, and which of these each word of the sentences is; a
    word without any sub-word gets the unknown id. Distinct words are tokenised once for all files and remembered where
    that is exact, which is checked on a tokenizer's first sentences; elsewhere (pieces that depend on neighbours)
    whole sentences are tokenised."""
    unknown = tokenizer.unk_token_id or 0

    def whole(batch):
        if not tokenizer.is_fast:  # CTRL, XLM: word by word
            found = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in chain.from_iterable(batch)]
            ids, sizes = list(chain.from_iterable(found)), np.array(list(map(len, found)), np.int64)
        else:
            encoded = tokenizer(batch, is_split_into_words=True, add_special_tokens=False, verbose=False,
                                return_attention_mask=False, return_token_type_ids=False)
            starts = accumulate(map(len, batch[:-1]), initial=0)
            owner = [np.asarray(encoded.word_ids(i), np.int64) + start for i, start in enumerate(starts)]
            ids = list(chain.from_iterable(encoded["input_ids"]))
            sizes = np.bincount(np.concatenate(owner), minlength=sum(map(len, batch)))
        bare = np.flatnonzero(sizes == 0)
        ids = np.insert(np.asarray(ids, np.int32), np.cumsum(sizes)[bare], unknown)
        sizes[bare] = 1
        return ids, offsets_of(sizes), np.arange(len(sizes))

    def remembered(batch):
        index, ids, offsets = REMEMBERED.pop(tokenizer, EMPTY)
        if len(index) > CACHED_WORDS or not index:
            index, ids, offsets = defaultdict(), *EMPTY[1:]
            index.default_factory = index.__len__  # a new word's place is the next one
        words = np.fromiter(map(index.__getitem__, chain.from_iterable(batch)), np.int64)
        if new := list(islice(index, len(offsets) - 1, None)):  # one call a word would cost more than its pieces
            more, ends, _ = whole([new[i : i + 64] for i in range(0, len(new), 64)])
            ids, offsets = np.concatenate([ids, more]), np.concatenate([offsets, len(ids) + ends[1:]])
        REMEMBERED[tokenizer] = index, ids, offsets
        return ids, offsets, words

    if tokenizer not in EXACT:
        sample = [sentence for sentence in sentences[:2000] if sentence][:200]
        ways = [(ids[ragged(offsets[words], np.diff(offsets)[words])].tolist(), np.diff(offsets)[words].tolist())
                for ids, offsets, words in (whole(sample), remembered(sample))]
        EXACT[tokenizer] = ways[0] == ways[1]
    return (remembered if EXACT[tokenizer] else whole)(sentences)


def offsets_of(sizes) -> np.ndarray:
    """Where each of N rows of these sizes starts, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)])


def ragged(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The places start, start + 1, ... start + size - 1 of each of N rows, one after another."""
    return np.arange(sizes.sum()) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)


@functools.lru_cache(maxsize=4)
def special_tokens(tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after a single text."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:start], full[start + len(bare) :]


def windows(sizes: list[int], capacity: int) -> list[tuple[int, int, int, int]]:
    """Overlapping windows of whole words: (start, end, first owned, end of owned), counted in words. Neighbours share
    up to a quarter of the capacity. Each word is owned by exactly one window, the one that shows more of its context.
    `sizes` are pieces per word, `capacity` pieces per window."""
    total = list(accumulate((min(size, capacity) for size in sizes), initial=0))  # a longer word: its first pieces
    n, spans, start = len(sizes), [], 0
    while start < n:
        end = bisect_right(total, total[start] + capacity) - 1
        spans.append((start, end))
        if end == n:
            break
        start = max(start + 1, bisect_left(total, max(total[end] - capacity // 4, total[end + 1] - capacity)))
    cuts = [0, *((following + end + 1) // 2 for (_, end), (following, _) in pairwise(spans)), n]
    return [(*span, cuts[i], cuts[i + 1]) for i, span in enumerate(spans)]


@dataclass(frozen=True)
class Examples:
    """N windows of token ids, flat and ragged: window i is `input_ids[offsets[i]:offsets[i + 1]]`, of sentence
    `sentences[i]`. On the first sub-word of each owned word, `labels` holds the label's id and `words` the index of
    the word in its sentence; elsewhere IGNORED and -1, but -2 on the sub-words that continue an owned word. Token
    types, where a tokenizer gives any, tell texts apart. `teacher`: the same windows, by its own tokenizer."""

    input_ids: np.ndarray
    labels: np.ndarray
    words: np.ndarray
    offsets: np.ndarray
    sentences: np.ndarray
    token_type_ids: np.ndarray | None = None
    teacher: "Examples | None" = None

    def __len__(self) -> int:
        return len(self.sentences)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Sub-words per window, special tokens included."""
        return np.diff(self.offsets)

    @property
    def digest(self) -> str:
        """sha256 of ids and offsets."""
        return hashlib.sha256(self.input_ids.tobytes() + self.offsets.tobytes()).hexdigest()


def encode(sentences: Sentences, tokenizer, seq_len: int, labels: list[str] = (), n_jobs: int = 0,
           beside=None) -> Examples:
    """Token ids of sentences; longer ones become overlapping windows of at most `seq_len` sub-words, of the tokenizer
    `beside` as well. Very many are shared out over `n_jobs` processes; default: one for every PER_PROCESS sentences,
    as far as there are cores."""
    n_jobs = n_jobs or min(os.cpu_count(), max(1, len(sentences) // PER_PROCESS))
    n_parts = max(n_jobs, -(-len(sentences) // PER_PART))
    cuts = [len(sentences) * i // n_parts for i in range(n_parts + 1)]
    rows = (Sentences(sentences.words[a:b], sentences.tags and sentences.tags[a:b]) for a, b in pairwise(cuts))
    parts = Parallel(n_jobs)(delayed(_encode)(some, tokenizer, seq_len, labels, beside) for some in rows)
    starts = offsets_of([len(part.input_ids) for part in parts])
    fields = [np.concatenate([getattr(part, name) for part in parts]) for name in ("input_ids", "labels", "words")]
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)]
    owners = [part.sentences + np.int32(start) for part, start in zip(parts, cuts, strict=False)]
    return Examples(*fields, np.concatenate([*offsets, starts[-1:]]), np.concatenate(owners))


def _encode(sentences: Sentences, tokenizer, seq_len: int, labels: list[str], beside) -> Examples:
    (before, after), tagged = special_tokens(tokenizer), labels and sentences.tags
    cuts = [word_pieces(x, sentences.words) for x in (tokenizer, beside) if x]
    capacity = seq_len - max(sum(map(len, special_tokens(x))) for x in (tokenizer, beside) if x)
    (ids, starts, known), largest = cuts[0], np.max([np.diff(offsets)[word] for _, offsets, word in cuts], axis=0)
    sizes, ends = np.diff(starts)[known], offsets_of(list(map(len, sentences.words)))  # of words, of sentences
    totals = np.diff(offsets_of(largest)[ends])
    fits = (0 < totals) & (totals <= capacity)
    zero, length = np.zeros_like(totals), np.diff(ends)  # spans: (sentence, start, end, first, last) of each window
    spans = np.stack([np.arange(len(totals)), zero, length, zero, length], 1)[fits]
    cut = [(i, *span) for i in np.flatnonzero(~fits)
           for span in windows(largest[ends[i] : ends[i + 1]].tolist(), capacity)]
    spans = np.concatenate([spans, np.asarray(cut, np.int64).reshape(-1, 5)])
    owner, start, end, first, last = spans[np.argsort(spans[:, 0], kind="stable")].T

    shown = ragged(ends[owner] + start, end - start)  # the words of each window
    window = np.repeat(np.arange(len(owner)), end - start)
    word, counts = shown - ends[owner][window], np.minimum(sizes[shown], capacity)
    offsets = offsets_of(np.bincount(window, counts, len(owner)).astype(np.int64) + len(before) + len(after))
    place = np.cumsum(counts) - counts + window * (len(before) + len(after)) + len(before)  # of its first sub-word
    found = np.empty(offsets[-1], np.int32)
    found[ragged(place, counts)] = ids[ragged(starts[known[shown]], counts)]
    found[offsets[:-1, None] + np.arange(len(before))] = before
    found[offsets[1:, None] - len(after) + np.arange(len(after))] = after
    owned = (first[window] <= word) & (word < last[window])
    words, tags = np.full(len(found), -1, np.int32), np.full(len(found), IGNORED, np.int16)
    words[ragged(place[owned], counts[owned])] = -2
    words[place[owned]] = word[owned]
    if tagged:
        label_id = {label: i for i, label in enumerate(labels)}
        label_ids = np.fromiter(map(label_id.__getitem__, chain.from_iterable(sentences.tags)), np.int16, len(known))
        tags[place[owned]] = label_ids[shown[owned]]
    return Examples(found, tags, words, offsets, owner.astype(np.int32))


def collate(examples: Examples, indices, pad_id: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """One batch: input_ids, attention_mask, labels, words and, if there are any, token_type_ids, each [B, S], S =
    `width` or the longest; beside a teacher's own windows also compared [B, S], see `wordwise`; windows [B]."""
    indices = np.asarray(indices)
    starts, ends = examples.offsets[indices], examples.offsets[indices + 1]
    column = np.arange(width or (ends - starts).max())
    real = column < (ends - starts)[:, None]
    places = (starts[:, None] + column)[real]
    batch = {"attention_mask": torch.from_numpy(real.astype(np.int64)), "windows": torch.from_numpy(indices)}
    paddings = {"input_ids": pad_id, "labels": IGNORED, "words": -1, "token_type_ids": 0}
    for name, padding in list(paddings.items())[: 3 if examples.token_type_ids is None else 4]:
        field = np.full(real.shape, padding, np.int64)
        field[real] = getattr(examples, name)[places]
        batch[name] = torch.from_numpy(field)
    return batch | ({"compared": (batch["words"] >= 0).long()} if examples.teacher else {})


def split_transfer(n: int, chunk_size: int, holdout_ratio: float, seed: int):
    """The held-out windows of a transfer set, at most 2,000, and its chunks, as index arrays. DataError for n < 2."""
    if n < 2:
        raise DataError("transfer_file: one sentence cannot be held out and trained on; give two or more")
    order, n_held_out = np.random.default_rng(seed).permutation(n), min(2000, max(1, round(n * holdout_ratio)))
    held_out, rest = np.split(order, [n_held_out])
    return held_out, [rest[i : i + chunk_size] for i in range(0, len(rest), chunk_size)]
