"""Every encoder family as a teacher and, where transformers has a token classifier for it, as a student."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tiny import head_of
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as pieces
from torch import nn
from transformers import AutoModelForTokenClassification

from xdistil import data, dropout, families, losses, models, stages, students
from xdistil.frozen import FrozenStates, run_upper
from xdistil.params import load_params
from xdistil.runs import STAGES, Run
from xdistil.unfreeze import encoder_layers, freeze_to, layer_groups, unfreezing_steps, word_embedding

BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
DEBERTA = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
XLNET = ("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", "<mask>", "<eod>", "<eop>")
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 24,
         "max_position_embeddings": 40}
DISENTANGLED = SIZES | {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
                        "type_vocab_size": 0}


def learn(text, model, split, trainer, **options):
    """The model part of tokenizer.json, learnt from the toy sentences."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.train_from_iterator(text, trainer(show_progress=False, **options))
    return json.loads(tokenizer.to_str())["model"]


@functools.cache  # ties are broken at random: one vocabulary for all families that share it
def wordpiece(text, special):
    return learn(text, pieces.WordPiece(unk_token="[UNK]"), pre_tokenizers.BertPreTokenizer(),
                 trainers.WordPieceTrainer, vocab_size=600, special_tokens=list(special))["vocab"]


@functools.cache
def unigram(text, special, unknown):
    found = learn(text, pieces.Unigram(), pre_tokenizers.Metaspace(), trainers.UnigramTrainer, vocab_size=400,
                  special_tokens=list(special), unk_token=unknown)
    return [(piece, score) for piece, score in found["vocab"]]


def bpe(text, special, split=None, **options):
    byte_level = pre_tokenizers.ByteLevel
    found = learn(text, pieces.BPE(**{"unk_token": "<unk>"} if options else {}, **options),
                  split or byte_level(add_prefix_space=True), trainers.BpeTrainer, vocab_size=600,
                  special_tokens=list(special), initial_alphabet=[] if split else byte_level.alphabet(), **options)
    return {"vocab": found["vocab"], "merges": [tuple(pair) for pair in found["merges"]]}


def modernbert_tokenizer(text):
    tokenizer = Tokenizer(pieces.BPE(**bpe(text, BERT)))
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[
        ("[CLS]", 2), ("[SEP]", 3)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_input_names=["input_ids", "attention_mask"])


def openai_tokenizer(text):
    text, split = [x.lower() for x in text], pre_tokenizers.BertPreTokenizer()
    return transformers.OpenAIGPTTokenizer(**bpe(text, ["<unk>"], split, end_of_word_suffix="</w>"))


def ctrl_tokenizer(text, folder):
    found = bpe(text, ["<unk>"], pre_tokenizers.WhitespaceSplit(), end_of_word_suffix="</w>")
    names = {piece: piece[:-4] if piece.endswith("</w>") else piece if piece == "<unk>" else f"{piece}@@"
             for piece in found["vocab"]}
    (folder / "vocab.json").write_text(json.dumps({names[piece]: i for piece, i in found["vocab"].items()}))
    merges = "".join(f"{' '.join(pair)}\n" for pair in found["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    return transformers.CTRLTokenizer(folder / "vocab.json", folder / "merges.txt")


def bert_tokenizer(text, _):
    return transformers.BertTokenizer(vocab=wordpiece(text, BERT), do_lower_case=False)


# the config and the tokenizer of each family, and how many special tokens stand before and after a text
FAMILIES = {
    "bert": (SIZES, bert_tokenizer, (1, 1)),
    "electra": (SIZES | {"embedding_size": 8}, bert_tokenizer, (1, 1)),
    "distilbert": ({"dim": 16, "n_layers": 4, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 40},
                   bert_tokenizer, (1, 1)),
    "roberta": (SIZES | {"pad_token_id": 1},
                lambda text, _: transformers.RobertaTokenizer(**bpe(text, ROBERTA)), (1, 1)),
    "xlm-roberta": (SIZES | {"pad_token_id": 1}, lambda text, _: transformers.XLMRobertaTokenizer(
        vocab=unigram(text, ROBERTA, "<unk>")), (1, 1)),
    "camembert": (SIZES | {"pad_token_id": 1}, lambda text, _: transformers.CamembertTokenizer(
        vocab=unigram(text, ROBERTA, "<unk>")), (1, 1)),
    "albert": (SIZES | {"embedding_size": 8}, lambda text, _: transformers.AlbertTokenizer(
        vocab=unigram(text, ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"), "<unk>"), do_lower_case=False), (1, 1)),
    "deberta": (DISENTANGLED, lambda text, _: transformers.DebertaTokenizer(**bpe(text, DEBERTA)), (1, 1)),
    "deberta-v2": (DISENTANGLED | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True},
                   lambda text, _: transformers.DebertaV2Tokenizer(vocab=unigram(text, DEBERTA, "[UNK]"), unk_id=3),
                   (1, 1)),
    "mpnet": (SIZES | {"pad_token_id": 1}, lambda text, _: transformers.MPNetTokenizer(
        vocab=wordpiece(text, ("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>")), do_lower_case=False), (1, 1)),
    "modernbert": (SIZES | {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2,
                            "sep_token_id": 3, "local_attention": 4, "embedding_dropout": 0.1, "mlp_dropout": 0.1,
                            "attention_dropout": 0.1},
                   lambda text, _: modernbert_tokenizer(text), (1, 1)),
    "xlm": ({"emb_dim": 16, "n_layers": 4, "n_heads": 4, "max_position_embeddings": 40, "pad_token_id": 0},
            bert_tokenizer, (1, 1)),  # its own tokenizer needs sacremoses
    "xlnet": ({"d_model": 16, "n_layer": 4, "n_head": 4, "d_inner": 24}, lambda text, _: transformers.XLNetTokenizer(
        vocab=unigram(text, XLNET, "<unk>")), (0, 2)),
    "openai-gpt": ({"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 40},
                   lambda text, _: openai_tokenizer(text), (0, 0)),
    "gpt2": ({"n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 40, "bos_token_id": 0, "eos_token_id": 0},
             lambda text, _: transformers.GPT2Tokenizer(**bpe(text, ["<|endoftext|>"])), (0, 0)),
    "ctrl": ({"n_embd": 16, "n_layer": 4, "n_head": 4, "dff": 24, "n_positions": 40}, ctrl_tokenizer, (0, 0)),
}
CAUSAL = ("openai-gpt", "gpt2", "ctrl")
NO_CLASSIFIER = ("openai-gpt", "ctrl")
STUDENTS = [name for name in FAMILIES if name not in CAUSAL]
each_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory, sentences):
    """The folder of a family's tiny encoder, without a head, as the hub would give it."""
    text = tuple(" ".join(words) for words in sentences.words)

    @functools.cache
    def build(name):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        sizes, make_tokenizer, _ = FAMILIES[name]
        tokenizer = make_tokenizer(text, folder)
        tokenizer.save_pretrained(folder)
        config = transformers.AutoConfig.for_model(name, vocab_size=len(tokenizer), **sizes)
        transformers.AutoModel.from_config(config).save_pretrained(folder)
        return folder

    return build


@pytest.fixture
def teacher_of(checkpoint, labels):
    """A family's teacher with eager attention in eval mode, and its tokenizer."""

    def load(name):
        model = models.load_classifier(checkpoint(name), labels, "pt_teacher_checkpoint").eval()
        models.return_maps(model)
        return model, models.load_tokenizer(checkpoint(name))

    return load


@pytest.fixture
def encoded(sentences, labels):
    return lambda tokenizer: data.encode(sentences, tokenizer, 32, labels)


def some(examples, pad_id):
    """A batch of short and long windows."""
    return data.collate(examples, np.argsort(examples.lengths)[::9], pad_id)


@each_family
def test_words_become_pieces_with_the_special_tokens_of_the_family(name, teacher_of, sentences, encoded):
    tokenizer, found = teacher_of(name)[1], encoded(teacher_of(name)[1])
    before, after = data.special_tokens(tokenizer)
    assert (len(before), len(after)) == FAMILIES[name][2]
    owned = found.words >= 0
    assert owned.sum() == sum(map(len, sentences.words)) == (found.labels != data.IGNORED).sum()
    assert (found.input_ids != tokenizer.pad_token_id).all() or tokenizer.pad_token == tokenizer.unk_token
    first = tokenizer.convert_ids_to_tokens(found.input_ids[owned].tolist())
    if name in ("roberta", "deberta", "modernbert", "gpt2"):
        assert all(piece.startswith("Ġ") for piece in first)
    whole = tokenizer(" ".join(sentences.words[3]))["input_ids"]  # as a pipeline would give it, punctuation apart
    assert set(whole[: len(before)]) == set(before) and whole[len(whole) - len(after) :] == after


@each_family
def test_a_teacher_answers_whole_and_padding_changes_nothing(name, teacher_of, encoded):
    teacher, tokenizer = teacher_of(name)
    batch = some(encoded(tokenizer), tokenizer.pad_token_id)
    mask, (n, width) = batch["attention_mask"], batch["attention_mask"].shape
    assert 0 < mask.sum() < mask.numel()
    with torch.no_grad():
        logits, states, maps = models.run_model(teacher, batch, True, True)
        alone = [models.run_model(teacher, {k: v[i : i + 1, : int(mask[i].sum())] for k, v in batch.items()
                                            if k != "windows"})[0][0] for i in range(n)]
    assert [x.shape for x in states] == [(n, width, 16)] * 5 and [x.shape for x in maps] == [(n, 4, width, width)] * 4
    torch.testing.assert_close(logits[mask > 0], torch.cat(alone), rtol=1e-4, atol=1e-5)
    for found in maps:
        rows = found.transpose(1, 2)[mask > 0]  # of real tokens
        torch.testing.assert_close(rows.sum(-1), torch.ones(rows.shape[:2]))
        assert (found * (mask[:, None, :, None] > mask[:, None, None])).abs().max() == 0  # nothing for padding
        assert (found.triu(1).abs().max() == 0) == (name in CAUSAL)
    if name != "modernbert":
        torch.testing.assert_close(head_of(teacher)(states[-1]), logits)


@each_family
def test_a_teacher_is_distilled_into_a_student_from_scratch(name, teacher_of, encoded, labels):
    teacher, tokenizer = teacher_of(name)
    batch = some(encoded(tokenizer), tokenizer.pad_token_id)
    config = students.student_config(teacher.config, "scratch", None, hidden_size=8, num_hidden_layers=2,
                                     num_attention_heads=4, intermediate_size=None)
    students.check_shapes(teacher.config, config, seq_len=32, init="scratch", compress=True, distil_attention=True)
    student, _ = students.build_student(config, teacher, "scratch", None, labels, tokenizer, True)
    assert student.config.pad_token_id == tokenizer.pad_token_id == word_embedding_padding(student)
    models.return_maps(student)
    pairs = students.spread(2, 4, "uniform")
    both = nn.ModuleDict({"student": student, "projections": students.make_projections(
        pairs, students.state_widths(student.config), 16)})
    with torch.no_grad():
        _, states, maps = models.run_model(teacher, batch, True, True)
    goal = {"teacher_hidden": torch.stack([states[t] for _, t in pairs], 2),
            "teacher_attention": torch.stack([maps[t - 1] for _, t in pairs[1:]], 1)}
    for kinds in (("mse", "mse"), ("cosine", "kl")):
        terms = students.distil_terms(pairs, pairs[1:], *kinds)(both, batch | goal)
        assert len(terms) == 5 and all(torch.isfinite(x) and x > 0 for x in terms.values())
        sum(terms.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in both.parameters() if p.grad is not None)
    students.fold_head(student, teacher, both["projections"]["2"])


@each_family
def test_relations_are_distilled_where_queries_keys_and_values_are_found(name, teacher_of, encoded):
    teacher, tokenizer = teacher_of(name)
    batch = some(encoded(tokenizer), tokenizer.pad_token_id)
    both = nn.ModuleDict({"student": teacher, "projections": nn.ModuleDict()})
    terms = students.distil_terms([], [(2, 2), (4, 4)], "mse", "relation", 4)
    if name in ("deberta", "xlnet"):  # one projection of interleaved heads; parameters, not modules
        with pytest.raises(models.CheckpointError, match="^attention_loss: .*; set attention_loss: kl, or"):
            terms(both, batch)
        return
    with torch.no_grad():
        with models.keep_qkv(teacher, (2, 4)) as qkv:
            _, states, _ = models.run_model(teacher, batch, True)
        assert [x.shape for x in qkv.values()] == [(*batch["input_ids"].shape, 3, 16)] * 2
        assert not torch.equal(qkv[2], qkv[4])  # the layers of ALBERT share weights, not states
        values = terms(both, batch | {"teacher_qkv": torch.stack([qkv[4], qkv[4]], 2)})
    assert torch.isfinite(values["attention_2"]) and float(values["attention_4"]) == pytest.approx(0, abs=1e-6)


def word_embedding_padding(model):
    return model.get_input_embeddings().padding_idx


@each_family
def test_a_teacher_learns_is_saved_and_comes_back(name, teacher_of, encoded, labels, tmp_path):
    teacher, tokenizer = teacher_of(name)
    batch = some(encoded(tokenizer), tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(teacher.parameters(), 1e-3)
    values = []
    for _ in range(4):
        loss = losses.tag_loss(models.run_model(teacher, batch)[0], batch["labels"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(float(loss.detach()))
    assert values[-1] < values[0]
    models.save_model(teacher, tokenizer, tmp_path)
    again = models.load_classifier(tmp_path, labels, "teacher_model_dir").eval()
    other = models.load_tokenizer(tmp_path)
    assert again.config.pad_token_id == other.pad_token_id == tokenizer.pad_token_id
    assert other.get_vocab() == tokenizer.get_vocab()
    assert np.array_equal(encoded(other).input_ids, encoded(tokenizer).input_ids)
    real = batch["attention_mask"] > 0
    with torch.no_grad():
        torch.testing.assert_close(*(models.run_model(x, batch)[0][real] for x in (again, teacher)))


@each_family
@pytest.mark.parametrize("exact", [True, False])
def test_a_teacher_answers_in_bfloat16(name, exact, teacher_of, encoded):
    if name == "deberta" and exact:
        pytest.skip("transformers fills DeBERTa's mask with float32's least number, which autocast cannot take")
    teacher, tokenizer = teacher_of(name)
    batch = some(encoded(tokenizer), tokenizer.pad_token_id)
    with torch.no_grad():
        wanted = models.run_model(teacher, batch)[0]
        half = models.prepare_to_answer(teacher, SimpleNamespace(device="cpu", mixed_precision="bf16"), exact)
        with torch.autocast("cpu", torch.bfloat16):
            found = models.run_model(half, batch, True, True)[0]
    real = batch["attention_mask"] > 0
    assert (found.float() - wanted)[real].abs().max() < 0.1 * wanted[real].abs().max()


@each_family
def test_the_class_of_the_teacher_is_checked(name, checkpoint):
    config = models.load_config(checkpoint(name))
    own = transformers.MODEL_MAPPING[type(config)].__name__
    for good in (None, own, f"TF{own}"):
        models.check_class(good, config, "pt_teacher_checkpoint")
    other = "TFBertModel" if name != "bert" else "RobertaModel"
    with pytest.raises(models.CheckpointError, match=f"^pt_teacher: '{other}', but pt_teacher_checkpoint is a "
                                                     f"'{name}' model; set pt_teacher: {own}, or leave it out"):
        models.check_class(other, config, "pt_teacher_checkpoint")


def test_a_family_that_transformers_has_dropped_is_named_with_its_last_version(checkpoint, tmp_path):
    with pytest.raises(models.CheckpointError, match="^pt_teacher: 'TFTransfoXLModel', but .*transformers 4.35.0 was"):
        models.check_class("TFTransfoXLModel", models.load_config(checkpoint("bert")), "pt_teacher_checkpoint")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transfo-xl", "vocab_size": 10}))
    with pytest.raises(models.CheckpointError, match="^pt_teacher_checkpoint: .*transformers 4.35.0 was the last"):
        models.load_config(tmp_path)


def test_a_tokenizer_that_needs_another_package_says_so(checkpoint, tmp_path):
    if transformers.utils.import_utils._is_package_available("sacremoses")[0]:
        pytest.skip("sacremoses is installed")
    models.load_config(checkpoint("xlm")).save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(models.CheckpointError, match="install sacremoses .*; install it beside xdistil"):
        models.load_tokenizer(tmp_path)


def check_student(student, tokenizer, examples, accelerator, folder):
    """One step learns, frozen layers are kept exactly, and the folder loads without this library."""
    batch = some(examples, tokenizer.pad_token_id)
    models.save_model(student, tokenizer, folder)
    student = models.load_classifier(folder, list(student.config.id2label.values()), "model_dir")
    dropout.set_dropout(student.train(), hidden=0.0, attention=0.0)
    assert torch.equal(*(models.run_model(student, batch)[0] for _ in range(2)))  # nothing drops out any more
    kept_steps = []
    for _, names in unfreezing_steps(layer_groups(student), "layer"):
        freeze_to(student, names)
        kept = FrozenStates(student, examples, np.arange(len(examples)), tokenizer.pad_token_id, accelerator, 1e9)
        (fed,) = kept.feed([dict(batch)])
        kept_steps.append("frozen_states" in fed)
        whole, upper = models.run_model(student, batch)[0], run_upper(student, fed)
        torch.testing.assert_close(upper[batch["attention_mask"] > 0], whole[batch["attention_mask"] > 0],
                                   rtol=1e-4, atol=1e-6)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-2)
    loss = losses.tag_loss(run_upper(student, batch), batch["labels"])
    loss.backward()
    optimizer.step()
    models.save_model(student.eval(), tokenizer, folder)
    plain = AutoModelForTokenClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        mine = models.run_model(student, batch)[0]
        theirs = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(mine, theirs)
    return kept_steps


@pytest.mark.parametrize("name", [*STUDENTS, "gpt2"])
def test_a_student_of_copied_layers(name, teacher_of, encoded, labels, accelerator, tmp_path):
    teacher, tokenizer = teacher_of(name)
    examples = encoded(tokenizer)
    config = students.student_config(teacher.config, "teacher_layers", None, num_hidden_layers=2,
                                     intermediate_size=None, hidden_size=99, num_attention_heads=99)
    assert (config.num_hidden_layers, config.hidden_size) == (2, 16)
    student, _ = students.build_student(config, teacher, "teacher_layers", None, labels, tokenizer, False)
    n_groups = 1 if name == "albert" else 2
    assert len(encoder_layers(student)) == n_groups and len(models.run_model(student, some(
        examples, tokenizer.pad_token_id), True)[1]) == 3
    for layer, i in zip(encoder_layers(student), [0] if name == "albert" else [1, 3], strict=True):
        given = encoder_layers(teacher)[i].state_dict()
        assert all(torch.equal(given[n], x) for n, x in layer.state_dict().items())
    groups = dict(layer_groups(student))  # below the layers lie tables, norms and one projection, no attention
    assert len(groups["layer_1"]) >= 5 and not any("ffn" in n or "attn" in n for n in groups["embeddings"])
    if name == "modernbert":
        assert config.layer_types == [teacher.config.layer_types[i] for i in (1, 3)]
    lowest = students.student_config(teacher.config, "teacher_layers", None, copied_layers=[1, 2], num_hidden_layers=2,
                                     intermediate_size=None)
    first, _ = students.build_student(lowest, teacher, "teacher_layers", None, labels, tokenizer, False)
    batch = some(examples, tokenizer.pad_token_id)
    below, states = (models.run_model(model.eval(), batch, True)[1] for model in (first, teacher))
    torch.testing.assert_close(below[1], states[1])  # what its layers read is what they were trained to read
    kept = check_student(student, tokenizer, examples, accelerator, tmp_path)
    by_layers = name not in ("albert", "xlm", "xlnet")
    assert kept == [True, by_layers, False, False][: 2 + n_groups]


def test_states_are_kept_where_the_embeddings_are_read_again(teacher_of, encoded, accelerator):
    """DeBERTa-v2 xlarge has a convolution between its first two layers, which reads the embeddings again."""
    tokenizer = teacher_of("deberta-v2")[1]
    sizes = FAMILIES["deberta-v2"][0] | {"conv_kernel_size": 3, "conv_act": "gelu", "vocab_size": len(tokenizer)}
    model, examples = models.from_config(transformers.DebertaV2Config(**sizes, num_labels=7)), encoded(tokenizer)
    dropout.set_dropout(model, hidden=0.0, attention=0.0)
    for i, (_, names) in enumerate(unfreezing_steps(layer_groups(model), "layer")):
        freeze_to(model, names)
        kept = FrozenStates(model, examples, np.arange(len(examples)), tokenizer.pad_token_id, accelerator, 1e9)
        (fed,) = kept.feed([some(examples, tokenizer.pad_token_id)])
        assert ("frozen_states" in fed) == (i < 4)
        whole, upper = models.run_model(model, fed)[0], run_upper(model, fed)
        torch.testing.assert_close(upper[fed["attention_mask"] > 0], whole[fed["attention_mask"] > 0])


@pytest.mark.parametrize("name", STUDENTS)
def test_dropout_of_maps_is_set_apart(name, teacher_of, encoded):
    """A row of a map that was dropped from does not sum to 1."""
    model, tokenizer = teacher_of(name)
    batch = some(encoded(tokenizer), tokenizer.pad_token_id)
    for hidden, attention in ((0.5, 0.0), (0.0, 0.5)):
        dropout.set_dropout(model.train(), hidden=hidden, attention=attention)
        maps = torch.stack(models.run_model(model, batch, False, True)[2])
        rows = maps.transpose(2, 3)[:, batch["attention_mask"] > 0]
        whole = (rows.sum(-1) - 1).abs() < 1e-5
        assert whole.all() if attention == 0 else whole.float().mean() < 0.1


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student_from_a_checkpoint_of_the_family(name, teacher_of, checkpoint, encoded, labels, accelerator,
                                                   tmp_path):
    teacher, tokenizer = teacher_of("bert")
    config = students.student_config(teacher.config, "checkpoint", str(checkpoint(name)))
    students.check_shapes(teacher.config, config, seq_len=32, init="checkpoint", compress=True, distil_attention=True)
    student, origin = students.build_student(config, teacher, "checkpoint", str(checkpoint(name)), labels, tokenizer,
                                             True)
    assert len(word_embedding(student)) == student.config.vocab_size == len(tokenizer)
    assert origin == "the student's own" if name in ("electra", "distilbert", "bert", "xlm") else "shared" in origin
    given, own = transformers.AutoModel.from_pretrained(checkpoint(name)).state_dict(), student.base_model.state_dict()
    layers = [n for n in own if "embed" not in n]  # not of another class, which would leave them random
    assert len(layers) >= 16 and all(torch.equal(given[n], own[n]) for n in layers)
    check_student(student, tokenizer, encoded(tokenizer), accelerator, tmp_path)


@pytest.mark.parametrize("name", ["distilbert", "gpt2", "xlnet", "albert", "deberta-v2", "mpnet"])
def test_copied_layers_may_be_narrower(name, teacher_of, labels):
    teacher, tokenizer = teacher_of(name)
    asked = {"num_hidden_layers": 2, "intermediate_size": 10}
    config = students.student_config(teacher.config, "teacher_layers", None, **asked)
    student, _ = students.build_student(config, teacher, "teacher_layers", None, labels, tokenizer, False)
    assert 10 in {n for p in encoder_layers(student)[-1].parameters() for n in p.shape}


@pytest.mark.parametrize("name", ["xlm", "modernbert"])
def test_layers_that_cannot_be_narrower_are_an_error(name, teacher_of):
    with pytest.raises(models.CheckpointError, match=f"^intermediate_size: '{name}' layers .*; leave it out"):
        students.student_config(teacher_of(name)[0].config, "teacher_layers", None, num_hidden_layers=2,
                                intermediate_size=10)


@pytest.mark.parametrize("name", NO_CLASSIFIER)
@pytest.mark.parametrize("init", ["checkpoint", "teacher_layers"])
def test_a_family_without_a_token_classifier_is_no_student(name, init, checkpoint):
    config = models.load_config(checkpoint(name))
    with pytest.raises(models.CheckpointError, match=f"no token classifier for '{name}', .*teacher only; choose"):
        students.student_config(config, init, str(checkpoint(name)), num_hidden_layers=2, intermediate_size=None)


def test_positions_follow_the_padding_id_of_the_teachers_vocabulary(teacher_of, checkpoint, labels, tmp_path):
    """RoBERTa numbers positions from padding id + 1: with the teacher's padding id a pretrained student must find the
    same position embeddings as before."""
    teacher, tokenizer = teacher_of("xlnet")  # pads with id 5
    config = models.load_config(checkpoint("roberta"))
    student, _ = students.build_student(config, teacher, "checkpoint", str(checkpoint("roberta")), labels, tokenizer,
                                        True)
    models.save_model(student, tokenizer, tmp_path)
    before, after = (models.load_classifier(x, labels, "x").base_model.embeddings for x in (
        checkpoint("roberta"), tmp_path))
    ids = torch.full((1, 20), 9)
    torch.testing.assert_close(*(x.position_embeddings(x.create_position_ids_from_input_ids(ids, x.padding_idx))
                                 for x in (before, after)))
    assert families.n_positions(student.config) == 34 and families.n_positions(config) == 38
    teacher.config.pad_token_id = 50256
    with pytest.raises(models.CheckpointError, match="^pt_student_checkpoint: a 'roberta' student counts .* 50256"):
        students.check_shapes(teacher.config, config, seq_len=32, init="checkpoint", compress=True,
                              distil_attention=False)


@pytest.mark.parametrize("name, overrides", [
    ("roberta", {"student_init": "teacher_layers", "num_hidden_layers": 2}), ("xlnet", {"num_hidden_layers": 2}),
    ("gpt2", {"num_hidden_layers": 2, "compress_word_embedding": True}), ("ctrl", {"num_hidden_layers": 2}),
    ("deberta-v2", {"pt_student_checkpoint": "electra", "compress_word_embedding": True}),
    ("modernbert", {"student_init": "teacher_layers", "num_hidden_layers": 2})])
def test_the_seven_stages(name, overrides, checkpoint, toy, tmp_path, capsys):
    if student := overrides.get("pt_student_checkpoint"):
        overrides = overrides | {"pt_student_checkpoint": str(checkpoint(student))}
    params = load_params({
        "task": str(toy), "model_dir": str(tmp_path / "run"), "pt_teacher_checkpoint": str(checkpoint(name)),
        "seq_len": 32, "device": "cpu", "opt_policy": "float32", "hidden_size": 8, "num_attention_heads": 4,
        "distil_multi_hidden_states": True, "distil_attention": True, "distil_epochs": 1, "ft_epochs": 1,
        "unfreeze": "layer", **overrides})
    run = Run(params)
    stages.check(params, run)
    for verb in STAGES.values():
        getattr(stages, verb)(params, run)
    plain = AutoModelForTokenClassification.from_pretrained(run.dir / "student")
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.dir / "student")
    assert plain.config.num_hidden_layers == (4 if student else 2)
    assert plain.config.pad_token_id == tokenizer.pad_token_id is not None
    assert "[hidden] the student's head is the teacher's" in capsys.readouterr().out
    assert len((run.dir / "evaluation/predictions.tsv").read_text().splitlines()) == 24
