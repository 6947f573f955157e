"""Figures of the kit: numbers in, ``matplotlib.figure.Figure`` out.

Not ``plt.figure``: pyplot keeps each one until closed, and notebooks would show it twice. Jupyter
draws a bare ``Figure`` only after ``%matplotlib inline``, so each carries a PNG repr of its own.
"""

import functools
import io
import itertools
import math
import re

import matplotlib
import numpy as np
from matplotlib import colors, font_manager
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Rectangle

# fmt: off  (calls with a dozen short keywords read better packed)
# Okabe-Ito: told apart under the common colour-vision deficiencies; without its faint yellow.
BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
SKY, ORANGE, BLACK, GREY = "#56B4E9", "#E69F00", "#000000", "#6b6b6b"
CYCLE = (BLUE, VERMILLION, GREEN, PURPLE, SKY, ORANGE)
TEACHER, STUDENT = BLUE, VERMILLION
WIDTH = 11.6  # inches: 1,276 pixels at 110 dots per inch
# A glyph missing in one family is looked up in the next. A family that is not installed is left
# out, because naming it would make matplotlib warn at every text.
_WANTED = ("DejaVu Sans", "Noto Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC",
           "WenQuanYi Zen Hei", "Droid Sans Fallback", "Noto Sans Thai", "Noto Sans Devanagari",
           "Noto Sans Arabic", "Noto Sans Hebrew", "Lohit Devanagari", "Loma", "FreeSans")
_INSTALLED = {font.name for font in font_manager.fontManager.ttflist}
FAMILIES = [name for name in _WANTED if name in _INSTALLED] or ["sans-serif"]
STYLE = {"font.family": FAMILIES, "font.size": 10, "figure.dpi": 110, "figure.titlesize": 12,
         "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelsize": 10,
         "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
         "axes.facecolor": "white", "figure.facecolor": "white", "savefig.facecolor": "white",
         "grid.color": "#dddddd", "legend.fontsize": 9, "legend.frameon": False}
_styled = matplotlib.rc_context(STYLE)  # as a decorator it enters the style for each call


def _png(fig):
    fig.savefig(buffer := io.BytesIO(), format="png", bbox_inches="tight")
    return buffer.getvalue()


def _figure(height, cols=1, rows=1, width=WIDTH, grid=True, layout="constrained", **kwargs):
    fig = Figure(figsize=(width, height), layout=layout)
    axes = fig.subplots(rows, cols, **kwargs)
    for ax in np.atleast_1d(axes):
        # Ticks are made when the figure is drawn, after the style has been left.
        ax.tick_params(labelsize=9, labelfontfamily=FAMILIES)
        ax.grid(grid, axis="y")
    fig._repr_png_ = functools.partial(_png, fig)
    return fig, axes


def _floats(values):
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def _percent(values):
    """F1 in percent: fractions (no value above 1) times 100; None becomes NaN."""
    values = _floats(values)
    return values if np.max(values, initial=0, where=np.isfinite(values)) > 1 else values * 100


@functools.cache
def _glyphs():
    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in FAMILIES)
    return frozenset().union(*(font.get_charmap() for font in fonts))


def _drawable(text):
    """Token as it can be drawn: a box for what no installed font has, cut when very long."""
    text = "".join(c if ord(c) in _glyphs() else "\u25af" for c in str(text))
    return text if len(text) <= 16 else text[:15] + "…"


def _pair_names(pairs):
    return [f"S{student} ← T{teacher}" for student, teacher in pairs]


def _heat(matrix, title, write, label, height, width, vmax, **axis_settings):
    """Figure with one heat map from 0 to ``vmax``, NaN cells grey, values in the cells or not."""
    fig, ax = _figure(height, width=min(width, WIDTH), grid=False)
    cmap = matplotlib.colormaps["cividis"].with_extremes(bad="#cccccc")
    image = ax.imshow(np.ma.masked_invalid(matrix), cmap, aspect="auto", vmin=0, vmax=vmax)
    fig.colorbar(image, ax=ax, label=label)
    for (row, col), value in np.ndenumerate(matrix):
        if write and np.isfinite(value):
            dark = np.dot(cmap(image.norm(value))[:3], (0.299, 0.587, 0.114)) < 0.5
            ax.text(col, row, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black")
    ax.set(**axis_settings)
    fig.suptitle(title, parse_math=False)
    return fig, ax


@_styled
def plot_lengths(lengths, seq_len):
    """Sentence lengths per file. ``lengths``: {file: sub-words of each sentence}; ``seq_len``:
    sub-words per sequence; longer sentences are split into windows of that size."""
    fig, ax = _figure(4.4)
    counts = {name: np.asarray(values, dtype=float) for name, values in lengths.items()}
    # All beyond ``top`` goes to the last bin, so that one long sentence does not flatten the
    # picture. Bins are whole numbers wide: others would hold now one length, now two.
    every = np.concatenate([[0], *counts.values()])
    top = max(1.25 * seq_len, np.percentile(every, 99.5, method="lower"))
    bins = np.arange(0, top + 2 * math.ceil(top / 60), math.ceil(top / 60)) - 0.5
    for (name, values), colour in zip(counts.items(), itertools.cycle(CYCLE), strict=False):
        share = np.full(values.size, 100 / max(values.size, 1))  # of one sentence, in percent
        label = (f"{name}: {values.size:,} sentences, {share[values > seq_len].sum():.3g} % "
                 f"longer than {seq_len}")
        ax.hist(np.clip(values, 0, bins[-1]), bins, weights=share, histtype="step", linewidth=1.8,
                color=colour, label=label)
    ax.axvline(seq_len + 0.5, color=GREY, linestyle="--", label=f"seq_len: {seq_len} sub-words")
    ax.set(title="Sentence lengths: those right of the dashed line are split into windows",
           xlabel="sub-words per sentence (last bin: all longer ones)",
           ylabel="sentences of the file (%)", xlim=(0, bins[-1]))
    fig.legend(loc="outside lower center", ncols=2)
    return fig


def _timeline(history):
    """Records with the update counted over all steps as "x", and [(start, name)] of the steps. A
    step that begins before the end of the one ahead of it counts from 0: it is moved behind."""
    steps, placed, starts, offset, end = {}, [], [], 0, 0
    for record in history:
        steps.setdefault(record.get("step", 0), []).append(record)
    for step, records in steps.items():
        updates = [record.get("update", 0) for record in records]
        offset = end if min(updates) + offset < end else offset
        placed += [{**r, "x": u + offset} for r, u in zip(records, updates, strict=True)]
        starts.append((min(updates) + offset, str(records[0].get("step_name", f"step {step}"))))
        end = max(updates) + offset
    return placed, starts


@_styled
def plot_history(history, title):
    """Records of history.jsonl: above, the loss and its terms (all further float keys) at each
    logged optimizer update; below, the held-out metric (percent when it is an F1), the best score
    marked. Dotted lines: an unfreezing step begins."""
    fig, (top, low) = _figure(6.6, rows=2, sharex=True)
    placed, starts = _timeline(history)
    train, evals = ([r for r in placed if r.get("kind") == kind] for kind in ("train", "eval"))
    families, curves = {"loss": ["loss"]}, {}  # {legend label: the lines it stands for}
    for name in dict.fromkeys(k for r in train for k, v in r.items() if isinstance(v, float)):
        if name not in ("lr", "loss", "epoch", "update", "x"):
            families.setdefault(re.sub(r"_?\d+$", "", name), []).append(name)
    for i, (family, names) in enumerate(families.items()):
        base, lines = np.array(colors.to_rgb(CYCLE[(i - 1) % len(CYCLE)] if i else BLACK)), []
        for name, fade in zip(names, np.linspace(0, 0.65, len(names)), strict=True):
            lines += top.plot([r["x"] for r in train], _floats(r.get(name) for r in train),
                              color=base + (1 - base) * fade, marker="o" if len(train) == 1 else "",
                              linewidth=1.2 if i else 2)
        if len(names) > 3:  # one entry for the whole family keeps the legend short
            key = f"{family} ({len(names)}): {names[0]} dark … {names[-1]} pale"
            curves[key] = lines[0], lines[len(lines) // 2], lines[-1]
        else:
            curves |= dict(zip(names, lines, strict=True))
    losses = np.concatenate([line.get_ydata() for line in top.lines])
    losses = losses[np.isfinite(losses)]
    if losses.size and losses.max() > 20 * losses.min() > 0:
        top.set_yscale("log")
    if train:
        fig.legend(curves.values(), curves, loc="outside lower center", ncols=min(len(curves), 3),
                   handler_map={tuple: HandlerTuple(ndivide=None, pad=0.2)})
    metric = next((str(record["metric"]) for record in evals if "metric" in record), "score")
    scores = _floats(record.get("score") for record in evals)
    if "f1" in metric.lower():
        scores, metric = _percent(scores), f"{metric} (%)"
    low.plot([r["x"] for r in evals], scores, color=STUDENT, marker="o", markersize=4)
    # "best" is set whenever a score beats all before it, so the last one is the best of the run.
    for i in [i for i, r in enumerate(evals) if r.get("best") and np.isfinite(scores[i])][-1:]:
        low.plot(evals[i]["x"], scores[i], "*", color=ORANGE, markersize=15, markeredgecolor=BLACK)
        low.set_title(f"best (star): {scores[i]:.4g} at update {evals[i]['x']:,}")
    top.set(ylabel="loss")
    low.set(xlabel="optimizer updates", ylabel=metric)
    for ax, some in ((top, losses.size), (low, np.isfinite(scores).any())):
        ax.text(0.5, 0.5, "" if some else "no records", transform=ax.transAxes, ha="center")
        for start, _ in starts[1:]:
            ax.axvline(start, color=GREY, linestyle=":", linewidth=1.2)
    for start, name in starts:
        top.text(start, 1.02, name, transform=top.get_xaxis_transform(), fontsize=9, color=GREY,
                 rotation=20 if len(starts) > 4 else 0, parse_math=False)
    fig.suptitle(title, parse_math=False)
    return fig


@_styled
def plot_spectrum(singular_values, kept):
    """Spectrum of the teacher's word embeddings. ``singular_values``: [D], largest first (no
    unit); ``kept``: how many of them, from 1 to D, the student's embeddings keep."""
    values = np.asarray(singular_values, dtype=float)
    fig, (left, right) = _figure(4.2, 2)
    energy = 100 * np.cumsum(values**2) / np.sum(values**2)
    share = energy[kept - 1]
    for ax, curve in ((left, values), (right, energy)):
        ax.plot(np.arange(1, values.size + 1), curve, color=TEACHER)
        ax.axvspan(0.5, kept + 0.5, color=SKY, alpha=0.25, linewidth=0)
        ax.set(xlabel="rank of the singular value", xlim=(0.5, values.size + 0.5))
    right.plot([kept], [share], "o", color=BLACK)
    left.set(title=f"Singular values: the first {kept} of {values.size} are kept", yscale="log",
             ylabel="singular value (log scale)")
    right.set(title=f"The kept ones hold {share:.1f} % of the energy", ylim=(0, 104),
              ylabel="cumulative energy (% of sum of squares)")
    return fig


@_styled
def plot_attention_pair(tokens, teacher, student, title, head=None):
    """Attention of one sentence: teacher, student, student minus teacher. ``tokens``: S strings;
    ``teacher`` [A_t, S, S], ``student`` [A_s, S, S]: weights from 0 to 1, row = attending token
    (padding behind the S tokens is cut off). ``head``: index from 0, None = mean over heads."""
    size, maps = len(tokens), []
    for name, weights in (("teacher", np.asarray(teacher)), ("student", np.asarray(student))):
        if weights.ndim != 3 or min(weights.shape[1:]) < size:
            raise ValueError(f"{name}: shape {weights.shape}, needs [heads, {size}, {size}]")
        if head is not None and not 0 <= head < len(weights):
            raise ValueError(f"{name} has {len(weights)} heads, there is no head {head}")
        weights = weights[:, :size, :size].astype(float)
        maps.append(weights.mean(0) if head is None else weights[head])
    # Beyond 30 tokens the picture grows, so that its labels can be read when it is enlarged.
    width = WIDTH * min(max(1.0, size / 30), 1.7)
    fig, axes = _figure(width * 0.45 + 0.6, 3, 1, width, False, "compressed", sharey=True)
    # Square-root scale: a few weights near 1 ([CLS], [SEP]) would leave all the others dark.
    shared = colors.PowerNorm(0.5, vmin=0, vmax=max(np.nanmax(maps), 1e-6))
    looks = [("Teacher", maps[0], "cividis", shared), ("Student", maps[1], "cividis", shared),
             ("Student − teacher", maps[1] - maps[0], "RdBu_r", colors.CenteredNorm())]
    style = {"fontsize": min(9, 0.8 * (width - 1.6) / 3 * 72 / size), "parse_math": False}
    names, images = [_drawable(token) for token in tokens], []
    for ax, (name, values, cmap, norm) in zip(axes, looks, strict=True):
        images.append(ax.imshow(values, cmap, norm))
        ax.set_xticks(range(size), names, rotation=90, **style)
        ax.set_yticks(range(size), names, **style)
        ax.tick_params(length=0, pad=2)
        ax.set(title=name, xlabel="attended token")
    axes[0].set_ylabel("attending token")
    bar = {"location": "bottom", "shrink": 0.8, "aspect": 40}
    fig.colorbar(images[0], ax=axes[:2], label="weight (square-root scale)", **bar)
    fig.colorbar(images[2], ax=axes[2], label="difference of weights", **bar)
    what = "mean over heads" if head is None else f"head {head} (counted from 0)"
    fig.suptitle(f"{title}: {what}", parse_math=False)
    return fig


@_styled
def plot_cka(cka, pairs, title):
    """Similarity of all layers. ``cka``: [L_t + 1, L_s + 1] linear CKA from 0 to 1, index 0 =
    embeddings; ``pairs``: (student layer, teacher layer) distilled into each other, framed."""
    rows, cols = np.shape(cka)
    fig, ax = _heat(cka, f"{title}\nframed: distilled pairs", max(rows, cols) <= 13, "linear CKA",
                    min(1.6 + 0.36 * rows, 8), 2.6 + 0.62 * cols, 1, xticks=range(cols),
                    yticks=range(rows), ylim=(-0.5, rows - 0.5), xlabel="student layer"
                    " (0 = embeddings)", ylabel="teacher layer (0 = embeddings)")
    # White on black: the frame shows on dark and on bright cells.
    for (student, teacher), (colour, width) in itertools.product(
            pairs, ((BLACK, 4.5), ("white", 2.2))):
        ax.add_patch(Rectangle((student - 0.5, teacher - 0.5), 1, 1, fill=False, clip_on=False,
                               edgecolor=colour, linewidth=width))
    return fig


@_styled
def plot_cosine(before, after, pairs):
    """Mean token cosine (-1 to 1) of student and teacher states, one value per (student layer,
    teacher layer) of ``pairs``, ``before`` and ``after`` stage 1."""
    fig, ax = _figure(3.9)
    at, both = np.arange(len(pairs)), np.array([_floats(before), _floats(after)])
    for row, shift, colour, label in ((both[0], -0.2, SKY, "before stage 1"),
                                      (both[1], 0.2, STUDENT, "after stage 1")):
        bars = ax.bar(at + shift, row, 0.38, color=colour, label=label)
        if len(pairs) <= 14:  # beyond that the numbers would touch
            ax.bar_label(bars, fmt="{:.2f}", fontsize=8, padding=2)
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.set_xticks(at, _pair_names(pairs), rotation=0 if len(pairs) <= 14 else 90)
    lowest = np.min(both, initial=0, where=np.isfinite(both))
    ax.set(ylim=(lowest - 0.09 if lowest < 0 else 0, 1.08), ylabel="mean token cosine",
           xlabel="student layer ← teacher layer",
           title="Cosine of student and teacher states (1 = same direction)")
    fig.legend(loc="outside lower center", ncols=2)
    return fig


@_styled
def plot_attention_kl(kl, pairs, title):
    """Divergence of the student's attention from the teacher's. ``kl``: [n_pairs, A] in nats, a
    row per (student layer, teacher layer) of ``pairs``, a column per head."""
    rows, cols = np.shape(kl)
    worst = np.max(kl, initial=1e-6, where=np.isfinite(kl))
    return _heat(kl, title, cols <= 16, "KL divergence (nats)", 1.7 + 0.36 * rows,
                 3.4 + 0.62 * cols, worst, xticks=range(cols), yticks=range(rows),
                 yticklabels=_pair_names(pairs), xlabel="attention head (counted from 0)",
                 ylabel="student ← teacher layer")[0]


@_styled
def plot_languages(teacher, student, title):
    """F1 per language, sorted by the teacher's. ``teacher``, ``student``: {language: F1}, as
    fractions or in percent, None or NaN = not measured. Lines: mean over the languages that both
    have; row of numbers at the top: retention = student / teacher in percent."""
    names = list(dict.fromkeys([*teacher, *student]))
    # Both at once, so that they are read in the same unit.
    f1 = _percent(side.get(name) for side in (teacher, student) for name in names).reshape(2, -1)
    order = np.argsort(-np.nan_to_num(f1[0], nan=-1), kind="stable")
    names, f1 = [names[i] for i in order], f1[:, order]
    common, at = np.isfinite(f1).all(0), np.arange(len(names))
    fig, ax = _figure(4.6)
    for who, row, shift, colour in (("teacher", f1[0], -0.2, TEACHER),
                                    ("student", f1[1], 0.2, STUDENT)):
        ax.bar_label(ax.bar(at + shift, row, 0.38, color=colour, label=who), fmt="{:.1f}",
                     label_type="center", color="white", fontsize=8,
                     rotation=90 if len(names) > 9 else 0)
        used = row[common if common.any() else np.isfinite(row)]
        if used.size:
            label = f"{who}, mean of {used.size}: {used.mean():.1f} %"
            ax.axhline(used.mean(), color=colour, linestyle="--", linewidth=1.2, label=label)
    for i in np.flatnonzero(common & (f1[0] > 0)):
        ax.text(i, 102, f"{100 * f1[1, i] / f1[0, i]:.0f} %", ha="center", fontsize=9)
    ax.set_xticks(at, [_drawable(name) for name in names], parse_math=False)
    side = max(0.7, 2.6 - len(names) / 2)  # else one language would fill the width with two bars
    ax.set(xlim=(-side, len(names) - 1 + side), ylim=(0, 108), yticks=range(0, 101, 20),
           ylabel="F1 (%)", xlabel="language")
    ax.set_title(f"{title}\nrow at the top: share of the teacher's F1 kept", parse_math=False)
    fig.legend(loc="outside lower center", ncols=4)
    return fig


@_styled
def plot_stages(scores, teacher):
    """Student after each stage. ``scores``: {stage: dev macro F1} in the order of training;
    ``teacher``: the teacher's; all as fractions or all in percent."""
    *values, goal = _percent([*scores.values(), teacher])
    fig, ax = _figure(3.9, width=8.5)
    ax.plot(range(len(values)), values, color=STUDENT, marker="o", markersize=7, label="student")
    ax.axhline(goal, color=TEACHER, linestyle="--", label=f"teacher: {goal:.1f} %")
    for i in np.flatnonzero(np.isfinite(values)):
        ax.annotate(f"{values[i]:.1f}", (i, values[i]), (7, -13), textcoords="offset points")
    ax.set_xticks(range(len(values)), [f"after {name}" for name in scores], parse_math=False)
    ax.set(xlim=(-0.5, len(values) - 0.5), xlabel="stage", ylabel="dev macro F1 (%)",
           title="Dev macro F1 of the student after each stage", ymargin=0.2)
    fig.legend(loc="outside lower center", ncols=2)
    return fig


@_styled
def plot_size_speed(rows):
    """Size and speed of the models. ``rows``: dicts with "name", "parameters" and "non_embedding"
    (counts), "mb" (megabytes), "ms_per_sentence" (batch 1), "sentences_per_second", "f1"
    (fraction or percent); any number may be missing or None."""
    fig, axes = _figure(4.2, 3)
    at, f1 = np.arange(len(rows)), _percent(row.get("f1") for row in rows)
    total, other, mb, single, batch = (_floats(row.get(key) for row in rows) for key in (
        "parameters", "non_embedding", "mb", "ms_per_sentence", "sentences_per_second"))
    teacher = ["teacher" in str(row["name"]).lower() for row in rows]
    paint = {"width": 0.6, "color": [TEACHER if yes else STUDENT for yes in teacher]}
    axes[0].bar(at, other / 1e6, **paint)
    bars = axes[0].bar(at, (total - other) / 1e6, bottom=other / 1e6, **paint, alpha=0.4,
                       hatch="//", edgecolor="white")
    texts = [f"{n / 1e6:.1f} M\n{m:.0f} MB" for n, m in zip(total, mb, strict=True)]
    axes[0].bar_label(bars, labels=[re.sub(r"\n?nan \w+", "", t) for t in texts], fontsize=9)
    for ax, values in ((axes[1], single), (axes[2], batch)):
        ax.bar_label(ax.bar(at, values, **paint), fmt="{:,.4g}", fontsize=9, padding=2)
    names = [_drawable(row["name"]) + (f"\nF1 {score:.1f} %" if score == score else "")
             for row, score in zip(rows, f1, strict=True)]
    axes[0].set(title="Parameters (hatched: embeddings)", ylabel="parameters (millions)")
    axes[1].set(title="Time of one sentence (less is better)", ylabel="ms per sentence at batch 1")
    axes[2].set(title="Throughput (more is better)", ylabel="sentences per second")
    for ax in axes:
        ax.set_xticks(at, names, parse_math=False)
        ax.set(xlim=(-0.7, len(rows) - 0.3), ymargin=0.22)
    return fig
