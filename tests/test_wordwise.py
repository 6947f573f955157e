"""Two tokenizers, the same words: a student that keeps its own is compared with its teacher word by word."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from test_stages import PLAIN, plain_teacher, read_rows, run_stages, smoke, smoke_params  # noqa: F401
from test_vocab import trained

from xdistil import data, explore, losses, models, stages, views, wordwise
from xdistil.alignment import measure_alignment
from xdistil.inputs import Inputs
from xdistil.models import CheckpointError, load_tokenizer, run_model
from xdistil.params import ParamsError, load_params
from xdistil.runs import STAGES, Run
from xdistil.students import check_shapes, fit_projection
from xdistil.targets import TargetSpec, TargetStore

SPEC = TargetSpec(hidden=(0, 4), attention=(2, 4), qkv=(4,))
KINDS = ("unigram", "bytes")


def both(sentences, tokenizer, other, seq_len, labels=()):
    """Windows as a student with `tokenizer` and a teacher with `other` read them."""
    theirs = data.encode(sentences, other, seq_len, labels, beside=tokenizer)
    return dataclasses.replace(data.encode(sentences, tokenizer, seq_len, labels, beside=other), teacher=theirs)


@pytest.fixture(scope="module")
def others(sentences):
    """A Unigram and a byte-level tokenizer, trained on the spot."""
    return {kind: trained(kind, [word for words in sentences.words for word in words]) for kind in KINDS}


def test_words_are_aligned_by_hand():
    teacher = transformers.BertTokenizer(vocab={p: i for i, p in enumerate(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "play", "##ing", "with", "fi", "##re"])})
    student = trained("bytes", ["a"])  # a piece for each byte and for the space before
    found = both(data.Sentences([["playing", "with", "fire"]]), student, teacher, 40)
    assert found.teacher.words.tolist() == [-1, 0, -2, 1, 2, -2, -1]
    assert found.words.tolist() == [-1, 0, *[-2] * 7, 1, *[-2] * 4, 2, *[-2] * 4, -1]
    batch, model = data.collate(found, [0], 1), torch.nn.Module()
    model.config = transformers.BertConfig()
    read = wordwise.as_teacher_reads(found, batch, model)
    assert read["input_ids"].tolist() == [[2, 5, 6, 7, 8, 9, 3]]
    states = torch.arange(7.0)[None, :, None, None].expand(1, 7, 2, 3)
    moved = wordwise.move_states(states, read, batch)
    assert moved[0, :, 1, 2].tolist() == [0, 1, *[0] * 7, 3, *[0] * 4, 4, *[0] * 4, 0]
    assert wordwise.compared(batch).tolist() == [[0, 1, *[0] * 7, 1, *[0] * 4, 1, *[0] * 4, 0]]


def test_attention_is_pooled_by_hand():
    read = {"words": torch.tensor([[-1, 3, -2, 4, -1]])}  # [CLS] a ##a b, then a word that another window owns
    batch = {"words": torch.tensor([[3, 4, -2, -1]]), "compared": torch.tensor([[1, 1, 0, 0]])}
    maps = torch.tensor([[[[.2] * 5, [.5, .1, .1, .2, .1], [.1, .2, .4, .1, .2], [.6, 0, .1, .1, .2], [.2] * 5]]])
    # a to a: (.1 + .1 + .2 + .4) / 2, a to b: (.2 + .1) / 2, scaled to 1; b to a: 0 + .1, b to b: .1
    wanted = torch.tensor([[.8 / 1.1, .3 / 1.1, 0, 0], [.5, .5, 0, 0], [0] * 4, [0] * 4])
    torch.testing.assert_close(wordwise.pool_maps(maps, read, batch)[0, 0], wanted)
    assert wordwise.pool_maps(maps, read, read) is maps  # one tokenizer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seq_len", [12, 16, 64])
def test_windows_hold_the_same_words_however_long_the_sentence(sentences, tokenizer, others, labels, kind, seq_len):
    long = data.Sentences(*([sum(x[i : i + 6], []) for i in range(0, 60, 6)]
                            for x in (sentences.words, sentences.tags)))
    found, alone = both(long, others[kind], tokenizer, seq_len, labels), data.encode(long, tokenizer, seq_len, labels)
    assert len(found) == len(found.teacher) >= len(alone) and (seq_len == 64 or len(found) > len(alone) > 30)
    assert np.array_equal(found.sentences, found.teacher.sentences)
    owned = [[x.words[a:b][x.words[a:b] >= 0].tolist() for a, b in zip(x.offsets, x.offsets[1:], strict=False)]
             for x in (found, found.teacher)]
    assert owned[0] == owned[1]
    for i, words in enumerate(long.words):  # each in one window
        assert sum((w for w, s in zip(owned[0], found.sentences, strict=True) if s == i), []) == [*range(len(words))]
    assert found.lengths.max() <= seq_len and found.teacher.lengths.max() <= seq_len
    assert all(np.array_equal(x.labels[x.words >= 0], found.labels[found.words >= 0]) for x in (found, found.teacher))


def store_of(teacher, examples, accelerator, folder, mode="disk"):
    return TargetStore(lambda: teacher, teacher.config, SPEC, examples, 0, accelerator, folder=folder, mode=mode)


def answers(store):
    """All that a store says, batch by batch, in a fixed order."""
    return list(store.batches("a", np.arange(24), 8))


def test_the_same_tokenizer_twice_gives_the_same_targets_at_first_sub_words(teacher, sentences, tokenizer, labels,
                                                                           examples, accelerator, tmp_path):
    twice = both(sentences, tokenizer, tokenizer, 32, labels)
    assert np.array_equal(twice.input_ids, examples.input_ids)
    plain, aligned, kept = (answers(store_of(teacher, x, accelerator, tmp_path / name, mode)) for x, name, mode in (
        (examples, "plain", "disk"), (twice, "own", "disk"), (twice, "own", "disk")))
    for one, other, again in zip(plain, aligned, kept, strict=True):
        first = one["words"] >= 0
        assert torch.equal(other["compared"], first.long()) and not first.all() and "compared" not in one
        for kind in ("hidden", "qkv", "logits"):
            assert torch.equal(one[f"teacher_{kind}"][first], other[f"teacher_{kind}"][first])
            assert not other[f"teacher_{kind}"][~first].any()
        real = other["attention_mask"] > 0
        for kind in ("hidden", "qkv", "logits"):  # read back from the disk
            assert torch.equal(again[f"teacher_{kind}"][real], other[f"teacher_{kind}"][real])
        assert torch.equal(again["teacher_attention"], other["teacher_attention"])


@pytest.mark.parametrize("kind", KINDS)
def test_targets_of_another_tokenizer_are_the_teachers_at_its_own_first_sub_words(
        teacher, sentences, tokenizer, others, labels, accelerator, tmp_path, kind):
    found = both(sentences, others[kind], tokenizer, 32, labels)
    for batch in answers(store_of(teacher, found, accelerator, tmp_path)):
        read = data.collate(found.teacher, batch["windows"].numpy(), 0)
        first, theirs = batch["words"] >= 0, read["words"] >= 0
        assert torch.equal(batch["words"][first], read["words"][theirs])
        with torch.inference_mode():
            logits, states, _ = run_model(teacher, read, True, True)
        torch.testing.assert_close(batch["teacher_logits"][first], logits[theirs])
        torch.testing.assert_close(batch["teacher_hidden"][first][:, 1].float(), states[4][theirs], rtol=8e-3,
                                   atol=1e-3)
        maps = batch["teacher_attention"].float()
        assert maps.shape[-2:] == 2 * (batch["input_ids"].shape[1],)
        sums = maps.sum(-1).movedim(-1, 1)
        torch.testing.assert_close(sums[first], torch.ones_like(sums[first]), rtol=0, atol=0.02)  # in bfloat16
        assert not sums[~first].any() and not maps.movedim(-1, 1)[~first].any()


@pytest.mark.parametrize("loss", [losses.attention_mse, losses.attention_kl])
def test_maps_pooled_from_themselves_differ_from_none_and_keep_a_gradient(loss, teacher, sentences, tokenizer, others,
                                                                         labels):
    found = both(sentences, others["unigram"], tokenizer, 32, labels)
    batch = data.collate(found, range(4), 1)
    read = wordwise.as_teacher_reads(found, batch, teacher)
    maps = run_model(teacher, read, False, True)[2][1]
    pooled = wordwise.pool_maps(maps, read, batch)
    assert float(loss(pooled.detach(), pooled.detach(), wordwise.compared(batch))) == 0
    value = loss(pooled, pooled.detach().flip(1), wordwise.compared(batch))
    value.backward()
    grad = teacher.bert.encoder.layer[1].attention.self.query.weight.grad
    assert float(value.detach()) > 0 and grad.isfinite().all() and grad.any()


def test_a_teacher_is_aligned_with_itself_and_its_head_is_found_again(teacher, sentences, tokenizer, labels,
                                                                     accelerator):
    twice = both(sentences, tokenizer, tokenizer, 32, labels)
    found = measure_alignment(teacher, teacher, {}, twice, 0, "cpu", hidden_pairs=[(4, 4)], attention_pairs=[(4, 4)])
    assert found["cosine"] == pytest.approx([1], abs=1e-5) and found["attention_kl"][0] == pytest.approx([0] * 4)
    assert [found["cka"][i][i] for i in range(5)] == pytest.approx([1] * 5, abs=1e-6)
    projection = fit_projection(teacher, teacher, twice, np.arange(len(twice)), 0, accelerator)
    assert (projection.weight - torch.eye(48)).abs().max() < 0.05


@pytest.fixture(scope="module")
def student(others, labels, tmp_path_factory):
    """A checkpoint of a student that reads bytes, as somebody else would hand it over."""
    folder, tokenizer = tmp_path_factory.mktemp("student"), others["bytes"]
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    models.save_model(models.from_config(config), tokenizer, folder)
    return folder


def own_params(folder, student, **values):
    """Parameters of a run in `folder` whose student keeps its own tokenizer."""
    return smoke_params(folder, **{"student_tokenizer": "own", "pt_student_checkpoint": str(student), "seq_len": 48,
                                   "compress_word_embedding": False, "freeze_word_embedding": False} | values)


@pytest.fixture(scope="module")
def own(smoke, student, tmp_path_factory):  # noqa: F811
    """The folder of a finished run whose student keeps its own tokenizer."""
    folder = tmp_path_factory.mktemp("own")
    run_stages(own_params(folder / "run", student, teacher_model_dir=str(plain_teacher(smoke, folder / "given"))))
    return folder / "run"


def params_of(own, student):
    return own_params(own, student, teacher_model_dir=str(own.parent / "given"))


def test_all_seven_stages_with_the_students_own_tokenizer(own, student, others, smoke, tmp_path, capsys):  # noqa: F811
    params, vocabulary = params_of(own, student), others["bytes"].get_vocab()
    run, teacher = Run(params), load_tokenizer(own.parent / "given").get_vocab()
    for name in ("tokenizer", "student-init", "hidden", "logits", "labels", "student"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(own / name)
        assert tokenizer.get_vocab() == vocabulary != teacher, name
    built, begun = run.stage("student-init").metrics, models.load_classifier(own / "student-init", ["O"], "x")
    assert built["pieces"] == len(vocabulary) and built["word_embeddings"] == "the student's own"
    given = models.load_classifier(student, ["O"], "x")
    assert all(torch.equal(x, y) for (n, x), y in zip(begun.state_dict().items(), given.state_dict().values(),
                                                      strict=True) if "classifier" not in n)
    for name in ("hidden", "logits"):  # it learns
        scores = [row["score"] for row in run.stage(name).history if row["kind"] == "eval"]
        assert scores[-1] < 0.97 * scores[0]
    hidden = run.stage("hidden").metrics
    assert all(b < a for b, a in zip(*(hidden[f"alignment_{x}"]["cosine"] for x in ("before", "after")), strict=True))
    found, alone = run.stage("evaluation").metrics, Run(smoke_params(smoke)).stage("teacher").metrics
    assert found["teacher"]["parameters"] == alone["parameters"] and found["student"]["pieces"] == len(vocabulary)
    assert found["teacher"]["dev"] == Inputs(params, run).teacher.score(
        Inputs(params, run).load_teacher(), "dev", stages.open_accelerator("cpu", "float32", quiet=True))[0]
    rows = sorted(read_rows(own / "evaluation/predictions.tsv"), key=lambda row: len(row[0]))[:8]
    words = [row[0].split(" ") for row in rows]
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, str(own / "student"), json.dumps(words)], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tags, _, _ = json.loads(done.stdout.splitlines()[-1])
    whole = [(found, row[1].split(" ")) for found, row in zip(tags, rows, strict=True) if found]
    assert len(whole) > 2 and all(found == ours for found, ours in whole)
    capsys.readouterr()
    run_stages(params)  # all is done
    assert capsys.readouterr().out.count("done before with the same") == len(STAGES)


def test_what_notebooks_show_of_it(own, student):
    params = params_of(own, student)
    shown = views.attention_example(params, Run(params), text="Anna works in Berlin .")
    assert len(shown["tokens"]) == 5 and shown["teacher"].shape == shown["student"].shape == (4, 5, 5)
    for name in ("teacher", "student"):
        assert shown[name].sum(-1) == pytest.approx(1, abs=1e-4)
    explorer = explore.Explorer(views.Pair(params, Run(params)))
    explorer.text.value, explorer.tabs.selected_index = "Anna works in Berlin .", 1
    assert explorer.look.tokens == ["Anna", "works", "in", "Berlin", "."]  # compared by words
    assert explorer.similarity.value and len(explorer.look.heads[0]) == 2
    assert {row["model"]: row["pieces"] for row in views.sizes(Run(params)).rows}["student"] == len(
        load_tokenizer(student))
    assert all(row["GB"] > 0 for row in views.needs(params, Run(params)).rows)


def test_an_interrupted_stage_1_ends_with_the_weights_of_an_unbroken_one(own, student, tmp_path, monkeypatch):
    params = own_params(tmp_path / "run", student, teacher_model_dir=str(own.parent / "given"))
    shutil.copytree(own, tmp_path / "run")
    for later in ("hidden", "logits", "labels", "evaluation", "student", "targets"):
        shutil.rmtree(tmp_path / "run" / later)
    asked, ask = [], TargetStore.ask

    def stop(self, batch):
        asked.append(batch)
        if len(asked) == 5:
            raise KeyboardInterrupt
        return ask(self, batch)
    monkeypatch.setattr(TargetStore, "ask", stop)
    with pytest.raises(KeyboardInterrupt):
        stages.distil_hidden(params, Run(params))
    stages.distil_hidden(params, Run(params))
    one, other = (models.load_classifier(x / "hidden", ["O"], "x").state_dict() for x in (own, tmp_path / "run"))
    assert all(torch.equal(one[n], other[n]) for n in one if "classifier" not in n)


def test_another_reading_has_other_targets(own, student, tmp_path):
    shutil.copytree(own, tmp_path / "run")
    values = {"teacher_model_dir": str(own.parent / "given"), "compress_word_embedding": True}
    run_stages(own_params(tmp_path / "run", student, student_tokenizer="teacher", **values), "student-init", "hidden")
    assert len(list((own / "targets").iterdir())) == 1 and len(list((tmp_path / "run/targets").iterdir())) == 2


def test_a_trimmed_vocabulary_of_its_own_and_relations(own, student, smoke, tmp_path):  # noqa: F811
    params = own_params(tmp_path / "run", student, teacher_model_dir=str(own.parent / "given"), trim_vocab=True,
                        attention_loss="relation", hidden_loss="cka", freeze_word_embedding=True, train_limit=12,
                        transfer_limit=20, transfer_select="uncertain", hard_label_weight=0.5)
    run = run_stages(params)
    built, full = run.stage("student-init").metrics, len(load_tokenizer(student))
    assert built["pieces"] < full and len(load_tokenizer(run.dir / "student")) == built["pieces"]
    assert built["teacher_dev"] == run.stage("teacher").metrics["dev"]  # who reads as before
    inputs = Inputs(params, run)
    assert len(models.word_embedding(inputs.load_teacher())) == len(inputs.teacher.tokenizer)
    tables = [models.word_embedding(models.load_classifier(run.dir / x, ["O"], "x"))
              for x in ("student-init", "labels")]
    assert torch.equal(*tables)


@pytest.mark.parametrize("values", [
    {}, {"student_init": "teacher_layers"}, {"pt_student_checkpoint": "x", "distil": False},
    {"pt_student_checkpoint": "x", "do_NER": False, "task": "x"},
    {"pt_student_checkpoint": "x", "compress_word_embedding": True}])
def test_what_does_not_go_together_is_refused(values):
    with pytest.raises(ParamsError, match="^student_tokenizer: own .* set distil and do_NER: true, name "
                       "pt_student_checkpoint .*compress_word_embedding out, or set student_tokenizer: teacher"):
        load_params({"student_tokenizer": "own"} | values)
    with pytest.raises(ParamsError, match="^student_tokenizer: found 'mine'"):
        load_params({"student_tokenizer": "mine"})
    load_params({"student_tokenizer": "own", "pt_student_checkpoint": "x", "freeze_word_embedding": True})


def test_a_checkpoint_without_a_tokenizer_is_refused_before_anything_is_written(student, tmp_path):
    shutil.copytree(student, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    params = own_params(tmp_path / "run", tmp_path / "bare")
    with pytest.raises(CheckpointError, match="^pt_student_checkpoint: "):
        stages.check(params, Run(params))
    assert not (tmp_path / "run").exists()


def test_positions_are_counted_from_the_padding_id_of_its_own_tokenizer():
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    teacher = transformers.BertConfig(**sizes, pad_token_id=60)
    student = transformers.RobertaConfig(**sizes, pad_token_id=1, max_position_embeddings=50)
    shapes = {"seq_len": 48, "init": "checkpoint", "compress": False, "distil_attention": True}
    check_shapes(teacher, student, **shapes, own_tokenizer=True)
    with pytest.raises(CheckpointError, match="counts positions from the padding id, 60"):
        check_shapes(teacher, student, **shapes)
