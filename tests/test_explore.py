"""The explorer without a browser: what moves, what it shows then, and how long that takes."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_inside import maps
from test_stages import plain_teacher, run_stages, smoke, smoke_params  # noqa: F401

from xdistil import explore
from xdistil.inside import Look, Pair, Side
from xdistil.runs import Run

SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def explorer(smoke):  # noqa: F811
    params = smoke_params(smoke)
    return explore.Explorer(Pair(params, Run(params)))


def test_layer_head_sentence_and_stage_change_the_figure(explorer):
    seen = {explorer.attention.value}
    assert bytes(explorer.attention.value).startswith(b"\x89PNG")
    for control, value in ((explorer.layer, 1), (explorer.head, 2), (explorer.stage, "student-init"),
                           (explorer.sentence, explorer.sentence.options[-1][1])):
        control.value = value
        assert explorer.attention.value not in seen, control.description
        seen.add(explorer.attention.value)
    assert explorer.look is explorer.pair.look("student-init", explorer.sentence.value)
    assert "gold" in explorer.spans.value
    explorer.layer.value, explorer.layer.value = 2, 1
    assert explorer.attention.value in seen  # drawn over what was there, not on top of it


def test_a_click_chooses_layer_and_head_or_a_pair_of_layers(explorer):
    explorer.heads.buttons[0][3].click()
    assert (explorer.layer.value, explorer.head.value) == (2, 3)
    framed = [b for line in explorer.heads.buttons for b in line if b.layout is explorer.heads.framed]
    kl, nearest = explorer.look.heads
    assert framed == [explorer.heads.buttons[0][3]] and framed[0].description == nearest[1][3]
    assert f"<b>{kl[1][3]:.3f} nats" in explorer.said.value
    explorer.tabs.selected_index = 1
    before = explorer.similarity.value, explorer.states.value
    explorer.cka.buttons[1][2].click()  # the rows go down from the teacher's layer 4
    assert (explorer.s.value, explorer.t.value) == (2, 3)
    assert explorer.similarity.value != before[0] and explorer.states.value != before[1]
    cka = explorer.pair.cka(explorer.stage.value)
    assert explorer.cka.buttons[1][2].description == f"{cka[3][2]:.2f}"
    assert f"<b>{cka[3][2]:.3f}" in explorer.noted.value
    explorer.s.value = 1
    assert explorer.t.value == explorer.look.paired[1]  # a slider moves along the pairs
    explorer.tabs.selected_index = 0


def test_own_sentences_are_escaped_and_have_no_gold(explorer):
    explorer.text.value = f"{SCRIPT} met Ada"
    assert SCRIPT not in explorer.spans.value and "&lt;script&gt;" in explorer.spans.value
    assert "gold" not in explorer.spans.value and explorer.look.words[0] == SCRIPT
    before = explorer.look
    explorer.text.value = "  "
    assert "found no words" in explorer.spans.value and explorer.look is before
    explorer.sentence.value = explorer.sentence.options[0][1]
    assert explorer.text.value == "" and "gold" in explorer.spans.value


def test_a_bilstm_shows_what_it_has(smoke, tmp_path):  # noqa: F811
    params = smoke_params(tmp_path / "run", teacher_model_dir=str(plain_teacher(smoke, tmp_path / "given")),
                          student_arch="bilstm", embedding_size=12, hidden_size=10, distil_attention=False)
    found = explore.Explorer(Pair(params, run_stages(params, last="student-init")))
    assert found.said.value == explore.NO_MAPS and found.attention.value and len(found.head.options) == 1
    found.layer.value, found.tabs.selected_index = 1, 1
    assert "widths 48 and 20" in found.look.states(1, 4)[2] and found.similarity.value and found.states.value
    assert "no attention maps" in explore.heads_figure(found.look, "S").get_suptitle()


def test_a_slider_of_a_large_pair_does_not_wait():
    size, types, looks = 60, ["LOC", "ORG", "PER"], {}
    sides = [Side(maps(n, 12, size, seed=n), [torch.randn(size, 384) for _ in range(n + 1)], ["O"]) for n in (12, 6)]
    paired = {s: 2 * s for s in range(7)}
    for stage in ("hidden", "labels"):
        looks[stage] = Look(["a"], [f"▁token{i}" for i in range(size)], types * 20, None, *sides, paired, {})
    pair = SimpleNamespace(stages=list(looks), types=types, sentences=lambda: [("=", ("a",))], words_of=None,
                           look=lambda stage, words: looks[stage], cka=lambda stage: np.full((13, 7), 0.5).tolist())
    found, seconds = explore.Explorer(pair), {}

    def move(control, value):
        start = time.process_time()  # not the clock: whatever else runs here is not counted
        control.value = value
        taken = time.process_time() - start
        seconds[control.description, value] = min(taken, seconds.get((control.description, value), taken))

    for i in range(3):  # the least of three: two that share a core both take longer
        found.tabs.selected_index = 0
        for control, value in ((found.layer, 2), (found.layer, 3), (found.head, 5), (found.head, 6),
                               (found.stage, "hidden"), (found.stage, "labels")):
            move(control, value)
        found.tabs.selected_index = 1
        for control, value in ((found.s, 2 + i % 2), (found.t, 7 + i % 2), (found.stage, "hidden")):
            move(control, value)
    assert max(seconds.values()) < 0.3, seconds
