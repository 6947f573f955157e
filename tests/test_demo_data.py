"""The made-up corpus: reproducible, well formed, and with nothing of the test part in training."""
import os
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("faker")

from xdistil.demo_data import LABELS, fill, name_lists, read_patterns, write_demo_corpus  # noqa: E402

SMALL = {"n_train": 180, "n_dev": 31, "n_test": 121, "n_transfer": 240}
FILES = ("train", "dev", "test", "transfer", "labels")
ENTITIES = ("PER", "LOC", "ORG")
LANGUAGES = ("en", "de", "es", "fr", "pt", "vi")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    counts = write_demo_corpus(folder, **SMALL)
    return folder, counts


def contents(folder):
    return {part: Path(folder, f"{part}.tsv").read_bytes() for part in FILES}


def labelled(folder, part):
    lines = Path(folder, f"{part}.tsv").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [(words.split(" "), tags.split(" "), language)
            for words, tags, language in (line.split("\t") for line in lines)]


def sentences(folder, part):
    """The sentences of any file, lower case."""
    text = Path(folder, f"{part}.tsv").read_text(encoding="utf-8")
    return [line.split("\t")[0].casefold() for line in text.splitlines()]


def entities(words, tags):
    """The surface strings of one sentence, lower case."""
    found = []
    for word, tag in zip(words, tags, strict=True):
        if tag[0] == "B":
            found.append(word)
        elif tag[0] == "I":
            found[-1] += " " + word
    return [name.casefold() for name in found]


def pattern_regex(pattern):
    """A pattern as a regular expression on lower-case sentences, whatever stands in its slots."""
    parts = [r"\S+(?: \S+){0,11}" if re.fullmatch(r"\{[A-Z]+\}", token) else
             re.escape(token.casefold()) for token in pattern.split(" ")]
    if pattern[-1] in ".!?":  # the noise may drop the last token
        return re.compile(" ".join(parts[:-1]) + f"(?: {parts[-1]})?")
    return re.compile(" ".join(parts))


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not(corpus, tmp_path):
    expected = contents(corpus[0])
    for part in ("train", "dev", "test", "transfer"):
        assert len(expected[part].splitlines()) == SMALL[f"n_{part}"] == corpus[1][part]
    assert sorted(path.name for path in corpus[0].iterdir()) == sorted(f"{p}.tsv" for p in FILES)
    code = f"from xdistil.demo_data import *; write_demo_corpus({str(tmp_path / 'a')!r}, **{SMALL})"
    for hash_seed in ("1", "77"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed,
                       "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        assert contents(tmp_path / "a") == expected
    write_demo_corpus(tmp_path / "b", seed=14, **SMALL)
    other = contents(tmp_path / "b")
    assert all(other[part] != expected[part] for part in FILES if part != "labels")


def test_lines_are_strict_iob2_with_known_labels_and_shared_languages(corpus):
    assert (corpus[0] / "labels.tsv").read_text().splitlines() == list(LABELS)
    for part in ("train", "dev", "test"):
        lines, seen = labelled(corpus[0], part), set()
        for words, tags, _ in lines:
            assert len(words) == len(tags) and all(words)
            assert not any(re.search(r"[{}#\s]", word) for word in words)
            for before, tag in zip(["O", *tags], tags, strict=False):
                assert tag in LABELS
                assert tag[0] != "I" or before[1:] == tag[1:], (words, tags)
            seen.update(tags)
        assert seen == set(LABELS)
        shares = Counter(language for _, _, language in lines)
        assert set(shares) == set(LANGUAGES)
        assert max(shares.values()) - min(shares.values()) <= 1


def test_no_sentence_stands_twice_in_or_across_the_files(corpus):
    lines = [line for part in ("train", "dev", "test", "transfer")
             for line in sentences(corpus[0], part)]
    assert len(lines) == len(set(lines)) == sum(SMALL.values())


def test_no_test_name_occurs_in_training_text(corpus):
    names = {name for words, tags, _ in labelled(corpus[0], "test")
             for name in entities(words, tags)}
    assert len(names) > 100
    for part in ("train", "dev", "transfer"):
        text = "\n".join(f" {line} " for line in sentences(corpus[0], part))
        assert [name for name in names if f" {name} " in text] == []


def test_no_test_pattern_occurs_in_training_text(corpus):
    tests = [pattern_regex(pattern) for kinds in read_patterns().values()
             for pattern in kinds["test"]]
    for part in ("train", "dev", "transfer"):
        for line in sentences(corpus[0], part):
            assert not any(regex.fullmatch(line) for regex in tests), line
    for line in sentences(corpus[0], "test"):  # the expressions do recognise their own pattern
        assert any(regex.fullmatch(line) for regex in tests), line


def test_the_two_parts_share_no_first_name_no_last_name_and_no_place_in_any_language():
    lists = {part: [name_lists(table, part) for table in read_patterns().values()] for part in ("train", "test")}
    for kind in ("first", "last", "place"):
        assert all(len(one[kind]) >= 8 for part in lists.values() for one in part), kind
        train, test = ({name.casefold() for one in lists[part] for name in one[kind]} for part in ("train", "test"))
        assert len(train) > 2 * len(test) > 100 and train.isdisjoint(test), kind


def test_people_of_the_test_part_share_no_word_with_those_of_the_others(corpus):
    """Middle names apart, which Vietnamese has few of."""
    words = {part: {name.casefold() for line, tags, language in labelled(corpus[0], part) if language != "vi"
                    for name, tag in zip(line, tags, strict=True) if tag in ("B-PER", "I-PER")
                    } for part in ("train", "dev", "test")}
    assert len(words["test"]) > 50 and words["test"].isdisjoint(words["train"] | words["dev"])


def test_a_company_is_never_a_bare_name_or_three_letters():
    rng = random.Random(0)
    for table in read_patterns().values():
        for part in ("train", "test"):
            lists = name_lists(table, part)
            names = {fill("{ORG}", lists, rng) for _ in range(300)}
            assert len(names) > 60 and all("-" in name or " " in name for name in names)
            assert names.isdisjoint(lists["last"]) and names.isdisjoint(lists["place"])


def test_patterns_are_many_distinct_and_use_known_slots():
    tables = read_patterns()
    assert set(tables) == set(LANGUAGES)
    for language, kinds in tables.items():
        assert len(kinds["train"]) >= 36 and len(kinds["test"]) >= 12, language
        patterns = kinds["train"] + kinds["test"]
        assert len({pattern.casefold() for pattern in patterns}) == len(patterns)
        bare = 0
        for pattern in patterns:
            tokens = pattern.split(" ")
            assert all(tokens), pattern
            slots = [token for token in tokens if "{" in token or "}" in token]
            assert {*slots} <= {f"{{{kind}}}" for kind in (*ENTITIES, "DATE", "NUM", "JOB")}
            count = sum(slot[1:-1] in ENTITIES for slot in slots)
            assert count <= 4, pattern
            bare += count == 0
        assert 0.05 <= bare / len(patterns) <= 0.2, language


def test_a_subset_of_languages_and_refused_calls(tmp_path):
    few = {"n_train": 12, "n_dev": 0, "n_test": 5, "n_transfer": 6}
    assert write_demo_corpus(tmp_path, languages=["vi", "en"], **few)["train"] == 12
    shares = Counter(language for _, _, language in labelled(tmp_path, "test"))
    assert shares == {"vi": 3, "en": 2} and (tmp_path / "dev.tsv").read_bytes() == b""
    for languages in (["en", "xx"], []):
        with pytest.raises(ValueError, match="languages must be"):
            write_demo_corpus(tmp_path, languages=languages, **few)


def test_missing_faker_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faker.providers.person.en_US", None)
    with pytest.raises(ImportError, match="pip install faker"):
        write_demo_corpus(tmp_path, languages=["en"])
    assert list(tmp_path.iterdir()) == []
