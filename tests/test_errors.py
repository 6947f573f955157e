"""Error analysis by hand: small sentences whose confusions, losses and scores are counted on paper."""

import numpy as np
import pytest

from xdistil import errors

WORDS = [["Anna", "Lee", "saw", "Rome"], ["Lee", "slept"], ["in", "Rome", "with", "Anna"]]
GOLD = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O"], ["O", "B-LOC", "O", "B-PER"]]
TEACHER = [["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "O"], ["O", "B-PER", "O", "B-PER"]]
STUDENT = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-LOC"], ["O", "O", "O", "B-PER"]]
gold, teacher, student = map(errors.spans, (GOLD, TEACHER, STUDENT))
SIDES = {"teacher": teacher, "student": student}


def test_spans_are_the_entities_of_strict_f1():
    assert gold[0] == {(0, 2): "PER", (3, 4): "LOC"} and student[1] == {(0, 1): "LOC", (1, 2): "LOC"}
    assert errors.spans([["I-PER", "O"]]) == [{}]  # strict: no entity begins with I-
    assert errors.spans([["sport"], ["news"]], by_word=False) == [{(0, 1): "sport"}, {(0, 1): "news"}]


def test_confusion_has_missed_invented_and_other_bounds():
    names, found = errors.confusion(gold, SIDES)
    assert names == ["LOC", "PER", "other bounds", "nothing"]
    assert found["teacher"].tolist() == [[1, 1, 0, 0], [0, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    # Rome is right once and missed once; Lee is taken for LOC, Anna Lee cut short; "slept" is invented
    assert found["student"].tolist() == [[1, 0, 0, 1], [1, 1, 1, 0], [0, 1, 0, 0], [1, 0, 0, 0]]
    for counts, side in zip(found.values(), SIDES.values(), strict=True):  # rows sum to gold, columns to predictions
        assert counts.sum(1)[:2].tolist() == [2, 3]
        assert counts.sum(0)[:2].tolist() == [sum(list(s.values()).count(kind) for s in side) for kind in names[:2]]


def test_confusion_of_texts_has_their_labels_alone():
    labels = [["a"], ["b"], ["b"], ["c"]]
    names, found = errors.confusion(errors.spans(labels, False), {"student": errors.spans([["a"], ["a"], ["b"], ["c"]],
                                                                                            False)})
    assert names == ["a", "b", "c"] and found["student"].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_wrong_words_are_counted_for_both_sides():
    rows = errors.wrong_words(WORDS, GOLD, {"teacher": TEACHER, "student": STUDENT}, 2)
    assert rows[0] == {"word": "Lee", "times": 2, "teacher wrong": 0, "student wrong": 2,
                       "student's most frequent mistake": "I-PER → O"}
    assert len(rows) == 2 and rows[1]["word"] in ("slept", "Rome")
    again = errors.wrong_words([["x"] * 5], [["O"] * 5], {"student": [["B-A", "B-A", "B-A", "B-B", "O"]]}, 9)
    assert again == [{"word": "x", "times": 5, "student wrong": 4, "student's most frequent mistake": "O → B-A"}]


def test_lost_is_what_the_teacher_had_and_the_student_has_not():
    rows = errors.lost(WORDS, gold, teacher, student, 5)
    assert [row["lost"] for row in rows] == [1, 1]  # not the third: the teacher had Rome wrong as well
    assert rows[0] == {"lost": 1, "teacher and gold": "Anna Lee (PER)", "student": "Anna (PER)",
                       "sentence": "Anna Lee saw Rome"}
    assert rows[1]["student"] == "Lee (LOC)"
    none = errors.lost(WORDS, gold, teacher, [{}] * 3, 1)
    assert none == [{"lost": 2, "teacher and gold": "Anna Lee (PER); Rome (LOC)", "student": "nothing",
                     "sentence": "Anna Lee saw Rome"}]


def test_scores_by_length_are_those_of_each_bin():
    rows = errors.by_length(WORDS, gold, SIDES)
    found = {(row["who"], row["bin"]): (row["n"], row["score"]) for row in rows}
    assert found == {("teacher", "2"): (1, 1.0), ("teacher", "3–4"): (4, 0.75),
                     ("student", "2"): (1, 0.0), ("student", "3–4"): (4, pytest.approx(2 * 2 / (4 + 3)))}
    assert all(0 <= row["low"] <= row["score"] <= row["high"] <= 1 for row in rows)


def test_scores_by_frequency_are_of_the_very_words():
    train = [["Rome", "and", "Rome"], ["Anna"], ["rome"]]
    seen = errors.spans([["B-LOC", "O", "B-LOC"], ["B-PER"], ["O"]])
    rows = errors.by_frequency(WORDS, gold, {"student": student}, train, seen)
    # never: Anna Lee and Lee of gold, Lee and slept of the student, none right; once: Anna, and the student's other
    # Anna, which is wrong; two to four: Rome, one of two
    assert {row["bin"]: (row["n"], row["score"]) for row in rows} == {
        "never": (2, 0.0), "1": (1, pytest.approx(2 / 3)), "2–4": (2, pytest.approx(2 / 3))}


def test_of_texts_the_score_is_accuracy():
    texts = [["one"], ["two words"], ["and these three"], ["now there are four"]]
    wanted, said = errors.spans([["a"], ["a"], ["b"], ["b"]], False), errors.spans([["a"], ["b"], ["b"], ["b"]], False)
    rows = errors.by_length(texts, wanted, {"student": said})
    found = [(row["bin"], row["score"], row["n"]) for row in rows]
    assert found == [("1", 1, 1), ("2", 0, 1), ("3", 1, 1), ("4", 1, 1)]


def test_the_interval_is_that_of_a_binomial_share():
    rng = np.random.default_rng(0)
    said = [{(0, 1): "a" if right else "b"} for right in rng.random(400) < 0.8]
    (row,) = errors.by_length([["w"]] * 400, [{(0, 1): "a"}] * 400, {"student": said})
    half = 1.96 * (row["score"] * (1 - row["score"]) / 400) ** 0.5
    assert (row["high"] - row["low"]) / 2 == pytest.approx(half, rel=0.2)
