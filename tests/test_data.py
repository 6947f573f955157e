"""Text to ids and back: nothing is lost, every fault names file and line."""

import re

import numpy as np
import pytest
import torch
from tiny import pieces

from xdistil.data import (
    REMEMBERED,
    DataError,
    Sentences,
    collate,
    encode,
    read_labels,
    read_lines,
    read_tagged,
    read_text,
    repair_iob2,
    special_tokens,
    split_transfer,
    subset,
    windows,
    write_tagged,
)
from xdistil.losses import IGNORED
from xdistil.models import load_tokenizer
from xdistil.views import typical_sentence

LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]


@pytest.fixture
def write(tmp_path):
    def writer(content, name="train.tsv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path
    return writer


def test_what_is_written_is_read_back(tmp_path, toy, labels):
    for name in ("train", "dev", "test"):
        found = read_tagged(toy / f"{name}.tsv", labels)
        write_tagged(tmp_path / "again.tsv", found, found.tags)
        assert read_tagged(tmp_path / "again.tsv", labels) == found
        assert (tmp_path / "again.tsv").read_bytes() == (toy / f"{name}.tsv").read_bytes()


def test_two_and_three_columns_blank_lines_bom_and_crlf(write):
    found = read_tagged(write("\ufeffAda Byron\tB-PER I-PER\ten\r\n\r\nhi\tO\n  \nà Huế\tO B-LOC\tvi\r\n"), LABELS)
    assert found == Sentences([["Ada", "Byron"], ["hi"], ["à", "Huế"]],
                              [["B-PER", "I-PER"], ["O"], ["O", "B-LOC"]], ["en", "", "vi"])
    assert len(found) == 3


@pytest.mark.parametrize("content, line, message", [
    ("a b\tO O\nc d\tO\n", 2, "2 words and 1 tags"), ("a\tO O\n", 1, "1 words and 2 tags"),
    ("a\tO\n\nb\tB-ORG\n", 3, "unknown label 'B-ORG'"), ("a b\n", 1, "2 words and 1 tags"),
    ("a\n", 1, "unknown label ''"), ("a\tO\ten\tmore\n", 1, r"expected words<TAB>tags\[<TAB>language\]"),
    ("a  b\tO O O\n", 1, "single spaces"), (b"a\tO\nb\xff\tO\n", 2, "invalid UTF-8 at byte 2 of the line")])
def test_a_bad_line_is_named(write, content, line, message):
    path = write(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{message}"):
        read_tagged(path, LABELS)


@pytest.mark.parametrize("read", [lambda path: read_tagged(path, LABELS), read_text])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_file_is_named(write, read, content):
    path = write(content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: no sentence"):
        read(path)


def test_a_missing_file_lists_its_neighbours(write, tmp_path):
    write("O\n", "labels.tsv")
    with pytest.raises(DataError, match=r"train\.tsv: no such file; .* holds \['labels\.tsv'\]"):
        read_tagged(tmp_path / "train.tsv", LABELS)
    with pytest.raises(DataError, match="no such file"):
        next(read_lines(tmp_path))


@pytest.mark.parametrize("content", ["", "O\nO\n", "O\nPER\n", "O\nB-PER X\nb-LOC\n"])
def test_labels_are_distinct_and_iob2(write, content):
    with pytest.raises(DataError, match="labels.tsv: found .*; expected distinct O, B-TYPE, I-TYPE"):
        read_labels(write(content, "labels.tsv"))
    assert read_labels(write("O\n B-PER\r\n\nI-PER\n", "labels.tsv")) == ["O", "B-PER", "I-PER"]


@pytest.mark.parametrize("tags, fixed, n", [
    ("O I-PER I-PER", "O B-PER I-PER", 1), ("I-LOC", "B-LOC", 1), ("B-PER I-LOC I-LOC", "B-PER B-LOC I-LOC", 1),
    ("B-PER I-PER B-PER", "B-PER I-PER B-PER", 0), ("I-PER O I-PER", "B-PER O B-PER", 2), ("", "", 0)])
def test_iob2_is_repaired(tags, fixed, n):
    assert repair_iob2(tags.split()) == (fixed.split(), n)


def test_repairs_are_counted_aloud(write, capsys):
    path = write("a b\tO I-PER\nc d\tI-LOC I-PER\n")
    assert read_tagged(path, LABELS).tags == [["O", "B-PER"], ["B-LOC", "B-PER"]]
    assert f"{path}: 3 tags broke IOB2" in capsys.readouterr().out


def test_transfer_text_is_the_first_column(write):
    found = read_text(write("a  b\tO O\ten\tx\n\n\tno words\nc\u00a0d e\n"))
    assert found.words == [["a", "b"], ["c", "d", "e"]] and found.tags is None and not any(found.languages)
    assert list(read_text(write("a b\tde\nc\td e\tf\n")).languages) == ["de", ""]


def test_a_subset_is_seeded_and_in_order(write):
    rows = list(range(100))
    some = subset(rows, 10, 1)
    assert some == sorted(set(some)) and len(some) == 10 and some == subset(rows, 10, 1) != subset(rows, 10, 2)
    assert subset(rows, None, 1) == rows == subset(rows, 100, 1) == subset(rows, 1000, 1)
    path = write("".join(f"w{i}\tO\tl{i}\n" for i in range(20)))
    found = read_tagged(path, LABELS, 5, 3)
    assert found.words == [[f"w{i}"] for i in subset(list(range(20)), 5, 3)]
    assert found.languages == [words[0].replace("w", "l") for words in found.words]


def test_the_typical_sentence_has_entities_and_a_handy_length():
    short, long = ["a"], [str(i) for i in range(9)]
    tags = [["B-PER"], ["B-PER", "B-LOC", *["O"] * 7]]
    assert typical_sentence(Sentences([short, long], tags, ["", ""])) == long
    assert typical_sentence(Sentences([short], tags[:1], [""])) == short


def test_labels_stand_on_first_sub_words_and_nowhere_else(tokenizer, labels):
    unseen = "mrotS"  # of known letters, so it falls into them
    sentence = Sentences([["Storm", unseen, "company"]], [["B-LOC", "I-LOC", "O"]], ["en"])
    found = encode(sentence, tokenizer, 32, labels)
    n = len(unseen)
    assert tokenizer.convert_ids_to_tokens(found.input_ids.tolist()) == [
        "[CLS]", "Storm", unseen[0], *("##" + x for x in unseen[1:]), "company", "[SEP]"]
    rest = [IGNORED] * (n - 1)
    assert found.labels.tolist() == [
        IGNORED, labels.index("B-LOC"), labels.index("I-LOC"), *rest, labels.index("O"), IGNORED]
    assert found.words.tolist() == [-1, 0, 1, *[-2] * (n - 1), 2, -1]
    assert found.offsets.tolist() == [0, n + 4] and found.lengths.tolist() == [n + 4] and len(found) == 1
    assert (encode(sentence, tokenizer, 32).labels == IGNORED).all()  # without labels nothing is labelled


class Neighbourly:
    """A tokenizer whose pieces of one sentence depend on neighbours, so words cannot be remembered."""

    is_fast = True

    def __init__(self, tokenizer, trigger):
        self.tokenizer, self.trigger, self.unk_token_id, self.longest = tokenizer, trigger, tokenizer.unk_token_id, 0

    def __call__(self, batch, **options):
        self.longest = max(self.longest, *map(len, batch))
        return self.tokenizer([["company"] * len(s) if s == self.trigger else s for s in batch], **options)


def test_remembered_words_equal_whole_sentences(tokenizer, sentences):
    words = [*sentences.words, [], ["\u200b", "Storm", "\u00ad"], ["qqq\u4e2d", "Storm"]]
    trigger = ["a", "b"]
    slow = Neighbourly(tokenizer, trigger)
    whole = pieces(slow, [trigger, *words])
    fast = pieces(tokenizer, [trigger, *words])
    assert whole[0] != fast[0] and whole[1:] == fast[1:]
    assert [len(found) for found in fast[1:]] == [len(sentence) for sentence in words]
    # a word without pieces is one unknown piece
    storm = tokenizer("Storm", add_special_tokens=False)["input_ids"]
    assert fast[-2] == [[tokenizer.unk_token_id], storm, [tokenizer.unk_token_id]]


def test_special_tokens_are_those_around_a_text(tokenizer):
    assert special_tokens(tokenizer) == ([tokenizer.cls_token_id], [tokenizer.sep_token_id])


def random_sizes(n=400):
    rng = np.random.default_rng(0)
    for i in range(n):
        capacity = int(rng.integers(1, 24))
        top = (3, capacity, 2 * capacity)[i % 3]  # a few pieces a word, up to the capacity, and beyond
        yield rng.integers(1, top + 1, rng.integers(0, 60)).tolist(), capacity


def test_windows_own_every_word_once_within_the_capacity():
    for sizes, capacity in random_sizes():
        spans, shown = windows(sizes, capacity), [min(size, capacity) for size in sizes]
        owners = [range(first, last) for *_, first, last in spans]
        assert [w for owned in owners for w in owned] == list(range(len(sizes)))
        for start, end, first, last in spans:
            assert start < end and start <= first <= last <= end and sum(shown[start:end]) <= capacity
        for (start, end, *_), (following, *_, owned, _) in zip(spans, spans[1:], strict=False):
            assert start < following <= end and sum(shown[following:end]) <= capacity // 4
            for w in range(following, end):  # the owner shows at least as much context on the other's short side
                right, left = end - 1 - w, w - following
                assert left >= right if w >= owned else right >= left


def test_windows_by_hand():
    assert windows([1, 2, 1], 4) == [(0, 3, 0, 3)] and windows([], 4) == []
    # eight pieces hold words 0-7; two of them (a quarter) come again, and the middle of the two is the border
    assert windows([1] * 12, 8) == [(0, 8, 0, 7), (6, 12, 7, 12)]
    # a word of more pieces than fit stands alone, shown by its first pieces
    assert windows([9, 1, 1], 4) == [(0, 1, 0, 1), (1, 3, 1, 3)]


def test_no_window_shows_only_what_its_neighbour_shows():
    for sizes, capacity in [([1] * 8 + [8], 8), *random_sizes()]:
        ends = [end for _, end, *_ in windows(sizes, capacity)]
        assert ends == sorted(set(ends)), (sizes, capacity)


@pytest.mark.parametrize("seq_len", [3, 4, 8, 13, 64])
def test_no_word_is_lost_however_short_the_windows(sentences, tokenizer, labels, seq_len):
    found = encode(sentences, tokenizer, seq_len, labels)
    assert found.lengths.max() <= seq_len and found.lengths.sum() == len(found.input_ids)
    owner = np.repeat(found.sentences, found.lengths)
    seen = [(int(s), int(w), labels[t]) for s, w, t in zip(owner, found.words, found.labels, strict=True) if w >= 0]
    wanted = [(i, w, tag) for i, tags in enumerate(sentences.tags) for w, tag in enumerate(tags)]
    assert sorted(seen) == wanted
    assert ((found.labels != IGNORED) == (found.words >= 0)).all()
    assert (np.diff(found.sentences) >= 0).all()


def test_an_empty_sentence_has_no_window(tokenizer):
    found = encode(Sentences([[], ["Storm"], []]), tokenizer, 16)
    assert found.sentences.tolist() == [1] and len(encode(Sentences([[]]), tokenizer, 16)) == 0


def test_collate_pads_each_field_with_its_own_value(examples):
    rows = np.array([int(examples.lengths.argmin()), int(examples.lengths.argmax())])
    batch = collate(examples, rows, pad_id=7)
    width = int(examples.lengths[rows].max())
    assert {name: tuple(x.shape) for name, x in batch.items()} == dict.fromkeys(
        ("attention_mask", "input_ids", "labels", "words"), (2, width)) | {"windows": (2,)}
    assert batch["windows"].tolist() == rows.tolist()
    for i, row in enumerate(rows):
        n, span = examples.lengths[row], slice(examples.offsets[row], examples.offsets[row + 1])
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        for name, padding in (("input_ids", 7), ("labels", IGNORED), ("words", -1)):
            assert batch[name][i, :n].tolist() == getattr(examples, name)[span].tolist()
            assert set(batch[name][i, n:].tolist()) <= {padding} and batch[name].dtype == torch.int64
    wide = collate(examples, rows[1:], 7, width + 5)["input_ids"]
    assert wide.shape == (1, width + 5) and (wide[0, width:] == 7).all()


@pytest.mark.parametrize("n, chunk, ratio, n_held_out, sizes", [
    (100, 30, 0.1, 10, [30, 30, 30]), (11, 3, 0.1, 1, [3, 3, 3, 1]),
    (100, 40, 0.05, 5, [40, 40, 15]), (10, 100, 0.01, 1, [9]),
    (50_000, 48_000, 0.5, 2000, [48_000])])
def test_the_transfer_set_is_split_without_rest(n, chunk, ratio, n_held_out, sizes):
    held_out, chunks = split_transfer(n, chunk, ratio, 0)
    assert len(held_out) == n_held_out and [len(x) for x in chunks] == sizes
    assert sorted(np.concatenate([held_out, *chunks])) == list(range(n))
    assert np.array_equal(held_out, split_transfer(n, chunk, ratio, 0)[0])
    assert not np.array_equal(chunks[0], split_transfer(n, chunk, ratio, 1)[1][0])


@pytest.mark.data
def test_real_text_in_thirteen_languages_gets_the_ids_of_its_own_tokenizer(shared):
    folder = shared / "data" / "multi_ner"
    found = read_tagged(folder / "dev.tsv", read_labels(folder / "labels.tsv"), 200, 0)
    tokenizer = load_tokenizer(shared / "weights" / "me5-small-q4-73k")  # SentencePiece, padding id 1
    assert tokenizer.pad_token_id == 1
    examples = encode(found, tokenizer, 512)
    ids = [examples.input_ids[a:b].tolist() for a, b in zip(examples.offsets, examples.offsets[1:], strict=False)]
    assert ids == tokenizer(found.words, is_split_into_words=True)["input_ids"]
    batch = collate(examples, np.arange(8), tokenizer.pad_token_id)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 1).all()


def byte_level_bpe(sentences):
    """A tokenizer as RoBERTa's, trained on the sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(map(" ".join, sentences), trainers.BpeTrainer(
        vocab_size=8000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, add_prefix_space=True, **names)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "byte-level BPE"])
def test_remembered_words_equal_the_tokenizers_in_thirteen_languages(shared, kind):
    folder = shared / "data" / "multi_ner"
    found = read_tagged(folder / "test.tsv", read_labels(folder / "labels.tsv"), 3000, 0)
    assert len(set(found.languages)) == 13
    tokenizer = {"WordPiece": lambda: load_tokenizer("sentence-transformers/all-MiniLM-L6-v2"),
                 "Unigram": lambda: load_tokenizer(shared / "weights" / "me5-small-q4-73k"),
                 "byte-level BPE": lambda: byte_level_bpe(found.words)}[kind]()
    remembered = pieces(tokenizer, found.words)
    distinct = {word for sentence in found.words for word in sentence}
    assert len(REMEMBERED[tokenizer][0]) == len(distinct)  # the fast way
    encoded = tokenizer(found.words, is_split_into_words=True, add_special_tokens=False)
    for i, got in enumerate(remembered):
        wanted = [[] for _ in got]
        for piece, word in zip(encoded["input_ids"][i], encoded.word_ids(i), strict=True):
            wanted[word].append(piece)
        assert got == [ids or [tokenizer.unk_token_id] for ids in wanted]


def test_processes_share_the_work_and_change_nothing(sentences, tokenizer, labels):
    alone, shared_out = (encode(sentences, tokenizer, 13, labels, n_jobs) for n_jobs in (1, 3))
    for name in ("input_ids", "labels", "words", "offsets", "sentences"):
        one, other = getattr(alone, name), getattr(shared_out, name)
        assert np.array_equal(one, other) and one.dtype == other.dtype, name
