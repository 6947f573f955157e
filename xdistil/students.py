"""How a student is made. Projections live beside it, never in it: what is saved is a plain Hugging Face model."""

import functools

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES

from xdistil import data, embeddings, families, losses, models, narrow, wordwise
from xdistil.bilstm import BiLstmConfig
from xdistil.grouping import batches, grid, shapes_for
from xdistil.unfreeze import encoder_layers, layer_groups, word_embedding


def student_config(teacher_config, init: str, checkpoint: str | None, arch: str = "transformer",
                   embedding_size: int = 300, copied_layers="uniform", **sizes):
    """The student's config. `init` is checkpoint, scratch, teacher_layers or teacher_pca; `arch` transformer or
    bilstm, which alone has an embedding_size; `copied_layers` see `copied`; `sizes` are hidden_size (of a bilstm: in
    each direction), num_hidden_layers, num_attention_heads and intermediate_size (None: 4 x hidden_size)."""
    if init != "scratch":
        named = "pt_student_checkpoint" if init == "checkpoint" else "student_init"
        less = _narrower if init == "teacher_pca" else _shallower
        config = (models.load_config(checkpoint, named) if init == "checkpoint" else
                  less(teacher_config, copied_layers=copied_layers, **sizes))
        if config.model_type not in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES and not is_bilstm(config):
            raise models.CheckpointError(f"{named}: transformers has no token classifier for {config.model_type!r}, "
                                         "which can be a teacher only; choose a student of another family")
        return config
    if arch == "bilstm":
        return BiLstmConfig(embedding_size=embedding_size, hidden_size=2 * sizes["hidden_size"],
                            num_hidden_layers=sizes["num_hidden_layers"])
    sizes["intermediate_size"] = sizes["intermediate_size"] or 4 * sizes["hidden_size"]
    return transformers.BertConfig(**sizes)


# names of the feed-forward width where it is not intermediate_size; ModernBERT's is gated
FEED_FORWARD = {"distilbert": "hidden_dim", "xlnet": "d_inner", "gpt2": "n_inner", "modernbert": ""}


def _shallower(t, num_hidden_layers: int, intermediate_size: int | None, copied_layers, **_):
    """The teacher's config with fewer layers, which it names, and perhaps a narrower feed-forward part."""
    layers = copied(copied_layers, num_hidden_layers, t.num_hidden_layers)
    depth = t.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    changed = {depth: num_hidden_layers, "copied_layers": layers}  # a note in config.json as well
    width = FEED_FORWARD.get(t.model_type, "intermediate_size")
    if intermediate_size and not hasattr(t, width):
        raise models.CheckpointError(f"intermediate_size: {t.model_type!r} layers cannot be copied narrower; leave it "
                                     "out")
    changed |= {width: intermediate_size} if intermediate_size else {}
    if types := getattr(t, "layer_types", None):  # local or global attention (ModernBERT)
        changed["layer_types"] = [types[i - 1] for i in layers]
    return type(t).from_dict(t.to_dict() | changed)


def _narrower(t, hidden_size: int, num_attention_heads: int, intermediate_size: int | None, **sizes):
    """The config of `_shallower`, with states and heads narrower as well."""
    if t.model_type not in narrow.FAMILIES or getattr(t, "embedding_size", t.hidden_size) != t.hidden_size:
        raise models.CheckpointError(f"student_init: 'teacher_pca' narrows {', '.join(narrow.FAMILIES)} without a "
                                     f"projection of the embeddings, not this {t.model_type!r}; set student_init: "
                                     "teacher_layers for the teacher's width, or scratch")
    neurons = intermediate_size or min(4 * hidden_size, t.intermediate_size)
    config = _shallower(t, intermediate_size=neurons, **sizes)
    config.update({"hidden_size": hidden_size, "num_attention_heads": num_attention_heads} |
                  ({"embedding_size": hidden_size} if hasattr(t, "embedding_size") else {}))
    return config


def check_shapes(t, s, *, seq_len: int, init: str, compress: bool, distil_attention: bool,
                 relation_heads: int | None = None, own_tokenizer: bool = False) -> None:
    """Raise CheckpointError naming parameter and remedies if teacher and student config cannot work together;
    `distil_attention`: by maps, head by head; `relation_heads`: by relations of so many heads."""
    pad_id = t.eos_token_id if t.pad_token_id is None else t.pad_token_id  # as `load_tokenizer` chooses it
    room_t, room_s = families.n_positions(t), families.n_positions(s, None if own_tokenizer else pad_id)
    width = getattr(t, "embedding_size", t.hidden_size)
    fits = [n for n in range(1, s.hidden_size + 1) if s.hidden_size % n == t.hidden_size % n == 0]
    heads = [n for n in range(1, t.num_attention_heads + 1) if s.hidden_size % n == 0 and
             s.hidden_size * t.num_attention_heads <= n * t.hidden_size]  # no wider than the teacher's
    heads_s, size = getattr(s, "num_attention_heads", 0), "embedding_size" if is_bilstm(s) else "hidden_size"
    for wrong, message in (
        (room_s < 1, f"pt_student_checkpoint: a {s.model_type!r} student counts positions from the padding id, "
         f"{pad_id} in the teacher's vocabulary; choose a student of another family"),
        (s.num_hidden_layers > t.num_hidden_layers, f"num_hidden_layers: the student has {s.num_hidden_layers}, the "
         f"teacher {t.num_hidden_layers}; choose at most {t.num_hidden_layers}"),
        (distil_attention and heads_s != t.num_attention_heads, "distil_attention: the teacher has "
         f"{t.num_attention_heads} heads, the student {heads_s}; set attention_loss: relation, or "
         f"num_attention_heads: {t.num_attention_heads} (or a student checkpoint with as many), or distil_attention: "
         "false"),
        (relation_heads and relation_heads not in fits, f"relation_heads: {relation_heads} must divide both widths, "
         f"{t.hidden_size} (teacher) and {s.hidden_size} (student); choose from {fits} or leave it out"),
        ((compress and init == "scratch" or init == "teacher_pca") and getattr(s, size) > width, f"{size}: "
         f"{getattr(s, size)}, but the teacher's word embeddings have width {width}; choose at most {width}"),
        (init == "teacher_pca" and heads_s not in heads, f"num_attention_heads: {heads_s} heads of width "
         f"{s.hidden_size / (heads_s or 1):g} cannot be had from the teacher's {t.num_attention_heads} of width "
         f"{t.hidden_size // t.num_attention_heads}; choose from {heads}"),
        (init.startswith("teacher") and getattr(s, "intermediate_size", 0) > getattr(t, "intermediate_size", 1e9),
         f"intermediate_size: more than the teacher's {getattr(t, 'intermediate_size', 0)}; leave it out"),
        (seq_len > min(room_t, room_s), f"seq_len: {seq_len}, but the teacher has {room_t} positions and the student "
         f"{room_s}; choose at most {min(room_t, room_s)}"),
    ):
        if wrong:
            raise models.CheckpointError(message)


def is_bilstm(config) -> bool:
    """Whether this is the config of a BiLSTM."""
    return isinstance(config, BiLstmConfig)


def state_widths(config) -> list[int]:
    """Widths of the hidden states 0..L; a BiLSTM's embeddings have their own."""
    return [config.embedding_size if is_bilstm(config) else config.hidden_size] + (
        [config.hidden_size] * config.num_hidden_layers)


def spread(n_student: int, n_teacher: int, layer_map) -> list[tuple[int, int]]:
    """Pairs (student, teacher) of hidden-state indices 0..L, 0 = embeddings, ascending: "uniform" pairs by depth,
    "top" pairs student hidden[-i] with teacher hidden[-i] (2106.04563), "last" is the topmost pair alone, a list of
    pairs is itself. Raises CheckpointError for a layer that is not there or a student layer given twice."""
    if isinstance(layer_map, str):
        pairs = [(s, s + n_teacher - n_student if layer_map == "top" else round(s * n_teacher / n_student))
                 for s in range(n_student + 1)]
        return pairs[-1:] if layer_map == "last" else pairs
    pairs = sorted(map(tuple, layer_map))
    if any(s > n_student or t > n_teacher for s, t in pairs) or len(dict(pairs)) < len(pairs):
        raise models.CheckpointError(f"layer_map: found {layer_map}; student layers are 0..{n_student}, each at most "
                                     f"once, teacher layers 0..{n_teacher}, where 0 are the embeddings")
    return pairs


def copied(layers, n_student: int, n_teacher: int) -> list[int]:
    """The teacher layers 1..L_t, ascending, that a student's are copied from: "uniform" by depth with the last,
    "lower" by depth in the lower half, a list is itself. Raises CheckpointError if it does not fit."""
    if layers == "uniform":
        return [t for _, t in spread(n_student, n_teacher, "uniform")[1:]]
    if layers == "lower":
        return [int(max(0.5 * n_teacher / n_student, 1) * (i + 0.5) + 0.5) for i in range(n_student)]
    if sorted(set(layers)) != layers or len(layers) != n_student or layers[-1] > n_teacher:
        raise models.CheckpointError(f"copied_layers: found {layers}; name {n_student} layers (num_hidden_layers) of "
                                     f"the teacher's 1..{n_teacher}, each once and in order, or uniform or lower")
    return layers


def other_vocabulary(checkpoint: str, tokenizer, compress: bool):
    """The tokenizer of a student's checkpoint if it has another vocabulary than the teacher's. Raises CheckpointError
    if it has and `compress` is off."""
    other = models.load_tokenizer(checkpoint, "pt_student_checkpoint")
    if other.get_vocab() == tokenizer.get_vocab():
        return None
    if not compress:
        raise models.CheckpointError(f"pt_student_checkpoint: {checkpoint!r} has another vocabulary than the teacher "
                                     f"({len(other)}, {len(tokenizer)} pieces); set compress_word_embedding: true, "
                                     "or student_tokenizer: own")
    return other


@torch.no_grad()
def build_student(config, teacher, init: str, checkpoint: str | None, labels: list[str], tokenizer,
                  compress: bool, sample=None) -> tuple[nn.Module, str]:
    """The student on the vocabulary of the tokenizer, and where its word embeddings come from; `sample` gives batches
    of text to narrow by, on one device. Raises CheckpointError if a checkpoint has another vocabulary and `compress`
    is off."""
    words, origin, unit = word_embedding(teacher), "random", models.unit_of(teacher.config)
    if init == "checkpoint":
        student = models.load_classifier(checkpoint, labels, "pt_student_checkpoint", unit)
        rows, origin = word_embedding(student), "the student's own"
        if other := other_vocabulary(checkpoint, tokenizer, compress):
            ours, theirs = (t.convert_ids_to_tokens(list(range(len(t)))) for t in (tokenizer, other))
            new, n_shared = embeddings.map_to_student(words[: len(ours)], ours, rows[: len(theirs)], theirs)
            student.resize_token_embeddings(len(words), mean_resizing=False)
            word_embedding(student)[: len(new)] = new
            origin = f"the teacher's, mapped by {n_shared} shared pieces"
    else:
        config.vocab_size = len(words)
        config.id2label, config.label2id = teacher.config.id2label, teacher.config.label2id
        config.pad_token_id = tokenizer.pad_token_id
        student = models.from_config(config, unit)
        if init == "teacher_layers":
            copy_layers(teacher, student)
            origin = "the teacher's"
        elif init == "teacher_pca":
            batches, wide = list(sample()), models.from_config(_shallower(
                teacher.config, config.num_hidden_layers, config.intermediate_size, config.copied_layers), unit)
            copy_layers(teacher, wide)
            for model in (wide, student):
                model.to(batches[0]["input_ids"].device)
            fold_head(student, wide, narrow.narrow(wide, student, batches))
            student, origin = student.cpu(), "the teacher's, by principal components of its states"
        elif compress:  # at the scale that the layers above were initialised for
            own = word_embedding(student)
            scale = own.norm(dim=-1).mean()
            embeddings.compress(words, own.shape[1], out=own)
            own *= scale / own.norm(dim=-1).mean()
            origin = "the teacher's, by truncated SVD"
    families.set_padding(student, tokenizer.pad_token_id)
    return student, origin


@torch.no_grad()
def copy_layers(teacher, student) -> None:
    """Copy embeddings, head and the layers that the student's config names (`copied`) into the student. A narrower
    feed-forward part keeps the neurons with the largest product of incoming and outgoing weight norms."""
    layers_t, layers_s, groups = encoder_layers(teacher), encoder_layers(student), dict(layer_groups(student))
    for name in groups["head"] + groups["embeddings"]:
        student.get_parameter(name).copy_(teacher.get_parameter(name))
    for layer, t in zip(layers_s, student.config.copied_layers, strict=False):  # ALBERT has one, again and again
        given, own = layers_t[min(t, len(layers_t)) - 1].state_dict(), layer.state_dict()
        state = {name: given[name] for name in own}  # ModernBERT's first layer lacks a norm that others have
        inner = {name: i for name, w in own.items() for i, n in enumerate(w.shape) if n < given[name].shape[i]}
        if inner:
            norms = [state[name].norm(dim=1 - side) for name, side in inner.items() if state[name].dim() == 2]
            narrow = next(own[name].shape[side] for name, side in inner.items())
            kept = torch.stack(norms).prod(0).topk(narrow).indices.sort().values
            state |= {name: state[name].index_select(side, kept) for name, side in inner.items()}
        layer.load_state_dict(state)


def make_projections(pairs: list[tuple[int, int]], widths: list[int], width_t: int, gelu: bool = False):
    """One linear map H_s -> H_t per layer pair, named by the student layer, where the width of that state (`widths`)
    is not the teacher's. With `gelu` one for each pair, z~ = GELU(W h + b) (2004.05686)."""
    return nn.ModuleDict({str(s): nn.Sequential(nn.Linear(widths[s], width_t), nn.GELU()) if gelu else
                          nn.Linear(widths[s], width_t) for s, _ in pairs if gelu or widths[s] != width_t})


def sample_batches(examples: data.Examples, windows: np.ndarray, pad_id: int, accelerator, n_windows: int = 1024):
    """Batches, on the accelerator, of at most so many evenly spread windows."""
    some = windows[np.linspace(0, len(windows) - 1, min(n_windows, len(windows))).astype(int)]
    lengths = examples.lengths[some]
    for rows, width in batches(lengths, grid(lengths, 32, shapes_for(accelerator))):
        batch = data.collate(examples, some[rows], pad_id, width)
        yield {name: values.to(accelerator.device) for name, values in batch.items()}


@torch.no_grad()
def fit_projection(student, teacher, examples: data.Examples, windows: np.ndarray, pad_id: int, accelerator,
                   n_windows: int = 1024) -> nn.Linear:
    """The map P x + b of the student's last hidden states to the teacher's, for losses that train none: by ridge
    regression over the tokens compared in evenly spread windows, [P b]' = (X'X + r I)^-1 X'Y, where X has a column of
    ones that r spares and r is 1e-4 of the mean diagonal of X'X. Both models in eval mode."""
    gram = moment = 0.0
    for batch in sample_batches(examples, windows, pad_id, accelerator, n_windows):
        with accelerator.autocast():
            read = wordwise.as_teacher_reads(examples, batch, teacher, shapes_for(accelerator))
            x, y = (models.run_model(*pair, True)[1][-1] for pair in ((student, batch), (teacher, read)))
        y, real = wordwise.move_states(y, read, batch), wordwise.compared(batch) > 0
        x, y = (states[real].cpu().double() for states in (x, y))
        x = F.pad(x, (0, 1), value=1.0)
        gram, moment = gram + x.T @ x, moment + x.T @ y
    gram.diagonal()[:-1].add_(1e-4 * gram.diagonal()[:-1].mean())
    found = torch.linalg.solve(gram, moment)
    projection = nn.Linear(len(gram) - 1, moment.shape[1])
    projection.weight.copy_(found[:-1].T), projection.bias.copy_(found[-1])
    return projection.to(accelerator.device)


@torch.no_grad()
def fold_head(student, teacher, projection: nn.Linear | None) -> bool:
    """Give the student the teacher's classifier composed with the projection of the top layer: W = W_t P and
    b = W_t b_P + b_t. Its logits are the teacher's on projected states, and what is deployed is a standard model. A
    head with more than a linear map (of a text or pair, ModernBERT's) composes with no projection: without one it is
    copied where all shapes are equal, else left as it is. Returns whether the head is now the teacher's."""
    ours, theirs = ([m.get_parameter(name) for name in dict(layer_groups(m))["head"]] for m in (student, teacher))
    if projection is not None:
        if [p.dim() for p in theirs] != [2, 1]:
            return False
        weight, bias = theirs
        theirs = [weight @ projection.weight, weight @ projection.bias + bias]
    fits = [p.shape for p in ours] == [p.shape for p in theirs]
    for own, given in zip(ours, theirs, strict=True) if fits else ():
        own.copy_(given)
    return fits


def distil_terms(hidden_pairs, attention_pairs, hidden_loss: str, attention_loss: str, relation_heads=None):
    """The loss terms of stage 1 (2106.04563) as a function of (modules, batch): `student` and `projections`, and
    `teacher_hidden` [B, S, P, H_t] and `teacher_attention` [B, P, A, S, S], or `teacher_qkv` [B, S, P, 3, H_t] if
    `attention_loss` is relation, by pairs (student, teacher) in order."""
    hidden_fn = {"mse": losses.hidden_mse, "cosine": losses.hidden_cosine, "cka": losses.hidden_cka}[hidden_loss]
    relate = functools.partial(losses.relation_kl, n_heads=relation_heads)
    attention_fn = {"mse": losses.attention_mse, "kl": losses.attention_kl, "relation": relate}[attention_loss]
    layers, relation = [s for s, _ in attention_pairs], attention_loss == "relation"

    def terms(modules, batch):
        mask, projections, values = wordwise.compared(batch), modules["projections"], {}
        with models.keep_qkv(modules["student"], layers if relation else ()) as qkv:
            _, states, maps = models.run_model(modules["student"], batch, bool(hidden_pairs),
                                               bool(layers) and not relation)
        for i, (s, _) in enumerate(hidden_pairs):
            state = projections[str(s)](states[s]) if str(s) in projections else states[s]
            values[f"hidden_{s}"] = hidden_fn(state, batch["teacher_hidden"][:, :, i], mask)
        for i, s in enumerate(layers):
            pair = ((qkv[s], batch["teacher_qkv"][:, :, i]) if relation else
                    (wordwise.pool_maps(maps[s - 1], batch, batch), batch["teacher_attention"][:, i]))
            values[f"attention_{s}"] = attention_fn(*pair, mask)
        return values

    return terms
