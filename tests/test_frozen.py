"""Frozen parts computed once: the same logits, gradients and training as without."""

import itertools

import numpy as np
import pytest
import torch

from xdistil import frozen, losses
from xdistil.data import collate
from xdistil.frozen import FrozenStates, lower_states, run_upper
from xdistil.grouping import batches, grid
from xdistil.models import run_model
from xdistil.training import Feed, Recipe, fit
from xdistil.unfreeze import encoder_layers, freeze_to, layer_groups, n_frozen_layers, unfreezing_steps


def steps(model):
    return unfreezing_steps(layer_groups(model), "layer")


@pytest.fixture
def rows(examples):
    return np.argsort(examples.lengths)[::7]


def test_frozen_layers_are_counted_from_below(teacher):
    found = []
    for _, names in steps(teacher):
        freeze_to(teacher, names)
        found.append(n_frozen_layers(teacher))
    assert found == [4, 3, 2, 1, 0, 0]  # head, layer 4 ... layer 1, embeddings
    freeze_to(teacher, [name for name, _ in teacher.named_parameters() if "word_embeddings" not in name])
    assert n_frozen_layers(teacher) == 0  # their norm learns


@pytest.mark.parametrize("n", range(1, 5))
def test_lower_states_are_the_hidden_states(teacher, examples, rows, n):
    batch = collate(examples, rows, 0)
    with torch.no_grad():
        assert torch.equal(lower_states(teacher, batch, n), run_model(teacher, batch, True)[1][n])


@pytest.mark.parametrize("step", range(6))
def test_kept_states_give_the_logits_and_gradients_of_the_whole_model(teacher, examples, rows, accelerator, step):
    freeze_to(teacher, steps(teacher)[step][1])
    for module in teacher.modules():  # what is frozen is in eval mode; here the rest must be repeatable as well
        module.p = 0.0
    kept = FrozenStates(teacher, examples, np.arange(len(examples)), 0, accelerator, 1e9)
    (batch,) = kept.feed([collate(examples, rows, 0)])
    assert ("frozen_states" in batch) == (step < 4)

    def gradients(logits):
        teacher.zero_grad()
        losses.tag_loss(logits, batch["labels"]).backward()
        return {name: p.grad.clone() for name, p in teacher.named_parameters() if p.grad is not None}

    fresh, again = run_model(teacher, batch)[0], run_upper(teacher, batch)
    real = batch["attention_mask"] > 0
    torch.testing.assert_close(again[real], fresh[real], rtol=1e-5, atol=1e-6)
    one, other = gradients(fresh), gradients(again)
    assert set(one) == set(other) == set(steps(teacher)[step][1])
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)
    assert run_model(teacher, batch)[0].equal(fresh)  # afterwards the model is whole again


def test_the_frozen_part_runs_once_for_each_window_and_step(teacher, examples, accelerator, monkeypatch):
    seen = []
    monkeypatch.setattr(frozen, "lower_states", lambda model, batch, n: (
        seen.append((n, len(batch["windows"]))), lower_states(model, batch, n))[1])
    kept = FrozenStates(teacher, examples, np.arange(len(examples)), 0, accelerator, 1e9)
    for _, names in steps(teacher):
        freeze_to(teacher, names)
        for seed in (1, 2):
            grouped = batches(examples.lengths, grid(examples.lengths, 8), seed)
            list(kept.feed(collate(examples, rows, 0) for rows, _ in grouped))
    assert {n: sum(size for m, size in seen if m == n) for n, _ in seen} == dict.fromkeys((4, 3, 2, 1), len(examples))


def test_nothing_is_kept_where_the_answer_would_be_another(teacher, examples, rows, accelerator):
    """What a layer says is changed on its way to the next, and would be once more."""
    encoder_layers(teacher)[0].register_forward_hook(lambda *given: given[-1].flip(-1))
    for step, (_, names) in enumerate(steps(teacher)):
        freeze_to(teacher, names)
        before = [module.training for module in teacher.modules()]
        kept = FrozenStates(teacher, examples, np.arange(len(examples)), 0, accelerator, 1e9)
        (batch,) = kept.feed([collate(examples, rows, 0)])
        assert ("frozen_states" in batch) == (step < 3)  # not where that layer alone is frozen
        assert [module.training for module in teacher.modules()] == before


def test_past_the_budget_nothing_is_kept(teacher, examples, rows, accelerator):
    freeze_to(teacher, steps(teacher)[0][1])
    need = int(examples.lengths.sum()) * 48 * 4
    for budget, inside in ((need, True), (need - 1, False)):
        kept = FrozenStates(teacher, examples, np.arange(len(examples)), 0, accelerator, budget)
        (batch,) = kept.feed([collate(examples, rows, 0)])
        assert ("frozen_states" in batch) == inside


def test_training_ends_with_the_same_weights(teacher, examples, accelerator, tmp_path):
    start, ends = {name: p.clone() for name, p in teacher.state_dict().items()}, {}

    def feed_batches(pass_number, _chunk):
        grouped = batches(examples.lengths, grid(examples.lengths, 8), pass_number)
        return (collate(examples, rows, 0) for rows, _ in grouped)

    for name, budget in (("fresh", 0), ("kept", 1e9)):
        teacher.load_state_dict(start)
        torch.manual_seed(1)  # of the dropout above
        kept = FrozenStates(teacher, examples, np.arange(len(examples)), 0, accelerator, budget)
        feed = Feed(lambda *place, kept=kept: kept.feed(feed_batches(*place)), len(examples))
        better = itertools.count(0, -1)  # every epoch's weights are the best so far, so they are kept
        fit(teacher, lambda model, batch: {"labels": losses.tag_loss(run_upper(model, batch), batch["labels"])}, feed,
            lambda model, better=better: {"metric": "held-out loss", "score": next(better)}, Recipe(2, 1e-3),
            steps(teacher), accelerator=accelerator, folder=tmp_path / name)
        ends[name] = {key: p.clone() for key, p in teacher.state_dict().items()}
    for key in start:
        torch.testing.assert_close(ends["kept"][key], ends["fresh"][key], rtol=1e-3, atol=1e-4)  # Adam magnifies
    assert any(not ends["kept"][key].equal(start[key]) for key in start)
