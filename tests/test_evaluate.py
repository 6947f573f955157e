"""How good: strict entity F1 by hand, one prediction per word whatever the windows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import pieces
from torch import nn

from xdistil import evaluate
from xdistil.data import Sentences, encode
from xdistil.evaluate import entity_f1, measure_speed, predict, retention, score

NONE = {"precision": None, "recall": None, "f1": None, "by_type": {}}


@pytest.mark.parametrize("gold, predicted, precision, recall, f1, by_type", [
    ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", 1, 1, 1, {"LOC": 1, "PER": 1}),
    ("B-PER I-PER O B-LOC", "B-PER O O B-LOC", 1 / 2, 1 / 2, 1 / 2, {"LOC": 1, "PER": 0}),  # a border is wrong
    ("B-PER I-PER O B-LOC", "B-LOC I-LOC O B-LOC", 1 / 2, 1 / 2, 1 / 2, {"LOC": 2 / 3, "PER": 0}),  # a type is
    ("B-PER B-PER", "B-PER I-PER", 0, 0, 0, {"PER": 0}),  # two adjacent entities are not one
    ("B-PER B-PER", "B-PER B-PER", 1, 1, 1, {"PER": 1}),
    ("B-PER O B-PER", "B-PER O O", 1, 1 / 2, 2 / 3, {"PER": 2 / 3}),
    ("O B-PER", "O I-PER", 0, 0, 0, {"PER": 0}),  # an entity starts with B-
    ("O B-PER", "O O", 0, 0, 0, {"PER": 0}), ("O O", "B-PER O", 0, 0, 0, {"PER": 0})])
def test_entity_f1_by_hand(gold, predicted, precision, recall, f1, by_type):
    found = entity_f1([gold.split()], [predicted.split()])
    assert found.pop("by_type") == pytest.approx(by_type)
    assert found == pytest.approx({"precision": precision, "recall": recall, "f1": f1})


@pytest.mark.parametrize("gold, predicted", [([["O", "O"]], [["O", "O"]]), ([], []), ([[]], [[]])])
def test_without_entities_there_is_no_score(gold, predicted):
    assert entity_f1(gold, predicted) == NONE


@pytest.mark.parametrize("gold, predicted, f1", [
    ("B-PER O", "B-PER I-ORG", 1.0), ("B-PER O", "O I-ORG", 0.0)])
def test_a_stray_inside_tag_of_a_type_without_entities_is_no_entity(gold, predicted, f1):
    found = entity_f1([gold.split()], [predicted.split()])
    assert found["f1"] == f1 and found["by_type"]["PER"] == f1


def test_stray_inside_tags_alone_are_no_entities():
    assert entity_f1([["O", "O"]], [["O", "I-ORG"]])["f1"] in (None, 0.0)


def test_sentences_are_scored_apart():
    gold, predicted = [["O", "B-PER"], ["O", "O"]], [["O", "B-PER"], ["I-PER", "O"]]
    assert entity_f1(gold, predicted)["f1"] == 1.0  # joined, the entity would be a word too long
    assert entity_f1([gold[0] + gold[1]], [predicted[0] + predicted[1]])["f1"] == 0.0


def make(languages, *tags):
    return Sentences([["w"] * len(x.split()) for x in tags], [x.split() for x in tags], languages)


def test_scores_per_language_and_their_mean_by_hand():
    gold = make(["en", "vi", "en", "th"], "B-PER O", "B-LOC B-PER", "B-LOC I-LOC", "O")
    predicted = [["B-PER", "O"], ["B-LOC", "O"], ["B-LOC", "O"], ["O"]]
    found = score(gold, predicted)
    # en: 1 of 2 found, 2 predicted; vi: 1 of 2 found, 1 predicted; th: nothing to find
    assert found["by_language"] == pytest.approx({"en": 1 / 2, "vi": 2 / 3, "th": None})
    assert found["macro"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["precision"] == pytest.approx(2 / 3) and found["recall"] == pytest.approx(1 / 2)
    assert found["micro"] == pytest.approx(4 / 7) and found["sentences"] == 4
    assert found["by_type"] == pytest.approx({"LOC": 1 / 2, "PER": 2 / 3})


def test_one_language_or_none_makes_macro_equal_micro():
    found = score(make(["", ""], "B-PER O", "B-LOC"), [["B-PER", "O"], ["O"]])
    assert found["by_language"] == pytest.approx({"all": 2 / 3}) and found["macro"] == found["micro"]
    assert score(make([""], "O"), [["O"]])["macro"] == 0.0


def test_retention_is_the_students_share():
    student = {"macro": 0.4, "micro": 0.6, "by_language": {"en": 0.45, "th": None, "vi": 0.3, "de": 0.1}}
    teacher = {"macro": 0.8, "micro": 0.5, "by_language": {"en": 0.9, "th": 0.5, "vi": 0.0, "de": None}}
    found = retention(student, teacher)
    assert found.pop("by_language") == pytest.approx({"en": 0.5, "th": None, "vi": None, "de": None})
    assert found == pytest.approx({"macro": 0.5, "micro": 1.2})


class ById(nn.Module):
    """A stand-in for a model: the label of a position is its token id modulo the number of labels."""

    def __init__(self, n_labels):
        super().__init__()
        self.config, self.n_labels = SimpleNamespace(num_hidden_layers=1), n_labels

    def forward(self, input_ids, attention_mask, **_):
        assert input_ids.shape == attention_mask.shape
        logits = nn.functional.one_hot(input_ids % self.n_labels, self.n_labels).float()
        return SimpleNamespace(logits=logits, hidden_states=None, attentions=None)


@pytest.mark.parametrize("seq_len", [3, 5, 16, 64])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_word_has_one_prediction_in_input_order(sentences, tokenizer, labels, accelerator, seq_len, batch_size):
    words = [*sentences.words[:20], [], [x for sentence in sentences.words[20:30] for x in sentence], ["\u200b"]]
    examples = encode(Sentences(words), tokenizer, seq_len)
    model = ById(len(labels)).train()
    found, _ = predict(model, examples, words, labels, 0, accelerator, batch_size)
    assert found == [[labels[ids[0] % len(labels)] for ids in sentence] for sentence in pieces(tokenizer, words)]
    assert not model.training


def test_no_sentence_has_no_prediction(tokenizer, labels, accelerator):
    examples = encode(Sentences([[], []]), tokenizer, 16)
    assert predict(ById(7), examples, [[], []], labels, 0, accelerator) == ([[], []], [[], []])


def test_speed_is_measured_in_positive_numbers(teacher, examples, accelerator):
    found = measure_speed(teacher, examples, 0, accelerator, n=5)
    assert sorted(found) == ["ms_per_sentence", "sentences_per_second"] and all(x > 0 for x in found.values())
    assert not teacher.training


def test_in_bfloat16_a_model_meets_few_shapes_and_every_window(examples):
    cpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")
    shapes = set()
    for n in range(40, len(examples)):
        found = evaluate._batches(examples.lengths[:n], 8, cpu)
        assert set(np.concatenate([rows for rows, _ in found])) == set(range(n))
        shapes |= {(len(rows), width) for rows, width in found}
    assert len(shapes) <= len({width for _, width in shapes})  # one number of rows for each width


def test_agreement_by_hand():
    said = [[["O", "B-PER"], ["O"], ["B-LOC"]], [["O", "B-ORG"], ["O"], ["O"]], [["O", "B-ORG"], ["O"], ["B-LOC"]]]
    divided, pairs = evaluate.agreement(said)
    assert divided == 2 / 4 and pairs == pytest.approx((2 / 4 + 3 / 4 + 3 / 4) / 3)
    assert evaluate.agreement(said[:1] * 2) == (0.0, 1.0)
