"""Error analysis: where predictions leave gold, and where a student lost what its teacher had. Spans: of each of N
sentences a dict of entities, (first word, the one after the last): type; a text or pair is one, of its label."""

from collections import Counter
from itertools import chain

import numpy as np

ELSEWHERE, NOTHING = "other bounds", "nothing"
FREQUENCIES = {"never": 0, "1": 1, "2–4": 4, "5–16": 16, "17 or more": np.inf}  # how often in training, at the most


def spans(tags: list[list[str]], by_word: bool = True) -> list[dict[tuple[int, int], str]]:
    """The spans of tagged sentences, as strict F1 counts them (IOB2); of labelled texts."""
    if not by_word:
        return [{(0, 1): label} for (label,) in tags]
    from seqeval.scheme import IOB2, Entities

    return [{(x.start, x.end): x.tag for x in found} for found in Entities(tags, IOB2).entities]


def _beside(at: tuple[int, int], spans: dict) -> list[tuple[int, int]]:
    """The spans that overlap a place."""
    return [(start, end) for start, end in spans if start < at[1] and at[0] < end]


def confusion(gold: list[dict], sides: dict[str, list[dict]]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Names of the types, and of each side the counts [T, T], rows gold, columns predicted. With entities two more:
    "other bounds", where the other side has an entity that only overlaps, and "nothing": a column of missed entities,
    a row of invented ones. So rows sum to gold's entities, columns to the predicted ones."""
    pairs = {name: Counter(
        tuple(x.get(at) or (ELSEWHERE if _beside(at, x) else NOTHING) for x in both)
        for both in zip(gold, found, strict=True) for at in both[0].keys() | both[1].keys())
        for name, found in sides.items()}
    types = {x for count in pairs.values() for pair in count for x in pair}
    names = [*sorted(types - {ELSEWHERE, NOTHING}), *[ELSEWHERE, NOTHING] * bool(types & {ELSEWHERE, NOTHING})]
    return names, {name: np.array([[count[row, col] for col in names] for row in names])
                   for name, count in pairs.items()}


def wrong_words(words: list[list[str]], gold: list[list[str]], sides: dict[str, list], n: int) -> list[dict]:
    """The n words that the last of the sides tags wrongly most often: how often they are there, how often each side is
    wrong, and the most frequent mistake."""
    there = Counter(chain(*words))
    wrong = {name: [(word, f"{right} → {said}") for word, right, said in zip(
        chain(*words), chain(*gold), chain(*tags), strict=True) if right != said] for name, tags in sides.items()}
    each = {name: Counter(word for word, _ in found) for name, found in wrong.items()}
    name = list(sides)[-1]
    usual = dict(pair for pair, _ in reversed(Counter(wrong[name]).most_common()))
    return [{"word": word, "times": there[word], **{f"{x} wrong": each[x][word] for x in sides},
             f"{name}'s most frequent mistake": usual[word]} for word, _ in each[name].most_common(n)]


def lost(words: list[list[str]], gold: list[dict], teacher: list[dict], student: list[dict], n: int) -> list[dict]:
    """The n sentences with the most spans that the teacher has as gold has them, and the student has not."""
    def text(i, places, spans):
        return "; ".join(f"{' '.join(words[i][slice(*at)])} ({spans[at]})" for at in places)

    rows = []
    for i, (wanted, whole, said) in enumerate(zip(gold, teacher, student, strict=True)):
        places = sorted(at for at in wanted if whole.get(at) == wanted[at] != said.get(at))
        instead = sorted({x for at in places for x in _beside(at, said)})
        rows += [{"lost": len(places), "teacher and gold": text(i, places, wanted),
                  "student": text(i, instead, said) or NOTHING, "sentence": " ".join(words[i])}] if places else []
    return sorted(rows, key=lambda row: -row["lost"])[:n]


def _scores(gold: list[dict], sides: dict[str, list[dict]], bins: list[str], place, n_draws: int = 300) -> list[dict]:
    """F1 (of texts accuracy) of each side in bins: `place(i, at)` is the bin of a span of sentence i. Rows of "bin",
    "who", "n" of gold and "score", with its 95 % interval "low" to "high" by a bootstrap of the sentences."""
    rows, draw = [], np.random.default_rng(0)
    times = draw.multinomial(len(gold), np.full(len(gold), 1 / len(gold)), n_draws).astype(np.float32)
    for who, found in sides.items():
        counts = np.zeros((len(gold), 3, len(bins)), np.float32)  # of both sides: that agree; all; of gold
        for i, (wanted, said) in enumerate(zip(gold, found, strict=True)):
            for is_gold, side in ((1, wanted), (0, said)):
                for at in side:
                    counts[i, :, place(i, at)] += (wanted.get(at) == said.get(at), 1, is_gold)
        whole, drawn = counts.sum(0), np.tensordot(times, counts[:, :2], 1)
        low, high = np.quantile(drawn[:, 0] / np.maximum(drawn[:, 1], 1), (0.025, 0.975), axis=0)
        each = zip(bins, *whole, low, high, strict=True)
        rows += [{"bin": name, "who": who, "n": int(n), "score": float(same) / float(of), "low": float(least),
                  "high": float(most)} for name, same, of, n, least, most in each if of]
    return rows


def by_length(words: list[list[str]], gold: list[dict], sides: dict[str, list[dict]]) -> list[dict]:
    """Rows of `_scores` by words of the sentence or text, in at most five bins of about as many sentences."""
    lengths = np.array([len(" ".join(sentence).split()) for sentence in words])
    ends = np.unique(np.quantile(lengths, (0.2, 0.4, 0.6, 0.8, 1.0), method="lower"))
    starts = [lengths.min(), *ends[:-1] + 1]
    names = [str(end) if start == end else f"{start}–{end}" for start, end in zip(starts, ends, strict=True)]
    of = np.searchsorted(ends, lengths)
    return _scores(gold, sides, names, lambda i, _: of[i])


def by_frequency(words: list[list[str]], gold: list[dict], sides: dict[str, list[dict]],
                 train_words: list[list[str]], train: list[dict]) -> list[dict]:
    """Rows of `_scores` by how often the very words of an entity are an entity of the training set."""
    seen = Counter(" ".join(sentence[slice(*at)]) for sentence, found in zip(train_words, train, strict=True)
                   for at in found)
    most = np.array(list(FREQUENCIES.values()))
    return _scores(gold, sides, list(FREQUENCIES),
                   lambda i, at: np.searchsorted(most, seen[" ".join(words[i][slice(*at)])]))
