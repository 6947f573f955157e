"""What the transfer set is made of: languages, the teacher's doubt, train.tsv, replaced mentions."""

import shutil

import numpy as np
import pytest
import torch
from test_stages import TOY, finished_smoke_run, run_stages, smoke_params

from xdistil import data, evaluate, models, transfer
from xdistil.data import DataError, Sentences
from xdistil.inputs import Inputs
from xdistil.provenance import depends
from xdistil.runs import Run

SIZES = np.array([600, 300, 90, 10])


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    return finished_smoke_run(tmp_path_factory)


@pytest.fixture
def half_done(smoke, tmp_path):
    """A run folder with a finished teacher and student, nothing distilled yet."""
    for name in ("teacher", "student-init"):
        shutil.copytree(smoke / name, tmp_path / "run" / name)
    return tmp_path / "run"


def transfer_of(folder, **overrides):
    params = smoke_params(folder, **overrides)
    return Inputs(params, Run(params)).sentences("transfer").words


@pytest.mark.parametrize("limit, temperature, counts", [
    (100, 1.00001, [60, 30, 9, 1]), (1000, 1, [600, 300, 90, 10]), (1000, 3, [600, 300, 90, 10]),
    (40, 1e9, [10, 10, 10, 10]), (100, 1e9, [30, 30, 30, 10]),  # the smallest gives all, the others share the rest
    (400, 1e9, [150, 150, 90, 10]), (76, 2, [34, 24, 13, 4]), (100, 0.5, [79, 20, 2, 0])])
def test_languages_give_their_part(limit, temperature, counts):
    languages = np.repeat(["d", "a", "c", "b"], SIZES)
    rows = transfer.select(np.random.default_rng(0).permutation(1000), languages, limit, temperature)
    found = np.array([(languages[rows] == name).sum() for name in "dacb"])
    assert sorted(set(rows)) == rows.tolist() and len(rows) == limit
    assert (found <= SIZES).all() and np.abs(found - counts).max() <= 1


def test_each_language_gives_its_first_of_the_order():
    order, languages = np.array([5, 0, 3, 1, 4, 2]), ["a", "a", "a", "a", "b", "b"]
    assert transfer.select(order, languages, 4, 1).tolist() == [0, 1, 3, 5]
    assert transfer.select(order, languages, 4, 1e9).tolist() == [0, 3, 4, 5]
    assert transfer.select(order, languages, 9, 2).tolist() == [0, 1, 2, 3, 4, 5]
    for wrong in ([""] * 6, ["a", "a", "a", "a", "b", ""]):
        with pytest.raises(DataError, match="language_temperature: 2 .*text<TAB>language; .*language_temperature: 1"):
            transfer.select(order, wrong, 4, 2)


def test_the_temperature_flattens_the_languages_of_a_file(half_done, tmp_path):
    text = tmp_path / "text.tsv"
    text.write_text("".join(f"{name} {i} .\t{name}\n" for name, n in (("en", 80), ("vi", 16)) for i in range(n)))
    def counts(**values):
        words = transfer_of(half_done, transfer_file=str(text), transfer_limit=24, **values)
        return [sum(name == first for first, *_ in words) for name in ("en", "vi")]

    assert counts(language_temperature=1.0001) == [20, 4] and counts(language_temperature=1000) == [12, 12]
    assert transfer_of(half_done, transfer_limit=24) == data.read_text(TOY / "transfer.tsv", 24, 42).words
    with pytest.raises(DataError, match="language_temperature: 2.*second column"):
        transfer_of(half_done, transfer_limit=24, language_temperature=2)


def test_entropy_is_that_of_all_labels_of_each_word(teacher, examples, sentences, labels, accelerator):
    tags, entropies = evaluate.predict(teacher, examples, sentences.words, labels, 0, accelerator, entropy=True)
    assert tags == evaluate.predict(teacher, examples, sentences.words, labels, 0, accelerator)[0]
    batch = data.collate(examples, [0], 0)
    with torch.inference_mode():
        shares = models.run_model(teacher, batch)[0][0].softmax(-1)
    wanted = -(shares * shares.log()).sum(-1)[batch["words"][0] >= 0]
    assert entropies[int(examples.sentences[0])][: len(wanted)] == pytest.approx(wanted.tolist(), abs=1e-5)


def doubt(words):
    """Nats a word of a teacher that is unsure of short sentences and sure of long ones."""
    return [1 / len(words)] * len(words)


def test_what_the_teacher_is_unsure_of_is_chosen_and_it_is_asked_once(half_done, monkeypatch):
    asked, every = [], data.read_text(TOY / "transfer.tsv").words

    def predict(_model, _examples, words, *_, entropy=False):
        asked.append(len(words))
        return [], list(map(doubt, words))

    monkeypatch.setattr(evaluate, "predict", predict)
    some = transfer_of(half_done, transfer_select="uncertain", transfer_limit=20)
    assert len(some) == 20 and some == [words for words in every if words in some]
    assert max(map(len, some)) <= min(len(words) for words in every if words not in some)
    assert transfer_of(half_done, transfer_select="uncertain", transfer_limit=20) == some
    assert len(transfer_of(half_done, transfer_select="uncertain", transfer_limit=30)) == 30
    assert asked == [len(every)]  # another limit asks nothing either
    (other := half_done / "other.tsv").write_text("one\ntwo words\nthree more words\n")
    assert transfer_of(half_done, transfer_select="uncertain", transfer_limit=2, transfer_file=str(other)) == [
        ["one"], ["two", "words"]]
    assert asked == [len(every), 3]


def test_before_there_is_a_teacher_a_random_subset_stands_in(tmp_path):
    assert len(transfer_of(tmp_path / "none", transfer_select="uncertain", transfer_limit=20)) == 20
    assert not (tmp_path / "none").exists()


def test_the_most_uncertain_of_the_real_teacher_are_distilled(half_done, accelerator):
    params = smoke_params(half_done, transfer_select="uncertain", transfer_limit=20, distil_epochs=1)
    run = run_stages(params, "hidden", "logits")
    inputs = Inputs(params, run)
    text, labels = data.read_text(TOY / "transfer.tsv"), inputs.labels
    _, each = evaluate.predict(inputs.load_teacher(), inputs.encode(text), text.words, labels, inputs.pad_id,
                               accelerator, entropy=True)
    means = list(map(np.mean, each))
    chosen = {tuple(words) for words in inputs.sentences("transfer").words}
    inside = [mean for words, mean in zip(text.words, means, strict=True) if tuple(words) in chosen]
    outside = [mean for words, mean in zip(text.words, means, strict=True) if tuple(words) not in chosen]
    assert len(inside) == 20 and min(inside) >= max(outside) - 1e-6
    assert [run.stage(name).metrics["teacher_windows"] for name in ("hidden", "logits")] == [
        len(inputs.read("transfer")[1]), 0]


def test_train_sentences_join_without_their_tags(half_done):
    text, train = data.read_text(TOY / "transfer.tsv").words, transfer_of(half_done, transfer_train=True)
    added = Inputs(params := smoke_params(half_done), Run(params)).sentences("train").words
    assert train == text + [words for words in added if words not in text] and len(train) > len(text) + 50
    few = transfer_of(half_done, transfer_train=True, transfer_limit=10, train_limit=5)
    assert len(few) == 15


def tagged(*rows):
    return Sentences(*map(list, zip(*((w.split(), t.split(), language) for w, t, language in rows), strict=True)))


def test_mentions_make_room_for_others_of_their_type_and_language():
    train = tagged(("Ann Lee met Bob .", "B-PER I-PER O B-PER O", "en"), ("Rome fell .", "B-LOC O O", "en"),
                   ("Cem Oslo gördü", "B-PER B-LOC O", "tr"), ("nothing here", "O O", "en"))
    made = transfer.replace_mentions(train, 50, train.words, 0)
    assert set(map(" ".join, made.words)) == {"Bob met Ann Lee ."}  # elsewhere there is no other mention
    assert made.tags == [["B-PER", "O", "B-PER", "I-PER", "O"]] and made.languages == ["en"]
    nothing = transfer.replace_mentions(train, 50, [*train.words, made.words[0]], 0)
    assert len(nothing) == 0 and len(transfer.replace_mentions(tagged(("a b", "O O", "en")), 5, [], 0)) == 0


def test_made_sentences_are_new_tagged_and_seeded(sentences):
    spans = {(tag[2:], word) for words, tags in zip(sentences.words, sentences.tags, strict=True)
             for word, tag in zip(words, tags, strict=True) if tag != "O"}
    made = transfer.replace_mentions(sentences, 100, sentences.words, 3)
    assert len(made) == 100 == len(set(map(tuple, made.words)))
    assert not {tuple(words) for words in made.words} & {tuple(words) for words in sentences.words}
    frames = {tuple(w for w, t in zip(words, tags, strict=True) if t == "O")
              for words, tags in zip(sentences.words, sentences.tags, strict=True)}
    for words, tags in zip(made.words, made.tags, strict=True):
        assert data.repair_iob2(tags) == (tags, 0)
        assert {(tag[2:], word) for word, tag in zip(words, tags, strict=True) if tag != "O"} <= spans
        assert tuple(w for w, t in zip(words, tags, strict=True) if t == "O") in frames  # the rest stays
    assert made == transfer.replace_mentions(sentences, 100, sentences.words, 3)
    assert made != transfer.replace_mentions(sentences, 100, sentences.words, 4)


def test_made_sentences_join_the_transfer_set_and_none_leaks(half_done, tmp_path, labels):
    plain, more = transfer_of(half_done), transfer_of(half_done, augment_mentions=0.5)
    made = more[len(plain) :]
    assert more[: len(plain)] == plain and len(made) == round(0.5 * len(plain))
    task = shutil.copytree(TOY, tmp_path / "task")  # one that would be made is a dev sentence
    with open(task / "dev.tsv", "a", encoding="utf-8") as file:
        file.write(f"{' '.join(made[0])}\t{' '.join(['O'] * len(made[0]))}\ten\n")
    (task / "test.tsv").unlink()  # not read before evaluation
    again = transfer_of(half_done, augment_mentions=0.5, task=str(task))[len(plain) :]
    assert made[1:] == again[: len(made) - 1] and made[0] not in again


@pytest.mark.parametrize("values, names", [
    ({"transfer_train": True}, {"transfer_train", "train file", "train_limit"}),
    ({"augment_mentions": 0.5}, {"augment_mentions", "train file", "train_limit"}),
    ({"transfer_select": "uncertain", "transfer_limit": 20}, {"transfer_select", "transfer_limit"}),
    ({"language_temperature": 2, "transfer_limit": 20}, {"language_temperature", "transfer_limit"})])
def test_stages_follow_from_how_the_set_is_made(smoke, values, names):
    old, new = smoke_params(smoke), smoke_params(smoke, **values)
    for stage in ("hidden", "logits"):
        before, after = (depends(params, Run(params), stage) for params in (old, new))
        assert {name for name in {**before, **after} if before.get(name) != after.get(name)} == names - (
            {"train_limit"} if new.train_limit is None else set())
    trimmed = depends(smoke_params(smoke, trim_vocab=True, **values), Run(new), "student-init")
    assert names <= set(trimmed)
