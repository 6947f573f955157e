"""The student of XtremeDistil (2004.05686): word-piece embeddings of width E under a BiLSTM of H units a direction.
A Hugging Face model like any other, which the auto classes load once `import xdistil` has been run. It has no
attention maps; padding stands on the right and reaches no real token."""

from collections import OrderedDict

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GenericForTokenClassification
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import can_return_tuple


class BiLstmConfig(PreTrainedConfig):
    """Sizes: `embedding_size` is E; `hidden_size` is the width of a state, both directions side by side, 2H."""

    model_type = "xdistil-bilstm"
    vocab_size: int = 30522
    embedding_size: int = 300
    hidden_size: int = 1200
    num_hidden_layers: int = 1
    hidden_dropout_prob: float | int = 0.2
    pad_token_id: int | None = 0


class BiLstmLayer(nn.Module):
    """States [B, S, width] and lengths [B] to states [B, S, 2H], rightward and leftward side by side."""

    def __init__(self, width: int, config):
        super().__init__()
        self.rightward = nn.LSTM(width, config.hidden_size // 2, batch_first=True)
        self.leftward = nn.LSTM(width, config.hidden_size // 2, batch_first=True)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, states, lengths):
        if torch.onnx.is_in_onnx_export():
            return self._onnx(states, lengths)
        place, n = torch.arange(states.shape[1], device=states.device), lengths[:, None]
        mirror = torch.where(place < n, n - 1 - place, place)[..., None]  # twice as fast to train as packed sequences
        left, _ = self.leftward(states.gather(1, mirror.expand(-1, -1, states.shape[2])))
        right, _ = self.rightward(states)
        return self.dropout(torch.cat([right, left.gather(1, mirror.expand(-1, -1, left.shape[2]))], dim=-1))

    def _onnx(self, states, lengths):
        """The same as ONNX's own operator, which knows lengths: torch's exporter would fix S."""
        def both(name):  # gates: torch has input, forget, cell, output; ONNX input, output, forget, cell
            weights = [getattr(lstm, name).unflatten(0, (4, -1)) for lstm in (self.rightward, self.leftward)]
            return torch.stack([w[[0, 3, 1, 2]].flatten(0, 1) for w in weights])

        width, (n, length, _) = self.rightward.hidden_size, states.shape
        biases = torch.cat([both("bias_ih_l0"), both("bias_hh_l0")], dim=1)
        given = states.transpose(0, 1), both("weight_ih_l0"), both("weight_hh_l0"), biases, lengths.int()
        found = torch.onnx.ops.symbolic("LSTM", given, {"hidden_size": width, "direction": "bidirectional"},
                                        dtype=states.dtype, shape=(length, 2, n, width), version=20)
        return found.permute(2, 0, 1, 3).flatten(2)


class BiLstmPreTrainedModel(PreTrainedModel):
    """What both models share."""

    config_class, base_model_prefix, _input_embed_layer = BiLstmConfig, "model", "word_embeddings"

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, nn.Embedding):  # at unit variance: no norm stands between them and the gates
            init.normal_(module.weight)


class BiLstmModel(BiLstmPreTrainedModel):
    """The encoder. Hidden states: embeddings [B, S, E], then L of [B, S, 2H]."""

    def __init__(self, config):
        super().__init__(config)
        words = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.embeddings = nn.Sequential(OrderedDict(
            word_embeddings=words, dropout=nn.Dropout(config.hidden_dropout_prob)))
        widths = [config.embedding_size] + [config.hidden_size] * (config.num_hidden_layers - 1)
        self.layers = nn.ModuleList(BiLstmLayer(width, config) for width in widths)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, output_hidden_states=None, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = [self.embeddings(input_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], mask.sum(1)))
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        return BaseModelOutput(last_hidden_state=states[-1], hidden_states=tuple(states) if wanted else None)


class BiLstmForTokenClassification(GenericForTokenClassification, BiLstmPreTrainedModel):
    """A linear head on the last states."""

    def __init__(self, config):
        super().__init__(config)
        self.dropout = nn.Identity()  # the last layer has its own


AutoConfig.register(BiLstmConfig.model_type, BiLstmConfig, exist_ok=True)
AutoModel.register(BiLstmConfig, BiLstmModel, exist_ok=True)
AutoModelForTokenClassification.register(BiLstmConfig, BiLstmForTokenClassification, exist_ok=True)
