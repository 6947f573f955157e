"""What is shown of teacher and student is what they compute: maps, states, divergences, neighbours."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_stages import smoke, smoke_params  # noqa: F401

from xdistil import data, losses, models
from xdistil.alignment import nearest_heads, principal_plane, token_similarity
from xdistil.inside import Look, Pair, Side
from xdistil.runs import Run

WORDS = ("Ada", "Storm", "lives", "in", "Lisbon", ".")


def maps(layers, heads, size=5, seed=0):
    drawn = np.random.default_rng(seed).dirichlet(np.ones(size), (layers, heads, size))
    return torch.tensor(drawn, dtype=torch.float32)


def look_at(teacher, student, paired):
    """A look with these maps and random states of width 8, of five tokens."""
    sides = [Side(x, [torch.randn(5, 8) for _ in range(n + 1)], ["O"])
             for x, n in ((teacher, max(paired.values())), (student, max(paired)))]
    return Look(["a"], list("abcde"), [""] * 5, None, *sides, paired, {})


@pytest.fixture(scope="module")
def pair(smoke):  # noqa: F811
    params = smoke_params(smoke)
    return Pair(params, Run(params))


def test_a_model_beside_itself_is_exactly_zero_and_one():
    same = maps(3, 4)
    look = look_at(same, same, {i: i for i in range(4)})
    look = dataclasses.replace(look, student=look.teacher)
    kl, nearest = look.heads
    assert kl == [[0.0] * 4] * 3 and nearest == [[f"{layer}.{head}" for head in range(4)] for layer in (1, 2, 3)]
    teacher, student, how = look.states(2, 2)
    assert token_similarity(teacher, student).diagonal().tolist() == pytest.approx([1] * 5, abs=1e-15)
    assert how == "states as they are"
    mine, other, share = principal_plane(teacher, student)
    assert torch.equal(mine, other) and 0 < share <= 1


def test_the_grid_of_divergences_is_that_of_each_pair_of_rows():
    teacher, student, paired = maps(4, 2, seed=1), maps(2, 2, seed=2), {0: 0, 1: 2, 2: 4}
    kl, nearest = look_at(teacher, student, paired).heads
    for s, t in ((1, 2), (2, 4)):
        for head in range(2):
            rows = zip(teacher[t - 1, head].tolist(), student[s - 1, head].tolist(), strict=True)
            wanted = sum(p * math.log(p / q) for a, b in rows for p, q in zip(a, b, strict=True)) / 5
            assert kl[s - 1][head] == pytest.approx(wanted, rel=1e-4)
            both = [float(losses.attention_kl(x[None, None], y[None, None], torch.ones(1, 5))
                          + losses.attention_kl(y[None, None], x[None, None], torch.ones(1, 5)))
                    for y in [student[s - 1, head]] for layer in teacher for x in layer]
            best = int(np.argmin(both))
            assert nearest[s - 1][head] == f"{best // 2 + 1}.{best % 2}"


def test_heads_that_changed_places_and_other_counts_of_heads_are_found():
    teacher = maps(2, 4)
    assert nearest_heads(teacher, teacher[[1]][:, [3, 0, 2, 1]]) == [[(2, 3), (2, 0), (2, 2), (2, 1)]]
    look = look_at(teacher, teacher[1][None, [3, 1]], {0: 0, 1: 2})
    shown, student = look.attention(1)
    assert np.array_equal(shown, student) and look.heads == ([[0.0, 0.0]], [["2.3", "2.1"]])


def test_a_bilstm_has_no_maps_and_all_else():
    look = look_at(maps(2, 4), None, {0: 0, 1: 2})
    teacher, student = look.attention(1)
    assert teacher.shape == (4, 5, 5) and student.shape == (1, 5, 5) and np.isnan(student).all()
    assert look.heads == ([], [])


def test_token_similarity_by_hand_and_over_widths():
    x, y = torch.tensor([[1.0, 0], [0, 2]]), torch.tensor([[3.0, 0], [1, 1]])
    assert token_similarity(x, y).tolist() == [pytest.approx([1, 0.5**0.5]), pytest.approx([0, 0.5**0.5])]
    x = torch.randn(6, 4)
    wider = 3 * x @ torch.linalg.qr(torch.randn(7, 4)).Q.T + 5  # the same up to rotation, scale and place
    assert token_similarity(x, wider).diagonal().tolist() == pytest.approx([1] * 6, abs=1e-5)


def test_the_plane_of_other_widths_is_turned_onto_the_teachers():
    x = torch.randn(9, 4)
    turned = 2 * x @ torch.linalg.qr(torch.randn(6, 4)).Q.T + 1
    teacher, student, share = principal_plane(x, turned)
    torch.testing.assert_close(student, teacher, atol=1e-4, rtol=1e-4)
    values = torch.linalg.svdvals((x - x.mean(0)).double()) ** 2
    assert share == pytest.approx(float(values[:2].sum() / values.sum()), rel=1e-5)
    moved = principal_plane(x, x + 1)[1] - teacher  # of one width, how far it lies off is kept
    assert float(moved.norm(dim=1).min()) > 0.1
    assert principal_plane(x[:1], x[:1])[0].shape == (1, 2)


def test_maps_are_the_models_own_and_without_dropout(pair):
    look = pair.look("hidden", WORDS)
    for name, side in (("teacher", look.teacher), ("student", look.student)):
        assert side.maps.sum(-1).numpy() == pytest.approx(1, abs=1e-5), name
    again = Pair(pair.params, pair.run).look("hidden", WORDS)
    assert torch.equal(look.teacher.maps, again.teacher.maps) and torch.equal(look.student.maps, again.student.maps)
    batch = data.collate(pair.inputs.encode(data.Sentences([list(WORDS)])), [0], pair.inputs.pad_id)
    with torch.no_grad():
        _, states, whole = models.run_model(pair.student("hidden"), batch, True, True)
    teacher, student = look.attention(2)
    assert np.array_equal(student, whole[1][0].numpy()) and torch.equal(look.student.states[1], states[1][0])
    assert np.array_equal(teacher, look.teacher.maps[3].numpy()) and look.paired == {0: 0, 1: 2, 2: 4}
    assert len(look.tokens) == len(look.types) == student.shape[-1]
    assert look.types[0] == "" and look.words == list(WORDS) and "gold" not in look.tags


def test_each_stage_is_read_from_its_own_folder(pair):
    assert pair.stages == ["student-init", "hidden", "logits", "labels"]
    found = {stage: pair.look(stage, WORDS) for stage in pair.stages}
    for stage, look in found.items():
        student = models.load_classifier(pair.run.dir / stage, pair.inputs.labels, "model_dir").eval()
        batch = data.collate(pair.inputs.encode(data.Sentences([list(WORDS)])), [0], pair.inputs.pad_id)
        models.return_maps(student)
        with torch.no_grad():
            assert torch.equal(models.run_model(student, batch, True)[1][-1][0], look.student.states[-1]), stage
    assert not torch.equal(found["hidden"].student.states[-1], found["student-init"].student.states[-1])
    assert found["hidden"].teacher is found["labels"].teacher  # asked once
    assert np.shape(pair.cka("labels")) == (5, 3)


def test_states_go_through_what_stage_1_learnt(pair):
    first, later = pair.look("student-init", WORDS), pair.look("hidden", WORDS)
    assert "widths 48 and 24 without a projection" in first.states(2, 4)[2]
    weights = load_file(pair.run.dir / "hidden" / "projections.safetensors")
    wanted = later.student.states[2] @ weights["2.weight"].T + weights["2.bias"]
    teacher, student, how = later.states(2, 4)
    torch.testing.assert_close(student, wanted)
    assert teacher is later.teacher.states[4] and how == "student states through stage 1's projection"


def test_sentences_where_both_differ_come_first_with_their_gold_tags(pair):
    names, words = zip(*pair.sentences(), strict=True)
    marks = "".join(name[0] for name in names)
    assert marks == "≠" * marks.count("≠") + "=" * marks.count("=") and len(marks) == 16 + 24
    assert {name.split()[1] for name in names} == {"dev", "test"}
    for name, sentence in zip(names, words, strict=True):
        look = pair.look("labels", sentence)
        assert look.gold == pair.gold[sentence][: len(look.words)] and len(look.student.tags) == len(look.words)
        if len(look.words) == len(sentence):  # else only the first window is looked at
            assert (look.teacher.tags != look.student.tags) == (name[0] == "≠")
    with pytest.raises(data.DataError, match="found no words"):
        pair.words_of("  ")


def test_a_run_without_students_says_so(tmp_path):
    params = smoke_params(tmp_path / "none")
    with pytest.raises(RuntimeError, match="run build_student first"):
        Pair(params, Run(params))
