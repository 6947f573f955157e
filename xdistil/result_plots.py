"""Figures of results, in the style of `plots`: error analysis, and several runs side by side."""

import numpy as np
from matplotlib import ticker

from xdistil.plots import CYCLE, FAMILIES, GREY, STUDENT, TEACHER, _figure, _heat_map, _legend

MARKERS = "os^Dv<>ph"


def plot_confusion(names, sides, title):
    """`sides`: {"teacher", "student": counts [T, T]}, rows gold, columns predicted, see `errors.confusion`."""
    fig, axes = _figure(title, min(2.6 + 0.34 * len(names), 9), cols=len(sides), grid=False, facecolor="#ccc",
                        xlabel="predicted", xticks=range(len(names)), yticks=range(len(names)))
    for ax, (who, counts) in zip(np.atleast_1d(axes), sides.items(), strict=True):
        counts = np.array(counts, float)
        with np.errstate(invalid="ignore"):
            shares = 100 * counts / counts.sum(1, keepdims=True)
        shares[-2:, -2:] = np.nan if names[-1] == "nothing" else shares[-2:, -2:]  # what neither side has
        image = ax.imshow(shares, "cividis", vmin=0, vmax=100, aspect="auto")
        small = len(names) > 12
        for row, col in np.argwhere(counts > 0) if len(names) <= 24 else ():
            ax.text(col, row, f"{counts[row, col]:,.0f}", ha="center", va="center", fontsize=6 if small else 8,
                    color="white" if shares[row, col] < 55 else "black")
        style = {"parse_math": False, "family": FAMILIES, "size": 7 if small else 9}
        ax.set_xticks(range(len(names)), [x.replace("nothing", "missed")[:18] for x in names], rotation=60, ha="right",
                      rotation_mode="anchor", **style)
        ax.set_yticks(range(len(names)), [x.replace("nothing", "invented")[:18] for x in names], **style)
        ax.set(title=who.capitalize(), ylabel="gold")
        ax.label_outer()
    fig.colorbar(image, ax=axes, label="share of the row (%)")
    return fig


def plot_scores(rows, title, xlabel, ylabel):
    """`rows`: of "bin", "who", "n" and "score" with "low" and "high" (0 to 1, 95 %), see `errors.by_length`."""
    if not rows:
        return _figure(f"{title}: texts have none", 1)[0]
    count = {row["bin"]: row["n"] for row in rows}
    fig, ax = _figure(title, 4.4, 8.5, xlabel=xlabel, ylabel=f"{ylabel} (%)", ylim=(0, 104),
                      xticks=range(len(count)), xticklabels=[f"{name}\nn = {n:,}" for name, n in count.items()])
    whose = dict.fromkeys(row["who"] for row in rows)
    for who, shift in zip(whose, (-0.06, 0.06), strict=False):
        own = [row for row in rows if row["who"] == who]
        low, score, high = (100 * np.array([row[key] for row in own]) for key in ("low", "score", "high"))
        ax.errorbar([list(count).index(row["bin"]) + shift * (len(whose) > 1) for row in own], score,
                    np.maximum(0, (score - low, high - score)), fmt="o-", capsize=4, label=f"{who}, 95 % interval",
                    color=TEACHER if who == "teacher" else STUDENT)
    ax.set_xlim(-0.6, max(len(count), 2) - 0.4)
    return _legend(fig, 2)


def plot_front(points, title):
    """`points`: dicts of "name", "f1" (0 to 1), "parameters" (millions) and "ms" (per sentence), "is_teacher" and,
    where nothing is both cheaper and better, "front_parameters" or "front_ms"."""
    fig, axes = _figure(title, 5.4, cols=2, ylabel="macro F1 on test (%)", xscale="log")
    costs = {"parameters": "parameters outside embeddings (millions, log scale)", "ms": "ms per sentence (log scale)"}
    for ax, (cost, label) in zip(axes, costs.items(), strict=True):
        own = [point for point in points if point[cost]]
        for i, point in enumerate(own):
            colour = GREY if point["is_teacher"] else CYCLE[i % len(CYCLE)]
            ax.plot(point[cost], 100 * point["f1"], "*" if point["is_teacher"] else MARKERS[i % len(MARKERS)],
                    color=colour, markersize=12 if point["is_teacher"] else 8,
                    label=point["name"] if cost == "parameters" else "")
        front = sorted((point[cost], 100 * point["f1"]) for point in own if point[f"front_{cost}"])
        ax.step(*zip(*front, strict=True), where="post", color="black", linewidth=1, zorder=0,
                label="Pareto front: nothing is both cheaper and better" if cost == "parameters" else "")
        ax.set(xlabel=label)
        ax.xaxis.set(major_locator=ticker.LogLocator(subs=(1, 2, 5)), major_formatter="{x:.3g}",
                     minor_formatter=ticker.NullFormatter())
    return _legend(fig, 3)


def plot_retention(names, languages, shares, title):
    """`shares` [runs, languages]: the student's F1 as a share of its teacher's (1 = all; NaN: not measured)."""
    shares = np.array(shares, dtype=float)
    least, most = min(0.8, np.nanmin(shares, initial=1)), max(1.0, np.nanmax(shares, initial=0))
    return _heat_map(shares[::-1], title, "student F1 / teacher F1", most, vmin=least, xticklabels=languages,
                     yticklabels=names[::-1])[0]
