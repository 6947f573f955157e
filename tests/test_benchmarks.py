"""The benchmark measures the same work for all: equal losses, right operation counts, a table that says what is
missing. Speed itself is not tested."""

import warnings

import numpy as np
import pytest
import torch
from benchmarks import figures, ours, peers, table, work
from test_plots import drawn, legend, texts

TINY = work.Setting("tiny", work.Encoder(3, 16, 2, 32), work.Encoder(2, 8, 2, 24), 50, 16)


def test_flops_are_counted_by_hand():
    one = work.Encoder(layers=2, hidden=4, heads=1, inner=8)
    # a layer: q, k, v, out 4 x 4 x 4 and feed-forward 2 x 4 x 8, twice (multiply, add) for each of 3 + 5 tokens;
    # scores and weighted sums 2 x 2 x 4 for each of 9 + 25 pairs
    assert one.flops(np.array([3, 5])) == 2 * (2 * (64 + 64) * 8 + 2 * 2 * 4 * 34)
    lengths, setting = np.array([2]), work.Setting("x", work.Encoder(1, 4, 1, 8), work.Encoder(1, 2, 1, 4), 9, 8)
    student, projections = 2 * (16 + 16) * 2 + 4 * 2 * 4, 2 * 2 * 4 * 2 * 2
    assert setting.flops("stage1", "later", lengths) == 3 * (student + projections)
    assert setting.flops("logits", "later", lengths) == 3 * student
    assert setting.flops("logits", "first", lengths) == 3 * student + setting.teacher.flops(lengths)
    assert work.SETTINGS["big32"].padded_bytes() == 4 * (7 * 768 * 32 + 6 * 12 * 32 * 32)


def test_units_of_any_size_hold_the_same_lengths():
    setting = work.SETTINGS["big128"]
    few, many = (np.sort([len(ids) for ids in setting.sentences(n, 32, seed=n)]) for n in (32, 96))
    assert np.array_equal(np.repeat(few, 3), many) and few.max() <= 128
    assert setting.lengths(64).mean() == pytest.approx(23.87, abs=0.1)  # of the 31,441 transfer sentences
    assert work.SETTINGS["big32"].lengths(64).mean() == pytest.approx(19.82, abs=0.1)


def test_lengths_are_those_of_the_transfer_text(shared):
    with open(shared / "data/multi_ner/transfer.tsv", encoding="utf-8") as file:
        words = [len(line.split("\t")[0].split()) for line in file]
    wanted = np.quantile([n for n in words if n], (np.arange(64) + 0.5) / 64).round()
    assert wanted.astype(int).tolist() == list(work.WORDS)


@pytest.fixture
def stage1():
    return work.make_models(TINY, "stage1", dropout=0.0)


def test_the_losses_of_all_are_one(stage1):
    sentences = TINY.sentences(8, 8, seed=1)
    expected = peers.Loop(TINY, "stage1", "fp32", stage1).loss(sentences)
    assert ours.Ours(TINY, "stage1", "fp32", stage1).loss(sentences) == pytest.approx(expected, rel=1e-4)
    if peers.textbrewer():
        assert peers.TextBrewer(TINY, "stage1", stage1).loss(sentences) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("stage", ["stage1", "logits"])
def test_everyone_trains_and_is_timed(stage):
    given, sentences = work.make_models(TINY, stage), TINY.sentences(64, 32, seed=1)
    everyone = [*peers.all_peers(TINY, stage, given, ["fp32"]), *ours.all_ours(TINY, stage, given)]
    for one in everyone:
        learner = one.model if isinstance(one, ours.Ours) else one.student
        before = {name: p.detach().clone() for name, p in learner.named_parameters()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those of the peers are not ours to mend
            found = one.unit(sentences)
        assert all((seconds > 0).all() for seconds in found.values()), one.name
        changed = {name for name, p in learner.named_parameters() if not torch.equal(p, before[name])}
        assert changed and not any("word_embeddings" in name for name in changed), one.name
        if "head only" in one.name:
            assert changed == {"classifier.weight", "classifier.bias"}
    teachers = zip(given[0].parameters(), everyone[-1].teacher.parameters(), strict=True)
    assert all(torch.equal(p.to(q.dtype), q) for p, q in teachers)  # layers may be kept in bfloat16


def test_the_table_says_what_was_not_measured():
    rows = [{"setting": "big32", "stage": "stage1", "name": name, "part": "first", "sentences_per_second": rate,
             "tokens_per_second": 20 * rate, "limit": 2.0, "limit_of": "bf16", "best": 1.0, "worst": 2.0, "rounds": 1}
            for name, rate in (("ours bf16", 30.0), ("loop bf16", 15.0), ("loop fp32", 10.0))]
    facts = {"machine": {"processor": "a | b"}, "threads": 1, "quick": True, "skipped": {"memory": "too long"}}
    text = table.write(facts | {"training": rows, "limits": {"fp32": 1e11}})
    lines = text.splitlines()
    assert any(line.startswith("| stage 1, first pass, big, 32 / 128, bf16 | loop bf16 |") and
               line.endswith("| 2.00x / – |") for line in lines)
    assert "| 3.00x / – |" in text and "TextBrewer" in text and "memory: too long" in text and "a / b" in text
    width = {line.count("|") for line in lines if line.startswith("| stage 1")}
    assert len(width) == 1


def test_figures_have_bars_by_setting_and_lines_by_epoch():
    rows = [{"setting": setting, "stage": "stage1", "name": name, "part": part, "seconds": seconds, "limit": limit}
            for setting in ("big32", "big128") for name, part, seconds, limit in
            (("loop", "first", 0.6, 4.0), ("ours", "first", 0.3, 2.0), ("ours", "later", 0.06, None))]
    fig = drawn(figures.plot_rows(rows + [rows[0] | {"stage": "logits"}], "stage1", "seconds", "seconds"))
    ax = fig.axes[0]
    assert [[bar.get_height() for bar in bars] for bars in ax.containers] == [[0.6] * 2, [0.3] * 2, [0.06] * 2]
    assert texts(ax.get_xticklabels()) == ["big32", "big128"] and legend(fig)[-1] == "ours, later"
    assert len(drawn(figures.plot_rows(rows, "stage1", "limit", "limit")).axes[0].containers) == 2
    loop, ours = drawn(figures.plot_epochs(rows, "big128", 600, 3)).axes[0].lines
    assert list(loop.get_ydata()) == pytest.approx([6, 12, 18])
    assert list(ours.get_ydata()) == pytest.approx([3, 3.6, 4.2])
