"""How a student is made: sizes, weights from somewhere, projections, and the folded head.

Projections live beside the student, never in it: what is saved is a plain Hugging Face model.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from xdistil import embeddings, losses
from xdistil.models import (
    CheckpointError,
    Recorder,
    from_config,
    load_config,
    load_encoder,
    load_tokenizer,
    run_model,
)
from xdistil.unfreeze import encoder_layers, word_embedding


def student_config(teacher_config, init: str, checkpoint: str | None, sizes: dict):
    """The student's config, without its weights.

    Args:
        init: "checkpoint", "scratch" or "teacher_layers".
        sizes: hidden_size, num_hidden_layers, num_attention_heads, intermediate_size.
    """
    from transformers import BertConfig

    if init == "checkpoint":
        return load_config(checkpoint, "pt_student_checkpoint")
    if init == "teacher_layers":
        config = type(teacher_config).from_dict(teacher_config.to_dict())
        config.num_hidden_layers = sizes["num_hidden_layers"]
        return config
    return BertConfig(
        **{**sizes, "intermediate_size": sizes["intermediate_size"] or 4 * sizes["hidden_size"]}
    )


def check_shapes(teacher_config, student_config, *, seq_len: int, init: str, compressed: bool,
                 attention_loss: str | None) -> None:
    """Stop before any weights are read when two models cannot work together.

    Args: attention_loss is None without attention distillation.
    Raises CheckpointError naming the parameter and the remedies.
    """
    t, s = teacher_config, student_config
    if s.num_hidden_layers > t.num_hidden_layers:
        raise CheckpointError(
            f"num_hidden_layers: the student has {s.num_hidden_layers}, the teacher "
            f"{t.num_hidden_layers} layers; choose at most {t.num_hidden_layers}"
        )
    if attention_loss in ("mse", "kl") and s.num_attention_heads != t.num_attention_heads:
        raise CheckpointError(
            f"distil_attention: the teacher has {t.num_attention_heads} heads, the student "
            f"{s.num_attention_heads}; set num_attention_heads: {t.num_attention_heads} or "
            "attention_loss: relation"
        )
    if compressed and init == "scratch" and s.hidden_size > t.hidden_size:
        raise CheckpointError(
            f"hidden_size: {s.hidden_size} is wider than the teacher ({t.hidden_size}), so its word "
            f"embeddings cannot be compressed to it; choose at most {t.hidden_size}"
        )
    for name, config in (("teacher", t), ("student", s)):
        room = getattr(config, "max_position_embeddings", None) or seq_len
        if seq_len > room:
            raise CheckpointError(
                f"seq_len: {seq_len} is more than the {room} positions of the {name}; "
                f"choose at most {room}"
            )


def spread(n_student: int, n_teacher: int, layer_map: str) -> list[tuple[int, int]]:
    """Pairs (student, teacher) of hidden-state indices 0..L, 0 = embeddings, ascending.

    "top" pairs student hidden[-i] with teacher hidden[-i] (2106.04563); "uniform" by depth.
    """
    if layer_map == "top":
        return [(s, s + n_teacher - n_student) for s in range(n_student + 1)]
    return [(s, round(s * n_teacher / n_student)) for s in range(n_student + 1)]


def build_student(config, teacher, init: str, checkpoint: str | None, labels: list[str], pad_id: int):
    """The student on the teacher's vocabulary, word embeddings not yet the teacher's (but copied
    with `teacher_layers`).

    Returns: the student and the pretrained word embeddings [V_s, H_s], None unless a checkpoint of
    another vocabulary was loaded.
    """
    vocab_size, own = teacher.config.vocab_size, None
    if init == "checkpoint":
        student = load_encoder(checkpoint, labels, "pt_student_checkpoint")
        own = word_embedding(student).detach().clone()
        if len(own) != vocab_size:
            student.resize_token_embeddings(vocab_size, mean_resizing=False)
    else:
        config.vocab_size = vocab_size
        config.id2label, config.label2id = teacher.config.id2label, teacher.config.label2id
        student = from_config(config)
    student.config.pad_token_id = pad_id
    if init == "teacher_layers":
        copy_layers(teacher, student)
    return student, own


def copy_layers(teacher, student) -> None:
    """Copy embeddings, head and evenly spread layers (the last one included) into the student."""
    n_t, n_s = teacher.config.num_hidden_layers, student.config.num_hidden_layers
    layers_t, layers_s = encoder_layers(teacher, n_t), encoder_layers(student, n_s)
    inside = {id(p) for p in layers_t.parameters()} | {id(p) for p in layers_s.parameters()}
    source = {n: p for n, p in teacher.named_parameters() if id(p) not in inside}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if id(parameter) not in inside:
                parameter.copy_(source[name])
    for s, t in spread(n_s, n_t, "uniform")[1:]:
        layers_s[s - 1].load_state_dict(layers_t[t - 1].state_dict())


def make_projections(pairs: list[tuple[int, int]], width_s: int, width_t: int) -> nn.ModuleDict:
    """One linear map H_s -> H_t per layer pair, named by the student layer; none at equal widths."""
    if width_s == width_t:
        return nn.ModuleDict()
    return nn.ModuleDict({str(s): nn.Linear(width_s, width_t) for s, _ in pairs})


def head_of(model) -> nn.Linear:
    """The linear classifier [C, H] on the last hidden states.

    Raises CheckpointError where the head is something else."""
    for name in ("classifier", "score"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear) and head.in_features == model.config.hidden_size:
            return head
    raise CheckpointError(f"{type(model).__name__} has no linear head on its last hidden states")


def fold_head(student, teacher, projection: nn.Linear | None) -> None:
    """Give the student the teacher's classifier composed with the projection of the top layer.

    W = W_t P, b = W_t b_P + b_t: logits of the student's own states equal the teacher's classifier
    on projected states, and nothing but a standard model is deployed.
    """
    goal, head = head_of(student), head_of(teacher)
    with torch.no_grad():
        weight, bias = head.weight, head.bias
        if projection is not None:
            weight, bias = head.weight @ projection.weight, head.weight @ projection.bias + head.bias
        goal.weight.copy_(weight)
        goal.bias.copy_(bias)


def compressed_words(words, own_rows, tokenizer, own, student_checkpoint):
    """The teacher's word embeddings [V, H_t] in the student's width.

    Args: own_rows: the student's initial embeddings; own: a pretrained student's [V_s, H_s] or None.
    Returns: [V, H_s] and what was done, for the metrics.
    """
    if own is None:
        new, _ = embeddings.compress(words, own_rows.shape[1])
        return embeddings.rescale(new, float(own_rows.norm(dim=-1).mean())), {"words": "svd"}
    other = load_tokenizer(student_checkpoint, "pt_student_checkpoint")
    if other.get_vocab() == tokenizer.get_vocab():
        return own, {"words": "the student's own: one vocabulary"}
    lists = [t.convert_ids_to_tokens(list(range(len(t)))) for t in (tokenizer, other)]
    marks = any(piece.startswith(("▁", "Ġ")) for piece in lists[0])
    new, shared = embeddings.mapped_to_student(
        words[: len(lists[0])], lists[0], own[: len(lists[1])], lists[1], marks
    )
    rest = new.mean(0).expand(len(words) - len(new), -1)
    return torch.cat([new, rest]), {"words": "mapped", "shared_pieces": shared}


def check_same_vocabulary(tokenizer, student_checkpoint: str) -> None:
    """Raises CheckpointError if the student's own vocabulary is not the run's (the teacher's)."""
    other = load_tokenizer(student_checkpoint, "pt_student_checkpoint")
    if other.get_vocab() != tokenizer.get_vocab():
        raise CheckpointError(
            f"pt_student_checkpoint: {student_checkpoint!r} has another vocabulary ({len(other)} "
            f"pieces) than the teacher ({len(tokenizer)}); set compress_word_embedding: true"
        )


def distil_terms(student, hidden, maps, relation: bool, hidden_loss, attention_loss, teacher_config):
    """The loss terms of stage 1 as a function of (modules, batch); modules hold `student` and
    `projections`. Sum over pairs of hidden and attention losses (2106.04563)."""
    hidden_fn = {"mse": losses.hidden_mse, "cosine": losses.hidden_cosine}[hidden_loss]
    map_fn = losses.attention_kl if attention_loss == "kl" else losses.attention_mse
    recorder = Recorder(student, student.config.num_hidden_layers) if relation else None
    common = math.gcd(student.config.hidden_size, teacher_config.hidden_size)
    n_heads = max(n for n in range(1, teacher_config.num_attention_heads + 1) if common % n == 0)

    def terms(modules, batch):
        mask = batch["attention_mask"]
        _, states, found = run_model(modules["student"], batch, True, bool(maps))
        values = {}
        for i, (s, _) in enumerate(hidden):
            state = states[s]
            if str(s) in modules["projections"]:
                state = modules["projections"][str(s)](state)
            values[f"hidden_{s}"] = hidden_fn(state, batch["teacher_hidden"][:, :, i], mask)
        for i, (s, _) in enumerate(maps):
            values[f"attention_{s}"] = map_fn(found[s - 1], batch["teacher_attention"][:, i], mask)
        if recorder:
            ours, theirs = recorder.take().chunk(3, -1), batch["teacher_relation"].chunk(3, -1)
            for name, x, y in zip(("query", "key", "value"), ours, theirs, strict=True):
                values[f"attention_{name}"] = losses.relation_kl(x, y, mask, n_heads)
        return values

    return terms


def model_card(metrics: dict, labels: list[str], teacher: str) -> str:
    """README.md of the exported student: use, scores, sizes."""
    student, scores = metrics["student"], metrics["student"]["test"]
    rows = "\n".join(
        f"| {language} | {metrics['teacher']['test']['by_language'][language] or 0:.4f} "
        f"| {f1 or 0:.4f} |" for language, f1 in scores["by_language"].items()
    )
    return f"""---
pipeline_tag: token-classification
library_name: transformers
tags: [distillation, xdistil]
---
# Distilled token classifier

A student of {student['parameters']:,} parameters distilled with xdistil from a fine-tuned
`{teacher}`. Labels: {", ".join(labels)}.

    from transformers import pipeline
    tag = pipeline("token-classification", model="FOLDER", aggregation_strategy="first")

| language | teacher F1 | student F1 |
| --- | --- | --- |
{rows}
| macro | {metrics['teacher']['test']['macro']:.4f} | {scores['macro']:.4f} |

Strict IOB2 entity F1 on the task's test set, each sentence whole.
"""
