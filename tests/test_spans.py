"""Entities with their places in the text."""

import pytest

from xdistil.spans import entities


def test_entities_carry_places_words_and_the_mean_probability():
    text = "  Angela  Braun lives in\tLisbon ."
    tags = ["B-PER", "I-PER", "O", "O", "B-LOC", "O"]
    one, two = entities(text, tags, [0.9, 0.7, 1.0, 1.0, 0.5, 1.0])
    assert one == {"type": "PER", "start": 2, "end": 15, "text": "Angela  Braun", "score": 0.8, "words": [0, 2]}
    assert two == {"type": "LOC", "start": 25, "end": 31, "text": "Lisbon", "score": 0.5, "words": [4, 5]}
    assert [text[x["start"] : x["end"]] for x in (one, two)] == ["Angela  Braun", "Lisbon"]


@pytest.mark.parametrize("tags, found", [
    ("O O", []), ("B-A B-A", [("A", [0, 1]), ("A", [1, 2])]), ("I-A I-A", [("A", [0, 2])]),
    ("B-A I-B", [("A", [0, 1]), ("B", [1, 2])]), ("I-A O I-A", [("A", [0, 1]), ("A", [2, 3])])])
def test_an_inside_that_continues_nothing_starts_an_entity(tags, found):
    tags = tags.split()
    got = entities(" ".join("w" * len(tags)), tags, [1.0] * len(tags))
    assert [(x["type"], x["words"]) for x in got] == found


def test_text_and_tags_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        entities("one two", ["O"], [1.0])
