"""Precision: what is chosen, that it is told, and how far it is from float32."""

import timeit
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xdistil import devices
from xdistil.data import collate
from xdistil.models import prepare_to_answer, run_model


@pytest.fixture
def probe(monkeypatch):
    """Sets what the processor says of itself, and how fast it multiplies in float32 and bfloat16."""
    def say(has_it, slow=1.0, fast=1.0):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        times = iter([[slow, slow], [fast, fast]])
        monkeypatch.setattr(timeit, "repeat", lambda *_, **__: next(times))
        devices.multiplies_bf16.cache_clear()
    yield say
    devices.multiplies_bf16.cache_clear()


@pytest.mark.parametrize("has_it, slow, fast, pays", [
    (False, 9.0, 1.0, False), (True, 2.0, 1.0, True), (True, 1.0, 1.0, False), (True, 0.5, 1.0, False)])
def test_a_cpu_gets_bfloat16_only_where_it_pays(probe, has_it, slow, fast, pays):
    probe(has_it, slow, fast)
    assert devices.multiplies_bf16("cpu") == pays
    assert devices.choose_precision("cpu", "auto")[0] == ("bf16" if pays else "no")
    precision, reason = devices.choose_precision("cpu", "mixed_bfloat16")
    assert precision == ("bf16" if pays else "no") and ("slower" in reason) != pays
    assert devices.choose_precision("cpu", "float32")[0] == "no"


def test_float16_on_a_cpu_is_an_error_with_its_remedy():
    with pytest.raises(ValueError, match="opt_policy: mixed_float16 does not train on cpu; set opt_policy: mixed_bf"):
        devices.choose_precision("cpu", "mixed_float16")


@pytest.fixture
def batch(examples):
    return collate(examples, np.arange(12), 0)


def test_layers_in_bfloat16_are_what_autocast_makes_of_them(teacher, batch):
    half = SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16")

    def ask():
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            return run_model(teacher, batch, True, True)

    (logits, states, maps), (other, more, others) = ask(), (prepare_to_answer(teacher, half), ask())[1]
    for one, same in zip((logits, *states, *maps), (other, *more, *others), strict=True):
        assert torch.equal(one, same)
    assert {p.dtype for p in teacher.parameters()} == {torch.float32, torch.bfloat16}
    assert teacher.classifier.weight.dtype == torch.float32  # `fold_head` reads it


def test_bfloat16_stays_within_bounds_of_float32(teacher, batch, accelerator):
    real = batch["attention_mask"] > 0
    with torch.inference_mode():
        logits, states, maps = run_model(teacher, batch, True, True)
        with torch.autocast("cpu", torch.bfloat16):
            other, more, others = run_model(teacher, batch, True, True)
    for one, same in zip((logits, *states), (other, *more), strict=True):
        assert (one - same)[real].abs().max() <= 0.02 * one[real].abs().max()
    for one, same in zip(maps, others, strict=True):
        assert (one - same).abs().max() <= 0.01
    assert prepare_to_answer(teacher, accelerator).classifier.weight.dtype == torch.float32
