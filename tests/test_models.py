"""Models as they come: loaded, checked, run and saved as plain Hugging Face folders."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from xdistil.dropout import set_dropout
from xdistil.models import (
    PACKAGED,
    CheckpointError,
    from_config,
    keep_qkv,
    load_classifier,
    load_config,
    load_tokenizer,
    run_model,
    save_model,
    size_of,
)
from xdistil.unfreeze import encoder_layers

SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
         "vocab_size": 30, "max_position_embeddings": 20}


@pytest.fixture
def batch():
    return {"input_ids": torch.tensor([[2, 9, 11, 3], [2, 9, 3, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}


def test_what_is_saved_is_loaded_bit_by_bit(teacher, tokenizer, labels, tmp_path):
    save_model(teacher, tokenizer, tmp_path)
    again = load_classifier(tmp_path, labels, "model_dir")
    before, after = teacher.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert again.config.id2label == dict(enumerate(labels))
    assert load_tokenizer(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_saving_leaves_a_whole_folder_and_nothing_else(teacher, tokenizer, tmp_path):
    for _ in range(2):  # the second time over the first
        save_model(teacher, tokenizer, tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


def test_a_folder_half_written_does_not_load(teacher, tokenizer, labels, tmp_path):
    save_model(teacher, tokenizer, tmp_path)

    class Broken:
        def save_pretrained(self, folder):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_model(teacher, Broken(), tmp_path)
    assert torch.equal(load_classifier(tmp_path, labels, "x").classifier.weight, teacher.classifier.weight)
    save_model(teacher, tokenizer, tmp_path)  # and the next save clears up
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_the_head_is_kept_for_as_many_labels_and_new_for_others(teacher_folder, labels):
    kept = load_file(teacher_folder / "model.safetensors")
    same = load_classifier(teacher_folder, [x.lower() for x in labels], "x")
    assert torch.equal(same.classifier.weight, kept["classifier.weight"])
    assert same.config.id2label[1] == labels[1].lower()
    fewer = load_classifier(teacher_folder, labels[:3], "x")
    assert fewer.classifier.weight.shape == (3, 48) and fewer.dtype == torch.float32
    word = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(fewer.state_dict()[word], kept[word])


def test_it_computes_what_plain_transformers_computes(teacher, teacher_folder, batch):
    plain = AutoModelForTokenClassification.from_pretrained(teacher_folder).eval()
    with torch.inference_mode():
        wanted = plain(**batch, output_hidden_states=True)
        logits, states, maps = run_model(teacher, batch, True, True)
        alone = run_model(teacher, batch)
    real = batch["attention_mask"] > 0
    torch.testing.assert_close(logits[real], wanted.logits[real])
    for ours, theirs in zip(states, wanted.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real])
    assert [m.shape for m in maps] == [(2, 4, 4, 4)] * 4 and len(states) == 5
    torch.testing.assert_close(maps[0].sum(-1), torch.ones(2, 4, 4))
    assert torch.equal(alone[0], logits) and not alone[1] and not alone[2]


def test_missing_maps_are_an_error_not_a_warning(teacher, batch):
    teacher.set_attn_implementation("sdpa")
    with pytest.raises(RuntimeError, match="returned 0 .* where 4 were due; set distil_attention: false"):
        run_model(teacher, batch, False, True)
    teacher.set_attn_implementation("eager")
    assert len(run_model(teacher, batch, False, True)[2]) == 4


@pytest.mark.parametrize("load", [
    lambda x, p: load_config(x, p), lambda x, p: load_tokenizer(x, p), lambda x, p: load_classifier(x, ["O"], p)])
@pytest.mark.parametrize("checkpoint, remedy", [
    ("nobody/such-model", "hub name on a machine with network"), ("{tmp}/none", "give an? .*folder"),
    ("{tmp}", "the folder needs config.json, tokenizer.json and model.safetensors")])
def test_a_checkpoint_that_does_not_load_names_parameter_and_remedy(load, checkpoint, remedy, tmp_path):
    checkpoint = checkpoint.format(tmp=tmp_path)
    with pytest.raises(CheckpointError, match=f"^some_parameter: .*{re.escape(repr(checkpoint))}.*; .*{remedy}"):
        load(checkpoint, "some_parameter")


def test_pickled_weights_are_not_read(teacher, teacher_folder, labels, tmp_path):
    shutil.copytree(teacher_folder, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save(teacher.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="^x: .*model.safetensors"):
        load_classifier(tmp_path / "pickled", labels, "x")


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(teacher_folder, tmp_path):
    folder = shutil.copytree(teacher_folder, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(CheckpointError, match=f"^x: the tokenizer of .* has {config['vocab_size']} pieces.* 100 rows"):
        load_tokenizer(folder, "x")
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    with pytest.raises(CheckpointError, match="padding id None.*with a padding token"):
        load_tokenizer(folder, "x")


@pytest.mark.parametrize("config", [
    BertConfig(**SMALL), RobertaConfig(**SMALL), ElectraConfig(**SMALL),
    DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=12)], ids=lambda c: c.model_type)
def test_dropout_on_maps_and_on_states_are_set_apart(config):
    model = from_config(config).train()
    set_dropout(model, hidden=0.25, attention=0.5)
    rates = {name: m.p for name, m in model.named_modules() if isinstance(m, nn.Dropout)}
    on_maps = {name for name, p in rates.items() if p == 0.5}
    assert set(rates.values()) == {0.25, 0.5} and len(on_maps) == 2  # one for each layer
    assert all("attention" in name and ".output." not in name for name in on_maps)
    set_dropout(model, hidden=0.0, attention=0.0)
    model.set_attn_implementation("eager")
    ids = torch.arange(5, 12)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(*(run_model(model, inputs, False, True)[2][1] for _ in range(2)))
    set_dropout(model, hidden=0.0, attention=0.5)
    maps = run_model(model, inputs, False, True)[2]
    assert any((m == 0).any() for m in maps)  # it acts on the maps themselves
    if config.model_type == "bert":  # what the config says is kept for those who load the model later
        assert model.config.hidden_dropout_prob == 0.1 == model.config.attention_probs_dropout_prob


@pytest.mark.parametrize("config", [
    BertConfig(**SMALL), ElectraConfig(**SMALL), RobertaConfig(**SMALL),
    DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=12),
    GPT2Config(vocab_size=30, n_embd=8, n_layer=2, n_head=2, n_positions=20)], ids=lambda c: c.model_type)
def test_queries_and_keys_give_the_attention_maps_of_their_layer(config, batch):
    model = from_config(config).eval()
    model.set_attn_implementation("eager")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    with torch.no_grad(), keep_qkv(model, (1, 2)) as found:
        _, _, maps = run_model(model, batch, False, True)
    hidden = (batch["attention_mask"] == 0)[:, None, None]
    if config.model_type == "gpt2":
        hidden = hidden | torch.ones(4, 4, dtype=torch.bool).triu(1)
    for layer in (1, 2):
        query, key, value = (x.unflatten(-1, (2, 4)).transpose(1, 2) for x in found[layer].unbind(2))
        scores = (query @ key.mT / 2).masked_fill(hidden, -torch.inf)
        torch.testing.assert_close(scores.softmax(-1), maps[layer - 1])
        assert not torch.allclose(value, query) and not torch.allclose(value, key)
    assert not any(module._forward_hooks for module in model.modules() if not list(module.children()))


@pytest.mark.parametrize("config, projected", [
    (MPNetConfig(**SMALL), lambda layer, x: [layer.attention.attn.q(x), layer.attention.attn.k(x),
                                             layer.attention.attn.v(x)]),
    (DebertaV2Config(**SMALL, relative_attention=True, share_att_key=True, pos_att_type=["p2c", "c2p"]),
     lambda layer, x: [getattr(layer.attention.self, f"{name}_proj")(x) for name in ("query", "key", "value")]),
    (ModernBertConfig(**SMALL, pad_token_id=0, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3),
     lambda layer, x: layer.attn.Wqkv(layer.attn_norm(x)).chunk(3, -1))], ids=lambda c: getattr(c, "model_type", ""))
def test_queries_keys_and_values_are_those_of_what_enters_the_layer(config, projected, batch):
    model, entered = from_config(config).eval(), []
    layer = encoder_layers(model)[1]
    layer.register_forward_pre_hook(lambda _, args, kwargs: entered.append(args[0] if args else kwargs[
        "hidden_states"]), with_kwargs=True)
    with torch.no_grad(), keep_qkv(model, (2,)) as found:
        run_model(model, batch)
    assert list(found) == [2] and found[2].shape == (2, 4, 3, 8)
    torch.testing.assert_close(found[2], torch.stack(list(projected(layer, entered[0])), 2))


@pytest.mark.parametrize("config", [DebertaConfig(**SMALL), LlamaConfig(**SMALL, num_key_value_heads=1)],
                         ids=["one matrix, head by head", "narrower keys"])
def test_projections_that_are_not_found_are_an_error_with_a_remedy(config):
    model = from_config(config)
    with pytest.raises(CheckpointError, match="^attention_loss: .* no query, key and value.*set attention_loss: kl"):
        with keep_qkv(model, (1,)):
            pass


def test_parameters_are_counted():
    model = from_config(BertConfig(**SMALL, type_vocab_size=2, num_labels=3))
    tables = (30 + 20 + 2) * 8
    layer = 4 * (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * 2 * 8
    assert size_of(model) == {"parameters": tables + 16 + 2 * layer + 27, "non_embedding": 16 + 2 * layer + 27,
                              "pieces": 30}


def test_the_packaged_teacher_is_found_without_a_hub():
    name = "sentence-transformers/all-MiniLM-L6-v2"
    pytest.importorskip(PACKAGED[name], reason="the packaged copy of the default teacher is not installed")
    config = load_config(name)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("bert", 6, 384)
    assert len(load_tokenizer(name)) == config.vocab_size


def test_a_folder_wins_over_the_packaged_teacher(teacher_folder, tmp_path, monkeypatch):
    name = next(iter(PACKAGED))
    shutil.copytree(teacher_folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert load_config(name).hidden_size == 48


@pytest.fixture
def broken(teacher_folder, tmp_path):
    """A copy of the tiny encoder, to be damaged."""
    return shutil.copytree(teacher_folder, tmp_path / "broken")


def test_weights_that_are_missing_are_not_left_random(broken, labels):
    weights = load_file(broken / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "layer.2." not in name}
    save_file(kept, broken / "model.safetensors", {"format": "pt"})
    n = len(weights) - len(kept)
    message = rf"teacher_model_dir: .*broken does not fit its config in {n} weights: \S*layer\.2"
    with pytest.raises(CheckpointError, match=message):
        load_classifier(broken, labels, "teacher_model_dir")


def test_weights_of_another_shape_are_refused(broken, labels):
    weights = load_file(broken / "model.safetensors")
    name = next(name for name in weights if name.endswith("word_embeddings.weight"))
    save_file(weights | {name: weights[name][:-3].clone()}, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight has shape \["):
        load_classifier(broken, labels, "teacher_model_dir")


def test_a_file_that_is_cut_off_is_refused(broken, labels):
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="teacher_model_dir: cannot load .*broken"):
        load_classifier(broken, labels, "teacher_model_dir")
