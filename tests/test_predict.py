"""Lines labelled as a stream: JSON with places and probabilities, order, blank lines, pipes."""

import json
import os
import threading

import pytest
import torch

from xdistil import cli, data, evaluate, models
from xdistil.predict import AT_ONCE, Labeller, entities, format_line

TEXT = ["Storm hits  Paris today .\textra column", "", "one", "a b c"]


@pytest.fixture(scope="module")
def student(teacher_folder, labels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    model, tokenizer = models.load_classifier(teacher_folder, labels, "x"), models.load_tokenizer(teacher_folder)
    models.save_model(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def labeller(student):
    return Labeller(student, device="cpu", batch_size=2)


@pytest.fixture
def path(tmp_path):
    (tmp_path / "in.txt").write_text("\n".join(TEXT) + "\n", encoding="utf-8")
    return tmp_path / "in.txt"


def test_labels_and_probabilities_are_those_of_the_model(labeller, path):
    found = list(labeller.label(path))
    assert [(text, words) for text, words, *_ in found] == [
        (line.split("\t")[0], line.split("\t")[0].split()) for line in TEXT]
    words = [words for _, words, *_ in found]
    examples = data.encode(data.Sentences(words), labeller.tokenizer, labeller.seq_len)
    batch = data.collate(examples, [0], 0)
    with torch.inference_mode(), labeller.accelerator.autocast():
        exact = models.run_model(labeller.model, batch)[0].float().softmax(-1)[0][batch["words"][0] >= 0]
    assert found[0][3] == pytest.approx(exact.max(-1).values.tolist(), abs=0.02)
    assert all(len(words) == len(tags) == len(scores) for _, words, tags, scores in found)
    tags, _ = evaluate.predict(labeller.model, examples, words, labeller.labels, 0, labeller.accelerator)
    assert [x[2] for x in found] == tags


def test_json_holds_entities_with_places():
    row = json.loads(format_line("jsonl", "word", "Storm hits  Paris", ["Storm", "hits", "Paris"],
                                 ["O", "O", "B-LOC"], [0.9, 0.8, 0.70004]))
    assert row["entities"] == [{"type": "LOC", "start": 12, "end": 17, "text": "Paris", "score": 0.7, "words": [2, 3]}]
    assert row["scores"] == [0.9, 0.8, 0.7] and row["tags"][-1] == "B-LOC" and row["text"] == "Storm hits  Paris"


@pytest.mark.parametrize("unit, text, row", [
    ("text", "good film", {"text": "good film", "label": "yes", "score": 0.5}),
    ("pair", "one\ttwo", {"text": "one", "text_pair": "two", "label": "yes", "score": 0.5})])
def test_texts_and_pairs_have_one_label(unit, text, row):
    assert json.loads(format_line("jsonl", unit, text, [text], ["yes"], [0.5])) == row
    assert format_line("tsv", unit, text, [text], ["yes"], [0.5]) == text + "\tyes"
    assert json.loads(format_line("jsonl", unit, "", [], [], [])) == {"text": "", "label": None, "score": None}


@pytest.mark.parametrize("output, flags, is_json", [
    ("x.tsv", [], False), ("x.jsonl", [], True), ("x.json", [], True), ("x.jsonl", ["--format", "tsv"], False),
    ("x.tsv", ["--format", "jsonl"], True)])
def test_the_name_of_the_output_chooses_the_form(student, path, tmp_path, output, flags, is_json):
    arguments = ["predict", student, path, "-o", tmp_path / output, "--device", "cpu", *flags]
    assert cli.main([*map(str, arguments)]) == 0
    assert (tmp_path / output).read_text(encoding="utf-8").startswith("{") == is_json


def test_the_command_writes_json_lines_in_order(student, path, tmp_path):
    assert cli.main(["predict", str(student), str(path), "-o", str(tmp_path / "out.jsonl"), "--device", "cpu"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == [line.split("\t")[0] for line in TEXT] and rows[1]["words"] == []


def test_more_lines_than_are_sorted_together_keep_their_order(labeller, tmp_path):
    lines = [" ".join(f"w{i}" for _ in range(1 + i % 7)) for i in range(AT_ONCE + 50)]
    (tmp_path / "many.txt").write_text("\n".join(lines) + "\n")
    labeller.batch_size = 512
    assert [text for text, *_ in labeller.label(tmp_path / "many.txt")] == lines


def test_a_pipe_is_read_once(labeller, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("a b\nc\n",))
    writer.start()
    assert [words for _, words, *_ in labeller.label(tmp_path / "pipe")] == [["a", "b"], ["c"]]
    writer.join()


def test_entities_carry_places_words_and_the_mean_probability():
    text = "  Angela  Braun lives in\tLisbon ."
    tags = ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]
    one, two = entities(text, tags, [0.9, 0.7, 1.0, 1.0, 0.5, 1.0])
    assert one == {"type": "PER", "start": 2, "end": 15, "text": "Angela  Braun", "score": 0.8, "words": [0, 2]}
    assert two == {"type": "LOC", "start": 25, "end": 31, "text": "Lisbon", "score": 0.5, "words": [4, 5]}
    assert [text[x["start"] : x["end"]] for x in (one, two)] == ["Angela  Braun", "Lisbon"]


@pytest.mark.parametrize("tags, found", [
    ("O O", []), ("B-A B-A", [("A", [0, 1]), ("A", [1, 2])]), ("I-A I-A", [("A", [0, 2])]),
    ("B-A I-B", [("A", [0, 1]), ("B", [1, 2])]), ("I-A O I-A", [("A", [0, 1]), ("A", [2, 3])]),
    ("B-A-B I-A-B", [("A-B", [0, 2])])])
def test_an_inside_that_continues_nothing_starts_an_entity(tags, found):
    tags = tags.split()
    got = entities(" ".join("w" * len(tags)), tags, [1.0] * len(tags))
    assert [(x["type"], x["words"]) for x in got] == found


def test_text_and_tags_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        entities("one two", ["O"], [1.0])
