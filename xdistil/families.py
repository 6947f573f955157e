"""What encoder families differ in: those that transformers dropped or has no token classifier for, and positions."""

import torch
import transformers
from torch import nn
from transformers.modeling_outputs import TokenClassifierOutput
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

GONE = {"transfoxl": "4.35.0"}  # the last version of transformers to support a family, by its documentation
AFTER_PADDING = ("roberta", "camembert", "longformer", "data2vec-text", "ibert", "xmod")  # first position: padding + 1

QKV = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("query_proj", "key_proj", "value_proj"),
       ("q_proj", "k_proj", "v_proj"), ("q", "k", "v"), ("Wq", "Wk", "Wv"),  # names of the projections in attention
       ("Wqkv",), ("c_attn",))  # or of one for all three, end to end
QUERIES = (*(names[0] for names in QKV), "in_proj")


def gone(text: str) -> str | None:
    """The remedy where a text names a family that transformers has dropped."""
    versions = (version for name, version in GONE.items() if name in text.lower().replace("-", ""))
    return next((f"transformers {x} was the last to support it; choose another family" for x in versions), None)


def has_classifier(config) -> bool:
    """Whether transformers itself has a token classifier for the family: a student must be loadable without us."""
    return config.model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES


def register_classifier(config) -> None:
    """Give a family that has no token classifier (OpenAI GPT, CTRL) a linear one on its last hidden states."""
    known = transformers.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING
    if type(config) in known or type(config) not in transformers.MODEL_MAPPING:
        return
    encoder = transformers.MODEL_MAPPING[type(config)]

    class TokenClassifier(encoder.__base__):
        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, encoder(config))
            self.dropout, self.classifier = nn.Dropout(0.1), nn.Linear(config.hidden_size, config.num_labels)
            self.post_init()

        def forward(self, input_ids, attention_mask=None, **options):
            out = self.base_model(input_ids=input_ids, attention_mask=attention_mask, **options)
            return TokenClassifierOutput(logits=self.classifier(self.dropout(out.last_hidden_state)),
                                         hidden_states=out.hidden_states, attentions=out.attentions)

    transformers.AutoModelForTokenClassification.register(type(config), TokenClassifier, exist_ok=True)


def counts_from_padding(config) -> bool:
    """Whether the first position is that of the padding id plus one."""
    return any(name in config.model_type for name in AFTER_PADDING)


def n_positions(config, pad_id: int | None = None) -> int:
    """Sub-words that the position embeddings have room for, if padding has this id; default: the config's."""
    room = getattr(config, "max_position_embeddings", None) or -1
    reserved = (config.pad_token_id if pad_id is None else pad_id) + 1 if counts_from_padding(config) else 0
    reserved = 2 if config.model_type == "mpnet" else reserved  # whatever its padding id
    return room - reserved if room > 0 else 10**9  # relative positions (XLNet) have no end


@torch.no_grad()
def set_padding(model, pad_id: int) -> None:
    """Tell a model the padding id of another tokenizer; positions counted from there keep their embeddings."""
    old, model.config.pad_token_id = model.config.pad_token_id, pad_id
    if old != pad_id and counts_from_padding(model.config):
        table = model.base_model.embeddings.position_embeddings.weight
        table.copy_(table.roll(pad_id - old, 0))
        model.base_model.embeddings.padding_idx = pad_id
