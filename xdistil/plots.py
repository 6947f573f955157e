"""Figures: numbers in, a matplotlib figure out; not through pyplot, as notebooks would show it twice."""

import functools
import io
import itertools

import numpy as np
from matplotlib import colors, ticker
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font, get_font_names

# Okabe-Ito: told apart under the common colour-vision deficiencies; without its faint yellow.
TEACHER, STUDENT, SKY, ORANGE, GREY = "#0072B2", "#D55E00", "#56B4E9", "#E69F00", "#6b6b6b"
CYCLE = (TEACHER, STUDENT, "#009E73", "#CC79A7", SKY, ORANGE)
# A glyph that one font lacks is looked up in the next; matplotlib warns of fonts that are not installed. On Debian:
# fonts-noto-core and fonts-noto-cjk; without them a box stands for each letter that no font here can draw.
WANTED = ("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", *("Noto Sans " + script for script in (
    "Thai", "Devanagari", "Arabic", "Hebrew", "Bengali", "Tamil", "Telugu", "Armenian", "Georgian", "Ethiopic")))
FAMILIES = [name for name in WANTED if name in get_font_names()]


class Picture(Figure):
    """Figure that Jupyter draws without any magic command."""

    def _repr_png_(self):
        self.savefig(png := io.BytesIO(), format="png", bbox_inches="tight")
        return png.getvalue()


def _figure(title, height, width=11.6, cols=1, rows=1, grid=True, **settings):
    """Styled figure, inches; `settings` (labels, limits, ticks) hold for each of its axes."""
    fig = Picture(figsize=(width, height), dpi=110, layout="constrained")
    fig.suptitle(title, weight="bold", parse_math=False)
    axes = fig.subplots(rows, cols, sharex="col", subplot_kw={"axisbelow": True, **settings})
    for ax in fig.axes:
        ax.spines[["top", "right"]].set_visible(False)
        if grid:
            ax.grid(axis="y", color="#dddddd")
    return fig, axes


def _legend(fig, ncols):
    fig.legend(loc="outside lower center", ncols=ncols, frameon=False)
    return fig


@functools.cache
def _drawable():
    return {code for name in FAMILIES for code in get_font(findfont(name)).get_charmap()}


def name_tokens(tokens, most=36):
    """Places and names of at most so many evenly spaced tokens that do not touch on an axis of 3.3 inches, and the
    style of these; a box stands for what no font can draw."""
    shown = range(0, len(tokens), 1 + (len(tokens) - 1) // most)
    names = ["".join(c if ord(c) in _drawable() else "\u25af" for c in tokens[i])[:12] for i in shown]
    return shown, names, {"parse_math": False, "family": FAMILIES, "size": min(9, 200 / len(names))}


def _heat_map(matrix, title, label, vmax, texts=None, vmin=0, **settings):
    """Colours from `vmin` to `vmax`, NaN grey, row 0 at the bottom; in cells `texts`, or values unless too many."""
    rows, cols = matrix.shape
    size = min(1.7 + 0.36 * rows, 8), min(max(7.6, 3.4 + 0.62 * cols), 11.6)  # wide enough for the title
    fig, ax = _figure(title, *size, grid=False, facecolor="#ccc", xticks=range(cols), yticks=range(rows), **settings)
    fig.colorbar(ax.imshow(matrix, "cividis", vmin=vmin, vmax=vmax, aspect="auto", origin="lower"), label=label)
    for row, col in np.argwhere(np.isfinite(matrix)) if max(rows, cols) <= 16 else ():
        ink = "white" if matrix[row, col] < vmin + 0.55 * (vmax - vmin) else "black"
        text = texts[row][col] if texts else f"{matrix[row, col]:.2f}"
        ax.text(col, row, text, ha="center", va="center", fontsize=8, color=ink)
    return fig, ax


def plot_history(history, title):
    """Records of history.jsonl by optimizer update: the loss and its terms above, the held-out metric (F1 in percent)
    with a star at its best below; dotted lines where an unfreezing step begins."""
    if not history:
        return _figure(f"{title}: nothing was trained here", 1)[0]
    fig, (top, low) = _figure(title, 6.6, rows=2)
    train, evals = ([r for r in history if r["kind"] == kind] for kind in ("train", "eval"))
    terms = [k for k in train[0] if k not in ("kind", "step", "step_name", "epoch", "update", "lr")]
    terms = terms[1:] if len(terms) == 2 else terms  # a loss of one term is that term
    families = itertools.groupby(terms, lambda term: term.rstrip("_0123456789"))
    for (_, group), colour in zip(families, ("black", *CYCLE), strict=False):
        first, *others = names = list(group)
        label = f"{first} (dark) … {names[-1]} (pale)" if others else first
        for name, alpha in zip(names, np.linspace(1, 0.35, len(names)), strict=True):
            top.plot([r["update"] for r in train], [r[name] for r in train], ".-", color=colour, alpha=alpha,
                     markersize=3, linewidth=3 if name == "loss" else 1, label=label if name == first else "")
    metric = evals[0]["metric"].replace("F1", "F1 (%)")
    points = [(r["update"], r["score"] * (100 if "%" in metric else 1), r["best"]) for r in evals]
    update, score, _ = max(p for p in points if p[2])  # the last that beat all before it
    low.plot([p[0] for p in points], [p[1] for p in points], "o-", color=STUDENT)
    low.plot(update, score, "*", color=ORANGE, markersize=15, mec="black",
             label=f"best {metric}: {score:.4g} at update {update:,}")
    for name, start in {r["step_name"]: r["update"] for r in reversed(history)}.items():
        top.text(start, 1.02, name, transform=top.get_xaxis_transform(), color=GREY, rotation=15)
        for ax in (top, low):
            ax.axvline(start, color=GREY, linestyle=":")
    top.set(yscale="log", ylabel="loss (log scale)")
    low.set(xlabel="optimizer updates", ylabel=metric)
    return _legend(fig, 3)


def plot_spectrum(singular_values, kept):
    """`singular_values`: [D] of the teacher's embeddings, largest first (no unit); `kept`: how many."""
    energy, end = np.cumsum(np.square(singular_values)), len(singular_values)
    energy *= 100 / energy[-1]
    fig, axes = _figure(f"The first {kept} of {end} singular values hold {energy[kept - 1]:.1f} % of the energy", 4.2,
                        cols=2, xlabel="rank of the singular value (shaded: kept)", xlim=(0.5, end + 0.5))
    for ax, values in zip(axes, (singular_values, energy), strict=True):
        ax.plot(np.arange(1, end + 1), values, color=TEACHER)
        ax.axvspan(0.5, kept + 0.5, color=SKY, alpha=0.25, linewidth=0)
    axes[0].set(yscale="log", ylabel="singular value (log scale)")
    axes[0].yaxis.set_minor_formatter(ticker.NullFormatter())
    axes[1].set(ylim=(0, 104), ylabel="cumulative energy (% of sum of squares)")
    return fig


def name_head(head):
    """What titles call a head (from 0), or the mean (None)."""
    return ": mean over heads" if head is None else f": head {head} (counted from 0)"


def plot_attention_pair(tokens, teacher, student, title, head=None, top=None):
    """Attention of one sentence of S `tokens`: `teacher` [A_t, S, S], `student` [A_s, S, S], weights from 0 to 1,
    row = attending token. `head`: index from 0, None = mean over heads. `top`: weight at the end of a scale that suits
    all layers and heads, by default the highest that is shown."""
    shown, names, style = name_tokens(tokens)
    first, second = (np.mean(side, 0) if head is None else side[head] for side in (teacher, student))
    scale, apart, root = colors.PowerNorm(0.5, 0, max(first.max(), second.max())), colors.CenteredNorm(), "square"
    ticks = [ticker.MaxNLocator(4)] * 3
    if top:
        (scale, apart), root = (colors.FuncNorm((np.cbrt, lambda x: x**3), low, top) for low in (0, -top)), "cube"
        ticks = [top * np.array(x) for x in ((0, 0.01, 0.1, 0.4, 1), (0, 0.01, 0.1, 0.4, 1), (-1, -0.1, 0, 0.1, 1))]
    same = "cividis", scale, f"weight ({root}-root scale)"  # else [CLS] and [SEP] outshine all
    panels = (("Teacher", first, *same), ("Student", second, *same), (
        "Student − teacher", second - first, "RdBu_r", apart, "difference" + " (cube-root scale)" * bool(top)))
    fig, axes = _figure(title + name_head(head), 5.6, cols=3, grid=False, xlabel="attended token",
                        ylabel="attending token")
    for ax, (name, data, cmap, norm, unit), marks in zip(axes, panels, ticks, strict=True):
        fig.colorbar(ax.imshow(data, cmap, norm), ticks=marks, format="{x:g}", label=unit, location="bottom")
        ax.set_xticks(shown, names, rotation=90, **style)
        ax.set_yticks(shown, names, **style)
        ax.set_title(name)
        ax.label_outer()
    return fig


def plot_cka(cka, pairs, title):
    """`cka`: [L_t + 1, L_s + 1] from 0 to 1, index 0 = embeddings; `pairs`: distilled (student, teacher)."""
    fig, ax = _heat_map(np.array(cka), title + "\nframed: distilled pairs" * bool(pairs), "linear CKA", 1,
                        xlabel="student layer (0 = embeddings)", ylabel="teacher layer (0 = embeddings)")
    for student, teacher in pairs:
        ax.bar(student, 1, 1, teacher - 0.5, fill=False, clip_on=False, edgecolor=STUDENT, linewidth=3)
    return fig


def plot_cosine(before, after, pairs):
    """`before`, `after` stage 1: mean token cosine (-1 to 1, None: no number) of each (student, teacher) pair."""
    fig, ax = _figure("Cosine of student and teacher states (1 = same direction)", 3.9, ylabel="mean token cosine",
                      ymargin=0.1, xticks=range(len(pairs)), xticklabels=[f"S{s} ← T{t}" for s, t in pairs])
    for values, shift, colour, when in ((before, -0.2, SKY, "before"), (after, 0.2, STUDENT, "after")):
        bars = ax.bar(np.arange(len(pairs)) + shift, np.array(values, float), 0.38, color=colour,
                      label=f"{when} stage 1")
        ax.bar_label(bars, fmt="{:.2f}", fontsize=8)
    return _legend(fig, 2)


def plot_attention_kl(kl, pairs, title, nearest=None):
    """`kl`: [n_pairs, A] divergence of attention in nats, by head; `pairs`: (student, teacher) layers; `nearest`:
    names to write in place of the numbers; then colours end at 1 nat, so that figures compare."""
    if not pairs:
        return _figure(f"{title}\nno attention maps were compared here", 1)[0]
    most, label = (1, "KL divergence (nats; 1 or more)") if nearest else (np.nanmax(kl), "KL divergence (nats)")
    return _heat_map(np.array(kl), title, label, most, nearest, xlabel="head (from 0)",
                     yticklabels=[f"S{s} ← T{t}" for s, t in pairs])[0]


def plot_languages(teacher, student, title):
    """`teacher` (or None), `student`: {language: F1 from 0 to 1, None = not measured}, sorted by the teacher's. Lines:
    means over the languages that both have; row at the top: student / teacher in percent."""
    teacher = teacher or dict.fromkeys(student)
    names = sorted(teacher, key=lambda name: teacher[name] or 0, reverse=True)
    scores = 100 * np.array([[side[name] for name in names] for side in (teacher, student)], dtype=float)
    at, both = np.arange(len(names)), np.isfinite(scores).all(0)
    means = both if both.any() else np.isfinite(scores[1])
    title += "\nrow at the top: share of the teacher's F1 kept" * bool(both.any())
    fig, ax = _figure(title, 4.6, ylim=(0, 108), ylabel="F1 (%)", xlim=(-0.7, max(at[-1], 4) + 0.7), xticks=at,
                      xticklabels=names)
    for who, f1, shift, colour in zip(("teacher", "student"), scores, (-0.2, 0.2), CYCLE, strict=False):
        ax.bar_label(ax.bar(at + shift, f1, 0.38, color=colour), fmt="{:.1f}", label_type="center", color="white",
                     fontsize=8, rotation=90 if len(names) > 9 else 0)
        if np.isfinite(f1).any():
            mean = f1[means].mean()
            ax.axhline(mean, color=colour, linestyle="--", label=f"{who}, mean of {means.sum()}: {mean:.1f} %")
    for i in np.flatnonzero(both & (scores[0] > 0)):
        ax.text(i, 102, f"{100 * scores[1, i] / scores[0, i]:.0f} %", ha="center", fontsize=9)
    return _legend(fig, 2)


def plot_stages(scores, teacher):
    """`scores`: {stage: the student's dev macro F1 after it}; `teacher`: the teacher's or None; both from 0 to 1."""
    fig, ax = _figure("Dev macro F1 of the student after each stage", 3.9, 8.5, xlabel="after stage",
                      ylabel="dev macro F1 (%)", xmargin=0.2, ymargin=0.2)
    ax.plot(list(scores), [100 * f1 for f1 in scores.values()], "o-", color=STUDENT, label="student")
    if teacher is not None:
        ax.axhline(100 * teacher, color=TEACHER, linestyle="--", label=f"teacher: {100 * teacher:.1f} %")
    for name, f1 in scores.items():
        ax.annotate(f"{100 * f1:.1f}", (name, 100 * f1), (7, -13), textcoords="offset points")
    return _legend(fig, 2)


def plot_intervals(rows, title):
    """One line a row: `cell`, the `difference` of its macro F1 from the base's and the interval `low` to `high` (from
    -1 to 1), grey where zero is in it."""
    fig, ax = _figure(title, 1.4 + 0.36 * len(rows), 8.5, grid=False, xlabel="macro F1 points above the base, 95 %",
                      yticks=range(len(rows)), yticklabels=[row["cell"] for row in rows], ymargin=0.3)
    ax.axvline(0, color="black", linewidth=1)
    for at, row in enumerate(rows):
        low, middle, high = (100 * row[key] for key in ("low", "difference", "high"))
        colour = GREY if low <= 0 <= high else STUDENT if high < 0 else TEACHER
        ax.plot((low, high), (at, at), "|-", color=colour, linewidth=3)
        ax.plot(middle, at, "o", color=colour)
        ax.annotate(f"{middle:+.1f}", (middle, at), (0, 7), textcoords="offset points", ha="center")
    ax.invert_yaxis()
    return fig


def plot_minutes(rows, title, lines=None):
    """Means over runs, with a bar from the least to the most. `rows`: a run each, its `cell`, `minutes` of learning
    and `test` macro F1 (%); `lines`: {name: cells to connect}, None = each cell is a point."""
    lines = lines or {cell: [cell] for cell in dict.fromkeys(row["cell"] for row in rows)}
    fig, ax = _figure(title, 4.6, 8.5, xlabel="minutes of learning, all stages of the student",
                      ylabel="test macro F1 (%)")
    for (name, cells), colour in zip(lines.items(), itertools.cycle(CYCLE), strict=False):
        runs = [np.array([(row["minutes"], row["test"]) for row in rows if row["cell"] == cell]).T for cell in cells]
        x, y, least, most = np.array(sorted((m.mean(), f1.mean(), f1.min(), f1.max()) for m, f1 in runs)).T
        ax.errorbar(x, y, (y - least, most - y), color=colour, marker="o", capsize=3, label=name)
    return _legend(fig, 3)


def plot_size_speed(teacher, student):
    """`teacher`, `student`: dicts of "parameters", "non_embedding" (counts), "mb" (megabytes), "ms_per_sentence" at
    batch 1, "sentences_per_second" and "test" with "macro" (F1, 0 to 1); a number may be None."""
    sides = [side | {"f1": side["test"]["macro"]} if side else {} for side in (teacher, student)]
    columns = ("parameters", "non_embedding", "mb", "ms_per_sentence", "sentences_per_second", "f1")
    total, other, mb, single, batch, f1 = np.array([[side.get(c) for side in sides] for c in columns], dtype=float)
    names = [f"{name}\n{size:.0f} MB\nF1 {100 * score:.1f} %".replace("nan", "–")
             for name, size, score in zip(("teacher", "student"), mb, f1, strict=True)]
    fig, axes = _figure("Size and speed: what the student saves", 4.2, cols=3, ymargin=0.1, xticks=(0, 1),
                        xticklabels=names, xlim=(-0.6, 1.6))
    panels = ((total / 1e6, "Parameters (hatched: embeddings)", "parameters (millions)"),
              (single, "Time of one sentence (less is better)", "ms per sentence at batch 1"),
              (batch, "Throughput (more is better)", "sentences per second"))
    for ax, (values, title, unit) in zip(axes, panels, strict=True):
        ax.bar_label(ax.bar((0, 1), values, 0.6, color=(TEACHER, STUDENT)), fmt="{:,.4g}")
        ax.set(title=title, ylabel=unit)
    axes[0].bar((0, 1), (total - other) / 1e6, 0.6, other / 1e6, fill=False, hatch="//", edgecolor="white")
    return fig
