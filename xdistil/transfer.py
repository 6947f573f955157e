"""What the transfer set is made of: which sentences of the text at hand, and new ones from a task's own mentions."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from xdistil import data


def select(order: np.ndarray, languages: Sequence[str], limit: int, temperature: float) -> np.ndarray:
    """The rows of the first `limit` sentences in an order [N], ascending. With a temperature T other than 1 each
    language gives its first ones in proportion to n^(1/T), n its sentences; what a small one cannot give, the others
    do. DataError: a sentence then has no language."""
    if temperature == 1:
        return np.sort(order[:limit])
    if not all(languages):
        raise data.DataError(f"language_temperature: {temperature} needs the language of every sentence in the second "
                             "column of the transfer text, text<TAB>language; add it, or set language_temperature: 1")
    _, group, sizes = np.unique(languages, return_inverse=True, return_counts=True)
    shares, kept = sizes ** (1 / temperature), []
    ranked = np.argsort(sizes / shares, kind="stable")  # who runs out comes first
    for i, language in enumerate(ranked):
        count = round((limit - len(kept)) * shares[language] / shares[ranked[i:]].sum())
        kept += order[group[order] == language][:count].tolist()
    return np.sort(kept)


def replace_mentions(sentences: data.Sentences, n: int, known: Iterable[list[str]], seed: int) -> data.Sentences:
    """Up to `n` new sentences from tagged ones: each mention of an entity makes room for another of its type and
    language (mention replacement, Dai and Adel 2020). None is one of `known`, none comes twice."""
    from seqeval.metrics.sequence_labeling import get_entities

    rows, pools, spans = [], defaultdict(dict), list(map(get_entities, sentences.tags))
    for *row, found in zip(sentences.words, sentences.tags, sentences.languages, spans, strict=True):
        rows += [(*row, found)] * bool(found)
        for kind, first, last in found:
            pools[kind, row[2]][tuple(row[0][first : last + 1])] = None  # a set that keeps its order
    pools, rng = {key: list(pool) for key, pool in pools.items()}, np.random.default_rng(seed)
    seen, made = set(map(tuple, known)), []
    for i in rng.integers(len(rows), size=20 * n) if rows else ():
        words, tags, language, found = rows[i]
        for kind, first, last in reversed(found):
            k = rng.integers(len(pool := pools[kind, language]))
            new = pool[k - (pool[k] == tuple(words[first : last + 1]))]
            words, tags = [*words[:first], *new, *words[last + 1 :]], [
                *tags[:first], f"B-{kind}", *[f"I-{kind}"] * (len(new) - 1), *tags[last + 1 :]]
        if len(made) < n and tuple(words) not in seen:
            seen.add(tuple(words))
            made.append((words, tags, language))
    return data.Sentences(*([list(column) for column in zip(*made, strict=True)] or ([], [], [])))
