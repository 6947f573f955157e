"""What encoder families differ in: those that transformers dropped or has no token classifier for, and positions."""

import re

import torch
import transformers
from transformers.modeling_layers import GenericForTokenClassification

# whose first position is that of the padding id plus one
AFTER_PADDING = re.compile("roberta|camembert|longformer|data2vec-text|ibert|xmod")
QKV = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
       ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("Wq", "Wk", "Wv"),  # names of the projections in attention
       ("Wqkv",), ("c_attn",))  # or of one for all three, end to end
QUERIES = (*(names[0] for names in QKV), "in_proj")


def gone(text: str) -> str | None:
    """The remedy where a text names a family that transformers has dropped."""
    if "transfoxl" in text.lower().replace("-", ""):
        return "transformers 4.35.0 was the last to support it; choose another family"
    return None


def register_classifier(config) -> None:
    """Give a family that has no token classifier (OpenAI GPT, CTRL) a linear one on its last hidden states."""
    known = transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if type(config) in known or type(config) not in transformers.MODEL_MAPPING:
        return
    base = transformers.MODEL_MAPPING[type(config)].__base__
    classifier = type("TokenClassifier", (GenericForTokenClassification, base),
                      {"base_model_prefix": base.base_model_prefix})
    transformers.AutoModelForTokenClassification.register(type(config), classifier, exist_ok=True)


def n_positions(config, pad_id: int | None = None) -> int:
    """Sub-words that the position embeddings have room for, if padding has this id; default: the config's."""
    room = getattr(config, "max_position_embeddings", None) or -1
    reserved = 2 if config.model_type == "mpnet" else 0  # whatever its padding id
    if AFTER_PADDING.search(config.model_type):
        reserved = (config.pad_token_id if pad_id is None else pad_id) + 1
    return room - reserved if room > 0 else 10**9  # relative positions (XLNet) have no end


@torch.no_grad()
def set_padding(model, pad_id: int) -> None:
    """Tell a model the padding id of another tokenizer; positions counted from there keep their embeddings."""
    old, model.config.pad_token_id = model.config.pad_token_id, pad_id
    if old != pad_id and AFTER_PADDING.search(model.config.model_type):
        table = model.base_model.embeddings.position_embeddings.weight
        table.copy_(table.roll(pad_id - old, 0))
        model.base_model.embeddings.padding_idx = pad_id
