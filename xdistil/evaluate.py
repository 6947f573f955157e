"""How good: one prediction per word, strict entity F1 per sentence, per language and per type."""

from __future__ import annotations

import statistics
import time
import warnings

import numpy as np
import torch

from xdistil.data import Examples, Sentences, batches, collate
from xdistil.models import run_model


def predict_tags(model, examples: Examples, words: list[list[str]], labels: list[str], *,
                 accelerator, pad_id: int, batch_size: int = 64) -> list[list[str]]:
    """The most probable label of every word, in input order.

    A word's label is read at its first sub-word in the one window that owns it, so no word is lost
    to truncation, whatever its length or the sentence's.
    """
    tags = [["O"] * len(sentence) for sentence in words]
    model.eval()
    for rows in batches(examples.lengths, batch_size) if len(examples) else ():
        batch = collate(examples, rows, pad_id)
        on_device = {k: batch[k].to(accelerator.device) for k in ("input_ids", "attention_mask")}
        with torch.inference_mode(), accelerator.autocast():
            best = run_model(model, on_device)[0].argmax(-1).cpu()
        row, column = torch.nonzero(batch["words"] >= 0, as_tuple=True)
        owners = examples.sentences[rows][row.numpy()]
        found = best[row, column].tolist()
        for i, word, label in zip(owners, batch["words"][row, column].tolist(), found, strict=True):
            tags[i][word] = labels[label]
    return tags


def entity_f1(gold: list[list[str]], predicted: list[list[str]]) -> dict:
    """Strict IOB2 precision, recall and F1 (0..1) over entities, and F1 `by_type` (seqeval).

    Values are None when neither side holds an entity.
    """
    from seqeval.metrics.v1 import precision_recall_fscore_support
    from seqeval.scheme import IOB2

    if all(tag == "O" for side in (gold, predicted) for tags in side for tag in tags):
        return {"precision": None, "recall": None, "f1": None, "by_type": {}, "entities": 0}
    types = sorted({tag[2:] for tags in (*gold, *predicted) for tag in tags if tag != "O"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # types that one side never shows score 0, as they should
        p, r, f, _ = precision_recall_fscore_support(
            gold, predicted, average="micro", scheme=IOB2, zero_division=0
        )
        each = precision_recall_fscore_support(
            gold, predicted, average=None, scheme=IOB2, zero_division=0
        )
    return {"precision": float(p), "recall": float(r), "f1": float(f),
            "by_type": dict(zip(types, map(float, each[2]), strict=True)),
            "entities": int(sum(each[3]))}


def score(gold: Sentences, predicted: list[list[str]]) -> dict:
    """Micro F1, F1 per entity type, per language, and the mean over languages (0..1).

    `macro` is the mean of per-language F1, as in the papers; with one language it equals `micro`.
    """
    whole, by_language = entity_f1(gold.tags, predicted), {}
    for language in sorted(set(gold.languages)):
        rows = [i for i, other in enumerate(gold.languages) if other == language]
        part = entity_f1([gold.tags[i] for i in rows], [predicted[i] for i in rows])
        by_language[language or "all"] = part["f1"]
    values = [f1 for f1 in by_language.values() if f1 is not None]
    return {"micro": whole["f1"], "macro": statistics.fmean(values) if values else 0.0,
            "precision": whole["precision"], "recall": whole["recall"],
            "by_type": whole["by_type"], "by_language": by_language, "sentences": len(gold)}


def retention(student: dict, teacher: dict) -> dict:
    """Student F1 as a share of the teacher's: macro, micro and per language (None where 0)."""
    def share(s, t):
        return s / t if s is not None and t else None

    by_language = {
        language: share(student["by_language"].get(language), f1)
        for language, f1 in teacher["by_language"].items()
    }
    return {"macro": share(student["macro"], teacher["macro"]),
            "micro": share(student["micro"], teacher["micro"]), "by_language": by_language}


def measure_speed(model, examples: Examples, *, accelerator, pad_id: int, n: int = 100) -> dict:
    """Median milliseconds per window at batch 1 and windows per second at batch 32, model only."""
    model.eval()

    def run(rows) -> float:
        batch = collate(examples, rows, pad_id, multiple=1)
        start = time.perf_counter()
        inputs = {k: batch[k].to(accelerator.device) for k in ("input_ids", "attention_mask")}
        with torch.inference_mode(), accelerator.autocast():
            run_model(model, inputs)[0].argmax(-1).cpu()
        return time.perf_counter() - start

    some = np.linspace(0, len(examples) - 1, min(n, len(examples))).astype(int)
    groups = [rows for rows in batches(examples.lengths[some], 32)]
    run(some[:1]), run(some[groups[0]])  # warm up
    single = [run(np.array([i])) for i in some]
    grouped = min(sum(run(some[rows]) for rows in groups) for _ in range(2))
    return {"ms_per_sentence": 1000 * statistics.median(single),
            "sentences_per_second": len(some) / grouped}
