"""What a run is warned of: sentences with the numbers, the threshold and the remedy; none if all is well."""

from statistics import fmean

import numpy as np

VARIETY = 0.1  # of the teacher's: with less spread, or rank above 1, the student's states have collapsed
GAIN = 0.02  # of the answers that a constant one misses: so many more are to be the teacher's
RISE, ALIKE = 0.01, 0.9  # of CKA: what stage 1 is to bring at a pair, or where it may end without
FALL = 0.01  # of F1 (0..1), or of a loss as a share of it: what is more than noise


def collapse(found: dict, folded: bool = True) -> list[str]:
    """Of `alignment.measure_alignment`: top states that hardly differ; unless the head is new, answers that are the
    teacher's hardly more often than one answer for all would be."""
    texts = [f"collapse: {name} of the student's top states is {s:.3g}, of the teacher's {t:.3g} (alarm below "
             f"{due:.3g}); lower the learning rate, or set student_init: teacher_layers"
             for name, least in (("spread", 0), ("rank", 1)) for s, t in [found[name]]
             if s < (due := least + VARIETY * (t - least))]
    share, constant, n = found["agreement"], found["constant"], found["words"]
    if folded and share < (due := constant + GAIN * (1 - constant)) and n * (1 - constant) >= 20:
        texts.append(f"collapse: {share:.1%} of {n:,} answers on dev are the teacher's, one answer for all would be "
                     f"at {constant:.1%} (alarm below {due:.1%}); raise distil_epochs or give more transfer text")
    return texts


def projection_alone(history: list[dict], before: dict, after: dict, projections) -> list[str]:
    """Pairs with a projection whose held-out loss fell in stage 1 while their CKA, of `measure_alignment` before and
    after, did not rise."""
    evals, texts = [r for r in history if r["kind"] == "eval"], []
    for s, t in (pair for pair in after["hidden_pairs"] if str(pair[0]) in projections):
        old, new = (r[f"held_out_hidden_{s}"] for r in (evals[0], min(evals, key=lambda r: r["score"])))
        was, now = before["cka"][t][s], after["cka"][t][s]
        if new < old and now < (due := min(was + RISE, ALIKE)):
            texts.append(f"projection: it does the work at layers {s} (student) and {t} (teacher): held-out loss fell "
                         f"from {old:.3g} to {new:.3g}, CKA went from {was:.3f} to {now:.3f} (alarm below {due:.3f}); "
                         "raise distil_epochs, or set hidden_loss: cka, which has no projection")
    return texts


def overfitting(history: list[dict], dev=()) -> list[str]:
    """Scores that grew worse while a loss fell: those of the last two evaluations of a step of `training.fit`, and
    macro F1 on `dev` before and after a stage whose held-out loss selects."""
    evals, cases = [r for r in history if r["kind"] == "eval"], []
    for step in sorted({r["step"] for r in evals}):
        own = [r for r in history if r["step"] == step]
        last = [r for r in own if r["kind"] == "eval"][-3:]
        loss = [fmean(r["loss"] for r in own if (r["kind"], r["epoch"]) == ("train", e["epoch"])) for e in last[1:]]
        lower = last[0]["metric"].endswith("loss")  # is better, and falls by a share of itself, F1 by points
        worse = [r["score"] for r in (last if lower else last[::-1])]
        if len(last) > 2 and worse == sorted(set(worse)) and worse[2] - worse[0] > FALL * (worse[0] if lower else 1):
            cases.append((f"{last[0]['metric']} ({last[0]['step_name']})", last[0]["score"], last[2]["score"], *loss))
    if len(dev) > 1 and dev[0] - dev[1] > FALL:
        cases.append(("dev macro F1, from the stage before,", *dev, evals[0]["score"], min(r["score"] for r in evals)))
    return [f"overfitting: {what} went from {a:.3g} to {b:.3g} (alarm from {FALL:.0%}) while the loss fell from "
            f"{x:.3g} to {y:.3g}; give more text nearer to dev, lower epochs or learning rate, set hard_label_weight"
            for what, a, b, x, y in cases if y < x]


def leakage(name: str, tested, path, trained) -> list[str]:
    """Sentences of dev or test (`name`) in a file that is trained on; of both the line numbers and hashes [2, N]."""
    n, lines = np.isin(tested[1], trained[1]).sum(), trained[0, np.isin(trained[1], tested[1])]
    return [f"leakage: {n:,} of {len(tested[1]):,} of {name} stand in {path} too, first in line {line} (alarm from "
            f"1): drop them there, they flatter the scores on {name}" for line in lines[:1]]
