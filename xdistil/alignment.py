"""How alike teacher and student are inside: numbers only, padding never counts."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from xdistil.data import Examples, collate
from xdistil.losses import attention_kl
from xdistil.models import run_model


def linear_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Linear centred kernel alignment of [n, H_1] and [n, H_2] (Kornblith et al. 2019), 0..1."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    scale = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return float(torch.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0


def measure_alignment(teacher, student, projections, examples: Examples, *, hidden_pairs,
                      attention_pairs, accelerator, pad_id: int, n: int = 128, max_tokens=4096) -> dict:
    """Alignment on a fixed sample, the first `n` windows of evenly spread positions.

    Args: hidden_pairs (student, teacher) hidden-state indices 0..L; attention_pairs (student,
        teacher) layers 1..L, empty to skip maps; projections as in `students.make_projections`.
    Returns: `cka` [L_t + 1][L_s + 1]; `cosine` per hidden pair after projection; `attention_kl`
        [pair][student head] in nats, of the teacher head of the same index, or of the nearest one
        when head counts differ; `tokens`.
    """
    teacher.eval(), student.eval()
    some = np.linspace(0, len(examples) - 1, min(n, len(examples))).astype(int)
    kept_t, kept_s, divergence, weights = [], [], [], []
    for start in range(0, len(some), 16):
        batch = collate(examples, some[start : start + 16], pad_id)
        batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
        mask = batch["attention_mask"]
        with torch.inference_mode():
            _, states_t, maps_t = run_model(teacher, batch, True, bool(attention_pairs))
            _, states_s, maps_s = run_model(student, batch, True, bool(attention_pairs))
            for kept, states in ((kept_t, states_t), (kept_s, states_s)):
                kept.append(torch.stack([h[mask > 0].float().cpu() for h in states]))
            divergence.append([head_divergence(maps_s[s - 1], maps_t[t - 1], mask)
                               for s, t in attention_pairs])
            weights.append(int(mask.sum()))
    all_t, all_s = (torch.cat(kept, dim=1)[:, :max_tokens] for kept in (kept_t, kept_s))
    cosine = []
    for s, t in hidden_pairs:
        state = all_s[s]
        if str(s) in projections:
            with torch.inference_mode():
                state = projections[str(s)].cpu()(state)
                projections[str(s)].to(accelerator.device)
        same = state.shape == all_t[t].shape
        cosine.append(float(F.cosine_similarity(state, all_t[t], dim=-1).mean()) if same else None)
    return {
        "cka": [[linear_cka(t, s) for s in all_s] for t in all_t], "cosine": cosine,
        "attention_kl": np.average(divergence, axis=0, weights=weights).tolist(),
        "hidden_pairs": hidden_pairs, "attention_pairs": attention_pairs,
        "tokens": all_t.shape[1],
    }


def head_divergence(student, teacher, mask) -> list[float]:
    """KL(teacher || student) in nats of each student head [B, A_s, S, S], see above."""
    n_s, n_t = student.shape[1], teacher.shape[1]
    pairs = {h: [h] if n_s == n_t else range(n_t) for h in range(n_s)}
    return [
        min(float(attention_kl(student[:, h : h + 1], teacher[:, o : o + 1], mask)) for o in others)
        for h, others in pairs.items()
    ]
