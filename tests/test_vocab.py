"""A trimmed vocabulary reads what it was trimmed for as before, and every other text without a new unknown piece."""

import hashlib
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from test_stages import PLAIN, plain_teacher, read_rows, run_stages, smoke, smoke_params  # noqa: F401
from tiny import pieces
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from xdistil import data, models, stages, views, vocab
from xdistil.inputs import Inputs
from xdistil.models import CheckpointError, load_classifier, load_tokenizer, run_model, save_model
from xdistil.provenance import is_done
from xdistil.runs import Run
from xdistil.unfreeze import word_embedding

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def trained(kind: str, text: list[str]):
    """A tokenizer of a kind, trained on the spot."""
    if kind == "wordpiece":
        tokenizer, trainer = Tokenizer(kinds.WordPiece(unk_token="<unk>")), trainers.WordPieceTrainer
        tokenizer.pre_tokenizer, more = pre_tokenizers.BertPreTokenizer(), {}
    elif kind == "bytes":
        tokenizer, trainer = Tokenizer(kinds.BPE()), trainers.BpeTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        more, tokenizer.decoder = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}, decoders.ByteLevel()
    elif kind == "bpe":
        tokenizer, trainer = Tokenizer(kinds.BPE(unk_token="<unk>", byte_fallback=True)), trainers.BpeTrainer
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        more = {"special_tokens": [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256))]}
    else:
        tokenizer, trainer = Tokenizer(kinds.Unigram()), trainers.UnigramTrainer
        tokenizer.pre_tokenizer, more = pre_tokenizers.Metaspace(), {"unk_token": "<unk>"}
    tokenizer.train_from_iterator(text, trainer(**{"vocab_size": 900, "special_tokens": SPECIAL,
                                                   "show_progress": False} | more))
    pair = [("</s>", tokenizer.token_to_id("</s>")), ("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.RobertaProcessing(*pair) if kind == "bytes" else (
        processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pair))
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token", "mask_token"), SPECIAL, strict=True))
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, cls_token="<s>",
                                                 sep_token="</s>")
    found.add_tokens(["@@", "<ent>"])  # beyond the model's own vocabulary
    return found


KINDS = ("wordpiece", "bytes", "bpe", "unigram")


@pytest.fixture(scope="module")
def words(toy, labels):
    """Words to keep, and others."""
    kept, other = ([word for sentence in data.read_tagged(toy / f"{name}.tsv", labels).words for word in sentence]
                   for name in ("train", "test"))
    return kept[:150], other + kept[150:]


@pytest.fixture(scope="module", params=KINDS)
def trimmed(request, words):
    """(full, trimmed tokenizer, kept ids) of a kind, trimmed to the words to keep."""
    full = trained(request.param, words[0] + words[1])
    used = {i for ids in pieces(full, [words[0]])[0] for i in ids}
    return full, *vocab.trim_tokenizer(full, used)


def shuffled(words: list[str], n: int) -> list[str]:
    """Words that were never seen, of letters that were."""
    draw, letters = random.Random(0), "".join(words)
    return ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(n)]


def texts(tokenizer, words):
    """The pieces of each word, as text."""
    return [tokenizer.convert_ids_to_tokens(ids) for ids in pieces(tokenizer, [words])[0]]


def check_reading(full, small, kept, words, others):
    """What any trimmed tokenizer promises."""
    assert len(small) == len(kept) < len(full)
    assert sorted(small.get_vocab().values()) == list(range(len(kept)))
    assert small.convert_ids_to_tokens(list(range(len(kept)))) == full.convert_ids_to_tokens(kept)
    assert texts(small, words) == texts(full, words)
    before, after = (pieces(t, [others])[0] for t in (full, small))
    for a, b, word in zip(before, after, others, strict=True):
        assert full.unk_token_id in a or small.unk_token_id not in b, word
    assert vocab.share_cut_differently(full, small, kept, [words]) == 0
    text = " ".join(words[:20])
    assert [kept[i] for i in small(text)["input_ids"]] == full(text)["input_ids"]  # special tokens among them
    assert small.all_special_tokens == full.all_special_tokens


def test_what_was_used_is_cut_as_before_and_nothing_new_is_unknown(trimmed, words):
    others = words[1] + shuffled(words[0] + words[1], 3000)
    check_reading(*trimmed, words[0], others)
    share = vocab.share_cut_differently(*trimmed, [words[1]])
    differ = [a != b for a, b in zip(*(texts(t, words[1]) for t in trimmed[:2]), strict=True)]
    assert 0 < share < 1 and share == pytest.approx(sum(differ) / len(differ))


def test_a_trimmed_tokenizer_is_saved_and_loaded_like_any(trimmed, words, tmp_path):
    _, small, _ = trimmed
    small.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == small.get_vocab() and type(again) is type(small)
    assert again(words[1], is_split_into_words=True)["input_ids"] == small(
        words[1], is_split_into_words=True)["input_ids"]
    assert again.get_added_vocab() == small.get_added_vocab() and "@@" in again.get_added_vocab()
    assert "tmp" not in (tmp_path / "tokenizer_config.json").read_text()


def test_added_tokens_stay_whole(trimmed):
    full, small, kept = trimmed
    ids = small("@@ <mask>", add_special_tokens=False)["input_ids"]
    assert [kept[i] for i in ids] == full("@@ <mask>", add_special_tokens=False)["input_ids"]
    assert small.convert_ids_to_tokens(small.mask_token_id) == "<mask>"


def test_merged_pieces_keep_what_they_are_merged_from():
    model = {"type": "BPE", "vocab": {p: i for i, p in enumerate(["a", "b", "c", "ab", "bc", "abc", "ca"])},
             "merges": [["b", "c"], ["a", "b"], ["a", "bc"], ["c", "a"]]}
    assert vocab.kept_pieces(model, {"abc"}) == {"a", "b", "c", "bc", "abc"}  # by way of bc, never of ab


def test_pieces_that_letters_cannot_spell_are_kept():
    """x begins no word by itself: without `xa` the word "xab" would become unknown."""
    model = {"type": "WordPiece", "continuing_subword_prefix": "##", "unk_token": "[UNK]", "vocab": {p: i for i, p in (
        enumerate(["[UNK]", "a", "##a", "b", "##b", "##x", "xa", "ab", "##ab", "ax"]))}}
    assert vocab.kept_pieces(model, set()) == {"[UNK]", "a", "##a", "b", "##b", "##x", "xa"}


def test_other_kinds_are_refused():
    words = Tokenizer(kinds.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(CheckpointError, match="^trim_vocab: .*WordLevel.*set trim_vocab: false"):
        vocab.trim_tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=words), [1])


@pytest.mark.parametrize("tokenizer_class", [transformers.RobertaTokenizer, transformers.BertTokenizer,
                                             transformers.XLMRobertaTokenizer])
def test_the_classes_of_real_checkpoints_survive(tokenizer_class, words, tmp_path):
    """Their own classes rebuild the tokenizer when loading."""
    if tokenizer_class is transformers.BertTokenizer:
        plain = trained("wordpiece", words[0] + words[1])
        full = tokenizer_class(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {
            piece: i + 5 for i, piece in enumerate(p for p in sorted(plain.get_vocab()) if p not in SPECIAL)})
    else:
        kind = "bytes" if tokenizer_class is transformers.RobertaTokenizer else "unigram"
        plain = trained(kind, words[0] + words[1])
        model = json.loads(plain.backend_tokenizer.to_str())["model"]
        merges = {"merges": [tuple(m) for m in model["merges"]], "add_prefix_space": True} if "merges" in model else {}
        full = tokenizer_class(vocab=model["vocab"] if merges else [tuple(x) for x in model["vocab"]], **merges)
    used = {i for ids in pieces(full, [words[0]])[0] for i in ids}
    small, kept = vocab.trim_tokenizer(full, used)
    assert type(small) is tokenizer_class
    check_reading(full, small, kept, words[0], words[1] + shuffled(words[0] + words[1], 500))
    small.save_pretrained(tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab() == small.get_vocab()


@pytest.mark.data
def test_the_real_tokenizers_of_a_unigram_and_a_wordpiece_checkpoint(shared):
    sentences = data.read_text(shared / "data/multi_ner/transfer.tsv", 3000).words
    seen, others = ([word for sentence in part for word in sentence] for part in (sentences[:400], sentences[400:]))
    for full in (load_tokenizer(shared / "weights/me5-multi-ner-teacher"),
                 load_tokenizer("sentence-transformers/all-MiniLM-L6-v2")):
        used = {i for ids in pieces(full, [seen])[0] for i in ids}
        small, kept = vocab.trim_tokenizer(full, used)
        assert len(kept) < 0.6 * len(full)
        check_reading(full, small, kept, seen, others + shuffled(others, 2000))


def test_the_teacher_answers_as_before(teacher, tokenizer, examples, sentences, labels):
    small, kept = vocab.trim_tokenizer(tokenizer, set(examples.input_ids.tolist()))
    again = data.encode(sentences, small, 32, labels)
    assert [kept[i] for i in again.input_ids] == examples.input_ids.tolist()
    batches = [data.collate(x, range(8), pad) for x, pad in ((examples, 0), (again, small.pad_token_id))]
    rows = word_embedding(teacher).detach().clone()
    with torch.inference_mode():
        before, _, _ = run_model(teacher, batches[0])
        after, _, _ = run_model(vocab.trim_model(teacher, kept), batches[1])
    assert (before - after)[batches[0]["attention_mask"] > 0].abs().max() < 1e-6
    assert torch.equal(word_embedding(teacher), rows[kept]) and teacher.config.vocab_size == len(kept)
    assert teacher.get_input_embeddings().num_embeddings == len(kept)
    assert teacher.config.pad_token_id == small.pad_token_id


def test_special_ids_of_the_config_move_along_and_roberta_must_not():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 8}
    model = vocab.trim_model(models.from_config(transformers.BertConfig(**sizes, pad_token_id=7, eos_token_id=9)),
                             [0, 2, 7, 9])
    assert (model.config.pad_token_id, model.config.eos_token_id) == (2, 3)
    roberta = models.from_config(transformers.RobertaConfig(**sizes))
    assert vocab.trim_model(roberta, [0, 1, 2, 9]).config.pad_token_id == 1
    with pytest.raises(CheckpointError, match="^trim_vocab: the padding id 1 .*set trim_vocab: false"):
        vocab.trim_model(roberta, [1, 2])


def state(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.rglob("*"))
            if p.is_file()}


@pytest.mark.slow
def test_a_whole_run_on_a_trimmed_vocabulary(smoke, tmp_path, capsys):  # noqa: F811
    given = plain_teacher(smoke, tmp_path / "given")
    before = state(given)
    params = smoke_params(tmp_path / "run", teacher_model_dir=str(given), trim_vocab=True, train_limit=12, seq_len=96,
                          transfer_limit=20)
    run = run_stages(params)
    assert state(given) == before  # the teacher stays as it was given
    built, plain = (Run(p).stage("student-init").metrics for p in (params, smoke_params(smoke)))
    assert built["pieces"] < built["teacher"]["pieces"] == plain["pieces"] == plain["teacher"]["pieces"]
    assert built["mb_saved"] == pytest.approx((plain["parameters"] - built["parameters"]) * 4 / 1e6)
    assert 0 < built["dev_words_cut_differently"] < 1
    assert f"[student-init] vocabulary: {built['pieces']:,} of {plain['pieces']:,} pieces" in capsys.readouterr().out
    assert built["teacher_dev"].keys() == run.stage("teacher").metrics["dev"].keys()
    shown = {row["model"]: row["pieces"] for row in views.sizes(run).rows}
    assert shown == {"teacher": plain["pieces"], "student": built["pieces"]}
    found = run.stage("evaluation").metrics
    assert found["teacher"]["parameters"] == run.stage("teacher").metrics["parameters"]  # of the one that was given
    assert found["student"]["parameters"] == built["parameters"]
    inputs = Inputs(params, run)
    assert len(inputs.tokenizer) == built["pieces"] == len(word_embedding(inputs.load_teacher()))
    assert views.attention_example(params, run)["tokens"]
    for name in ("student-init", "labels", "student"):
        assert len(load_tokenizer(run.dir / name)) == built["pieces"]
    rows = sorted(read_rows(run.dir / "evaluation/predictions.tsv"), key=lambda row: len(row[0]))[:8]
    words = [row[0].split(" ") for row in rows]
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, str(run.dir / "student"), json.dumps(words)],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tags, _, _ = json.loads(done.stdout.splitlines()[-1])
    whole = [(found, row[1].split(" ")) for found, row in zip(tags, rows, strict=True) if found]  # else past seq_len
    assert len(whole) > 2 and all(found == ours for found, ours in whole)


@pytest.fixture
def begun(smoke, tmp_path):  # noqa: F811
    """The folder of a run whose teacher is done."""
    folder = tmp_path / "run"
    for name in ("teacher", "task"):
        if (smoke / name).is_dir():
            shutil.copytree(smoke / name, folder / name)
    return folder


def test_the_text_is_part_of_what_a_trimmed_student_follows_from(begun, tmp_path):
    task = shutil.copytree(Path(smoke_params(begun).task), tmp_path / "task")
    texts = {trim: smoke_params(begun, task=str(task), trim_vocab=trim) for trim in (False, True)}
    for trim, params in texts.items():
        run_stages(params, "student-init", "student-init")
        assert is_done(params, Run(params), "student-init")
        with open(task / "transfer.tsv", "a", encoding="utf-8") as file:
            file.write("one sentence more\n")
        assert is_done(params, Run(params), "student-init") == (not trim)
    with pytest.raises(RuntimeError, match="transfer file changed .*run build_student first"):
        stages.distil_hidden(params, Run(params))


def test_a_student_checkpoint_on_the_teachers_vocabulary_is_trimmed_too(smoke, labels, tmp_path):  # noqa: F811
    given, folder = plain_teacher(smoke, tmp_path / "given"), tmp_path / "student"
    tokenizer = load_tokenizer(given)
    config = transformers.BertConfig(vocab_size=len(tokenizer), hidden_size=20, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=32, num_labels=len(labels))
    save_model(models.from_config(config), tokenizer, folder)
    params = smoke_params(tmp_path / "run", teacher_model_dir=str(given), student_init="checkpoint", trim_vocab=True,
                          pt_student_checkpoint=str(folder), train_limit=12, transfer_limit=20,
                          compress_word_embedding=False, freeze_word_embedding=False)
    run = run_stages(params, "teacher", "student-init")
    kept = json.loads((run.dir / "student-init/kept_ids.json").read_text())
    rows = [word_embedding(load_classifier(x, labels, "x")) for x in (folder, run.dir / "student-init")]
    assert torch.equal(rows[0][kept], rows[1]) and len(kept) < len(tokenizer)
