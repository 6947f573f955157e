"""Figures: numbers in, a matplotlib figure out; not through pyplot, as notebooks would show it twice."""

import io
import itertools
import math

import numpy as np
from matplotlib import colors, font_manager
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe-Ito: told apart under the common colour-vision deficiencies; without its faint yellow.
TEACHER, STUDENT, SKY, ORANGE, BLACK, GREY = "#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#000000", "#6b6b6b"
CYCLE = (TEACHER, STUDENT, "#009E73", "#CC79A7", SKY, ORANGE)
# A glyph that one font lacks is looked up in the next; matplotlib warns of fonts that are not installed.
WANTED = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans Thai", "Noto Sans Devanagari", "WenQuanYi Zen Hei",
          "Droid Sans Fallback", "FreeSans")
FAMILIES = [name for name in WANTED if name in font_manager.get_font_names()]


class Picture(Figure):
    """Figure that Jupyter draws without any magic command."""

    def _repr_png_(self):
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        return buffer.getvalue()


def _figure(title, height, width=11.6, rows=1, cols=1, layout="constrained", **settings):
    """Styled figure, inches; `settings` (labels, limits, ticks) hold for each of its axes."""
    fig = Picture(figsize=(width, height), dpi=110, layout=layout)
    fig.suptitle(title, weight="bold", parse_math=False)
    axes = fig.subplots(rows, cols, sharex="col")
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#dddddd")
        ax.tick_params(labelfontfamily=FAMILIES)
        ax.set(axisbelow=True, **settings)
    return fig, axes


def _legend(fig, ncols):
    fig.legend(loc="outside lower center", ncols=ncols, frameon=False)
    return fig


def _drawable(tokens):
    """Tokens with a box for each glyph that no font has, cut to 16 characters."""
    fonts = [font_manager.get_font(font_manager.findfont(name)) for name in FAMILIES]
    known = set().union(*(font.get_charmap() for font in fonts))
    return ["".join(c if ord(c) in known else "\u25af" for c in token)[:16] for token in tokens]


def _heat_map(matrix, title, label, vmax, **settings):
    """Colours from 0 to `vmax`, NaN grey, row 0 at the bottom; values in the cells unless too many."""
    rows, cols = matrix.shape
    fig, ax = _figure(title, min(1.7 + 0.36 * rows, 8), min(3.4 + 0.62 * cols, 11.6), xticks=range(cols),
                      yticks=range(rows), facecolor="#cccccc", **settings)
    ax.grid(False)
    fig.colorbar(ax.imshow(matrix, "cividis", vmin=0, vmax=vmax, aspect="auto", origin="lower"), label=label)
    for (row, col), value in np.ndenumerate(matrix):
        if max(rows, cols) <= 16 and np.isfinite(value):
            ink = "white" if value < 0.55 * vmax else "black"
            ax.text(col, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    return fig, ax


def plot_lengths(lengths, seq_len):
    """`lengths`: {file: sub-words of each sentence}; `seq_len`: sub-words per sequence."""
    fig, ax = _figure("Sentence lengths: those right of the dashed line are split into windows", 4.4,
                      xlabel="sub-words per sentence (last bin: all longer ones)", ylabel="sentences (%)")
    bins = np.arange(-0.5, 1.5 * seq_len, math.ceil(seq_len / 40))
    for (name, values), colour in zip(lengths.items(), CYCLE, strict=False):
        longer = 100 * np.mean(np.array(values) > seq_len)
        ax.hist(np.minimum(values, bins[-1]), bins, weights=np.full(len(values), 100 / len(values)),
                histtype="step", linewidth=1.8, color=colour,
                label=f"{name}: {len(values):,} sentences, {longer:.3g} % longer than {seq_len}")
    ax.axvline(seq_len + 0.5, color=GREY, linestyle="--", label=f"seq_len: {seq_len} sub-words")
    return _legend(fig, 2)


def plot_history(history, title):
    """Records of history.jsonl by optimizer update. Above: the loss and its terms; below: the held-out
    metric (F1 in percent), a star at the best. Dotted lines: an unfreezing step begins."""
    fig, (top, low) = _figure(title, 6.6, rows=2)
    train, evals = ([r for r in history if r["kind"] == kind] for kind in ("train", "eval"))
    terms = [k for k in train[0] if k not in ("kind", "step", "step_name", "epoch", "update", "lr")]
    families = itertools.groupby(terms, lambda term: term.rstrip("_0123456789"))
    for (_, group), colour in zip(families, (BLACK, *CYCLE), strict=False):
        first, *others = names = list(group)
        label = f"{first} (dark) … {names[-1]} (pale)" if others else first
        for name, alpha in zip(names, np.linspace(1, 0.35, len(names)), strict=True):
            top.plot([r["update"] for r in train], [r[name] for r in train], color=colour, alpha=alpha,
                     marker="o" if len(train) == 1 else "", label=label if name == first else None)
    losses = [r[term] for r in train for term in terms]
    top.set(ylabel="loss", yscale="log" if max(losses) > 20 * min(losses) > 0 else "linear")
    metric = evals[0]["metric"]
    unit, scale = (" (%)", 100) if metric.endswith("F1") else ("", 1)
    low.plot([r["update"] for r in evals], [scale * r["score"] for r in evals], "o-", color=STUDENT)
    best = [r for r in evals if r["best"]][-1]  # "best": it beats all before it
    low.plot(best["update"], scale * best["score"], "*", color=ORANGE, markersize=15, markeredgecolor=BLACK,
             label=f"best: {scale * best['score']:.4g}{unit} at update {best['update']:,}")
    low.set(xlabel="optimizer updates", ylabel=metric + unit)
    for name, start in {r["step_name"]: r["update"] for r in reversed(history)}.items():
        top.text(start, 1.02, name, transform=top.get_xaxis_transform(), color=GREY, rotation=15)
        for ax in (top, low):
            ax.axvline(start, color=GREY, linestyle=":")
    return _legend(fig, 3)


def plot_spectrum(singular_values, kept):
    """`singular_values`: [D] of the teacher's word embeddings, largest first (no unit); `kept`: how many."""
    energy = 100 * np.cumsum(np.square(singular_values)) / np.sum(np.square(singular_values))
    size, share = len(energy), energy[kept - 1]
    fig, axes = _figure(f"The first {kept} of {size} singular values hold {share:.1f} % of the energy", 4.2,
                        cols=2, xlabel="rank of the singular value (shaded: kept)", xlim=(0.5, size + 0.5))
    for ax, values in zip(axes, (singular_values, energy), strict=True):
        ax.plot(np.arange(1, size + 1), values, color=TEACHER)
        ax.axvspan(0.5, kept + 0.5, color=SKY, alpha=0.25, linewidth=0)
    axes[0].set(yscale="log", ylabel="singular value (log scale)")
    axes[1].set(ylim=(0, 104), ylabel="cumulative energy (% of sum of squares)")
    return fig


def plot_attention_pair(tokens, teacher, student, title, head=None):
    """Attention of one sentence of S `tokens`: `teacher` [A_t, S, S], `student` [A_s, S, S], weights from 0
    to 1, row = attending token. `head`: index from 0, None = mean over heads."""
    what = "mean over heads" if head is None else f"head {head} (counted from 0)"
    shown = range(0, len(tokens), math.ceil(len(tokens) / 36))  # more names could not be read
    names = _drawable(tokens[i] for i in shown)
    fig, axes = _figure(f"{title}: {what}", 5.8, cols=3, layout="compressed", xlabel="attended token",
                        ylabel="attending token", xticks=shown, xticklabels=names, yticks=shown, yticklabels=names)
    first, second = (np.mean(side, 0) if head is None else side[head] for side in (teacher, student))
    # Square-root scale: a few weights near 1 ([CLS], [SEP]) would leave all the others dark.
    weights = ("cividis", colors.PowerNorm(0.5, 0, max(first.max(), second.max())), "weight (square-root scale)")
    differences = ("RdBu_r", colors.CenteredNorm(), "difference of weights")
    for ax, values, name, (cmap, norm, label) in zip(
            axes, (first, second, second - first), ("Teacher", "Student", "Student − teacher"),
            (weights, weights, differences), strict=True):
        fig.colorbar(ax.imshow(values, cmap, norm), label=label, location="bottom", shrink=0.8)
        ax.tick_params(labelsize=min(9, 160 / len(names)))
        ax.tick_params("x", rotation=90)
        ax.grid(False)
        ax.set_title(name)
        ax.label_outer()
    return fig


def plot_cka(cka, pairs, title):
    """`cka`: [L_t + 1, L_s + 1] linear CKA from 0 to 1 of all layers, index 0 = embeddings; `pairs`:
    (student layer, teacher layer) distilled into each other, framed."""
    fig, ax = _heat_map(np.array(cka), title + "\nframed: distilled pairs" * bool(pairs), "linear CKA", 1,
                        xlabel="student layer (0 = embeddings)", ylabel="teacher layer (0 = embeddings)")
    for student, teacher in pairs:
        ax.add_patch(Rectangle((student - 0.5, teacher - 0.5), 1, 1, fill=False, edgecolor=STUDENT, linewidth=3))
    return fig


def plot_cosine(before, after, pairs):
    """Mean token cosine (-1 to 1) of student and teacher states `before` and `after` stage 1, one value for
    each (student layer, teacher layer) of `pairs`."""
    at, names = np.arange(len(pairs)), [f"S{student} ← T{teacher}" for student, teacher in pairs]
    fig, ax = _figure("Cosine of student and teacher states (1 = same direction)", 3.9, ymargin=0.1, xticks=at,
                      xticklabels=names, xlabel="student layer ← teacher layer", ylabel="mean token cosine")
    for bars in (ax.bar(at - 0.2, before, 0.38, color=SKY, label="before stage 1"),
                 ax.bar(at + 0.2, after, 0.38, color=STUDENT, label="after stage 1")):
        ax.bar_label(bars, fmt="{:.2f}", fontsize=8)
    return _legend(fig, 2)


def plot_attention_kl(kl, pairs, title):
    """`kl`: [n_pairs, A] divergence of the student's attention from the teacher's in nats, a row for each
    (student layer, teacher layer) of `pairs`, a column for each head."""
    names = [f"S{student} ← T{teacher}" for student, teacher in pairs]
    return _heat_map(np.array(kl), title, "KL divergence (nats)", np.nanmax(kl), yticklabels=names,
                     xlabel="attention head (counted from 0)", ylabel="student ← teacher layer")[0]


def plot_languages(teacher, student, title):
    """`teacher`, `student`: {language: F1 from 0 to 1, None = not measured}, sorted by the teacher's. Lines:
    means over the languages that both have; row at the top: student / teacher in percent."""
    names = sorted(teacher, key=lambda name: teacher[name] or 0, reverse=True)
    scores = 100 * np.array([[side[name] for name in names] for side in (teacher, student)], dtype=float)
    at, both = np.arange(len(names)), np.isfinite(scores).all(0)
    side = max(0.7, 2.6 - len(names) / 2)  # else one language would fill the width with two bars
    fig, ax = _figure(f"{title}\nrow at the top: share of the teacher's F1 kept", 4.6, xlabel="language",
                      ylabel="F1 (%)", xlim=(-side, len(names) - 1 + side), ylim=(0, 108))
    for who, f1, shift, colour in zip(("teacher", "student"), scores, (-0.2, 0.2), CYCLE, strict=False):
        ax.bar_label(ax.bar(at + shift, f1, 0.38, color=colour), fmt="{:.1f}", label_type="center",
                     color="white", fontsize=8, rotation=90 if len(names) > 9 else 0)
        label = f"{who}, mean of {both.sum()}: {f1[both].mean():.1f} %"
        ax.axhline(f1[both].mean(), color=colour, linestyle="--", label=label)
    for i in np.flatnonzero(both & (scores[0] > 0)):
        ax.text(i, 102, f"{100 * scores[1, i] / scores[0, i]:.0f} %", ha="center", fontsize=9)
    ax.set(xticks=at, xticklabels=names, yticks=range(0, 101, 20))
    return _legend(fig, 2)


def plot_stages(scores, teacher):
    """`scores`: {stage: dev macro F1 of the student after it} in the order of training; `teacher`: the
    teacher's; both from 0 to 1."""
    fig, ax = _figure("Dev macro F1 of the student after each stage", 3.9, 8.5, xlabel="after stage",
                      ylabel="dev macro F1 (%)", xmargin=0.2, ymargin=0.2)
    ax.plot(list(scores), [100 * f1 for f1 in scores.values()], "o-", color=STUDENT, label="student")
    ax.axhline(100 * teacher, color=TEACHER, linestyle="--", label=f"teacher: {100 * teacher:.1f} %")
    for name, f1 in scores.items():
        ax.annotate(f"{100 * f1:.1f}", (name, 100 * f1), (7, -13), textcoords="offset points")
    return _legend(fig, 2)


def plot_size_speed(rows):
    """`rows`: dicts of "name", "parameters", "non_embedding" (counts), "mb" (megabytes), "ms_per_sentence"
    (batch 1), "sentences_per_second" and "f1" (0 to 1); a number may be None."""
    columns = ("parameters", "non_embedding", "ms_per_sentence", "sentences_per_second", "mb", "f1")
    numbers = np.array([[row[key] for key in columns] for row in rows], dtype=float)
    names = [row["name"] + f"\n{mb:.0f} MB\nF1 {100 * f1:.1f} %".replace("nan", "–")
             for row, (*_, mb, f1) in zip(rows, numbers, strict=True)]
    fig, axes = _figure("Size and speed: what the student saves", 4.2, cols=3, ymargin=0.1)
    total, other = numbers[:, :2].T / 1e6
    panels = ((total, "Parameters (hatched: embeddings)", "parameters (millions)"),
              (numbers[:, 2], "Time of one sentence (less is better)", "ms per sentence at batch 1"),
              (numbers[:, 3], "Throughput (more is better)", "sentences per second"))
    for ax, (values, title, unit) in zip(axes, panels, strict=True):
        bars = ax.bar(names, values, 0.6, color=[TEACHER if row["name"] == "teacher" else STUDENT for row in rows])
        ax.bar_label(bars, fmt="{:,.4g}")
        ax.set(title=title, ylabel=unit)
    axes[0].bar(names, total - other, 0.6, bottom=other, fill=False, hatch="//", edgecolor="white")
    return fig
