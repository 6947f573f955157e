import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from xdistil import plots

PAIRS = [(1, 2), (2, 4), (3, 6)]


def drawn(fig):
    """The figure after it was laid out; pytest turns every warning on the way into an error."""
    fig.draw_without_rendering()
    assert fig.get_size_inches()[0] * fig.dpi <= 1280
    return fig


def texts(items):
    return [item.get_text() for item in items]


def legend(fig):
    return texts(fig.legends[0].get_texts())


def attention(heads, size):
    return np.random.default_rng(heads).dirichlet(np.ones(size), (heads, size))


def records(terms, metric):
    out = []
    for step, update in ((1, 0), (2, 50)):
        where = {"step": step, "step_name": f"top {step}"}
        judged = {"kind": "eval", **where, "metric": metric}
        out.append({**judged, "epoch": 0, "update": update, "best": step == 1, "score": 0.1 * step})
        for at in range(update + 10, update + 51, 10):
            losses = {name: math.exp(-at / 10) for name in ("loss", *terms)}
            out.append({"kind": "train", **where, "epoch": 1, "update": at, "lr": 1e-4, **losses})
        out.append({**judged, "epoch": 1, "update": update + 50, "best": True, "score": 0.3 + 0.1 * step})
    return out


def test_figures_show_in_notebooks_and_leave_matplotlib_as_it_was():
    before = dict(plt.rcParams)
    fig = plots.plot_stages({"hidden": 0.5, "logits": 0.8}, 0.9)
    assert fig._repr_png_().startswith(b"\x89PNG")
    assert dict(plt.rcParams) == before and plt.get_fignums() == []
    assert texts(fig.axes[0].texts) == ["50.0", "80.0"] and legend(fig) == ["student", "teacher: 90.0 %"]
    assert fig.axes[0].lines[1].get_ydata()[0] == pytest.approx(90)


def test_history_shows_every_term_the_best_point_and_the_steps():
    history = records(("hidden_1", "hidden_2", "attention_1", "logits"), "dev macro F1")
    fig = drawn(plots.plot_history(history, "$x$"))
    top, low = fig.axes
    assert legend(fig) == ["loss", "hidden_1 (dark) … hidden_2 (pale)", "attention_1", "logits",
                           "best dev macro F1 (%): 50 at update 100"]
    assert list(top.lines[0].get_xdata()) == list(range(10, 101, 10)) and top.lines[0].get_color() == "black"
    assert low.get_xlabel() == "optimizer updates" and low.get_ylabel() == "dev macro F1 (%)"
    assert list(low.lines[0].get_ydata()) == pytest.approx([10, 40, 20, 50])
    assert [line.get_xdata()[0] for line in low.lines if line.get_linestyle() == ":"] == [50, 0]
    assert texts(top.texts) == ["top 2", "top 1"]


def test_history_of_many_terms_and_of_a_loss():
    terms = [f"{family}_{i}" for family in ("hidden", "attention") for i in range(1, 8)]
    fig = drawn(plots.plot_history(records(terms, "held-out loss"), "many"))
    assert len(legend(fig)) == 4 and "best held-out loss: 0.5 at update 100" in legend(fig)
    shades = {(line.get_color(), line.get_alpha()) for line in fig.axes[0].lines[1:8]}
    assert len(shades) == 7 and {colour for colour, _ in shades} == {plots.TEACHER}


def test_spectrum_writes_the_energy_that_is_kept():
    fig = drawn(plots.plot_spectrum([3.0, 2.0, 1.0, 1.0], 2))
    assert fig.get_suptitle() == f"The first 2 of 4 singular values hold {100 * 13 / 15:.1f} % of the energy"
    assert list(fig.axes[1].lines[0].get_ydata())[-1] == pytest.approx(100)


def test_attention_pair_with_unequal_head_counts():
    tokens, teacher, student = ["[CLS]", "$a$", "a\U000f0000", "x" * 40], attention(12, 4), attention(3, 4)
    fig = drawn(plots.plot_attention_pair(tokens, teacher, student, "S"))
    first, second, difference = (ax.images[0] for ax in fig.axes[:3])
    assert np.allclose(first.get_array(), teacher.mean(0))
    assert np.allclose(difference.get_array(), student.mean(0) - teacher.mean(0))
    assert first.norm is second.norm and difference.norm.vmin == -difference.norm.vmax
    assert texts(fig.axes[0].get_xticklabels()) == ["[CLS]", "$a$", "a\u25af", "x" * 12]


def test_attention_pair_of_one_head_and_60_tokens_has_labels_that_do_not_overlap():
    tokens, teacher = [f"▁Regierung{i}" for i in range(60)], attention(2, 60)
    fig = drawn(plots.plot_attention_pair(tokens, teacher, attention(3, 60), "S", head=1))
    assert np.allclose(fig.axes[0].images[0].get_array(), teacher[1]) and "head 1" in fig.get_suptitle()
    boxes = [label.get_window_extent() for label in fig.axes[0].get_yticklabels()]
    assert len(boxes) == 30 and boxes[0].height > 6  # pixels
    assert all(above.y0 >= below.y1 - 1 for above, below in zip(boxes, boxes[1:], strict=False))


def test_cka_frames_the_pairs_and_writes_small_maps_only():
    ax = drawn(plots.plot_cka(np.linspace(0, 1, 28).reshape(7, 4).tolist(), PAIRS, "CKA")).axes[0]
    assert "student" in ax.get_xlabel() and "teacher" in ax.get_ylabel()
    assert {patch.get_xy() for patch in ax.patches} == {(s - 0.5, t - 0.5) for s, t in PAIRS}
    assert len(ax.texts) == 28 and ax.get_xlim() == (-0.5, 3.5) and ax.get_ylim() == (-0.5, 6.5)
    assert not drawn(plots.plot_cka(np.zeros((25, 7)), [], "CKA")).axes[0].texts


def test_pairs_are_named_in_cosine_and_attention_kl():
    fig = drawn(plots.plot_cosine([0.1, -0.2, 0.3], [0.9, 0.8, 0.7], PAIRS))
    assert texts(fig.axes[0].get_xticklabels()) == ["S1 ← T2", "S2 ← T4", "S3 ← T6"]
    assert legend(fig) == ["before stage 1", "after stage 1"] and fig.axes[0].get_ylim()[0] < -0.2
    fig = drawn(plots.plot_attention_kl([[0.1, 0.2], [0.3, math.nan], [0.5, 0.6]], PAIRS, "KL"))
    assert len(fig.axes[0].texts) == 5  # none for NaN
    assert texts(fig.axes[0].get_yticklabels()) == ["S1 ← T2", "S2 ← T4", "S3 ← T6"]
    assert fig.axes[1].get_ylabel() == "KL divergence (nats)"
    assert fig.axes[0].images[0].get_clim() == pytest.approx((0, 0.6))
    fig = drawn(plots.plot_cosine([None, 0.1], [None, 0.4], PAIRS[:2]))  # None: not comparable
    assert texts(fig.axes[0].texts) == ["", "0.10", "", "0.40"]
    assert "no attention maps" in drawn(plots.plot_attention_kl([], [], "KL")).get_suptitle()


def test_languages_are_sorted_and_those_without_a_score_left_out_of_the_mean():
    fig = drawn(plots.plot_languages({"th": None, "fr": 0.8, "de": 0.9, "vi": 0.0},
                                     {"th": None, "fr": math.nan, "de": 0.81, "vi": 0.0}, "Test"))
    ax = fig.axes[0]
    assert [bar.get_height() for bar in ax.containers[0]][:2] == pytest.approx([90, 80])
    assert texts(ax.get_xticklabels())[:2] == ["de", "fr"] and ax.get_ylabel() == "F1 (%)"
    assert [text for text in texts(ax.texts) if text.endswith("%")] == ["90 %"]
    assert legend(fig) == ["teacher, mean of 2: 45.0 %", "student, mean of 2: 40.5 %"]
    drawn(plots.plot_languages({"all": 0.9}, {"all": 0.8}, "one"))


def test_size_speed_has_three_panels_and_takes_missing_numbers():
    teacher = {"parameters": 278e6, "non_embedding": 86e6, "mb": 1110, "test": {"macro": 0.9},
               "ms_per_sentence": 40.0, "sentences_per_second": 200.0}
    student = {"parameters": 40e6, "non_embedding": 8e6, "mb": None, "test": {"macro": None},
               "ms_per_sentence": 5.0, "sentences_per_second": None}
    size, single, batch = drawn(plots.plot_size_speed(teacher, student)).axes
    total, embeddings = size.containers
    assert [bar.get_height() for bar in total] == pytest.approx([278, 40])
    assert embeddings[0].get_y() == pytest.approx(86) and embeddings[0].get_height() == pytest.approx(192)
    assert texts(size.get_xticklabels()) == ["teacher\n1110 MB\nF1 90.0 %", "student\n– MB\nF1 – %"]
    assert texts(single.texts) == ["40", "5"] and batch.get_ylabel() == "sentences per second"


def test_intervals_have_a_row_each_a_line_at_zero_and_grey_where_nothing_is_shown():
    rows = [{"cell": name, "difference": x, "low": low, "high": high} for name, x, low, high in
            (("a=1", 0.02, 0.01, 0.03), ("b", 0.01, -0.01, 0.02), ("c", -0.02, -0.05, -0.01))]
    ax = drawn(plots.plot_intervals(rows, "S")).axes[0]
    zero, *lines = ax.lines
    assert list(zero.get_xdata()) == [0, 0] and texts(ax.get_yticklabels()) == ["a=1", "b", "c"]
    assert list(lines[0].get_xdata()) == pytest.approx([1, 3]) and lines[1].get_xdata()[0] == pytest.approx(2)
    assert [line.get_color() for line in lines[::2]] == [plots.TEACHER, plots.GREY, plots.STUDENT]
    assert texts(ax.texts) == ["+2.0", "+1.0", "-2.0"] and ax.yaxis_inverted()


def test_minutes_are_means_over_runs_with_a_bar_from_the_least_to_the_most():
    rows = [{"cell": cell, "minutes": x, "test": y} for cell, x, y in
            (("long", 9, 80), ("long", 11, 84), ("short", 2, 70), ("other", 3, 60))]
    fig = drawn(plots.plot_minutes(rows, "S", {"ours": ["long", "short"], "theirs": ["other"]}))
    ours, theirs = fig.axes[0].containers
    assert ours.lines[0].get_xydata().tolist() == [[2, 70], [10, 82]]
    assert theirs.lines[0].get_xydata().tolist() == [[3, 60]]
    assert [[y for _, y in bar] for bar in ours.lines[2][0].get_segments()] == [[70, 70], [80, 84]]
    assert legend(fig) == ["ours", "theirs"] and fig.axes[0].get_xlabel().startswith("minutes")
    assert legend(drawn(plots.plot_minutes(rows, "S"))) == ["long", "short", "other"]
