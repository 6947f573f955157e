"""What distillation trains on and is judged by: batches of the transfer set with what the teacher says of them."""

import itertools

import numpy as np
import torch

from xdistil import data, grouping, losses, models, processes, students, wordwise
from xdistil.checkpoints import checkpoint_bytes
from xdistil.devices import asking
from xdistil.ensemble import hash_weights
from xdistil.frozen import FrozenStates
from xdistil.inputs import Inputs
from xdistil.params import Params, ParamsError, fingerprint
from xdistil.provenance import teacher_dir
from xdistil.runs import Run
from xdistil.targets import TargetSpec, TargetStore
from xdistil.training import Feed, to_device


def layer_pairs(params: Params, teacher_config, student_config):
    """Pairs (student, teacher) of hidden states 0..L and of attention layers 1..L that are distilled, weights of their
    loss terms by name, and the teacher outputs that these need. Raises ParamsError, or CheckpointError for the map."""
    pairs = students.spread(student_config.num_hidden_layers, teacher_config.num_hidden_layers, params.layer_map)
    factors = params.layer_weights or [1.0] * len(pairs)
    hidden = (pairs if params.distil_multi_hidden_states else pairs[-1:]) if params.hidden_weight else []
    attention = [pair for pair in pairs if min(pair) > 0] if params.distil_attention else []
    if len(factors) != len(pairs):
        raise ParamsError(f"layer_weights: found {len(factors)}, but the layer map has {len(pairs)} pairs (student, "
                          f"teacher), {pairs}; give a weight for each")
    if params.distil_attention and not attention:
        raise ParamsError(f"layer_map: {pairs} pairs no layers above the embeddings, so no attention can be "
                          "distilled; add such a pair, or set distil_attention: false")
    weights = {f"{kind}_{s}": weight * factor for (s, _), factor in zip(pairs, factors, strict=True)
               for kind, weight in (("hidden", params.hidden_weight), ("attention", params.attention_weight))}
    kind = "qkv" if params.attention_loss == "relation" else "attention"
    spec = TargetSpec(tuple(t for _, t in hidden), **{kind: tuple(t for _, t in attention)})
    return hidden, attention, weights, spec


def transfer(params: Params, run: Run, inputs: Inputs, student, load_teacher, spec: TargetSpec, accelerator):
    """The store of teacher outputs, a feed over the transfer windows that train, chunk by chunk, a function to the
    batches of those held out, and which train. Batches hold what teacher and frozen layers of the student say."""
    (_, examples), config = inputs.read("transfer"), models.load_config(teacher_dir(params, run), "teacher_model_dir")
    cut = params.pick("distil_chunk_size", "holdout_ratio", "seed")
    held_out, chunks = data.split_transfer(len(examples), *cut.values())
    key = fingerprint([run.stage("teacher").fingerprint, hash_weights(params.more_teachers), examples.digest, cut,
                       params.opt_policy, params.student_tokenizer])  # own: zeros but at first sub-words
    store = TargetStore(lambda: inputs.with_others(load_teacher(), accelerator), config, spec, examples, inputs.pad_id,
                        accelerator, folder=run.origin.dir / "targets" / key, mode=params.targets_cache,
                        n_passes=params.distil_epochs, budget_bytes=params.targets_cache_gb * 1e9,
                        room=lambda: run.room - checkpoint_bytes(student, params.keep_checkpoints))
    size, windows = params.student_distil_batch_size, np.concatenate(chunks)
    through = from_frozen(params, student, examples, inputs.pad_id, accelerator)

    def batches(pass_number: int, chunk: int):
        return store.batches(f"chunk-{chunk}", chunks[chunk], size, params.seed + 7919 * pass_number + 104729 * chunk)

    held_out_batches = through(held_out, lambda *_: store.batches("held-out", held_out, size))
    return store, Feed(through(windows, batches), len(windows), len(chunks)), held_out_batches, windows


def from_frozen(params: Params, student, examples, pad_id: int, accelerator):
    """A `through` whose batches carry what the student's frozen layers say, computed once per unfreezing step."""
    def through(windows, batches):
        kept = FrozenStates(student, examples, windows, pad_id, accelerator, params.targets_cache_gb * 1e9)
        return lambda *place: kept.feed(batches(*place))

    return through


def labelled_feed(params: Params, model, inputs: Inputs, batch_size: int, accelerator, name: str = "train") -> Feed:
    """Train or dev in batches, with what the model's frozen layers say."""
    examples = inputs.read(name)[1]
    shapes = grouping.grid(examples.lengths, batch_size, grouping.shapes_for(accelerator))
    windows = np.arange(len(examples))

    def batches(pass_number: int, _chunk: int):
        for rows, width in grouping.batches(examples.lengths, shapes, params.seed + 7919 * pass_number):
            yield wordwise.count_own(examples, windows, rows, width, inputs.pad_id)

    through = from_frozen(params, model, examples, inputs.pad_id, accelerator)
    return Feed(through(windows, batches), len(examples))


def with_labelled(batches, labelled: Feed):
    """`batches`, each with one of `labelled` beside it under names that start with "labelled_". Which one follows from
    pass and chunk alone, so that a resumed stage sees the same."""
    def joined(pass_number: int = 0, chunk: int = 0):
        passes = itertools.count(pass_number * 1009 + chunk, 1000003)
        others = itertools.chain.from_iterable(labelled.batches(number, 0) for number in passes)
        for batch, other in zip(batches(pass_number, chunk), others, strict=False):
            yield batch | {f"labelled_{name}": values for name, values in other.items()}

    return joined


def held_out_loss(terms, held_out, weights: dict[str, float], accelerator):
    """An `evaluate` for `fit`: the weighted sum of the loss terms over the held-out windows."""

    def judge(model):
        model.eval()
        means, n = {}, 0
        for batch in held_out():
            size, batch = int(batch.get("of", len(batch["windows"]))), to_device(batch, accelerator.device)
            with asking(accelerator.device), accelerator.autocast(), processes.sharing(losses.shared_out):
                found = terms(model, batch)
            n += size
            found = dict(zip(found, processes.mean(torch.stack([*found.values()])), strict=True))
            for name, value in found.items():
                means[name] = means.get(name, 0.0) + (float(value) - means.get(name, 0.0)) * size / n
        total = sum(weights.get(name, 1.0) * mean for name, mean in means.items())
        return {"metric": "held-out loss", "score": total, **{f"held_out_{name}": x for name, x in means.items()}}

    return judge
