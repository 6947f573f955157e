"""How far apart teacher and student are: float32 means over real positions, 0 without any; masks [B, S], 1 = real.
Below, s and t are the student's and the teacher's values at one real position, mean runs over all of those."""

import math
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F

IGNORED = -100  # the label of positions without a tag: special tokens, later sub-words, padding
TOTAL = ContextVar("TOTAL", default=lambda count: count.clamp(min=1))  # of a count, what a mean divides by


@contextmanager
def shared_out(mean):
    """Inside, where a batch is shared out among processes, means divide by the mean over these, `mean`, of the counts
    of positions: so the mean of all losses is the loss of the whole batch, however unequal the parts. (CKA is no mean
    over tokens: of several processes each has that of its own part.)"""
    token = TOTAL.set(lambda count: mean(count).clamp(min=1e-9))
    try:
        yield
    finally:
        TOTAL.reset(token)


def masked_mean(values, mask):
    """Mean of `values` where `mask` (broadcast against it) is 1; 0 when the mask is empty."""
    return values.where(mask > 0, 0.0).sum() / TOTAL.get()(mask.expand_as(values).sum())


def _same_shape(student, teacher):
    if student.shape != teacher.shape:
        raise ValueError(f"student {tuple(student.shape)} and teacher {tuple(teacher.shape)} differ in shape; project "
                         "hidden states to the teacher's width, use equal head counts and the same labels")


def _real(student, teacher, mask):
    """Both tensors in float32, 1 on padding: what padding holds, were it inf or nan, must not reach a gradient."""
    _same_shape(student, teacher)
    return (tensor.float().where(mask > 0, 1.0) for tensor in (student, teacher))


def _mse(student, teacher, mask):
    _same_shape(student, teacher)
    difference = torch.where(mask > 0, student.float() - teacher.float(), 0.0)  # few passes: this is a hot place
    return difference.square().sum() / TOTAL.get()(mask.sum() * (difference.numel() // mask.numel()))


def hidden_mse(student, teacher, mask):
    """Mean squared error of hidden states [B, S, H_t], mean (s - t)^2 (2106.04563); the student's are projected."""
    return _mse(student, teacher, mask[..., None])


def hidden_cosine(student, teacher, mask):
    """mean 1 - s.t / (|s| |t|) over tokens of hidden states [B, S, H_t] (DistilBERT's L_cos)."""
    student, teacher = _real(student, teacher, mask[..., None])
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def unit_states(states, real=None):
    """States [n, H] where `real` [n, 1] is 1 (default: all), centred and scaled so that |X'X|_F = 1, zeros elsewhere;
    the linear CKA (Kornblith et al. 2019) of two such X and Y is |Y'X|_F^2. All zeros where all n are the same."""
    real = states.new_ones(len(states), 1) if real is None else real
    states = states.where(real > 0, 0.0)
    states = (states - states.sum(0) / real.sum().clamp(min=1)).where(real > 0, 0.0)
    states = states / torch.linalg.norm(states).clamp(min=1e-12)  # no square below over- or underflows
    return states / torch.linalg.norm(states.T @ states).clamp(min=1e-12).sqrt()


def hidden_cka(student, teacher, mask):
    """1 - |Y'X|_F^2 / (|X'X|_F |Y'Y|_F), linear CKA of centred states X [n, H_s] and Y [n, H_t] of the n real tokens
    of a batch: any widths, no projection, blind to rotation and scale (Dasgupta and Cohn 2025). It needs n >> H."""
    _same_shape(student[..., 0], teacher[..., 0])
    with torch.autocast(mask.device.type, enabled=False):  # sums over all tokens want float32
        x, y = (unit_states(states.float().flatten(0, 1), mask.flatten()[:, None]) for states in (student, teacher))
        return (1 - (y.T @ x).square().sum()) * (mask.sum() > 0)


def attention_mse(student, teacher, mask):
    """mean (s - t)^2 of attention maps [B, A, S, S] over heads and pairs of real tokens (2106.04563)."""
    return _mse(student, teacher, mask[:, None, :, None] * mask[:, None, None])


def attention_kl(student, teacher, mask):
    """KL(t || s) = sum t log(t / s) of attention rows [B, A, S, S] in nats, mean over heads and real rows."""
    student, teacher = _real(student, teacher, mask[:, None, :, None] * mask[:, None, None])  # log 1 adds nothing
    rows = (teacher * (teacher.clamp(min=1e-9).log() - student.clamp(min=1e-9).log())).sum(-1)
    return masked_mean(rows, mask[:, None, :])


def relation_kl(student, teacher, mask, n_heads: int | None = None):
    """MiniLMv2 (2012.15828): sum over X = Q, K, V of the mean over heads and real rows of KL(R_t || R_s), in nats:
    R = softmax(X X' / sqrt(d)) over real tokens and X is split into `n_heads` relation heads of width d. `student` and
    `teacher` [B, S, 3, H] may differ in width and attention heads; `n_heads` divides both widths, by default the
    largest such number up to 12; the paper has 48 for BERT-base, at twice the time."""
    _same_shape(student[..., 0], teacher[..., 0])
    common = math.gcd(student.shape[-1], teacher.shape[-1])
    n_heads = n_heads or max(n for n in range(1, 13) if common % n == 0)

    def log_relations(qkv):  # [B, 3, n_heads, S, S]
        x = qkv.float().where(mask[:, :, None, None] > 0, 0.0).unflatten(-1, (n_heads, -1)).permute(0, 2, 3, 1, 4)
        scores = (x * x.shape[-1] ** -0.5) @ x.mT
        return scores.masked_fill(mask[:, None, None, None] == 0, -1e9).log_softmax(-1)  # not -inf: 0 x inf is nan

    with torch.autocast(mask.device.type, enabled=False):  # softmax of large scores wants float32
        rows = F.kl_div(*map(log_relations, (student, teacher)), log_target=True, reduction="none").sum(-1)
        return 3 * masked_mean(rows, mask[:, None, None])


def logit_mse(student, teacher, mask):
    """mean (s - t)^2 of raw logits [B, S, C] (2004.05686, L_LL without its factor 1/2)."""
    return _mse(student, teacher, mask[..., None])


def logit_kl(student, teacher, mask, temperature: float = 1.0):
    """temperature^2 KL(teacher || student) of softened classes [B, S, C], in nats (Hinton et al. 2015)."""
    log_s, log_t = (F.log_softmax(x / temperature, dim=-1) for x in _real(student, teacher, mask[..., None]))
    return masked_mean(F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1), mask) * temperature**2


def tag_loss(logits, labels):
    """Cross-entropy of logits [B, S, C] against labels [B, S]; IGNORED positions do not count."""
    values = F.cross_entropy(logits.float().transpose(1, 2), labels.clamp(min=0), reduction="none")
    return masked_mean(values, labels != IGNORED)
