"""How far apart: hand-worked values, and padding that never counts."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from xdistil import alignment, losses
from xdistil.losses import IGNORED

ONE = torch.ones(1, 2)
# two tokens (or rows) of two numbers each; the student's, the teacher's, the value by hand
S, T = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 1.0], [3.0, 1.0]]])
ROWS_S, ROWS_T = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]]), torch.tensor([[[[0.75, 0.25], [0.25, 0.75]]]])
LOGITS_S, LOGITS_T = torch.zeros(1, 2, 2), torch.tensor([[[math.log(3), 0.0], [0.0, 0.0]]])
KL = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # of (3/4, 1/4) from (1/2, 1/2)
BY_HAND = [
    (losses.hidden_mse, S, T, (1 + 1 + 0 + 9) / 4),
    (losses.hidden_cosine, S, T, (1 + 1 - 13 / (5 * math.sqrt(10))) / 2),
    (losses.attention_mse, ROWS_S, ROWS_T, (2 * 0.25**2) / 4),
    (losses.attention_kl, ROWS_S, ROWS_T, KL / 2),
    (losses.logit_mse, S, T, 11 / 4),
    (losses.logit_kl, LOGITS_S, LOGITS_T, KL / 2),
]
ALL = [row[0] for row in BY_HAND] + [losses.hidden_cka, losses.relation_kl]


def make(loss, seed, n_tokens=6):
    """Random inputs of the shape and range that the loss takes: 3 sentences, width 5 or 2 heads."""
    generator = torch.Generator().manual_seed(seed)
    if "attention" in loss.__name__:
        return torch.randn(3, 2, n_tokens, n_tokens, generator=generator).softmax(-1)
    return torch.randn(3, n_tokens, *((3, 8) if loss is losses.relation_kl else (5,)), generator=generator)


@pytest.mark.parametrize("loss, student, teacher, value", BY_HAND)
def test_values_by_hand(loss, student, teacher, value):
    assert loss(student, teacher, ONE).item() == pytest.approx(value, rel=1e-6)
    # of the first token alone
    first = {"attention_mse": 0.25**2, "attention_kl": 0.75 * math.log(1.5), "logit_kl": KL,
             "hidden_cosine": 1.0}.get(loss.__name__, 1.0)
    assert loss(student, teacher, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("loss", ALL)
def test_zero_if_and_only_if_equal(loss):
    one, other, mask = make(loss, 0), make(loss, 1), torch.ones(3, 6)
    assert loss(one, one, mask).item() == pytest.approx(0, abs=1e-6)
    assert loss(one, other, mask).item() > 1e-2


@pytest.mark.parametrize("garbage", [0.0, 1e30, float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("loss", ALL)
def test_padding_changes_neither_value_nor_gradient(loss, garbage):
    student, teacher, mask = make(loss, 0), make(loss, 1), torch.tensor([[1.0] * 4 + [0.0] * 2] * 3)
    if "attention" in loss.__name__:  # as softmax leaves it: no weight on padding
        student, teacher = (F.pad(x[..., :4, :4].softmax(-1), (0, 2, 0, 2)) for x in (student, teacher))
        padding = (mask[:, None, :, None] * mask[:, None, None, :]).expand_as(student) == 0
    else:
        padding = (mask == 0).view(3, 6, *[1] * (student.ndim - 2)).expand_as(student)
    found = []
    for a, b in ((student, teacher), (student.masked_fill(padding, garbage), teacher.masked_fill(padding, garbage))):
        a = a.clone().requires_grad_()
        value = loss(a, b, mask)
        value.backward()
        found.append((value.item(), a.grad))
    assert found[0][0] == found[1][0] and math.isfinite(found[0][0])
    assert torch.equal(found[0][1][~padding], found[1][1][~padding]) and found[0][1][~padding].abs().sum() > 0
    assert (found[1][1][padding] == 0).all()


@pytest.mark.parametrize("loss", ALL)
def test_an_empty_mask_gives_zero(loss):
    assert loss(make(loss, 0), make(loss, 1), torch.zeros(3, 6)).item() == 0


@pytest.mark.parametrize("loss", ALL)
def test_the_order_of_sentences_is_irrelevant_and_so_is_half_precision_storage(loss):
    student, teacher, order = make(loss, 0), make(loss, 1), [2, 0, 1]
    mask = torch.tensor([[1.0] * n + [0.0] * (6 - n) for n in (6, 2, 4)])
    value = loss(student, teacher, mask)
    torch.testing.assert_close(loss(student[order], teacher[order], mask[order]), value)
    half = loss(student, teacher.half(), mask)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, value, rtol=5e-3, atol=1e-5)


def test_every_real_token_weighs_the_same():
    student, teacher = torch.zeros(2, 2, 1), torch.tensor([[[1.0], [1.0]], [[4.0], [9.0]]])
    mask = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert losses.hidden_mse(student, teacher, mask).item() == pytest.approx((1 + 1 + 16) / 3)


def test_kl_of_logits_equals_torchs():
    student, teacher = make(losses.logit_kl, 0), make(losses.logit_kl, 1)
    flat = [x.reshape(-1, 5).log_softmax(-1) for x in (student, teacher)]
    wanted = F.kl_div(*flat, reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses.logit_kl(student, teacher, torch.ones(3, 6)), wanted)
    softened = F.kl_div(*((x.reshape(-1, 5) / 3).log_softmax(-1) for x in (student, teacher)),
                        reduction="batchmean", log_target=True)
    torch.testing.assert_close(losses.logit_kl(student, teacher, torch.ones(3, 6), 3.0), 9 * softened)


def test_kl_of_attention_equals_torchs():
    student, teacher = make(losses.attention_kl, 0), make(losses.attention_kl, 1)
    wanted = F.kl_div(student.reshape(-1, 6).log(), teacher.reshape(-1, 6), reduction="batchmean")
    torch.testing.assert_close(losses.attention_kl(student, teacher, torch.ones(3, 6)), wanted)


def test_kl_tends_to_half_the_squared_error_of_centred_logits():
    student, teacher = (make(losses.logit_kl, seed).double() for seed in (0, 1))
    student, teacher = (x - x.mean(-1, keepdim=True) for x in (student, teacher))
    mask = torch.ones(3, 6)
    # T^2 KL -> 1 / (2 C) sum of squares = 1/2 of their mean over the C classes (Hinton et al. 2015, section 2.1)
    kl = losses.logit_kl(student, teacher, mask, temperature=50.0)
    assert kl.item() == pytest.approx(losses.logit_mse(student, teacher, mask).item() / 2, rel=0.03)


@pytest.mark.parametrize("loss", [losses.hidden_mse, losses.logit_mse, losses.attention_mse])
def test_a_mismatch_of_shapes_names_both(loss):
    shape = (1, 4, 2, 2) if loss is losses.attention_mse else (1, 2, 8)
    fewer = (1, 1, 2, 2) if loss is losses.attention_mse else (1, 2, 1)  # would broadcast silently
    with pytest.raises(ValueError, match=r"student \(1, .*\) and teacher \(1, .*\) differ in shape; project"):
        loss(torch.zeros(fewer), torch.zeros(shape), ONE)


@pytest.mark.parametrize("loss", [losses.hidden_cosine, losses.attention_kl, losses.logit_kl, losses.hidden_cka,
                                  losses.relation_kl])
def test_no_loss_broadcasts_one_side_silently(loss):
    whole = make(loss, 0)
    with pytest.raises((ValueError, RuntimeError)):
        loss(whole[:, :1], whole, torch.ones(3, 6))


def test_tag_loss_is_cross_entropy_of_labelled_positions():
    torch.manual_seed(1)
    logits, labels = torch.randn(2, 4, 3), torch.tensor([[IGNORED, 2, 0, IGNORED], [IGNORED, 1, IGNORED, IGNORED]])
    picked = logits[labels != IGNORED], labels[labels != IGNORED]
    torch.testing.assert_close(losses.tag_loss(logits, labels), F.cross_entropy(*picked))
    assert losses.tag_loss(torch.zeros(1, 1, 4), torch.tensor([[3]])).item() == pytest.approx(math.log(4))
    assert losses.tag_loss(logits, torch.full((2, 4), IGNORED)).item() == 0
    logits[labels == IGNORED] = float("nan")
    torch.testing.assert_close(losses.tag_loss(logits, labels), F.cross_entropy(*picked))


@pytest.mark.parametrize("student, teacher, value", [
    ([[1], [2], [3]], [[1], [3], [2]], 0.75),  # 1 - correlation squared: 1 - (1/2)^2
    ([[1], [2], [3]], [[5], [1], [-3]], 0.0),
    ([[1, 0], [-1, 0], [0, 1], [0, -1]], [[1], [-1], [0], [0]], 1 - 2**-0.5)])  # 1 - 2^2 / (|diag(2, 2)| 2)
def test_cka_by_hand(student, teacher, value):
    student, teacher = (torch.tensor([x], dtype=torch.float32) for x in (student, teacher))
    mask = torch.ones(student.shape[:2])
    assert losses.hidden_cka(student, teacher, mask).item() == pytest.approx(value, abs=1e-6)
    padded = [F.pad(x, (0, 0, 0, 2), value=math.nan) for x in (student, teacher)]
    assert losses.hidden_cka(*padded, F.pad(mask, (0, 2))).item() == pytest.approx(value, abs=1e-6)


def test_cka_is_that_of_the_real_tokens_of_the_batch_at_any_widths():
    student, teacher, mask = torch.randn(4, 9, 7), torch.randn(4, 9, 13), (torch.rand(4, 9) > 0.4).long()
    kept = [x[mask > 0][None] for x in (student, teacher)]
    wanted = 1 - alignment.linear_cka(*kept)[0][0]
    assert losses.hidden_cka(student, teacher, mask).item() == pytest.approx(wanted, abs=1e-6) and 0.1 < wanted < 0.95
    rotation = torch.linalg.qr(torch.randn(7, 7)).Q
    for same in (student @ rotation, 1e-15 * student, 1e15 * student, student + 5):
        assert losses.hidden_cka(same, teacher, mask).item() == pytest.approx(wanted, abs=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # what a stage runs in must not round the sums
        assert losses.hidden_cka(student, teacher, mask).item() == pytest.approx(wanted, abs=1e-6)


def test_cka_has_the_gradient_of_its_equation():
    real, y = torch.tensor([[1.0], [1], [0], [1], [1]]).double(), torch.randn(5, 3).double()

    def distance(x):
        return 1 - (losses.unit_states(y, real).T @ losses.unit_states(x, real)).square().sum()
    torch.autograd.gradcheck(distance, torch.randn(5, 2, dtype=torch.double, requires_grad=True))


@pytest.mark.parametrize("states, mask", [(torch.arange(12.0).view(1, 3, 4), [[1.0, 0, 0]]),
                                          (torch.full((1, 3, 4), 0.5), [[1.0] * 3]),
                                          (torch.zeros(1, 3, 4), [[1.0] * 3])])
def test_cka_of_states_that_do_not_vary_is_one_without_a_gradient(states, mask):
    states = states.clone().requires_grad_()
    value = losses.hidden_cka(states, torch.randn(1, 3, 6), torch.tensor(mask))
    value.backward()
    assert value.item() == 1 and (states.grad == 0).all()


def qkv(*parts):
    """[1, S, 3, H] of the rows of queries, keys and values."""
    return torch.tensor(parts, dtype=torch.float32).transpose(0, 1)[None]


def test_relations_by_hand():
    a, nothing = math.log(3) ** 0.5, [[0.0], [0.0]]
    # X = (a, 0): X X' = ((log 3, 0), (0, 0)), so the rows of R are (3/4, 1/4) and (1/2, 1/2)
    some = [[a], [0.0]]
    back = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)  # of (1/2, 1/2) from (3/4, 1/4)
    for teacher, student, value in ((qkv(some, nothing, nothing), qkv(nothing, nothing, nothing), KL / 2),
                                    (qkv(nothing, some, some), qkv(nothing, nothing, some), KL / 2),
                                    (qkv(some, nothing, nothing), qkv(nothing, nothing, some), KL / 2 + back / 2)):
        assert losses.relation_kl(student, teacher, ONE, 1).item() == pytest.approx(value, rel=1e-6)
        assert losses.relation_kl(student, teacher, torch.tensor([[1, 0]]), 1).item() == 0  # a token alone
    # two heads of width 1, of which one differs; then one head of width 4: the scores are halved
    first = qkv([[a, 1.0], [0.0, 2.0]], [[0.0] * 2] * 2, [[0.0] * 2] * 2)
    other = qkv([[0.0, 1.0], [0.0, 2.0]], [[0.0] * 2] * 2, [[0.0] * 2] * 2)
    assert losses.relation_kl(other, first, ONE, 2).item() == pytest.approx(KL / 2 / 2, rel=1e-6)
    wide = qkv([[a, a, 0.0, 0.0], [0.0] * 4], [[0.0] * 4] * 2, [[0.0] * 4] * 2)
    assert losses.relation_kl(torch.zeros(1, 2, 3, 4), wide, ONE, 1).item() == pytest.approx(KL / 2, rel=1e-6)
    # any widths: 2 a^2 / sqrt(2) of a head of width 2 is b^2 of one of width 1 at b = a 2^(1/4)
    assert losses.relation_kl(qkv([[a * 2**0.25], [0]], nothing, nothing), qkv(
        [[a, a], [0, 0]], [[0, 0]] * 2, [[0, 0]] * 2), ONE, 1).item() == pytest.approx(0, abs=1e-6)


def softmax(x):
    return np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)


@pytest.mark.parametrize("n_heads, given", [(2, 2), (6, 6), (6, None)])
def test_relations_are_those_of_the_equation_head_by_head(n_heads, given):
    student, teacher, lengths = torch.randn(3, 7, 3, 6), 2 * torch.randn(3, 7, 3, 18), (7, 3, 4)
    mask, total, rows = torch.zeros(3, 7, dtype=torch.long), 0.0, 0
    for i, n in enumerate(lengths):
        mask[i, :n], rows = 1, rows + n * n_heads
        for x in range(3):
            parts = [np.split(side[i, :n, x].double().numpy(), n_heads, axis=1) for side in (student, teacher)]
            for s, t in zip(*parts, strict=True):
                s, t = (softmax(m @ m.T / math.sqrt(m.shape[1])) for m in (s, t))
                total += (t * np.log(t / s)).sum()
    assert losses.relation_kl(student, teacher, mask, given).item() == pytest.approx(total / rows, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert losses.relation_kl(student, teacher, mask, given).item() == pytest.approx(total / rows, rel=1e-5)


def test_relations_of_large_vectors_are_finite():
    student = (1e4 * torch.randn(2, 5, 3, 8)).requires_grad_()
    value = losses.relation_kl(student, 1e4 * torch.randn(2, 5, 3, 4), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]]))
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all()
