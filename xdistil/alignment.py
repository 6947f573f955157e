"""How alike teacher and student are inside: numbers only, padding never counts."""

import numpy as np
import torch
import torch.nn.functional as F

from xdistil import data, losses, models, wordwise


def linear_cka(rows, columns) -> list[list[float]]:
    """Linear centred kernel alignment (Kornblith et al. 2019), 0..1, of each of `rows` (each [n, H]) with each of
    `columns` (the same n, any H); 0 where all n are the same."""
    columns = [losses.unit_states(y.double()) for y in columns]
    units = (losses.unit_states(x.double()) for x in rows)  # one at a time: all would be many times the models
    return [[float(torch.linalg.norm(y.T @ x) ** 2) for y in columns] for x in units]


def nearest_heads(teacher, student) -> list[list[tuple[int, int]]]:
    """Layer (from 1) and head (from 0) of the teacher's map that is nearest to each of the student's, [L_s][A_s]: the
    least KL(t || s) + KL(s || t), mean over rows. Maps [L_t, A_t, S, S] and [L_s, A_s, S, S]."""
    t, s = (maps.flatten(0, 1).flatten(1).double().clamp(min=1e-9) for maps in (teacher, student))
    both = (t * t.log()).sum(1) + (s * s.log()).sum(1)[:, None] - s.log() @ t.T - s @ t.log().T
    n_heads = teacher.shape[1]
    return [[(i // n_heads + 1, i % n_heads) for i in row]
            for row in both.argmin(1).reshape(student.shape[:2]).tolist()]


def token_similarity(teacher, student) -> torch.Tensor:
    """Cosine (-1..1) of each teacher state [S, H_t] with each student state [S, H_s], [S, S]. Where widths differ, of
    their rows in the centred Gram matrices: how alike two tokens stand to all of the sentence."""
    if teacher.shape != student.shape:
        teacher, student = ((x - x.mean(0)) @ (x - x.mean(0)).T for x in (teacher, student))
    return F.normalize(teacher.double(), dim=-1) @ F.normalize(student.double(), dim=-1).T


def principal_plane(teacher, student):
    """Both models' states [S, H] in the plane of the teacher's first two principal components, [S, 2] each, and the
    share (0..1) of the teacher's variance that it shows. A student of another width is shown in its own plane, turned
    and scaled onto the teacher's (Procrustes)."""
    def plane(states):
        states = F.pad(states.double() - states.double().mean(0), (0, 0, 0, 1))  # two rows at least
        _, values, axes = torch.linalg.svd(states, full_matrices=False)
        return states[:-1] @ axes[:2].T, axes[:2].T, float(values[:2].square().sum() / values.square().sum())

    shown, axes, share = plane(teacher)
    if teacher.shape == student.shape:
        return shown, (student.double() - teacher.double().mean(0)) @ axes, share
    own, *_ = plane(student)
    left, values, right = torch.linalg.svd(own.T @ shown)
    return shown, own @ (left @ right) * values.sum() / own.square().sum().clamp(min=1e-12), share


@torch.no_grad()
def measure_alignment(teacher, student, projections, examples: data.Examples, pad_id: int, device, *,
                      hidden_pairs=(), attention_pairs=(), n_windows: int = 128) -> dict:
    """Alignment on a fixed sample of evenly spread windows: `cka` [L_t + 1][L_s + 1]; `cosine` per hidden pair, after
    projection, None where widths differ; `attention_kl` [pair][head] in nats; the pairs; of top states, the student's
    and those paired with them, `spread` (share of their norm beside their mean's) and `rank` (participation ratio of
    their covariance); of `words` words or texts, the shares that both answer alike (`agreement`) and that have the
    teacher's most frequent answer (`constant`). Args: hidden_pairs: (student, teacher) hidden-state indices 0..L;
    attention_pairs: (student, teacher) layers 1..L of equal head counts, eager attention; projections: see
    `students.make_projections`."""
    teacher.eval(), student.eval()
    some = np.linspace(0, len(examples) - 1, min(n_windows, len(examples))).astype(int)
    kept_t, kept_s, divergence, weights, answers = [], [], [], [], []
    for start in range(0, len(some), 16):
        batch = {k: v.to(device) for k, v in data.collate(examples, some[start : start + 16], pad_id).items()}
        mask, read = wordwise.compared(batch), wordwise.as_teacher_reads(examples, batch, teacher)
        logits_t, states_t, maps_t = models.run_model(teacher, read, True, bool(attention_pairs))
        logits_s, states_s, maps_s = models.run_model(student, batch, True, bool(attention_pairs))
        logits_t, *states_t = (wordwise.move_states(x, read, batch) for x in (logits_t, *states_t))
        for kept, states in ((kept_t, states_t), (kept_s, states_s)):
            kept.append([state[mask > 0].float() for state in states])
        first = batch["words"][:, : logits_t.shape[1]] >= 0
        answers.append(torch.stack([logits[first].argmax(-1) for logits in (logits_s, logits_t)]))
        heads = [zip(wordwise.pool_maps(maps_s[s - 1], batch, batch).split(1, 1),
                     wordwise.pool_maps(maps_t[t - 1], read, batch).split(1, 1), strict=True)
                 for s, t in attention_pairs]
        divergence.append([[float(losses.attention_kl(a, b, mask)) for a, b in pair] for pair in heads])
        weights.append(int(mask.sum()))
    all_t, all_s = ([torch.cat(parts) for parts in zip(*kept, strict=True)] for kept in (kept_t, kept_s))
    projected = [projections[str(s)](all_s[s]) if str(s) in projections else all_s[s] for s, _ in hidden_pairs]
    cosine = [float(torch.cosine_similarity(state, all_t[t], dim=-1).mean()) if state.shape == all_t[t].shape else None
              for state, (_, t) in zip(projected, hidden_pairs, strict=True)]
    kl = np.average(divergence, axis=0, weights=weights).tolist()
    ours, theirs = torch.cat(answers, 1)
    tops = [all_s[-1], all_t[dict(hidden_pairs).get(len(all_s) - 1, -1)]]
    units = [losses.unit_states(x.double()) for x in tops]
    return {"cka": linear_cka(all_t, all_s), "cosine": cosine, "attention_kl": kl, "hidden_pairs": hidden_pairs,
            "attention_pairs": attention_pairs, "rank": [float(x.square().sum() ** 2) for x in units],
            "spread": [float((x - x.mean(0)).norm() / x.norm().clamp(min=1e-12)) for x in tops], "words": len(ours),
            "agreement": float((ours == theirs).double().mean()),
            "constant": int(theirs.bincount().max()) / len(theirs)}
