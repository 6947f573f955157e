"""How alike teacher and student are inside: numbers only, padding never counts."""

import numpy as np
import torch

from xdistil import data, losses, models, wordwise


def linear_cka(rows, columns) -> list[list[float]]:
    """Linear centred kernel alignment (Kornblith et al. 2019), 0..1, of each of `rows` (each [n, H]) with each of
    `columns` (the same n, any H); 0 where all n are the same."""
    columns = [losses.unit_states(y.double()) for y in columns]
    units = (losses.unit_states(x.double()) for x in rows)  # one at a time: all would be many times the models
    return [[float(torch.linalg.norm(y.T @ x) ** 2) for y in columns] for x in units]


@torch.inference_mode()
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
