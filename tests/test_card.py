"""Model cards: what the hub reads, what people read."""

import pytest
import yaml

from xdistil.card import write_card

SIDE = {"parameters": 1_234_567, "mb": 4.9, "ms_per_sentence": 2.34}
TAGS = {"test": {"by_language": {"de": 0.5, "en": 0.8, "vi": None}, "macro": 0.65, "micro": 0.7}}
CLASSES = {"test": {"by_language": {"all": 0.5}, "macro": 0.5, "accuracy": 0.6, "matthews": -0.1}}


def card(unit="word", student=TAGS, teacher=None, onnx=(), baselines=(), **options):
    return write_card(unit, student | SIDE, teacher, dict(onnx), dict(baselines), **{
        "source": "mbert", "labels": ["O", "B-X"], "data": "my_task", "seq_len": 64, "licence": "mit"} | options)


@pytest.mark.parametrize("unit, student", [("word", TAGS), ("text", CLASSES), ("pair", CLASSES)])
def test_the_hub_can_read_its_fields(unit, student):
    head = yaml.safe_load(card(unit, student).split("---")[1])
    kind = "token" if unit == "word" else "text"
    assert head["pipeline_tag"] == f"{kind}-classification" and head["license"] == "mit"
    assert head.get("language") == (["de", "en", "vi"] if unit == "word" else None)


def test_scores_stand_beside_the_teachers():
    teacher = {"test": {"by_language": {"de": 0.625, "en": 0.8, "vi": 0.0}, "macro": 0.7, "micro": 0.8}} | SIDE
    text = card(teacher=teacher, onnx={"int8": {"mb": 1.2, "ms_per_sentence": 0.9, "dev": {"macro": 0.641}}})
    assert "| de | 62.5 | 50.0 | 80.0 % |" in text and "| vi | 0.0 | – | – |" in text
    assert "| **macro mean** | 70.0 | 65.0 | 92.9 % |" in text and "distilled with xdistil from a fine-tuned" in text
    assert "| ONNX int8, dev F1 64.1 | 1,234,567 | 1.2 | 0.9 |" in text and "my_task" in text


def test_baselines_stand_in_one_line_with_student_and_teacher():
    other = {name: side | {"test": side["test"] | {"macro": f1}} for name, side, f1 in (
        ("only labels", {"test": {}}, 0.412), ("only logits, labels", {"test": {}}, 0.6))}
    text = card(teacher={"test": TAGS["test"] | {"macro": 0.7}} | SIDE, baselines=other)
    assert "macro F1: only labels 41.2, only logits, labels 60.0, teacher 70.0, student 65.0.\n\nSize" in text
    assert "training windows" not in card()


def test_without_a_teacher_nothing_is_compared():
    text = card("pair", CLASSES)
    assert "mbert, fine-tuned with xdistil" in text and "| **Matthews correlation** | -10.0 |" in text
    assert "kept" not in text and "teacher" not in text and "micro" not in text


def test_the_lines_of_python_run_as_they_are_shown():
    text = card(registers="import xdistil  # knows it")
    code = "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    assert code.startswith("import xdistil  # knows it\nfrom transformers import pipeline\ntag = ")
    compile(code, "card", "exec")
