import math
import warnings

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from matplotlib import colors
from matplotlib.figure import Figure

from xdistil import plots

PAIRS = [(1, 2), (2, 4), (3, 6)]


def drawn(fig):
    """The figure after it was laid out; pytest turns every warning on the way into an error."""
    assert isinstance(fig, Figure)
    fig.draw_without_rendering()
    assert fig.get_size_inches()[0] * fig.dpi <= 2200
    return fig


def legend(holder):
    legends = holder.legends if isinstance(holder, Figure) else [holder.get_legend()]
    return [text.get_text() for text in legends[0].get_texts()]


def attention(heads, size, seed=0):
    weights = np.random.default_rng(seed).random((heads, size, size))
    return weights / weights.sum(-1, keepdims=True)


def records(steps=2, terms=("hidden_1", "hidden_2", "attention_1", "logits"), restart=False):
    out, update = [], 0
    for step in range(1, steps + 1):
        update = 0 if restart else update
        where = {"step": step, "step_name": f"top {step}"}
        out.append({"kind": "eval", **where, "epoch": 0, "update": update, "score": 0.1 * step,
                    "metric": "dev macro F1", "best": step == 1})  # fmt: skip
        for _ in range(5):
            update += 10
            losses = {name: math.exp(-update / 10) for name in terms}
            out.append({"kind": "train", **where, "epoch": 1, "update": update, "lr": 1e-4,
                        "loss": sum(losses.values()), **losses})  # fmt: skip
        out.append({"kind": "eval", **where, "epoch": 1, "update": update,
                    "score": 0.3 + 0.1 * step, "metric": "dev macro F1", "best": True})  # fmt: skip
    return out


def test_style_does_not_leak_into_matplotlib_or_pyplot():
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    plots.plot_stages({"hidden": 0.5}, 0.9)
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []


def test_notebooks_get_a_picture_without_any_magic_command():
    assert plots.plot_stages({"hidden": 0.5}, 0.9)._repr_png_().startswith(b"\x89PNG")


def test_only_installed_font_families_are_named():
    installed = {font.name for font in matplotlib.font_manager.fontManager.ttflist}
    assert plots.FAMILIES and set(plots.FAMILIES) <= installed | {"sans-serif"}


def test_lengths_counts_what_is_cut_and_keeps_long_sentences_in_the_last_bin():
    fig = drawn(plots.plot_lengths({"train": [10] * 98 + [129, 5000], "dev": [5, 6]}, 128))
    ax = fig.axes[0]
    assert "sub-words" in ax.get_xlabel() and "%" in ax.get_ylabel()
    assert ax.get_xlim()[1] < 400
    assert any(line.get_xdata()[0] == 128.5 for line in ax.lines)
    assert "train: 100 sentences, 2 % longer than 128" in legend(fig)
    assert "dev: 2 sentences, 0 % longer than 128" in legend(fig)
    tops = [patch.get_path().vertices[:, 1].max() for patch in ax.patches]
    assert sorted(tops) == pytest.approx([50, 98])


def test_lengths_of_empty_files():
    drawn(plots.plot_lengths({"train": [], "dev": []}, 128))


def test_history_shows_every_term_the_best_point_and_the_steps():
    fig = drawn(plots.plot_history(records(), "Stage 1: $x$"))
    top, low = fig.axes
    assert fig.get_suptitle() == "Stage 1: $x$"
    assert legend(fig) == ["loss", "hidden_1", "hidden_2", "attention_1", "logits"]
    assert top.get_yscale() == "log"
    assert low.get_xlabel() == "optimizer updates" and low.get_ylabel() == "dev macro F1 (%)"
    assert low.get_title(loc="left") == "best (star): 50 at update 100"
    assert list(low.lines[0].get_ydata()) == pytest.approx([10, 40, 20, 50])
    for ax in (top, low):
        assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [50]
    assert {"top 1", "top 2"} <= {text.get_text() for text in top.texts}
    assert top.lines[0].get_color() is not None
    assert colors.same_color(top.lines[0].get_color(), "black")


def test_history_that_counts_again_in_each_step_runs_on():
    top, _ = plots.plot_history(records(restart=True), "t").axes
    assert list(top.lines[0].get_xdata()) == list(range(10, 101, 10))


def test_history_legend_stays_short_with_many_terms():
    terms = [f"{family}_{i}" for family in ("hidden", "attention") for i in range(1, 8)]
    fig = drawn(plots.plot_history(records(terms=terms), "many"))
    assert len(legend(fig)) == 3
    assert "hidden (7): hidden_1 dark … hidden_7 pale" in legend(fig)
    hidden = [colors.rgb_to_hsv(colors.to_rgb(line.get_color())) for line in fig.axes[0].lines[1:8]]
    assert np.ptp([hue for hue, _, _ in hidden]) < 0.05
    assert len({tuple(shade) for shade in hidden}) == 7


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_history_without_one_kind_of_record(kind):
    top, low = drawn(plots.plot_history([r for r in records() if r["kind"] == kind], "t")).axes
    empty = low if kind == "train" else top
    full = top if kind == "train" else low
    assert "no records" in [text.get_text() for text in empty.texts]
    assert "no records" not in [text.get_text() for text in full.texts]


def test_history_empty_single_and_not_a_number():
    drawn(plots.plot_history([], "nothing"))
    one = [{"kind": "train", "step": 1, "step_name": "head", "epoch": 1, "update": 3, "lr": 1.0,
            "loss": math.nan, "ce": 0.5},
           {"kind": "eval", "step": 1, "step_name": "head", "epoch": 1, "update": 3,
            "score": math.nan, "metric": "held-out loss", "best": True}]  # fmt: skip
    top, low = drawn(plots.plot_history(one, "one")).axes
    assert top.lines[1].get_marker() == "o"
    assert low.get_ylabel() == "held-out loss"
    assert low.get_title(loc="left") == ""


def test_spectrum_writes_the_energy_that_is_kept():
    fig = drawn(plots.plot_spectrum([3.0, 2.0, 1.0, 1.0], 2))
    left, right = fig.axes
    assert left.get_title(loc="left") == "Singular values: the first 2 of 4 are kept"
    assert f"{100 * 13 / 15:.1f} %" in right.get_title(loc="left")
    assert list(right.lines[0].get_ydata())[-1] == pytest.approx(100)
    drawn(plots.plot_spectrum([3.0, 2.0], 2))


def test_attention_pair_with_unequal_head_counts():
    teacher, student = attention(12, 4), attention(3, 4, 1)
    fig = drawn(plots.plot_attention_pair(["[CLS]", "$a$", "中国", "[SEP]"], teacher, student, "S"))
    images = [ax.images[0] for ax in fig.axes[:3]]
    assert fig.get_suptitle() == "S: mean over heads"
    assert np.allclose(images[0].get_array(), teacher.mean(0))
    assert np.allclose(images[2].get_array(), student.mean(0) - teacher.mean(0))
    assert images[0].norm is images[1].norm
    assert images[2].norm.vmin == -images[2].norm.vmax
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()][1] == "$a$"


def test_attention_pair_of_one_head_cuts_padding_off():
    teacher, student = attention(2, 6), attention(2, 6, 1)
    fig = plots.plot_attention_pair(["a", "b", "c"], teacher, student, "S", head=1)
    assert np.allclose(fig.axes[0].images[0].get_array(), teacher[1, :3, :3])
    assert "head 1" in fig.get_suptitle()


def test_attention_pair_refuses_what_cannot_be_shown():
    with pytest.raises(ValueError, match="student has 2 heads, there is no head 3"):
        plots.plot_attention_pair(["a"], attention(4, 1), attention(2, 1), "S", head=3)
    with pytest.raises(ValueError, match="teacher: shape"):
        plots.plot_attention_pair(["a", "b"], attention(4, 1), attention(4, 2), "S")


def test_attention_pair_labels_of_60_tokens_do_not_overlap():
    tokens = [f"▁Regierung{i}" for i in range(60)]
    fig = plots.plot_attention_pair(tokens, attention(2, 60), attention(2, 60, 1), "S")
    drawn(fig)
    boxes = [label.get_window_extent() for label in fig.axes[0].get_yticklabels()]
    assert len(boxes) == 60
    assert all(above.y0 >= below.y1 - 1 for above, below in zip(boxes, boxes[1:], strict=False))
    assert boxes[0].height > 6  # pixels


def test_unknown_glyphs_become_boxes_instead_of_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert plots._drawable("a\U000f0000") == "a\u25af"
    assert plots._drawable("x" * 40) == "x" * 15 + "…"


def test_cka_frames_the_pairs_and_writes_small_maps_only():
    cka = np.linspace(0, 1, 28).reshape(7, 4)
    fig = drawn(plots.plot_cka(cka, PAIRS, "CKA"))
    ax = fig.axes[0]
    assert ax.get_xlabel().startswith("student layer")
    assert ax.get_ylabel() == "teacher layer (0 = embeddings)"
    assert len(ax.texts) == 28
    corners = {patch.get_xy() for patch in ax.patches}
    assert corners == {(s - 0.5, t - 0.5) for s, t in PAIRS}
    assert ax.get_ylim() == (-0.5, 6.5)
    assert not drawn(plots.plot_cka(np.zeros((25, 7)), PAIRS, "CKA")).axes[0].texts


def test_cosine_has_two_bars_for_each_pair():
    fig = drawn(plots.plot_cosine([0.1, -0.2, math.nan], [0.9, 0.8, None], PAIRS))
    ax = fig.axes[0]
    assert [len(group) for group in ax.containers] == [3, 3]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["S1 ← T2", "S2 ← T4", "S3 ← T6"]
    assert legend(fig) == ["before stage 1", "after stage 1"]
    assert ax.get_ylim()[0] < -0.2
    drawn(plots.plot_cosine([0.5] * 24, [0.9] * 24, [(i, i) for i in range(24)]))


def test_attention_kl_has_a_row_for_each_pair_and_greys_out_nan():
    kl = np.array([[0.1, 0.2], [0.3, math.nan], [0.5, 0.6]])
    fig = drawn(plots.plot_attention_kl(kl, PAIRS, "KL"))
    ax = fig.axes[0]
    assert len(ax.texts) == 5
    assert [label.get_text() for label in ax.get_yticklabels()] == ["S1 ← T2", "S2 ← T4", "S3 ← T6"]
    assert fig.axes[1].get_ylabel() == "KL divergence (nats)"
    assert ax.images[0].get_clim() == pytest.approx((0, 0.6))


@pytest.mark.parametrize("count", [1, 20])
def test_languages_sorted_by_teacher_with_retention(count):
    teacher = {f"l{i}": 0.5 + 0.02 * i for i in range(count)}
    student = {name: value / 2 for name, value in teacher.items()}
    fig = drawn(plots.plot_languages(teacher, student, "Test"))
    ax = fig.axes[0]
    heights = [bar.get_height() for bar in ax.containers[0]]
    assert heights == sorted(heights, reverse=True) and max(heights) > 1
    assert [t.get_text() for t in ax.texts].count("50 %") == count
    assert ax.get_ylabel() == "F1 (%)"
    mean = 100 * np.mean(list(teacher.values()))
    assert f"teacher, mean of {count}: {mean:.1f} %" in legend(fig)


def test_languages_with_missing_values_compare_the_same_languages():
    fig = drawn(plots.plot_languages({"de": 90, "fr": 80, "th": None},
                                     {"de": 81.0, "fr": math.nan, "vi": 50}, "Test"))  # fmt: skip
    ax = fig.axes[0]
    assert {"teacher, mean of 1: 90.0 %", "student, mean of 1: 81.0 %"} <= set(legend(fig))
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["de", "fr"]
    assert "90 %" in [text.get_text() for text in ax.texts]
    drawn(plots.plot_languages({"de": None}, {"de": None}, "none at all"))


def test_stages_show_each_value_and_the_teacher():
    fig = drawn(plots.plot_stages({"hidden": 0.5, "logits": 0.8, "labels": math.nan}, 0.9))
    ax = fig.axes[0]
    assert {"50.0", "80.0"} <= {text.get_text() for text in ax.texts}
    assert legend(fig) == ["student", "teacher: 90.0 %"]
    assert ax.lines[1].get_ydata()[0] == pytest.approx(90)
    assert ax.lines[1].get_linestyle() == "--"
    assert ax.get_ylabel() == "dev macro F1 (%)"


def test_size_speed_has_three_panels_and_takes_missing_numbers():
    rows = [{"name": "teacher", "parameters": 278e6, "non_embedding": 86e6, "mb": 1110,
             "ms_per_sentence": 40.0, "sentences_per_second": 200.0, "f1": 0.9},
            {"name": "student", "parameters": 40e6, "non_embedding": 8e6, "mb": None,
             "ms_per_sentence": 5.0, "sentences_per_second": None, "f1": None}]  # fmt: skip
    fig = drawn(plots.plot_size_speed(rows))
    size, single, batch = fig.axes
    other, embeddings = size.containers
    assert [bar.get_height() for bar in other] == pytest.approx([86, 8])
    assert embeddings[0].get_y() == pytest.approx(86)
    assert embeddings[0].get_height() == pytest.approx(192)
    assert [text.get_text() for text in size.texts] == ["278.0 M\n1110 MB", "40.0 M"]
    assert "ms" in single.get_ylabel() and batch.get_ylabel() == "sentences per second"
    assert size.get_xticklabels()[0].get_text() == "teacher\nF1 90.0 %"
    assert colors.same_color(single.patches[0].get_facecolor(), plots.TEACHER)
    assert colors.same_color(single.patches[1].get_facecolor(), plots.STUDENT)
