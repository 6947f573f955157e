"""Runs side by side: the front by hand, retention, tables, and what is no finished run."""

import json

import numpy as np
import pytest
from test_plots import drawn, legend, texts

from xdistil import compare, result_plots
from xdistil.tables import Table


def side(f1, parameters, ms):
    return {"test": {"macro": f1}, "parameters": 2e6 + parameters, "non_embedding": parameters, "ms_per_sentence": ms,
            "sentences_per_second": 1000 / ms}


@pytest.fixture
def runs(tmp_path):
    """Three finished runs: small, large, and one of the size of the first that is worse; and a folder that is none."""
    for name, student, languages, seed in (("small", side(0.8, 1e6, 1.0), {"de": 0.9, "vi": 0.7}, 1),
                                           ("large", side(0.88, 4e6, 3.0), {"de": 0.98, "vi": None}, 2),
                                           ("worse", side(0.7, 1e6, 1.5), {"de": 0.8, "vi": 0.6}, 3)):
        folder = tmp_path / name / "evaluation"
        folder.mkdir(parents=True)
        kept = {"macro": student["test"]["macro"] / 0.9, "by_language": languages}
        metrics = {"student": student, "teacher": side(0.9, 85e6, 20.0), "retention": kept}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (folder / "done.json").write_text(json.dumps({"test file": "abc"}))
        (tmp_path / name / "params.json").write_text(json.dumps({"seed": seed, "lr": 1, "model_dir": name}))
    (tmp_path / "begun" / "evaluation").mkdir(parents=True)
    return tmp_path


def test_the_front_is_what_nothing_beats():
    assert compare.pareto_front([1, 2, 3, 2, 1], [5, 7, 6, 7, 4]) == [True, True, False, True, False]
    assert compare.pareto_front([], []) == []


def test_finished_runs_are_found_and_another_folder_is_named(runs):
    found = compare.finished_runs(runs)
    assert [path.name for path in found] == ["large", "small", "worse"]
    with pytest.raises(ValueError, match=r"begun is no finished run.*xdistil run"):
        compare.load([*found, runs / "begun"])
    with pytest.raises(ValueError, match="nowhere is no finished run"):
        compare.load([runs / "nowhere"])
    with pytest.raises(ValueError, match="no finished run"):
        compare.load([])
    (runs / "x").mkdir()
    (runs / "small").rename(runs / "x" / "large")
    assert list(compare.load([runs / "large", runs / "x" / "large"])) == [f"{runs.name}/large", "x/large"]


def test_tables_of_scores_and_choices(runs):
    found = compare.load(compare.finished_runs(runs))
    rows = {row["run"]: row for row in compare.scores(found).rows}
    assert rows["small"]["macro F1 (%)"] == pytest.approx(80) and "test file" not in rows["small"]
    assert rows["large"]["of the teacher's (%)"] == pytest.approx(100 * 0.88 / 0.9)
    (row,) = compare.choices(found).rows  # of the parameters that differ
    assert row == {"parameter": "seed", **{name: str(run["asked"]["seed"]) for name, run in found.items()}}
    assert compare.choices({"large": found["large"]}).rows == [{"parameter": "none"}]
    found["small"]["test"] = "other"  # F1 on another test file is told
    assert "test file" in compare.scores(found).columns


def test_the_front_is_drawn_through_the_points_on_it(runs):
    points = compare.points(compare.load(compare.finished_runs(runs)))
    assert {p["name"]: (p["front_parameters"], p["front_ms"]) for p in points} == {
        "small": (True, True), "large": (True, True), "worse": (False, False), "teacher, F1 90.0 %": (True, True)}
    fig = drawn(result_plots.plot_front(points, "F"))
    line = fig.axes[0].lines[-1]
    assert list(line.get_xdata()) == [1, 4, 85] and list(line.get_ydata()) == pytest.approx([80, 88, 90])
    assert legend(fig)[:3] == ["large", "small", "worse"] and len(legend(fig)) == 5
    assert "ms" in fig.axes[1].get_xlabel() and fig.axes[0].get_ylabel() == "macro F1 on test (%)"


def test_retention_has_a_row_a_run(runs):
    names, languages, shares = compare.retention(compare.load(compare.finished_runs(runs)))
    assert (names, languages) == (["large", "small", "worse"], ["de", "vi"])
    assert shares == [[0.98, None], [0.9, 0.7], [0.8, 0.6]]
    fig = drawn(result_plots.plot_retention(names, languages, shares, "R"))
    assert texts(fig.axes[0].get_yticklabels()) == ["worse", "small", "large"]  # the first at the top
    assert len(fig.axes[0].texts) == 5


def test_confusion_and_scores_are_drawn():
    counts = np.array([[3, 1, 0], [0, 0, 2], [1, 0, 0]])
    sides = {"teacher": counts, "student": counts.T}
    fig = drawn(result_plots.plot_confusion(["PER", "ORG", "nothing"], sides, "C"))
    first, second, _ = fig.axes
    assert np.allclose(first.images[0].get_array(), [[75, 25, 0], [0, 0, 100], [100, 0, 0]])
    assert texts(first.get_yticklabels()) == ["PER", "ORG", "invented"]
    assert texts(second.get_xticklabels()) == ["PER", "ORG", "missed"] and len(first.texts) == 4
    rows = [{"bin": name, "who": who, "n": n, "score": 0.5, "low": 0.4, "high": 0.7}
            for who in ("teacher", "student") for name, n in (("1–3", 9), ("4", 8000))]
    fig = drawn(result_plots.plot_scores(rows, "S", "words", "F1"))
    assert texts(fig.axes[0].get_xticklabels()) == ["1–3\nn = 9", "4\nn = 8,000"]
    assert legend(fig) == ["teacher, 95 % interval", "student, 95 % interval"]
    assert "texts have none" in drawn(result_plots.plot_scores([], "S", "words", "F1")).get_suptitle()


def test_tables_are_copied_into_a_paper():
    rows = [{"run": "a_b & <c>", "F1 (%)": 91.26, "x|y": None}, {"run": "50 $", "F1 (%)": 0.5, "x|y": 3}]
    table = Table(rows, "T_1")
    assert table.to_markdown() == ("| run | F1 (%) | x\\|y |\n| --- | ---: | ---: |\n"
                                   "| a\\_b &amp; &lt;c&gt; | 91.3 | - |\n| 50 \\$ | 0.5 | 3 |")
    assert table.to_latex() == "\n".join([
        r"\begin{table}", r"\centering", r"\caption{T\_1}", r"\begin{tabular}{lrr}", r"\toprule",
        r"run & F1 (\%) & x\textbar{}y \\", r"\midrule", r"a\_b \& \textless{}c\textgreater{} & 91.3 & - \\",
        r"50 \$ & 0.5 & 3 \\", r"\bottomrule", r"\end{tabular}", r"\end{table}"])
    odd = Table([{"a": "\\{~^}\n"}])
    assert r"\textbackslash{}\{\textasciitilde{}\textasciicircum{}\} " in odd.to_latex()
    assert odd.to_markdown().count("\n") == 2
