"""How far apart teacher and student are: float32 means over real positions, 0 without any; masks [B, S], 1 = real."""

import torch
import torch.nn.functional as F

IGNORED = -100  # the label of positions without a tag: special tokens, later sub-words, padding


def masked_mean(values, mask):
    """Mean of `values` where `mask` (broadcast against it) is 1; 0 when the mask is empty."""
    return values.where(mask > 0, 0.0).sum() / mask.expand_as(values).sum().clamp(min=1)


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
    return difference.square().sum() / (mask.sum() * (difference.numel() // mask.numel())).clamp(min=1)


def hidden_mse(student, teacher, mask):
    """Mean squared error of hidden states [B, S, H_t] (2106.04563); the student's are projected before."""
    return _mse(student, teacher, mask[..., None])


def hidden_cosine(student, teacher, mask):
    """1 - cosine of hidden states [B, S, H_t], mean over tokens (DistilBERT's L_cos)."""
    student, teacher = _real(student, teacher, mask[..., None])
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def attention_mse(student, teacher, mask):
    """Mean squared error of attention maps [B, A, S, S] over heads and pairs of real tokens (2106.04563)."""
    return _mse(student, teacher, mask[:, None, :, None] * mask[:, None, None])


def attention_kl(student, teacher, mask):
    """KL(teacher || student) of attention rows [B, A, S, S] in nats, mean over heads and real rows."""
    student, teacher = _real(student, teacher, mask[:, None, :, None] * mask[:, None, None])  # log 1 adds nothing
    rows = (teacher * (teacher.clamp(min=1e-9).log() - student.clamp(min=1e-9).log())).sum(-1)
    return masked_mean(rows, mask[:, None, :])


def logit_mse(student, teacher, mask):
    """Mean squared error of raw logits [B, S, C] (2004.05686, L_LL without its factor 1/2)."""
    return _mse(student, teacher, mask[..., None])


def logit_kl(student, teacher, mask, temperature: float = 1.0):
    """temperature^2 KL(teacher || student) of softened classes [B, S, C], in nats (Hinton et al. 2015)."""
    log_s, log_t = (F.log_softmax(x / temperature, dim=-1) for x in _real(student, teacher, mask[..., None]))
    return masked_mean(F.kl_div(log_s, log_t, log_target=True, reduction="none").sum(-1), mask) * temperature**2


def tag_loss(logits, labels):
    """Cross-entropy of logits [B, S, C] against labels [B, S]; IGNORED positions do not count."""
    values = F.cross_entropy(logits.float().transpose(1, 2), labels.clamp(min=0), reduction="none")
    return masked_mean(values, labels != IGNORED)
