"""Figures of one sentence inside teacher and student, in the style of `plots`, and what a slider redraws of them."""

import io

import numpy as np
from matplotlib import colormaps, colors, image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.lines import Line2D

from xdistil.plots import CYCLE, FAMILIES, GREY, _figure, name_tokens

KINDS = (*CYCLE[2:], *CYCLE[:2])  # colours of entity types


def type_colours(types):
    """A colour for each entity type or class, the same in every view."""
    return {kind: KINDS[i % len(KINDS)] for i, kind in enumerate(types)}


def shades(n):
    """`n` colours of the map of all heat maps from its low end to its high one, each with one to write in."""
    return [(colors.to_hex(colormaps["cividis"](i / (n - 1))), "white" if i < 0.55 * n else "black") for i in range(n)]


def redraw(fig, title, *values):
    """PNG of a figure with another title, and `values` in its first images; all else is drawn in the first call only,
    as a slider cannot wait for it."""
    if not hasattr(fig, "rest"):
        fig.get_layout_engine().execute(fig)
        fig.set_layout_engine("none")
        fig._suptitle.set_visible(False)
        FigureCanvasAgg(fig).draw()
        fig.rest = fig.canvas.copy_from_bbox(fig.bbox)
        fig._suptitle.set_visible(True)
    fig.canvas.restore_region(fig.rest)
    fig._suptitle.set_text(title)
    for drawn, data in zip((drawn for ax in fig.axes for drawn in ax.images), values, strict=False):
        drawn.set_data(data)
        drawn.axes.draw_artist(drawn)
    fig.draw_artist(fig._suptitle)
    image.imsave(png := io.BytesIO(), fig.canvas.buffer_rgba(), format="png", pil_kwargs={"compress_level": 1})
    return png.getvalue()


def plot_token_similarity(tokens, similarity, title):
    """`similarity` [S, S], -1 to 1: teacher token by student token, see `alignment.token_similarity`."""
    shown, names, style = name_tokens(tokens)
    fig, ax = _figure(title, 5.3, 5.7, grid=False, xlabel="student token", ylabel="teacher token")
    drawn = ax.imshow(similarity, "RdBu_r", vmin=-1, vmax=1)
    fig.colorbar(drawn, label="cosine (diagonal: a token with itself)", shrink=0.8)
    ax.set_xticks(shown, names, rotation=90, **style)
    ax.set_yticks(shown, names, **style)
    return fig


def plot_states(tokens, types, teacher, student, title, colours):
    """Both models' token states, [S, 2] each, in the teacher's plane, see `alignment.principal_plane`; lines join a
    token with itself. `types`: the entity type of each token ("": none), `colours`: by type. As many tokens are named
    as do not touch, entities first."""
    fig, ax = _figure(title, 5.3, 5.7, grid=False, xlabel="first principal component", ylabel="second", xticks=(),
                      yticks=())
    both = np.concatenate([teacher, student]).astype(float)
    middle, unit = (both.max(0) + both.min(0)) / 2, max(np.ptp(both, 0) / (4.6, 3.7)) or 1.0  # `unit`: an inch
    ax.set(xlim=middle[0] + unit * np.array([-2.65, 2.65]), ylim=middle[1] + unit * np.array([-2.1, 2.1]))
    ink = [colours.get(kind, GREY) for kind in types]
    ax.plot(*np.stack([teacher, student]).transpose(2, 0, 1), color="#cccccc", linewidth=1)
    ax.scatter(*np.transpose(teacher), c=ink, s=26)
    ax.scatter(*np.transpose(student), facecolors="white", edgecolors=ink, s=26, marker="D")
    taken = [(x - 0.05, y - 0.05, x + 0.05, y + 0.05) for x, y in both / unit]  # boxes, inches
    for i in sorted(range(len(tokens)), key=lambda i: (not types[i], i)):
        text = name_tokens([tokens[i].strip("▁ ")])[1][0]
        wide = sum(0.075 + 0.06 * (ord(c) > 0x2E7F) for c in text)
        for right, up in ((0.06, 0.04), (0.06, -0.18), (-0.06 - wide, 0.04), (-0.06 - wide, -0.18)):
            x, y = both[i] / unit + (right, up)
            free = all(x > b[2] or b[0] > x + wide or y > b[3] or b[1] > y + 0.14 for b in taken)
            if text and free and abs(x + wide / 2 - middle[0] / unit) < 2.65 - wide / 2:
                taken.append((x, y, x + wide, y + 0.14))
                ax.text(x * unit, y * unit, text, color=ink[i], fontsize=8, parse_math=False, family=FAMILIES,
                        weight="bold" if types[i] else "normal", in_layout=False)  # they lie within the axes
                break
    marks = [Line2D([], [], color=GREY, marker=marker, markerfacecolor=face, linestyle="", label=name)
             for marker, face, name in (("o", GREY, "teacher"), ("D", "white", "student"))]
    marks += [Line2D([], [], color=colours[kind], marker="s", linestyle="", label=kind)
              for kind in colours if kind in types]
    fig.legend(handles=marks, loc="outside lower center", ncols=6, frameon=False, handletextpad=0.2)
    return fig
