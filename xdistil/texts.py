"""Whole texts and pairs of texts, one label each. A labelled line is `text<TAB>label[<TAB>language]` or, for pairs,
`text<TAB>text<TAB>label[<TAB>language]`; a transfer line is a text or a pair `[<TAB>language]`. In
`data.Sentences` a text is one word, a pair one word with the tab inside: what works on words and tags works here."""

from dataclasses import replace

import numpy as np

from xdistil import data
from xdistil.data import Examples, Sentences, subset
from xdistil.losses import IGNORED
from xdistil.sources import DataError, files_of, read_lines

FORM = {"text": "text", "pair": "text<TAB>text"}  # what a line of each unit begins with


def split_line(line: str, unit: str, place: str) -> tuple[str, list[str]]:
    """The text or pair that a line begins with, and further columns. Raises DataError, naming the place, without."""
    columns, n = [column.strip() for column in line.split("\t")], 1 + FORM[unit].count("<TAB>")
    if len(columns) < n or not all(columns[:n]):
        raise DataError(f"{place}: found {line[:80]!r}; expected {FORM[unit]} at the start of the line")
    return "\t".join(columns[:n]), columns[n:]


def units_of(line: str, unit: str, place: str) -> list[str]:
    """What a line of unlabelled input holds to label: its words, or its one text or pair; nothing if it is blank."""
    if unit == "word":
        return line.split("\t")[0].split()
    return [split_line(line, unit, place)[0]] if line.strip() else []


def read_texts(path, unit: str, classes=(), limit: int | None = None, seed: int = 0) -> Sentences:
    """Read a labelled file or, without `classes`, transfer text; blank lines are skipped. A label is a class's name
    or, where no name is a number, its line in labels.tsv from 0. Raises DataError naming file and line for an empty
    text, an unknown label and wrong columns; naming the file if it holds no text, or only one class."""
    rows, numbered = [], not any(name.isdecimal() for name in classes)
    lines = ((f"{file}:{number}", line) for file in files_of(path) for number, line in read_lines(file))
    for place, line in ((place, line) for place, line in lines if line.strip()):
        text, columns = split_line(line, unit, place)
        label, language = [*columns, "", ""][:2]
        if numbered and label.isdecimal() and int(label) < len(classes):
            label = classes[int(label)]
        if classes and (label not in classes or len(columns) > 2):
            raise DataError(f"{place}: found {columns} after {FORM[unit]}; expected label[<TAB>language], the "
                            f"label one of {list(classes)}{' or its line in labels.tsv, from 0' * numbered}")
        rows.append(([text], [label], language))
    if not rows:
        raise DataError(f"{path}: no text in this file; expected {FORM[unit]} at the start of each line")
    words, tags, languages = map(list, zip(*subset(rows, limit, seed), strict=True))
    if classes and len({label for (label,) in tags}) < 2:
        raise DataError(f"{path}: all {len(tags)} {unit}s that are read have the label {tags[0][0]!r}; a classifier "
                        "needs two classes or more")
    return Sentences(words, tags, languages) if classes else Sentences(words, None, [one for (one,) in tags])


def encode(sentences: Sentences, unit: str, tokenizer, seq_len: int, labels=(), teachers=None) -> tuple[Examples, int]:
    """Windows, and how many texts or pairs were cut. Words: `data.encode`, with the windows of the teacher's own
    tokenizer. Else a window for each text or pair, with special tokens and token types as the tokenizer gives them,
    cut to `seq_len` sub-words, of a pair the longer text first; its label, and word 0, stand on its first token."""
    if unit == "word":
        if teachers in (None, tokenizer):
            return data.encode(sentences, tokenizer, seq_len, labels), 0
        theirs = data.encode(sentences, teachers, seq_len, labels, beside=tokenizer)
        return replace(data.encode(sentences, tokenizer, seq_len, labels, beside=teachers), teacher=theirs), 0
    owners, sizes, fields, n_cut = [i for i, words in enumerate(sentences.words) if words], [], {}, 0
    for start in range(0, len(owners), 2000):
        texts = zip(*(sentences.words[i][0].split("\t") for i in owners[start : start + 2000]), strict=True)
        encoded = tokenizer(*map(list, texts), truncation=True, max_length=seq_len, verbose=False)
        n_cut += sum(bool(one.overflowing) for one in encoded.encodings)
        sizes += map(len, encoded["input_ids"])
        for name in encoded.keys() & {"input_ids", "token_type_ids"}:
            fields.setdefault(name, []).append(np.concatenate(encoded[name]).astype(np.int32))
    fields, offsets = {name: np.concatenate(parts) for name, parts in fields.items()}, np.cumsum([0, *sizes])
    tags, words = (np.full(offsets[-1], value, dtype) for value, dtype in ((IGNORED, np.int16), (-1, np.int32)))
    words[offsets[:-1]] = 0
    if labels and sentences.tags:
        tags[offsets[:-1]] = [labels.index(sentences.tags[i][0]) for i in owners]
    ids = fields.pop("input_ids", np.zeros(0, np.int32))
    return Examples(ids, tags, words, offsets, np.asarray(owners, np.int32), **fields), n_cut
