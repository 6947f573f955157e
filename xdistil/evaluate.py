"""How good: one prediction per word, strict entity F1 per sentence, per language and per type; or one per text."""

import itertools
import statistics
import timeit

import numpy as np
import torch

from xdistil import data, grouping, models, processes
from xdistil.devices import asking

# keys of scores, and what they are called
MEANS = {"macro": "macro F1", "micro": "micro F1", "accuracy": "accuracy", "matthews": "Matthews"}


def _best(model, batch: dict, accelerator, entropy: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The probability of the most probable label, or the entropy (nats) of all; and that label."""
    inputs = models.model_inputs(model, batch, accelerator.device)
    with asking(accelerator.device), accelerator.autocast():
        shares = models.run_model(model, inputs)[0].float().softmax(-1)
        best = shares.max(-1)
    return (torch.special.entr(shares).sum(-1) if entropy else best.values).cpu(), best.indices.cpu()


def _batches(lengths: np.ndarray, batch_size: int, accelerator) -> list[tuple[np.ndarray, int]]:
    """As `grouping.batches`. Where kernels are prepared for each shape, it is one of few, whatever text will come."""
    if grouping.shapes_for(accelerator) != "exact":
        widths, n_rows = grouping.BUCKETS, np.maximum(1, 32 * batch_size // grouping.BUCKETS)
        *full, (rows, width) = grouping.batches(lengths, (widths, n_rows))
        # the last one is filled up with windows that it has already: else each text would bring another shape
        return [*full, (np.resize(rows, n_rows[widths == width][0]) if full else rows, width)]
    return grouping.batches(lengths, grouping.grid(lengths, batch_size))


def predict(model, examples: data.Examples, words: list[list[str]], labels: list[str], pad_id: int, accelerator,
            batch_size: int = 64, entropy: bool = False) -> tuple[list[list[str]], list[list[float]]]:
    """The most probable label of every word and its probability (0..1), or the entropy (nats) of all labels, in input
    order: at the word's first sub-word, in the one window that owns it. Of a text or pair, see `texts`, one label."""
    tags, scores = ([[empty] * len(sentence) for sentence in words] for empty in ("O", 1.0))
    model.eval()
    grouped, found = _batches(examples.lengths, batch_size, accelerator) if len(examples) else [], [np.zeros((0, 4))]
    for rows, width in grouped[processes.rank() :: processes.size()]:
        batch = data.collate(examples, rows, pad_id, width)
        score, best = _best(model, batch, accelerator, entropy)
        word_of = batch["words"][:, : best.shape[1]]
        first = word_of >= 0
        sentences = examples.sentences[rows][first.nonzero()[:, 0].numpy()]
        found.append(np.stack([sentences, *(x[first].numpy() for x in (word_of, best, score))], 1))
    for part in processes.gather(np.concatenate(found)):
        for sentence, word, label, sure in part.tolist():
            tags[int(sentence)][int(word)], scores[int(sentence)][int(word)] = labels[int(label)], sure
    return tags, scores


def entity_f1(gold: list[list[str]], predicted: list[list[str]]) -> dict:
    """Strict IOB2 precision, recall, F1 (0..1) over entities, F1 `by_type` (seqeval); None if neither side has any."""
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    types = sorted({tag[2:] for tags in (*gold, *predicted) for tag in tags if tag[0] == "B"})
    if not types:
        return {"precision": None, "recall": None, "f1": None, "by_type": {}}
    (precision, recall, f1, _), each = (precision_recall_fscore_support(
        gold, predicted, average=average, scheme=IOB2, zero_division=0) for average in ("micro", None))
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1),
            "by_type": dict(zip(types, map(float, each[2]), strict=True))}


def score(gold: data.Sentences, predicted: list[list[str]]) -> dict:
    """Micro F1, F1 per type and per language, and `macro`, the mean over languages (0..1), which the papers report."""
    whole, by_language = entity_f1(gold.tags, predicted), {}
    for language in sorted(set(gold.languages)):
        rows = [i for i, other in enumerate(gold.languages) if other == language]
        by_language[language or "all"] = entity_f1([gold.tags[i] for i in rows], [predicted[i] for i in rows])["f1"]
    values = [f1 for f1 in by_language.values() if f1 is not None]
    return {"macro": statistics.fmean(values) if values else 0.0, "micro": whole.pop("f1"), **whole,
            "by_language": by_language, "sentences": len(gold)}


def score_classes(gold: data.Sentences, predicted: list[list[str]]) -> dict:
    """Of texts or pairs: `macro`, the mean F1 over the classes that occur, and accuracy (0..1), Matthews correlation
    (-1..1), F1 by class, macro F1 by language."""
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    wanted, found = (np.array([label for (label,) in tags]) for tags in (gold.tags, predicted))
    classes, languages = np.union1d(wanted, found), np.array(gold.languages)
    by_class = f1_score(wanted, found, labels=classes, average=None, zero_division=0).tolist()
    by_language = {language or "all": f1_score(wanted[languages == language], found[languages == language],
                                               average="macro", zero_division=0)
                   for language in sorted(set(gold.languages))}
    return {"macro": statistics.fmean(by_class), "accuracy": accuracy_score(wanted, found),
            "matthews": float(matthews_corrcoef(wanted, found)), "by_language": by_language,
            "by_class": dict(zip(classes.tolist(), by_class, strict=True)), "sentences": len(gold)}


def agreement(tags: list[list[list[str]]]) -> tuple[float, float]:
    """Of several predictions for the same sentences, shares of words (0..1): on which not all are one, and on which
    two are one, in the mean over pairs of predictions."""
    words = np.array([list(itertools.chain.from_iterable(one)) for one in tags])
    pairs = [(a == b).mean() for a, b in itertools.combinations(words, 2)]
    return float((words != words[0]).any(0).mean()), float(np.mean(pairs))


def _counted(gold: data.Sentences, tags: list[list[str]], by_word: bool) -> list[set]:
    """What F1 counts in each sentence, headed by whose F1 it is: entities by language, or texts by class."""
    if not by_word:
        return [{(label,)} for (label,) in tags]
    from seqeval.scheme import IOB2, Entities

    return [{(language, x.tag, x.start, x.end) for x in found}
            for language, found in zip(gold.languages, Entities(tags, IOB2).entities, strict=True)]


def paired_bootstrap(gold: data.Sentences, a: list, b: list, n: int = 1000, seed: int = 42, by_word=True) -> dict:
    """`difference` of macro F1, of `b` less that of `a`, and its 95 % interval `low` to `high` (-1..1): percentiles of
    n samples of the sentences, the same ones for both (Koehn 2004, W04-3250). `a`, `b`: predicted tags of one or more
    runs, pairs in order; differences are means over runs, which are sampled as well."""
    goal, *runs = (_counted(gold, tags, by_word) for tags in (gold.tags, *a, *b))
    heads = {x[0] for side in (goal, *runs) for found in side for x in found}
    place = {head: i for i, head in enumerate(sorted(heads))}
    counts = np.zeros((len(gold), 2, len(runs), len(place)), np.float32)  # both sides': that agree; all
    for r, run in enumerate(runs):
        for i, (wanted, found) in enumerate(zip(goal, run, strict=True)):
            for x in (*wanted, *found):
                counts[i, :, r, place[x[0]]] += (x in wanted and x in found, 1)

    def gain(times) -> np.ndarray:  # of each pair of runs, with each sentence so many times
        same, both = np.tensordot(times.astype(np.float32), counts, 1).astype(float)
        macro = (same / np.maximum(both, 1)).sum(-1) / np.maximum((both > 0).sum(-1), 1)
        return macro[len(a) :] - macro[: len(a)]

    draw, gains = np.random.default_rng(seed), []
    for _ in range(n):
        times = np.bincount(draw.integers(len(gold), size=len(gold)), minlength=len(gold))
        gains.append(gain(times)[draw.integers(len(a), size=len(a))].mean())
    low, high = np.quantile(gains, (0.025, 0.975))
    return {"difference": float(gain(np.ones(len(gold))).mean()), "low": float(low), "high": float(high)}


def retention(student: dict, teacher: dict) -> dict:
    """Student scores as a share of the teacher's: those of MEANS that there are, F1 per language; None where the
    teacher has 0."""
    def share(s, t):
        return s / t if s is not None and t else None

    languages = {name: share(student["by_language"][name], f1) for name, f1 in teacher["by_language"].items()}
    means = {mean: share(student[mean], teacher[mean]) for mean in MEANS if mean in teacher}
    return {"by_language": languages, **means}


def measure_speed(model, examples: data.Examples, pad_id: int, accelerator, n: int = 100) -> dict:
    """Median milliseconds per window at batch 1, and windows per second at batch 32; the model alone."""
    def seconds(rows, width: int) -> float:
        batch = data.collate(examples, some[rows], pad_id, width)
        return timeit.timeit(lambda: _best(model, batch, accelerator), number=1)

    model.eval()
    some = np.linspace(0, len(examples) - 1, min(n, len(examples))).astype(int)
    lengths = examples.lengths[some]
    singles = [(rows + i, width) for i in range(len(some))
               for rows, width in _batches(lengths[i : i + 1], 1, accelerator)]
    groups = _batches(lengths, 32, accelerator)
    for batch in (singles[0], groups[0]):
        seconds(*batch)  # the first calls also allocate
    return {"ms_per_sentence": 1000 * statistics.median(itertools.starmap(seconds, singles)),
            "sentences_per_second": len(some) / min(sum(itertools.starmap(seconds, groups)) for _ in range(2))}
