"""How far apart teacher and student are: pure functions of tensors, padding never counts.

Every loss is a mean over real positions in float32, and 0 when there are none.
Masks are [B, S], 1 = real token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

IGNORED = -100  # the label of positions without a tag: special tokens, later sub-words, padding


def masked_mean(values, mask):
    """Mean of `values` where `mask` (broadcast against it) is 1; 0 when the mask is empty."""
    mask = mask.expand_as(values).to(values.dtype)
    # where, not a product: whatever padding holds (inf, nan) must not reach the sum
    total = torch.where(mask > 0, values, values.new_zeros(())).sum()
    return total / mask.sum().clamp(min=1)


def _same_width(student, teacher, what: str, remedy: str):
    if student.shape != teacher.shape:
        raise ValueError(
            f"{what}: student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ; "
            f"{remedy}"
        )


def hidden_mse(student, teacher, mask):
    """Mean squared error of hidden states [B, S, H_t] (2106.04563; projections applied before)."""
    _same_width(student, teacher, "hidden_mse", "project the student to the teacher's width")
    return masked_mean((student.float() - teacher.float()) ** 2, mask[..., None])


def hidden_cosine(student, teacher, mask):
    """1 - cosine of hidden states [B, S, H_t], mean over tokens (DistilBERT's L_cos)."""
    _same_width(student, teacher, "hidden_cosine", "project the student to the teacher's width")
    return masked_mean(1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1), mask)


def _pair_mask(mask):
    return mask[:, None, :, None] * mask[:, None, None, :]  # [B, 1, S, S]


def attention_mse(student, teacher, mask):
    """Mean squared error of attention maps [B, A, S, S] over heads and real token pairs."""
    _same_width(student, teacher, "attention_mse", "use equal head counts or attention_loss relation")
    return masked_mean((student.float() - teacher.float()) ** 2, _pair_mask(mask))


def attention_kl(student, teacher, mask):
    """KL(teacher || student) of attention rows [B, A, S, S] in nats, mean over heads and rows."""
    _same_width(student, teacher, "attention_kl", "use equal head counts or attention_loss relation")
    student, teacher = student.float().clamp(min=1e-9), teacher.float()
    rows = torch.where(_pair_mask(mask) > 0, torch.xlogy(teacher, teacher / student), 0.0).sum(-1)
    return masked_mean(rows, mask[:, None, :])


def relations(states, mask, n_heads: int):
    """Log of softmax(X X^T / sqrt(d)) per relation head (MiniLMv2).

    Args: states [B, S, H] (queries, keys or values), mask [B, S], n_heads dividing H.
    Returns: [B, n_heads, S, S]; columns of padding hold about -1e4.
    """
    batch, length, width = states.shape
    heads = states.float().view(batch, length, n_heads, width // n_heads).transpose(1, 2)
    scores = heads @ heads.transpose(-1, -2) / (width // n_heads) ** 0.5
    return F.log_softmax(scores.masked_fill(mask[:, None, None, :] == 0, -1e4), dim=-1)


def relation_kl(student, teacher, mask, n_heads: int):
    """KL of MiniLMv2 relations of [B, S, H_s] and [B, S, H_t]; widths and heads may differ."""
    for name, states in (("student", student), ("teacher", teacher)):
        if states.shape[-1] % n_heads:
            raise ValueError(
                f"relation_kl: {name} width {states.shape[-1]} is not divisible by {n_heads} "
                "relation heads; choose a common divisor of both widths"
            )
    log_s, log_t = relations(student, mask, n_heads), relations(teacher, mask, n_heads)
    rows = torch.where(_pair_mask(mask) > 0, log_t.exp() * (log_t - log_s), 0.0).sum(-1)
    return masked_mean(rows, mask[:, None, :])


def logit_mse(student, teacher, mask):
    """Mean squared error of raw logits [B, S, C] (2004.05686 eq. L_LL without the half)."""
    _same_width(student, teacher, "logit_mse", "give both models the same labels")
    return masked_mean((student.float() - teacher.float()) ** 2, mask[..., None])


def logit_kl(student, teacher, mask, temperature: float = 1.0):
    """temperature^2 KL(teacher || student) of softened classes [B, S, C], in nats (Hinton)."""
    _same_width(student, teacher, "logit_kl", "give both models the same labels")
    log_s = F.log_softmax(student.float() / temperature, dim=-1)
    log_t = F.log_softmax(teacher.float() / temperature, dim=-1)
    return masked_mean((log_t.exp() * (log_t - log_s)).sum(-1), mask) * temperature**2


def tag_loss(logits, labels):
    """Cross-entropy of logits [B, S, C] against labels [B, S]; IGNORED positions do not count."""
    mask = (labels != IGNORED).float()
    values = F.cross_entropy(
        logits.float().transpose(1, 2), labels.clamp(min=0), reduction="none"
    )
    return masked_mean(values, mask)
