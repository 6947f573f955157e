"""The loop: one `fit` for every stage. It knows no NER, no teacher and no Params."""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from xdistil import processes
from xdistil.checkpoints import load_checkpoint, part, save_checkpoint
from xdistil.files import save_atomic, save_text
from xdistil.losses import shared_out
from xdistil.unfreeze import freeze_to, learning_mode

SEVERAL = 5  # updates with a loss that is not finite, between two records, end training
RECORD_EVERY = 20  # optimizer updates between two training records of history.jsonl


@dataclass(frozen=True)
class Recipe:
    """How to optimise: plain numbers, meanings and units as in `Params`."""

    epochs: int
    lr: float
    patience: int = 3
    warmup_ratio: float = 0.1
    lr_schedule: str = "linear"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


@dataclass(frozen=True)
class Feed:
    """What to train on: `batches(pass_number, chunk)` yields dicts of tensors, `input_ids` among them."""

    batches: Callable[[int, int], Iterable[dict]]
    n_windows: int
    n_chunks: int = 1


class _Terms(nn.Module):
    """A model and its loss terms as one module, which processes can run side by side."""

    def __init__(self, model, terms):
        super().__init__()
        self.model, self.terms = model, terms

    def forward(self, batch):
        return self.terms(self.model, batch)


class Stopped(KeyboardInterrupt):
    """Training was asked to stop and did so at a checkpoint: the same call goes on from there."""

    def _render_traceback_(self):  # IPython's: no traceback, as nothing went wrong
        return [str(self)]


def lr_factor(progress: float, warmup_ratio: float, schedule: str) -> float:
    """The learning rate as a share of its peak, at `progress` 0..1 of a step."""
    if progress < warmup_ratio:
        return progress / warmup_ratio
    rest = (progress - warmup_ratio) / (1 - warmup_ratio)
    return {"linear": 1 - rest, "cosine": (1 + math.cos(math.pi * rest)) / 2, "constant": 1.0}[schedule]


def make_optimizer(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what learns; biases and norms are not decayed."""
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learning if p.ndim > 1], "weight_decay": weight_decay},
              {"params": [p for p in learning if p.ndim <= 1], "weight_decay": 0.0}]
    fused = all(p.device.type in ("cpu", "cuda") for p in learning)  # one kernel instead of a dozen
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, fused=fused)


def to_device(batch: dict[str, torch.Tensor], device) -> dict[str, torch.Tensor]:
    """A batch on the device; to a GPU from pinned memory, so that the copy overlaps with its work."""
    if device.type == "cuda":
        return {name: x if x.is_cuda else x.pin_memory().to(device, non_blocking=True) for name, x in batch.items()}
    return {name: x.to(device) for name, x in batch.items()}


def step_unless_infinite(optimizer, norm: torch.Tensor, scaler) -> torch.Tensor:
    """An update, unless the norm of its gradients is not finite; 1 if there was none, else 0, and no wait for the
    device: a fused optimizer is told as the scaler tells it in float16. Where there is none (XLA, MPS) it is made."""
    fused = optimizer.optimizer.defaults["fused"]
    skipped = (~torch.isfinite(norm)).float() if fused else torch.zeros_like(norm)
    if fused and scaler is None:
        optimizer.optimizer.found_inf = skipped
    optimizer.step()
    optimizer.zero_grad()
    if norm.device.type == "xla":
        import torch_xla

        torch_xla.sync()  # one graph a step; else it grows until somebody looks at a number
    return skipped


def fit(model: nn.Module, terms: Callable[[nn.Module, dict], dict[str, torch.Tensor]], feed: Feed,
        evaluate: Callable[[nn.Module], dict], recipe: Recipe, steps: list[tuple[str, list[str]]], *,
        accelerator, folder: Path, name: str = "training", weights: dict[str, float] | None = None,
        watch: Callable[[list[dict], float], bool] = lambda records, done: False, keep: int = 1) -> dict:
    """Train through unfreezing steps, each with a fresh optimizer and ending with the best weights it saw. Returns
    metric, score, updates, epochs, windows, seconds, windows_per_second. FloatingPointError: the loss is not finite.
    Stopped: `watch` asked for it.
    Args:
        terms: the loss terms of a batch, unweighted scalars by name; their weighted sum is the loss. Of several
            processes each is given its part of a batch, `of` windows in all, see `processes`.
        evaluate: returns `metric` (a name) and `score`; lower is better where the name ends in "loss". The weights
            before a step are a candidate too, so no step makes the model worse.
        steps: (name, names of the parameters that learn), see `unfreeze.unfreezing_steps`.
        folder: gets history.jsonl and checkpoint.safetensors; an interrupted call goes on from there and ends with
            the numbers of an uninterrupted one (CPU, float32).
        weights: of the terms, by name; 1 for all others.
        watch: called after each update with the records so far and the share (0..1) of the step that is done; True
            stops at the next checkpoint, at most RECORD_EVERY updates away.
        keep: checkpoints that are kept."""
    path, started = folder / "checkpoint.safetensors", time.monotonic()
    (at, tensors), current = load_checkpoint(path), dict(model.named_parameters())
    records, before = at.records, at.seconds
    if at.scaler and accelerator.scaler:
        accelerator.scaler.load_state_dict(at.scaler)
    ever = {n: current[n] for _, members in steps for n in members}
    model.load_state_dict(part(tensors, "weights/"), strict=False)
    if tensors:
        print(f"[{name}] resumes at step {at.step + 1}/{len(steps)}, epoch {at.epoch + 1}, chunk "
              f"{at.chunk + 1}/{feed.n_chunks}", flush=True)
    recent = []

    def save(best, optimizer=None):
        at.seconds = before + time.monotonic() - started
        at.scaler = accelerator.scaler and accelerator.scaler.state_dict()
        save_text(folder / "history.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        save_checkpoint(path, at, ever, best, optimizer, keep)

    def judge(epoch: int) -> bool:
        result = evaluate(model)
        score, lower = result["score"], result["metric"].endswith("loss")
        ahead = at.best is None or (score < at.best if lower else score > at.best)
        at.best = score if ahead else at.best
        records.append({"kind": "eval", **where, "epoch": epoch, "update": at.updates, "best": ahead, **result})
        return ahead

    def record():  # losses stay on the device until here, so that no step waits for it
        names = list(recent[0][0])
        values = processes.mean(torch.stack([torch.stack(list(found.values())) for found, _ in recent])).cpu()
        finite, skipped = values[:, 0].isfinite(), int(values[:, -1].sum())
        if (~finite).sum() > SEVERAL or not finite.any():
            which = {name: tensor.cpu() for name, tensor in recent[int(finite.int().argmin())][1].items()}
            path = save_atomic(folder / "not_finite.safetensors", lambda path: save_file(which, path))
            raise FloatingPointError(
                f"the loss was not finite in {int((~finite).sum())} of the last {len(recent)} of {at.updates:,} "
                f"updates, which were left out; the first such batch is in {path}. Lower this stage's learning rate "
                "or set opt_policy: float32")
        means = dict(zip(names[:-1], values[finite][:, :-1].mean(0).tolist(), strict=True))
        records.append({"kind": "train", **where, "epoch": at.epoch + 1, "update": at.updates,
                        "lr": optimizer.param_groups[0]["lr"], **means, **({"skipped": skipped} if skipped else {})})
        recent.clear()

    def look():  # what is between two records is in no checkpoint
        asked = watch(records, min(1.0, (at.epoch + at.seen / feed.n_windows) / recipe.epochs))
        if not recent and processes.agree(lambda: asked):
            save(best, optimizer)
            raise Stopped(f"[{name}] stopped at a checkpoint after {at.updates:,} updates; the same call goes on from "
                          "there")

    for step in range(at.step, len(steps)):
        where = {"step": step + 1, "step_name": steps[step][0]}
        freeze_to(model, steps[step][1])
        members = {n: current[n] for n in steps[step][1]}
        optimizer = accelerator.prepare(make_optimizer(model, recipe.lr, recipe.weight_decay))
        if tensors:
            moments = {i: part(tensors, f"optimizer/{i}/") for i in range(len(members))}
            optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
            for device, restore in (("cpu", torch.set_rng_state), ("cuda", torch.cuda.set_rng_state)):
                if (state := tensors.get(f"random/{device}/{processes.rank()}")) is not None:
                    restore(state)
        together = processes.side_by_side(_Terms(model, terms), accelerator.device)
        best = part(tensors, "best/") or {n: p.detach().cpu().clone() for n, p in members.items()}
        tensors = {}
        if at.best is None:
            judge(0)
        while at.epoch < recipe.epochs and at.bad_epochs < recipe.patience:
            learning_mode(model)
            for chunk in range(at.chunk, feed.n_chunks):
                batches = feed.batches(step * recipe.epochs + at.epoch, chunk)
                for batch in itertools.islice(batches, at.batch, None):
                    size = int(batch.get("of", len(batch["input_ids"])))
                    batch = to_device(batch, accelerator.device)
                    at.seen, at.windows, at.updates = at.seen + size, at.windows + size, at.updates + 1
                    at.batch += 1
                    done = (at.epoch + at.seen / feed.n_windows) / recipe.epochs
                    for group in optimizer.param_groups:
                        group["lr"] = recipe.lr * lr_factor(min(done, 1), recipe.warmup_ratio, recipe.lr_schedule)
                    with accelerator.autocast(), processes.sharing(shared_out):
                        found = together(batch)
                    loss = sum((weights or {}).get(key, 1.0) * value for key, value in found.items())
                    accelerator.backward(loss)
                    norm = accelerator.clip_grad_norm_(members.values(), recipe.max_grad_norm)
                    skipped = step_unless_infinite(optimizer, norm, accelerator.scaler)
                    losses = {"loss": loss, **found, "skipped": skipped}
                    recent.append(({key: value.detach() for key, value in losses.items()},
                                   {key: batch[key] for key in ("windows", "input_ids") if key in batch}))
                    if len(recent) == RECORD_EVERY:
                        record()
                    look()
                if recent:
                    record()
                at.chunk, at.batch = chunk + 1, 0
                if at.chunk < feed.n_chunks:
                    save(best, optimizer)
                    look()
            ahead = judge(at.epoch + 1)
            if ahead:
                best = {n: p.detach().cpu().clone() for n, p in members.items()}
            at.bad_epochs = 0 if ahead else at.bad_epochs + 1
            at.epoch, at.chunk, at.seen, at.epochs_run = at.epoch + 1, 0, 0, at.epochs_run + 1
            print(f"[{name}] {where['step_name']}: epoch {at.epoch}/{recipe.epochs}, {records[-1]['metric']} "
                  f"{records[-1]['score']:.4f}{' (best)' if ahead else ''}", flush=True)
            save(best, optimizer)
            look()
        model.load_state_dict(best, strict=False)
        at.step, at.epoch, at.bad_epochs = step + 1, 0, 0
        save({})
    model.eval()
    return {"metric": records[-1]["metric"], "score": at.best, "updates": at.updates, "epochs": at.epochs_run,
            "windows": at.windows, "seconds": round(at.seconds, 2),
            "windows_per_second": round(at.windows / at.seconds, 1)}
