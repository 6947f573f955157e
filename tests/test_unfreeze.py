"""Who may learn: groups from top to bottom, a trainable set that only grows, dropout only where something learns."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

from xdistil.models import from_config
from xdistil.unfreeze import encoder_layers, freeze_to, layer_groups, unfreezing_steps, word_embedding

SIZES = {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12,
         "max_position_embeddings": 20}
CONFIGS = {
    "bert": BertConfig(**SIZES), "roberta": RobertaConfig(**SIZES),
    "electra": ElectraConfig(**SIZES, embedding_size=6),  # with a projection of its embeddings
    "distilbert": DistilBertConfig(vocab_size=30, dim=8, n_layers=3, n_heads=2, hidden_dim=12,
                                   max_position_embeddings=20),
}
ORDER = ["head", "layer_3", "layer_2", "layer_1", "embeddings"]


@pytest.fixture(params=CONFIGS)
def model(request):
    return from_config(CONFIGS[request.param])


def test_groups_hold_every_parameter_once_from_top_to_bottom(model):
    groups = layer_groups(model)
    assert [name for name, _ in groups] == ORDER
    members = [n for _, names in groups for n in names]
    assert sorted(members) == sorted(n for n, _ in model.named_parameters())
    found, current = dict(groups), dict(model.named_parameters())
    assert found["head"] == ["classifier.weight", "classifier.bias"]
    for i, layer in enumerate(encoder_layers(model), 1):
        assert {id(p) for p in layer.parameters()} == {id(current[n]) for n in found[f"layer_{i}"]}
    assert any(current[n] is word_embedding(model) for n in found["embeddings"])
    assert word_embedding(model).shape == (30, 6 if model.config.model_type == "electra" else 8)


@pytest.mark.parametrize("grain, names", [
    ("none", ["all"]), ("module", ["head", "all"]), ("layer", ORDER)])
@pytest.mark.parametrize("freeze", [False, True])
def test_the_trainable_set_only_grows_and_never_holds_what_is_frozen(model, grain, names, freeze):
    frozen = frozenset(n for n, p in model.named_parameters() if freeze and p is word_embedding(model))
    assert len(frozen) == freeze
    steps = unfreezing_steps(layer_groups(model), grain, frozen)
    sets = [set(members) for _, members in steps]
    assert [name for name, _ in steps] == names
    assert all(a < b for a, b in zip(sets, sets[1:], strict=False))
    assert sets[-1] == {n for n, _ in model.named_parameters()} - frozen
    for (_, members), allowed in zip(steps, sets, strict=True):
        freeze_to(model, members)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == allowed


def test_an_unknown_grain_is_an_error(model):
    with pytest.raises(KeyError):
        unfreezing_steps(layer_groups(model), "halves")


def test_nothing_frozen_is_in_train_mode_and_dropout_does_as_its_holder(model):
    groups = dict(layer_groups(model))
    model.train()
    freeze_to(model, groups["head"] + groups["layer_3"])
    for name, module in model.named_modules():
        own = list(module.parameters())
        if own:
            assert module.training is any(p.requires_grad for p in own), name
    first, _, last = encoder_layers(model)
    dropouts = [[m.training for m in layer.modules() if isinstance(m, nn.Dropout)] for layer in (first, last)]
    assert set(dropouts[0]) == {False} and set(dropouts[1]) == {True} and model.dropout.training
    freeze_to(model, [n for names in groups.values() for n in names])
    assert all(module.training for module in model.modules())
    freeze_to(model, [])
    assert not any(module.training for module in model.modules())


def test_a_frozen_part_answers_the_same_twice_while_the_head_learns():
    model = from_config(CONFIGS["bert"])
    freeze_to(model, dict(layer_groups(model))["head"])
    ids = torch.arange(5, 15)[None]
    states = [model.bert(input_ids=ids).last_hidden_state for _ in range(2)]
    assert torch.equal(*states)
    assert not torch.equal(*(model(input_ids=ids).logits for _ in range(2)))  # its own dropout acts


def test_a_model_without_layers_is_an_error():
    model = from_config(CONFIGS["bert"])
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match="BertForTokenClassification has no list of 7 layers"):
        encoder_layers(model)
