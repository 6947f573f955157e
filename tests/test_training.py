"""The loop, on a model of a few dozen numbers: what it computes, keeps, restores and resumes."""

import contextlib
import itertools
import math
import types
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from xdistil import training
from xdistil.devices import open_accelerator
from xdistil.files import read_jsonl
from xdistil.training import (
    Feed,
    Recipe,
    Stopped,
    fit,
    load_checkpoint,
    lr_factor,
    make_optimizer,
    step_unless_infinite,
)

EPOCHS, CHUNKS, BATCHES, SIZE = 2, 2, 2, 4  # of a step, of an epoch, of a chunk, of a batch
WINDOWS = CHUNKS * BATCHES * SIZE
RECIPE = Recipe(epochs=EPOCHS, lr=0.02, warmup_ratio=0.25)
SPEED = {"seconds", "windows_per_second"}


class Tagger(nn.Module):
    """Embeddings, dropout, a layer and a head."""

    def __init__(self):
        super().__init__()
        self.words, self.drop = nn.Embedding(11, 6), nn.Dropout(0.2)
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, input_ids):
        return self.head(torch.tanh(self.layer(self.drop(self.words(input_ids)))))


HEAD = ["head.weight", "head.bias"]
LAYER = ["layer.weight", "layer.bias"]
STEPS = [("head", HEAD), ("layer", HEAD + LAYER)]  # words.weight never learns
ALL = [("all", [*HEAD, *LAYER, "words.weight"])]


def new_model():
    torch.manual_seed(0)
    return Tagger()


def batches(pass_number, chunk):
    rng = torch.Generator().manual_seed(1000 * pass_number + chunk)
    for _ in range(BATCHES):
        ids = torch.randint(0, 11, (SIZE, 5), generator=rng)
        yield {"input_ids": ids, "labels": ids % 3}


def terms(model, batch):
    return {"labels": nn.functional.cross_entropy(model(batch["input_ids"]).mT, batch["labels"])}


def held_out_loss(model):
    model.eval()
    with torch.no_grad():
        return {"metric": "held-out loss", "score": float(terms(model, next(batches(999, 0)))["labels"])}


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


class Scores:
    """An `evaluate` that returns listed scores and remembers the weights it was shown."""

    def __init__(self, *scores, metric="held-out loss"):
        self.scores, self.metric, self.shown = iter(scores), metric, []

    def __call__(self, model):
        self.shown.append(weights_of(model))
        return {"metric": self.metric, "score": next(self.scores)}


def falling():
    return Scores(*range(100, 0, -1))


def train(folder, model=None, *, terms=terms, batches=batches, evaluate=held_out_loss, recipe=RECIPE, steps=STEPS,
          weights=None, n_chunks=CHUNKS, **watched):
    """`fit` with the defaults of this file. Returns the model, the summary and the history."""
    model = model or new_model()
    summary = fit(model, terms, Feed(batches, WINDOWS * n_chunks // CHUNKS, n_chunks), evaluate, recipe, steps,
                  accelerator=open_accelerator("cpu", "float32", quiet=True), folder=folder, weights=weights,
                  **watched)
    return model, summary, read_jsonl(folder / "history.jsonl")


def plain_loop(max_grad_norm, steps=STEPS):
    """What `fit` should compute, in plain torch: the loss of every update and the final weights."""
    model, found = new_model(), []
    named = dict(model.named_parameters())
    for step, (_, members) in enumerate(steps):
        for name, p in named.items():
            p.requires_grad_(name in members)
        optimizer = torch.optim.AdamW([
            {"params": [named[n] for n in members if n.endswith("weight")], "weight_decay": 0.01},
            {"params": [named[n] for n in members if n.endswith("bias")], "weight_decay": 0.0}], lr=0.02)
        n_updates = EPOCHS * CHUNKS * BATCHES
        model.train()
        for update in range(n_updates):
            epoch, place = divmod(update, CHUNKS * BATCHES)
            chunk, i = divmod(place, BATCHES)
            batch = list(batches(step * EPOCHS + epoch, chunk))[i]
            share = (update + 1) / n_updates
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * min(share / 0.25, (1 - share) / 0.75)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(batch["input_ids"]).mT, batch["labels"])
            loss.backward()
            nn.utils.clip_grad_norm_([named[n] for n in members], max_grad_norm)
            optimizer.step()
            found.append(loss.item())
    return found, weights_of(model)


@pytest.mark.parametrize("steps", [STEPS, ALL], ids=["unfreezing", "all"])
@pytest.mark.parametrize("max_grad_norm", [1e9, 1e-3])
def test_losses_and_weights_are_those_of_a_plain_loop(tmp_path, steps, max_grad_norm):
    seen = []

    def spy(model, batch):
        found = terms(model, batch)
        seen.append(found["labels"].item())
        return found

    recipe = Recipe(EPOCHS, 0.02, warmup_ratio=0.25, max_grad_norm=max_grad_norm)
    model, _, history = train(tmp_path, terms=spy, evaluate=falling(), steps=steps, recipe=recipe)
    losses, weights = plain_loop(max_grad_norm, steps)
    assert seen == pytest.approx(losses, rel=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(p, weights[name], rtol=1e-6, atol=1e-8), name
    means = [sum(losses[i : i + BATCHES]) / BATCHES for i in range(0, len(losses), BATCHES)]
    assert [r["loss"] for r in history if r["kind"] == "train"] == pytest.approx(means, rel=1e-6)


def test_clipping_changes_what_is_learnt():
    # AdamW hides a constant scale, so this shows that the comparison above can see clipping at all
    (_, clipped), (_, free) = plain_loop(1e-3), plain_loop(1e9)
    assert any((clipped[name] - free[name]).abs().max() > 1e-5 for name in free)


@pytest.mark.parametrize("metric, scores", [
    ("held-out loss", [5.0, 4.0, 2.0, 3.0, 4.0, 1.0]), ("dev macro F1", [0.1, 0.2, 0.6, 0.6, 0.5, 0.9])])
def test_the_best_weights_are_restored_and_patience_ends_a_step(tmp_path, metric, scores):
    evaluate = Scores(*scores, metric=metric)
    model, summary, history = train(
        tmp_path, evaluate=evaluate, steps=ALL, recipe=Recipe(epochs=9, lr=0.02, patience=2))
    assert len(evaluate.shown) == 5  # before, two better epochs, two that are not: the sixth never comes
    assert summary["epochs"] == 4 and summary["score"] == scores[2] and summary["metric"] == metric
    assert same(weights_of(model), evaluate.shown[2])
    assert not same(evaluate.shown[2], evaluate.shown[4])
    assert [r["best"] for r in history if r["kind"] == "eval"] == [True, True, True, False, False]
    assert not model.training


def test_starting_weights_are_a_candidate_in_every_step(tmp_path):
    evaluate = Scores(2.0, 3.0, 4.0, 1.0, 2.0)  # step 1 only harms; step 2 helps in its first epoch
    model, summary, _ = train(tmp_path, evaluate=evaluate)
    start = weights_of(new_model())
    assert same(evaluate.shown[0], start)
    assert not same(evaluate.shown[3], start)
    assert same(weights_of(model), evaluate.shown[3]) and summary["score"] == 1.0
    model, summary, _ = train(tmp_path / "harm", evaluate=Scores(1.0, *range(2, 9)))
    assert same(weights_of(model), start) and summary["score"] == 1.0


def test_only_the_members_of_a_step_change(tmp_path):
    evaluate = falling()
    train(tmp_path, evaluate=evaluate)
    before, _, after_head, _, after_layer = evaluate.shown
    for name in before:
        changed = [not torch.equal(a[name], b[name]) for a, b in
                   ((before, after_head), (after_head, after_layer))]
        assert changed == {"head": [True, True], "layer": [False, True]}.get(name.split(".")[0], [False, False]), name


@pytest.mark.parametrize("schedule, expected", [
    ("linear", [0, 0.5, 1, 0.75, 0.5, 0]),
    ("cosine", [0, 0.5, 1, (1 + math.sqrt(0.5)) / 2, 0.5, 0]),
    ("constant", [0, 0.5, 1, 1, 1, 1])])
def test_lr_factor_by_hand(schedule, expected):
    found = [lr_factor(progress, 0.2, schedule) for progress in (0, 0.1, 0.2, 0.4, 0.6, 1)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert lr_factor(0, 0, schedule) == 1


def test_biases_and_norms_are_not_decayed():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[1].weight.requires_grad_(False)
    decay = {id(p): g["weight_decay"] for g in make_optimizer(model, 0.1, 0.3).param_groups for p in g["params"]}
    assert decay == {id(model[0].weight): 0.3, id(model[0].bias): 0.0, id(model[1].bias): 0.0}


def two_kinds(model, batch):
    loss = terms(model, batch)["labels"]
    return {"hidden_1": loss, "hidden_2": loss**2, "attention_1": model.words.weight.square().mean()}


def test_weights_by_name_weigh_the_loss_and_history_keeps_terms_unweighted(tmp_path):
    _, _, history = train(tmp_path / "a", terms=two_kinds, weights={"hidden_1": 2.0, "attention_1": 0.5}, steps=ALL)
    records = [r for r in history if r["kind"] == "train"]
    assert len(records) == EPOCHS * CHUNKS
    for r in records:
        assert r["loss"] == pytest.approx(2 * r["hidden_1"] + r["hidden_2"] + 0.5 * r["attention_1"])
        assert r["attention_1"] > 0.1 and r["hidden_1"] > 0.1

    def hidden_only(model, batch):
        return {k: v for k, v in two_kinds(model, batch).items() if k != "attention_1"}

    ignored, _, _ = train(tmp_path / "b", terms=two_kinds, weights={"attention_1": 0.0}, steps=ALL)
    absent, _, _ = train(tmp_path / "c", terms=hidden_only, steps=ALL)
    counted, _, _ = train(tmp_path / "d", terms=two_kinds, steps=ALL)  # no weights: 1 for each
    assert same(weights_of(ignored), weights_of(absent)) and not same(weights_of(counted), weights_of(absent))


def test_history_records(tmp_path):
    _, summary, history = train(tmp_path)
    mark = {"kind", "step", "step_name", "epoch", "update"}
    assert {r["kind"]: r.keys() - mark for r in history} == {
        "train": {"lr", "loss", "labels"}, "eval": {"best", "metric", "score"}}
    assert all(mark <= r.keys() for r in history)
    step = ["train"] * CHUNKS + ["eval"]
    assert [r["kind"] for r in history] == ["eval"] + step * EPOCHS * len(STEPS)
    assert list(dict.fromkeys((r["step"], r["step_name"]) for r in history)) == [(1, "head"), (2, "layer")]
    assert [r["epoch"] for r in history if r["kind"] == "eval"] == [0, 1, 2, 1, 2]
    assert [r["update"] for r in history if r["kind"] == "train"] == list(range(2, 17, 2)) and summary["updates"] == 16
    assert summary.keys() == SPEED | {"metric", "score", "updates", "epochs", "windows"} and summary["epochs"] == 4
    assert summary["score"] == min(r["score"] for r in history if r["kind"] == "eval")


class Interrupted(Exception):
    """As a killed process: nothing after it runs."""


def failing_feed(*where):
    """The feed, which raises Interrupted once at each (pass, chunk, batches already given)."""
    pending = set(where)

    def feed(pass_number, chunk):
        for i, batch in enumerate([*batches(pass_number, chunk), None]):
            if (pass_number, chunk, i) in pending:
                pending.remove((pass_number, chunk, i))
                raise Interrupted
            if batch:
                yield batch

    return feed


def assert_resumes(folder, whole, *, times=1, **options):
    for _ in range(times):
        with pytest.raises(Interrupted):
            train(folder, **options)
    model, summary, history = train(folder, **options)
    assert same(weights_of(model), whole[0])
    assert history == whole[2]
    assert {k: v for k, v in summary.items() if k not in SPEED} == {
        k: v for k, v in whole[1].items() if k not in SPEED}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Weights, summary and history of the run that nothing interrupts."""
    model, summary, history = train(tmp_path_factory.mktemp("whole"))
    return weights_of(model), summary, history


PLACES = list(itertools.product(range(EPOCHS * len(STEPS)), range(CHUNKS), range(BATCHES + 1)))


@pytest.mark.parametrize("place", PLACES, ids=lambda p: "pass{}-chunk{}-batch{}".format(*p))
def test_resumes_wherever_the_feed_stops(tmp_path, whole, place):
    assert_resumes(tmp_path, whole, batches=failing_feed(place))


def test_resumes_again_and_again(tmp_path, whole):
    some = PLACES[1::3]
    assert_resumes(tmp_path, whole, batches=failing_feed(*some), times=len(some))


@pytest.mark.parametrize("n", range(EPOCHS * len(STEPS) + 1))
def test_resumes_when_stopped_while_judging(tmp_path, whole, n):
    calls = itertools.count()

    def judge(model):
        if next(calls) == n:
            raise Interrupted
        return held_out_loss(model)

    assert_resumes(tmp_path, whole, evaluate=judge)


@pytest.mark.parametrize("record_every", [1, 3], ids=["within a chunk", "at the end of a chunk"])
def test_it_stops_when_asked_and_goes_on_to_the_same_end(tmp_path, monkeypatch, record_every):
    monkeypatch.setattr(training, "RECORD_EVERY", record_every)
    seen = []

    def looks(records, done):
        seen.append((len(records), done))
        return False

    model, summary, history = train(tmp_path / "whole", watch=looks)
    updates = EPOCHS * len(STEPS) * CHUNKS * BATCHES
    assert len(seen) >= updates and all(0 < done <= 1 for _, done in seen) and seen[-1] == (len(history), 1)
    for asked in range(1, len(seen) + 1):
        folder, calls = tmp_path / str(asked), itertools.count(1)
        with pytest.raises(Stopped, match=r"\[training\] stopped at a checkpoint after \d+ updates; the same call"):
            train(folder, watch=lambda *_, n=asked, calls=calls: next(calls) >= n)
        position, _ = load_checkpoint(folder / "checkpoint.safetensors")
        assert position.updates <= asked + record_every
        again, found, records = train(folder)
        assert same(weights_of(again), weights_of(model)) and records == history
        assert {k: v for k, v in found.items() if k not in SPEED} == {
            k: v for k, v in summary.items() if k not in SPEED}


def test_being_stopped_is_no_error_with_a_traceback():
    assert issubclass(Stopped, KeyboardInterrupt) and Stopped("here")._render_traceback_() == ["here"]


def test_resume_keeps_best_weights_and_patience(tmp_path):
    scores = [5.0, 2.0, 3.0, 4.0, 1.0]

    def run(folder, feed, done=0):
        return train(folder, batches=feed, evaluate=Scores(*scores[done:]), steps=ALL,
                     recipe=Recipe(epochs=9, lr=0.02, patience=2))

    uncut, summary, _ = run(tmp_path / "a", batches)
    with pytest.raises(Interrupted):
        run(tmp_path / "b", failing_feed((2, 1, 1)))
    resumed, again, _ = run(tmp_path / "b", batches, done=3)
    assert same(weights_of(resumed), weights_of(uncut)) and again["epochs"] == summary["epochs"] == 3


def test_a_call_after_completion_trains_nothing(tmp_path, whole):
    train(tmp_path)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.name == "history.jsonl"}

    def never(*_):
        raise AssertionError("nothing is left to do")

    model, summary, history = train(tmp_path, batches=never, evaluate=never, terms=never)
    assert same(weights_of(model), whole[0]) and history == whole[2]
    assert {k: v for k, v in summary.items() if k not in SPEED} == {
        k: v for k, v in whole[1].items() if k not in SPEED}
    assert files == {"history.jsonl": (tmp_path / "history.jsonl").read_bytes()}


def spoilt(value, *updates):
    """The terms, with a loss that is `value` in these updates."""
    count = itertools.count(1)

    def spoil(model, batch):
        found = terms(model, batch)
        return {"labels": found["labels"] * value} if next(count) in updates else found

    return spoil


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_and_leaves_the_checkpoint(tmp_path, whole, value):
    with pytest.raises(FloatingPointError, match="learning rate or set.*opt_policy: float32"):
        train(tmp_path, terms=spoilt(value, *range(11, 99)))
    position, tensors = load_checkpoint(tmp_path / "checkpoint.safetensors")
    assert (position.step, position.epoch, position.chunk, position.updates) == (1, 0, 1, 10)
    assert tensors and all(torch.isfinite(t.float()).all() for t in tensors.values())
    batch = load_file(tmp_path / "not_finite.safetensors")
    assert torch.equal(batch["input_ids"], list(batches(EPOCHS, 1))[0]["input_ids"])  # the first of these
    model, _, history = train(tmp_path)
    assert same(weights_of(model), whole[0]) and history == whole[2]


def test_an_update_with_a_loss_that_is_not_finite_is_left_out_and_counted(tmp_path):
    recipe = replace(RECIPE, epochs=1, warmup_ratio=0, lr_schedule="constant")
    _, _, history = train(tmp_path, terms=spoilt(math.nan, 2), recipe=recipe, steps=STEPS[:1])
    skipped = [record.get("skipped", 0) for record in history if record["kind"] == "train"]
    assert skipped[0] == 1 and sum(skipped) == 1 and all(math.isfinite(record.get("loss", 0)) for record in history)
    model, optimizer = new_model(), None
    optimizer = open_accelerator("cpu", "float32", quiet=True).prepare(make_optimizer(model, 0.1, 0.0))
    before = weights_of(model)
    for norm, unchanged in ((math.inf, True), (1.0, False)):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        assert bool(step_unless_infinite(optimizer, torch.tensor(norm), None)) == unchanged == same(
            weights_of(model), before)


class Scaled:
    """What accelerate does in float16 on a GPU, on a CPU: gradients are scaled, and steps that overflow left out."""

    def __init__(self):
        self.scaler, self.device = torch.amp.GradScaler("cpu", 2.0**127, growth_interval=3), torch.device("cpu")
        self.autocast = contextlib.nullcontext

    def prepare(self, optimizer):
        self.inner = optimizer
        scaled = types.SimpleNamespace(**{name: getattr(optimizer, name) for name in (
            "param_groups", "zero_grad", "state_dict", "load_state_dict")}, optimizer=optimizer)
        scaled.step = lambda: (self.scaler.step(optimizer), self.scaler.update())
        return scaled

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def clip_grad_norm_(self, parameters, most):
        self.scaler.unscale_(self.inner)
        return torch.nn.utils.clip_grad_norm_(parameters, most)


def test_overflows_of_scaled_gradients_are_left_out_counted_and_the_scale_goes_on(tmp_path):
    def run(folder, **options):
        return fit(new_model(), terms, Feed(batches, WINDOWS, CHUNKS), held_out_loss, RECIPE, STEPS,
                   accelerator=Scaled(), folder=folder, weights={"labels": 100.0}, **options)

    run(tmp_path / "whole")
    history = read_jsonl(tmp_path / "whole" / "history.jsonl")
    skipped = [record.get("skipped", 0) for record in history if record["kind"] == "train"]
    assert skipped[0] > 0 and skipped[-1] == 0  # the scale was halved until nothing overflowed
    with pytest.raises(Stopped):
        run(tmp_path / "cut", watch=lambda records, done: len(records) > 6)
    run(tmp_path / "cut")
    assert read_jsonl(tmp_path / "cut" / "history.jsonl") == history




def test_the_checkpoint_is_one_safetensors_file(tmp_path, whole):
    with pytest.raises(Interrupted):
        train(tmp_path, batches=failing_feed((1, 1, 0)))
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint.safetensors", "history.jsonl"}
    with safe_open(tmp_path / "checkpoint.safetensors", "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in HEAD + LAYER:
        assert shapes[f"weights/{name}"] == tuple(whole[0][name].shape)
    assert any(name.startswith("optimizer/") for name in shapes)
    position, tensors = load_checkpoint(tmp_path / "missing.safetensors")
    assert (position.step, position.updates, tensors) == (0, 0, {})


def test_windows_are_counted_not_batches(tmp_path):
    def uneven(pass_number, chunk):
        for batch in batches(pass_number, chunk):
            yield {k: v[:3] for k, v in batch.items()}
            yield {k: v[3:] for k, v in batch.items()}

    _, summary, history = train(tmp_path, batches=uneven, steps=ALL, recipe=Recipe(1, 1.0, warmup_ratio=0.0))
    assert summary["updates"] == CHUNKS * BATCHES * 2
    lr = [r["lr"] for r in history if r["kind"] == "train"]
    assert lr == pytest.approx([0.5, 0.0])  # shares of the windows of the epoch
