"""The loop: one `fit` for every stage. It knows no NER, no teacher and no Params."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from xdistil.files import read_jsonl, save_atomic
from xdistil.unfreeze import freeze_to, learning_mode

RECORD_EVERY = 20  # optimizer updates between two training records of history.jsonl
LINE_EVERY = 15.0  # seconds between two lines of progress when there is no one to watch a bar


@dataclass(frozen=True)
class Recipe:
    """How to optimise: plain numbers, units as in `Params`."""

    epochs: int
    lr: float
    patience: int = 3
    warmup_ratio: float = 0.1
    lr_schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    seed: int = 0


@dataclass
class Feed:
    """What to train on: `batches(pass_number, chunk)` yields dicts of tensors with `input_ids`."""

    batches: Callable[[int, int], Iterable[dict]]
    n_sentences: int
    n_chunks: int = 1


@dataclass
class Position:
    """Where training stands; written with every checkpoint, between two batches of work."""

    step: int = 0
    epoch: int = 0
    chunk: int = 0
    seen: int = 0  # sentences of this epoch
    updates: int = 0
    best: float | None = None
    bad_epochs: int = 0
    records: int = 0
    seconds: float = 0.0


class Objective(nn.Module):
    """A model and its loss terms as one module, so that accelerate can wrap the forward pass."""

    def __init__(self, model: nn.Module, terms: Callable):
        super().__init__()
        self.model, self.terms = model, terms

    def forward(self, batch: dict) -> dict[str, torch.Tensor]:
        return self.terms(self.model, batch)


def lr_factor(progress: float, warmup_ratio: float, schedule: str) -> float:
    """Learning rate as a share of its peak, at `progress` 0..1 of a step."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    rest = (progress - warmup_ratio) / (1 - warmup_ratio)
    return {"linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2, "constant": 1.0}[schedule]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what learns; biases and norms are not decayed."""
    learning = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW([
        {"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0},
    ], lr=lr)


def is_watched() -> bool:
    """Whether someone may be looking at a progress bar: a terminal or a notebook front end."""
    return not os.environ.get("XDISTIL_HEADLESS")


class Checkpoint:
    """One safetensors file: weights, best weights, optimizer moments, random state, position."""

    def __init__(self, path: Path):
        self.path = path

    def save(self, position: Position, model, names, best, optimizer) -> None:
        """Write everything needed to go on exactly here."""
        weights = dict(model.named_parameters())
        tensors = {f"weights/{n}": weights[n].detach() for n in names}
        tensors |= {f"best/{n}": t for n, t in best.items()}
        if optimizer is not None:
            for i, state in enumerate(_optimizer_states(optimizer)):
                tensors |= {f"optimizer/{i}/{k}": v for k, v in state.items() if v is not None}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        tensors = {name: t.contiguous().cpu() for name, t in tensors.items()}
        metadata = {"position": json.dumps(asdict(position))}
        save_atomic(self.path, lambda path: save_file(tensors, path, metadata))

    def load(self) -> tuple[Position, dict[str, torch.Tensor]] | None:
        """The position and all tensors, or None when there is no checkpoint."""
        if not self.path.is_file():
            return None
        with safe_open(self.path, "pt") as handle:
            position = Position(**json.loads(handle.metadata()["position"]))
            return position, {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118


def _optimizer_states(optimizer) -> list[dict]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return [inner.state[p] for group in inner.param_groups for p in group["params"]]


def _restore_optimizer(optimizer, tensors: dict) -> None:
    inner = getattr(optimizer, "optimizer", optimizer)
    learning = [p for group in inner.param_groups for p in group["params"]]
    for i, parameter in enumerate(learning):
        prefix = f"optimizer/{i}/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if state:  # the step counter stays on the CPU, moments go with their parameter
            inner.state[parameter] = {
                k: v if k == "step" else v.to(parameter.device) for k, v in state.items()
            }


def _set_weights(model, tensors: dict) -> None:
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)


def fit(
    model: nn.Module,
    terms: Callable[[nn.Module, dict], dict[str, torch.Tensor]],
    feed: Feed,
    evaluate: Callable[[nn.Module], dict],
    recipe: Recipe,
    steps: list[tuple[str, list[str]]],
    *,
    accelerator,
    folder: Path,
    name: str = "training",
    weights: dict[str, float] | None = None,
) -> dict:
    """Train through unfreezing steps; each ends with the best weights it saw and a fresh optimizer.

    Args:
        terms: the loss terms of a batch, unweighted scalars by name; their weighted sum is the loss.
        evaluate: returns `metric` (its name) and `score`; lower is better for names ending in
            "loss". The starting weights count as a candidate, so no step makes a model worse.
        steps: (name, names of the parameters that learn), see `unfreeze.unfreezing_steps`.
        folder: gets history.jsonl and checkpoint.safetensors, from which an interrupted call goes
            on with the same numbers as an uninterrupted one (CPU, float32).
        weights: weight of the terms whose name starts with the key (1 where absent).

    Returns: metric, score, updates, epochs, seconds, sentences_per_second.
    Raises FloatingPointError when the loss stops being a number; the last checkpoint stays.
    """
    from tqdm.auto import tqdm

    names = list(dict.fromkeys(n for _, members in steps for n in members))
    objective = accelerator.prepare(Objective(model, terms))
    checkpoint, history_path = Checkpoint(folder / "checkpoint.safetensors"), folder / "history.jsonl"
    at, tensors = checkpoint.load() or (Position(), {})
    records = read_jsonl(history_path)[: at.records]
    if tensors:
        _set_weights(model, _part(tensors, "weights/"))
        print(f"[{name}] resumes at step {at.step + 1}/{len(steps)}, epoch {at.epoch + 1}, "
              f"chunk {at.chunk + 1}/{feed.n_chunks}", flush=True)
    started, before, sentences = time.monotonic(), at.seconds, 0
    metric, epochs_run = "", sum(r["kind"] == "eval" and r["epoch"] > 0 for r in records)
    term_weight = {}

    def scaled(terms_now):
        for key in terms_now:
            if key not in term_weight:
                term_weight[key] = next(
                    (w for prefix, w in (weights or {}).items() if key.startswith(prefix)), 1.0
                )
        return sum(term_weight[key] * value for key, value in terms_now.items())

    def keep(record):
        records.append(record)
        at.records = len(records)

    def save(best, optimizer):
        at.seconds = before + time.monotonic() - started
        text = "".join(json.dumps(r) + "\n" for r in records)
        save_atomic(history_path, lambda path: path.write_text(text, encoding="utf-8"))
        checkpoint.save(at, model, names, best, optimizer)

    for step in range(at.step, len(steps)):
        step_name, members = steps[step]
        where = {"step": step + 1, "step_name": step_name}
        freeze_to(model, members)
        optimizer = accelerator.prepare(make_optimizer(model, recipe.lr, recipe.weight_decay))
        current = dict(model.named_parameters())
        best = _part(tensors, "best/")
        if tensors:
            _restore_optimizer(optimizer, tensors)
            torch.set_rng_state(tensors["random/cpu"])
            if "random/cuda" in tensors:
                torch.cuda.set_rng_state(tensors["random/cuda"])
            tensors = {}

        def judge(epoch, update_best=True):
            nonlocal metric
            result = evaluate(model)
            metric, score = result["metric"], result["score"]
            ahead = at.best is None or (
                score < at.best if metric.endswith("loss") else score > at.best
            )
            if ahead:
                at.best = score
            keep({"kind": "eval", **where, "epoch": epoch, "update": at.updates,
                  "best": ahead, **result})
            return ahead

        def snapshot():
            return {n: current[n].detach().cpu().clone() for n in members}

        if not best:
            best = snapshot()
        if at.best is None:
            judge(0)
        bar = tqdm(total=recipe.epochs * feed.n_sentences, desc=f"{name} {step_name}",
                   initial=at.epoch * feed.n_sentences + at.seen, unit="sentence",
                   disable=not is_watched(), mininterval=0.5)
        last_line = time.monotonic()
        while at.epoch < recipe.epochs and at.bad_epochs < recipe.patience:
            learning_mode(model)
            for chunk in range(at.chunk, feed.n_chunks):
                sums, n_summed = {}, 0
                for batch in feed.batches(step * recipe.epochs + at.epoch, chunk):
                    batch = {k: v.to(accelerator.device) for k, v in batch.items()}
                    size = len(batch["input_ids"])
                    at.seen += size
                    sentences += size
                    done = (at.epoch + min(1.0, at.seen / feed.n_sentences)) / recipe.epochs
                    lr = recipe.lr * lr_factor(done, recipe.warmup_ratio, recipe.lr_schedule)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                    found = objective(batch)
                    loss = scaled(found)
                    accelerator.backward(loss)
                    accelerator.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                    at.updates += 1
                    bar.update(size)
                    for key, value in {"loss": loss, **found}.items():
                        sums[key] = sums.get(key, 0.0) + value.detach()
                    n_summed += 1
                    if n_summed == RECORD_EVERY:
                        _record(keep, where, at, lr, sums, n_summed)
                        sums, n_summed = {}, 0
                        bar.set_postfix(loss=f"{records[-1]['loss']:.4g}", refresh=False)
                        if not is_watched() and time.monotonic() - last_line > LINE_EVERY:
                            last_line = time.monotonic()
                            rate = sentences / (last_line - started)
                            print(f"[{name}] {step_name}: {done:.0%} of {recipe.epochs} epochs, "
                                  f"loss {records[-1]['loss']:.4g}, {rate:.0f} sentences/s",
                                  flush=True)
                if n_summed:
                    _record(keep, where, at, lr, sums, n_summed)
                at.chunk = chunk + 1
                if at.chunk < feed.n_chunks:
                    save(best, optimizer)
            ahead = judge(at.epoch + 1)
            best = snapshot() if ahead else best
            at.bad_epochs = 0 if ahead else at.bad_epochs + 1
            at.epoch, at.chunk, at.seen = at.epoch + 1, 0, 0
            epochs_run += 1
            score = records[-1]["score"]
            print(f"[{name}] {step_name}: epoch {at.epoch}/{recipe.epochs}, {metric} {score:.4f}"
                  f"{' (best)' if ahead else ''}", flush=True)
            save(best, optimizer)
        bar.close()
        _set_weights(model, best)
        at.step, at.epoch, at.chunk, at.seen, at.bad_epochs = step + 1, 0, 0, 0, 0
        save({}, None)
    model.eval()
    metric = next(r["metric"] for r in reversed(records) if r["kind"] == "eval")
    return {"metric": metric, "score": at.best, "updates": at.updates, "epochs": epochs_run,
            "seconds": round(at.seconds, 2),
            "sentences_per_second": round(sentences / max(1e-9, time.monotonic() - started), 1)}


def _part(tensors: dict, prefix: str) -> dict:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _record(keep, where: dict, at: Position, lr: float, sums: dict, n: int) -> None:
    """Keep the mean of each loss term over the last n updates."""
    means = {key: float(value) / n for key, value in sums.items()}
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(
            f"the loss is {means['loss']} after {at.updates} updates; lower the learning rate of "
            "this stage or set opt_policy: float32, then run again: it resumes before this point"
        )
    keep({"kind": "train", **where, "epoch": at.epoch + 1, "update": at.updates, "lr": lr, **means})
