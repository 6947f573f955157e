import io
import itertools

import numpy as np
import pytest
from matplotlib import image
from test_plots import attention, drawn

from xdistil import alignment_plots, plots

TOKENS = [f"▁Regierung{i}" for i in range(60)]


def touching(texts):
    """Pairs of shown texts whose boxes overlap."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text() and text.get_visible()]
    return [(a, b) for (a, x), (b, y) in itertools.combinations(boxes, 2) if x.overlaps(y)]


def pixels(png):
    return image.imread(io.BytesIO(png))


def test_names_of_60_tokens_do_not_touch():
    similarity = np.eye(60) * 2 - 1
    ax = drawn(alignment_plots.plot_token_similarity(TOKENS, similarity, "S")).axes[0]
    assert not touching(ax.get_xticklabels()) and not touching(ax.get_yticklabels())
    assert ax.images[0].get_clim() == (-1, 1) and np.array_equal(ax.images[0].get_array(), similarity)
    ax = drawn(plots.plot_attention_pair(TOKENS, attention(2, 60), attention(2, 60), "S", 1, top=1)).axes[0]
    assert not touching(ax.get_xticklabels()) and not touching(ax.get_yticklabels())
    assert ax.images[0].get_clim() == (0, 1)


def test_states_are_named_where_there_is_room_entities_first():
    teacher = np.random.default_rng(0).normal(size=(60, 2))
    types, colours = ["LOC", "", "PER"] * 20, alignment_plots.type_colours(["LOC", "ORG", "PER"])
    fig = drawn(alignment_plots.plot_states(TOKENS, types, teacher, teacher + 0.1, "S", colours))
    ax, named = fig.axes[0], {text.get_text(): text for text in fig.axes[0].texts}
    assert len(named) > 15 and not touching(named.values())
    assert {text.get_color() for text in named.values()} <= {*colours.values(), plots.GREY}
    inside = ax.get_window_extent()
    assert all(inside.contains(*text.get_window_extent().p0) for text in named.values())
    assert [x.get_text() for x in fig.legends[0].get_texts()] == ["teacher", "student", "LOC", "PER"]
    drawn(alignment_plots.plot_states(["a"], [""], [(0, 0)], [(0, 0)], "one", {}))  # all in one place


def test_a_figure_is_redrawn_as_it_would_be_drawn():
    tokens, maps = TOKENS[:12], attention(3, 12)

    def figure(head):
        return plots.plot_attention_pair(tokens, maps, maps[::-1], "S", head, top=1)

    def values(head):
        return maps[head], maps[::-1][head], maps[::-1][head] - maps[head]

    moved = figure(0)
    first = alignment_plots.redraw(moved, "head 0", *values(0))
    second = pixels(alignment_plots.redraw(moved, "head 2", *values(2)))
    assert np.array_equal(second, pixels(alignment_plots.redraw(figure(2), "head 2", *values(2))))
    assert not np.array_equal(second, pixels(first))
    assert alignment_plots.redraw(moved, "head 0", *values(0)) == first


@pytest.mark.parametrize("word, font", [("Nguyễn", "DejaVu Sans"), ("ประเทศไทย", "Noto Sans Thai"),
                                        ("दिल्ली", "Noto Sans Devanagari"), ("北京", "Noto Sans CJK SC"),
                                        ("القاهرة", "Noto Sans Arabic")])
def test_scripts_have_glyphs(word, font):
    if font not in plots.FAMILIES:
        pytest.skip(f"needs the font {font}: Debian's fonts-noto-core and fonts-noto-cjk")
    assert plots.name_tokens([word])[1] == [word[:12]]
