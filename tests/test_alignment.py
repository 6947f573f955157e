"""How alike: 1 for the same, blind to rotation, scale and padding."""

import pytest
import torch
from torch import nn

from xdistil.alignment import linear_cka, measure_alignment
from xdistil.students import build_student, make_projections, student_config

PAIRS = {"hidden_pairs": [(0, 0), (4, 4)], "attention_pairs": [(1, 1), (4, 4)]}


def test_cka_of_itself_is_one_whatever_the_rotation_scale_and_shift():
    x = torch.randn(50, 6)
    rotation = torch.linalg.qr(torch.randn(6, 6)).Q
    for y in (x, 3 * x, x @ rotation, -0.1 * x @ rotation + 5):
        assert linear_cka([x], [y])[0] == pytest.approx([1], abs=1e-6)


@pytest.mark.parametrize("x, y, value", [
    ([[1], [2], [3]], [[1], [3], [2]], 0.25),  # of single columns it is their correlation squared: (1/2)^2
    ([[1], [2], [3]], [[1], [-2], [1]], 0.0),
    ([[1, 0], [-1, 0], [0, 1], [0, -1]], [[1], [-1], [0], [0]], 2**-0.5),  # 2^2 / (|diag(2, 2)| 2)
    ([[1], [1]], [[1], [2]], 0.0)])  # a constant is like nothing
def test_cka_by_hand(x, y, value):
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    assert linear_cka([x], [y])[0] == pytest.approx([value], abs=1e-6) == linear_cka([y], [x])[0]


def test_cka_of_unrelated_states_is_small():
    assert linear_cka([torch.randn(4000, 6)], [torch.randn(4000, 3)])[0][0] < 0.02


def test_a_teacher_is_perfectly_aligned_with_itself(teacher, examples):
    found = measure_alignment(teacher, teacher, {}, examples, 0, "cpu", **PAIRS, n_windows=20)
    assert found["cosine"] == pytest.approx([1, 1], abs=1e-5)
    assert [len(row) for row in found["attention_kl"]] == [4, 4]
    assert sum(found["attention_kl"], []) == pytest.approx([0] * 8, abs=1e-6)
    assert [found["cka"][i][i] for i in range(5)] == pytest.approx([1] * 5, abs=1e-6)
    assert found["hidden_pairs"] == PAIRS["hidden_pairs"] and found["attention_pairs"] == PAIRS["attention_pairs"]


@pytest.fixture
def student(teacher, labels, tokenizer):
    config = student_config(teacher.config, "scratch", None, hidden_size=24, num_hidden_layers=2,
                            num_attention_heads=4, intermediate_size=32)
    model, _ = build_student(config, teacher, "scratch", None, labels, tokenizer, True)
    model.set_attn_implementation("eager")
    return model


def test_shapes_follow_layers_pairs_and_heads(teacher, student, examples):
    pairs = {"hidden_pairs": [(0, 0), (1, 2), (2, 4)], "attention_pairs": [(2, 4)]}
    projections = make_projections(pairs["hidden_pairs"], [24] * 3, 48)
    found = measure_alignment(teacher, student, projections, examples, 0, "cpu", **pairs, n_windows=20)
    assert (len(found["cka"]), {len(row) for row in found["cka"]}) == (5, {3})
    assert len(found["cosine"]) == 3 and all(-1 <= x <= 1 for x in found["cosine"])
    assert len(found["attention_kl"]) == 1 and all(x > 0 for x in found["attention_kl"][0])
    assert len(found["attention_kl"][0]) == 4
    # the embeddings are the SVD of the teacher's: far more alike than chance
    assert found["cka"][0][0] > 0.3 and all(0 <= x <= 1 + 1e-6 for row in found["cka"] for x in row)
    without = measure_alignment(teacher, student, {}, examples, 0, "cpu", hidden_pairs=[(2, 4)], n_windows=4)
    assert without["cosine"] == [None]  # of widths 24 and 48
    none = measure_alignment(teacher, student, {}, examples, 0, "cpu", n_windows=4)
    assert none["cosine"] == [] and none["attention_kl"] == [] and len(none["cka"]) == 5


def test_projections_are_applied_before_the_cosine(teacher, student, examples):
    found = []
    for sign in (1, -1):
        projections = nn.ModuleDict({"2": nn.Linear(24, 48)})
        nn.init.zeros_(projections["2"].weight)
        with torch.no_grad():
            projections["2"].bias.copy_(sign * torch.arange(48.0))
        found.append(measure_alignment(teacher, student, projections, examples, 0, "cpu", hidden_pairs=[(2, 4)],
                                       n_windows=5)["cosine"][0])
    assert found[0] == pytest.approx(-found[1], rel=1e-4) and abs(found[0]) > 1e-3


def test_padding_does_not_matter(teacher, student, examples):
    pairs = {"attention_pairs": [(2, 4)], "n_windows": 20}
    one, other = (measure_alignment(teacher, student, {}, examples, pad_id, "cpu", **pairs) for pad_id in (0, 9))
    for kind in ("cka", "attention_kl"):
        torch.testing.assert_close(torch.tensor(one[kind]), torch.tensor(other[kind]), rtol=1e-4, atol=1e-6)


def test_both_models_are_measured_without_dropout(teacher, student, examples):
    teacher.train(), student.train()
    found = measure_alignment(teacher, student, {}, examples, 0, "cpu", n_windows=4)
    assert not teacher.training and not student.training
    assert found == measure_alignment(teacher, student, {}, examples, 0, "cpu", n_windows=4)
