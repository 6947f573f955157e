"""How good: strict entity F1 by hand, one prediction per word whatever the windows."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import pieces
from torch import nn

from xdistil import evaluate
from xdistil.data import Sentences, encode
from xdistil.evaluate import entity_f1, measure_speed, paired_bootstrap, predict, retention, score

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


def spoilt(gold, share, seed):
    """The gold tags with some entities, chosen at random, taken away or made another's."""
    draw = np.random.default_rng(seed)
    return [[tag if draw.random() > share else draw.choice(["O", "B-PER", "B-LOC", "I-LOC"]) for tag in tags]
            for tags in gold.tags]


@pytest.fixture
def many():
    draw = np.random.default_rng(0)
    tags = [" ".join(draw.choice(["O", "O", "B-PER", "B-LOC"], 7)) for _ in range(120)]
    return make([("en", "vi", "th")[i % 3] for i in range(120)], *tags[:-1], "O O O O O O O")


def test_bootstrap_starts_from_the_difference_of_the_scores(many):
    a, b = spoilt(many, 0.4, 1), spoilt(many, 0.2, 2)
    found = paired_bootstrap(many, [a], [b], 300)
    assert found["difference"] == pytest.approx(score(many, b)["macro"] - score(many, a)["macro"], abs=1e-12)
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert found == paired_bootstrap(many, [a], [b], 300) != paired_bootstrap(many, [a], [b], 300, seed=1)
    back = paired_bootstrap(many, [b], [a], 300)
    assert back == pytest.approx({"difference": -found["difference"], "low": -found["high"], "high": -found["low"]})
    runs = [spoilt(many, 0.3, i) for i in range(4)]
    wanted = np.mean([score(many, tags)["macro"] for tags in runs[2:]]) - np.mean(
        [score(many, tags)["macro"] for tags in runs[:2]])
    assert paired_bootstrap(many, runs[:2], runs[2:], 9)["difference"] == pytest.approx(wanted, abs=1e-12)


def test_bootstrap_of_texts_is_of_macro_f1_over_classes():
    gold = make([""] * 6, *"a a b b c c".split())
    a, b = ([[x] for x in tags.split()] for tags in ("a b b b c a", "a a b c c c"))
    found = paired_bootstrap(gold, [a], [b], 50, by_word=False)
    wanted = evaluate.score_classes(gold, b)["macro"] - evaluate.score_classes(gold, a)["macro"]
    assert found["difference"] == pytest.approx(wanted, abs=1e-12) and found["low"] <= found["high"]


def test_bootstrap_of_equal_predictions_is_nothing_and_nothing_else(many):
    a = spoilt(many, 0.3, 1)
    assert paired_bootstrap(many, [a, a], [a, a], 50) == {"difference": 0, "low": 0, "high": 0}


def test_bootstrap_by_hand():
    # one entity a sentence; a finds that of the first, b both: 1 - 2 / 3. Of the four samples of two sentences one has
    # only the first (gain 0), one only the second (gain 1), two have both
    gold = make(["en", "en"], "B-PER O", "O B-LOC")
    a, b = [["B-PER", "O"], ["O", "O"]], [["B-PER", "O"], ["O", "B-LOC"]]
    found = paired_bootstrap(gold, [a], [b], 500)
    assert found == {"difference": pytest.approx(1 / 3), "low": 0.0, "high": 1.0}


def test_bootstrap_intervals_cover_no_difference_about_as_often_as_they_say(many):
    # two taggers that are equally good: zero is left out by chance alone
    found = [paired_bootstrap(many, [spoilt(many, 0.3, 2 * i)], [spoilt(many, 0.3, 2 * i + 1)], 200)
             for i in range(60)]
    assert sum(x["low"] <= 0 <= x["high"] for x in found) >= 51  # 95 % of 60 are 57; below 51 once in 300 studies
