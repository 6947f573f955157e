"""Dropout from a pool of random bits: as random as it needs to be, and the same after a resume."""

import pytest
import torch
from torch import nn

from xdistil.dropout import PooledDropout, pool_dropout, set_dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_drops_a_share_and_keeps_the_mean(dtype):
    drop, x = PooledDropout(0.25).train(), torch.ones(400, 500, dtype=dtype)
    found = drop(x).float()
    assert found.unique().numel() == 2 and (found == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert found.mean().item() == pytest.approx(1, abs=0.02)


def test_masks_differ_from_call_to_call_and_follow_the_seed():
    drop, x = PooledDropout(0.5).train(), torch.ones(64, 64)
    masks = []
    for _ in range(2):
        torch.manual_seed(3)
        masks.append([drop(x), drop(x)])
    assert not masks[0][0].equal(masks[0][1])
    assert all(one.equal(other) for one, other in zip(*masks, strict=True))
    share = (masks[0][0] * masks[0][1] > 0).float().mean().item()  # neighbours in time are independent
    assert share == pytest.approx(0.25, abs=0.04)


def test_gradients_pass_where_values_do():
    x = torch.ones(100, requires_grad=True)
    kept = PooledDropout(0.5).train()(x)
    kept.sum().backward()
    assert torch.equal(x.grad, kept.detach())


def test_nothing_is_dropped_in_eval_mode_or_at_zero_and_huge_tensors_use_torchs_own():
    x = torch.ones(3, 4)
    assert PooledDropout(0.5).eval()(x) is x and PooledDropout(0.0).train()(x).equal(x)
    assert (PooledDropout(0.5).train()(torch.ones(1 << 23)) == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


def test_loaded_models_have_it_and_keep_their_rates(teacher):
    found = [m for m in teacher.modules() if isinstance(m, nn.Dropout)]
    assert found and {type(m) for m in found} == {PooledDropout} and {m.p for m in found} == {0.1}
    set_dropout(teacher, hidden=0.3, attention=0.0)
    assert {m.p for m in found} == {0.0, 0.3}
    assert pool_dropout(teacher) is teacher
