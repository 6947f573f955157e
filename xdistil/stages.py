"""The spine: seven calls, in order, each reading and writing folders of a run.

A finished stage whose parameters, data and upstream stages are unchanged is loaded, not repeated; an
interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import time

import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import nn

from xdistil import alignment, data, embeddings, evaluate, losses, models, students
from xdistil.devices import open_accelerator
from xdistil.files import save_atomic, save_json
from xdistil.inputs import Inputs, depends, given_teacher, task_file, teacher_dir, teacher_source
from xdistil.params import RANDOM_TEACHER, Params, fingerprint
from xdistil.runs import STAGES, Run, Stage, describe_changes
from xdistil.targets import TargetSpec, TargetStore
from xdistil.training import Feed, Recipe, fit
from xdistil.unfreeze import layer_groups, unfreezing_steps, word_embedding


def _stage(name: str):
    """Make a stage of its work: check what is before it, begin, work, write metrics and done mark."""

    def wrap(work):
        @functools.wraps(work)
        def call(params: Params, run: Run) -> Stage:
            for earlier in list(STAGES)[: list(STAGES).index(name)]:
                found, wanted = run.stage(earlier).done, depends(params, run, earlier)
                if found != wanted:
                    why = describe_changes(found, wanted) if found else "it has not finished"
                    raise RuntimeError(f"{name} needs stage {earlier}: {why}; run {STAGES[earlier]} first")
            stage = run.stage(name)
            if stage.begin(depends(params, run, name)):
                save_json(run.dir / "params.json", params.model_dump())
                start = time.monotonic()
                set_seed(params.seed)
                metrics = work(params, run, stage)
                seconds = round(time.monotonic() - start, 2)
                stage.finish(metrics | {"stage_seconds": seconds, "peak_memory_mb": _peak_memory_mb()})
                stage.say(f"finished in {seconds} s")
            return stage

        return call

    return wrap


def _peak_memory_mb() -> float | None:
    """Peak resident memory of this process so far, in megabytes (1e6 bytes)."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


def _recipe(params: Params, epochs: int, lr: float) -> Recipe:
    return Recipe(epochs, lr, params.patience, params.warmup_ratio, params.lr_schedule, params.weight_decay,
                  params.max_grad_norm)


def _label_terms(model, batch):
    return {"labels": losses.tag_loss(models.run_model(model, batch)[0], batch["labels"])}


@_stage("teacher")
def finetune_teacher(params: Params, run: Run, stage: Stage):
    """1. Fine-tune the teacher on labels; or score the one in teacher_model_dir, which stays as it is."""
    accelerator, folder = open_accelerator(params.device, params.opt_policy), teacher_dir(params, run)
    if given_teacher(params, run):
        stage.say(f"fine-tuning skipped: {folder} holds a fine-tuned teacher")
        inputs = Inputs(params, run)
        teacher = models.load_classifier(folder, inputs.labels, "teacher_model_dir").to(accelerator.device)
        return {"dev": inputs.score(teacher, "dev", accelerator)[0], **models.size_of(teacher)}
    checkpoint = params.pt_teacher_checkpoint
    if checkpoint == RANDOM_TEACHER:
        labels = data.read_labels(task_file(params, run, "labels"))
        sentences = data.read_tagged(task_file(params, run, "train"), labels).words
        words = {word for sentence in sentences for word in sentence}
        checkpoint = models.random_teacher(words, labels, stage.dir / "untrained")
    inputs = Inputs(params, run, str(checkpoint))
    teacher = models.load_classifier(checkpoint, inputs.labels, "pt_teacher_checkpoint")
    summary = fit(
        teacher, _label_terms, inputs.labelled(params.teacher_batch_size), inputs.dev_f1(accelerator),
        _recipe(params, params.teacher_epochs or params.ft_epochs, params.teacher_lr),
        [("all", [n for n, _ in teacher.named_parameters()])],
        accelerator=accelerator, folder=stage.dir, name=stage.name)
    models.save_model(teacher, inputs.tokenizer, folder)
    save_json(folder / "xdistil.json", {"fine-tuned by": "xdistil", "params": params.model_dump()})
    return {"dev": inputs.score(teacher, "dev", accelerator)[0], **models.size_of(teacher), **summary}


def read_configs(params: Params, run: Run, checkpoint: str | None = None, parameter="teacher_model_dir"):
    """Teacher and student config, no weights. Raises CheckpointError if they cannot work together."""
    teacher = models.load_config(checkpoint or teacher_dir(params, run), parameter)
    family = (params.pt_teacher or "").removeprefix("TF").removesuffix("Model").lower()
    if family not in ("", teacher.model_type.replace("-", "").replace("_", "")):
        raise models.CheckpointError(f"pt_teacher: {params.pt_teacher!r}, but {parameter} is a "
                                     f"{teacher.model_type!r} model; name its class or leave pt_teacher out")
    sizes = params.pick("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    student = students.student_config(teacher, params.initialisation, params.pt_student_checkpoint, **sizes)
    students.check_shapes(teacher, student, seq_len=params.seq_len, init=params.initialisation,
                          compress=params.compress_word_embedding, distil_attention=params.distil_attention)
    return teacher, student


def check_models(params: Params, run: Run) -> None:
    """`read_configs` before anything runs. Raises CheckpointError naming the parameter and the remedy."""
    checkpoint, parameter = teacher_source(params, run)
    if checkpoint != RANDOM_TEACHER:
        read_configs(params, run, checkpoint, parameter)


@_stage("student-init")
def build_student(params: Params, run: Run, stage: Stage):
    """2. Build the student on the teacher's vocabulary; compress, map or copy its word embeddings."""
    inputs, (_, config) = Inputs(params, run), read_configs(params, run)
    teacher = _load_teacher(params, run, inputs)
    student, done = students.build_student(
        config, teacher, params.initialisation, params.pt_student_checkpoint, inputs.labels, inputs.tokenizer,
        params.compress_word_embedding)
    models.save_model(student, inputs.tokenizer, stage.dir)
    inputs.tokenizer.save_pretrained(run.dir / "tokenizer")
    _, spectrum = embeddings.compress(word_embedding(teacher), 1)
    return {**done, **models.size_of(student), "teacher": models.size_of(teacher),
            "rank": student.config.hidden_size, "singular_values": [round(x, 4) for x in spectrum.tolist()]}


def _load_student(run: Run, name: str, inputs: Inputs):
    return models.load_classifier(run.stage(name).dir, inputs.labels, "model_dir")


def _load_teacher(params: Params, run: Run, inputs: Inputs):
    return models.load_classifier(teacher_dir(params, run), inputs.labels, "teacher_model_dir").eval()


def layer_pairs(params: Params, teacher_config, student_config):
    """Pairs (student, teacher) of hidden states 0..L and of attention layers 1..L that are distilled."""
    pairs = students.spread(student_config.num_hidden_layers, teacher_config.num_hidden_layers, params.layer_map)
    return (pairs if params.distil_multi_hidden_states else pairs[-1:],
            pairs[1:] if params.distil_attention else [])


def _frozen_words(params: Params, student) -> frozenset[str]:
    names = (n for n, p in student.named_parameters() if p is word_embedding(student))
    return frozenset(names if params.freeze_word_embedding else ())


def _transfer(params: Params, run: Run, inputs: Inputs, teacher, spec: TargetSpec, accelerator):
    """The store of teacher outputs, a feed over the chunks, and a function to the held-out batches."""
    _, examples = inputs.read("transfer")
    held_out, chunks = data.split_transfer(
        len(examples), params.distil_chunk_size, params.holdout_ratio, params.seed)
    key = fingerprint([run.stage("teacher").fingerprint, depends(params, run, "logits")["transfer file"],
                       params.pick("seed", "opt_policy", "seq_len", "transfer_limit", "distil_chunk_size",
                                   "holdout_ratio")])
    size = params.student_distil_batch_size
    store = TargetStore(teacher, spec, examples, inputs.pad_id, accelerator, size,
                        params.targets_cache_gb * 1e9, run.dir / "targets" / key)

    def batches(pass_number: int, chunk: int):
        seed = params.seed + 7919 * pass_number + 104729 * chunk
        return store.batches(f"chunk-{chunk}", chunks[chunk], size, seed)

    return store, Feed(batches, sum(map(len, chunks)), len(chunks)), (
        lambda: store.batches("held-out", held_out, size))


def _held_out_loss(terms, held_out, weights: dict[str, float], accelerator):
    """An `evaluate` for `fit`: the weighted sum of the loss terms over the held-out windows."""

    def judge(model):
        model.eval()
        sums, n = {}, 0
        for batch in held_out():
            batch = {name: tensor.to(accelerator.device) for name, tensor in batch.items()}
            with torch.inference_mode(), accelerator.autocast():
                found = terms(model, batch)
            n += len(batch["input_ids"])
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch["input_ids"])
        total = sum(weights.get(name.split("_")[0], 1.0) * value / n for name, value in sums.items())
        return {"metric": "held-out loss", "score": total,
                **{f"held_out_{name}": value / n for name, value in sums.items()}}

    return judge


@_stage("hidden")
def distil_hidden(params: Params, run: Run, stage: Stage):
    """3. Stage 1: hidden states and attention on the transfer set; then fold the head."""
    accelerator, inputs = open_accelerator(params.device, params.opt_policy), Inputs(params, run)
    teacher = _load_teacher(params, run, inputs).to(accelerator.device)
    student = _load_student(run, "student-init", inputs).to(accelerator.device)
    hidden, maps = layer_pairs(params, teacher.config, student.config)
    for model in (teacher, student) if maps else ():
        model.set_attn_implementation("eager")  # the only one that returns maps
    models.set_dropout(student, hidden=params.dropout, attention=0.0)
    projections = students.make_projections(hidden, student.config.hidden_size, teacher.config.hidden_size)
    both = nn.ModuleDict({"student": student, "projections": projections.to(accelerator.device)})
    spec = TargetSpec(tuple(t for _, t in hidden), tuple(t for _, t in maps))
    store, feed, held_out = _transfer(params, run, inputs, teacher, spec, accelerator)
    terms = students.distil_terms(hidden, maps, params.hidden_loss, params.attention_loss)
    weights = {"hidden": params.hidden_weight, "attention": params.attention_weight}
    fixed = {f"student.{n}" for n in (*dict(layer_groups(student))["head"], *_frozen_words(params, student))}
    measure = functools.partial(
        alignment.measure_alignment, teacher, student, projections, inputs.read("dev")[1], inputs.pad_id,
        accelerator.device, hidden_pairs=hidden, attention_pairs=maps)
    before = measure()
    summary = fit(
        both, terms, feed, _held_out_loss(terms, held_out, weights, accelerator),
        _recipe(params, params.distil_epochs, params.distil_lr),
        [("all", [n for n, _ in both.named_parameters() if n not in fixed])],
        accelerator=accelerator, folder=stage.dir, name=stage.name, weights=weights)
    top = str(hidden[-1][0])
    students.fold_head(student, teacher, projections[top] if top in projections else None)
    models.save_model(student, inputs.tokenizer, stage.dir)
    save_atomic(stage.dir / "projections.safetensors", lambda path: save_file(
        {name: weight.contiguous().cpu() for name, weight in projections.state_dict().items()}, path))
    store.drop("hidden", "attention")
    return {"dev": inputs.score(student, "dev", accelerator)[0], **summary,
            "alignment_before": before, "alignment_after": measure()}


@_stage("logits")
def distil_logits(params: Params, run: Run, stage: Stage):
    """4. Stage 2: the teacher's logits on the transfer set, with gradual unfreezing."""
    accelerator, inputs = open_accelerator(params.device, params.opt_policy), Inputs(params, run)
    teacher = _load_teacher(params, run, inputs).to(accelerator.device)
    _, feed, held_out = _transfer(params, run, inputs, teacher, TargetSpec(), accelerator)

    def terms(model, batch):
        pair = models.run_model(model, batch)[0], batch["teacher_logits"], batch["attention_mask"]
        return {"logits": losses.logit_mse(*pair) if params.logit_loss == "mse"
                else losses.logit_kl(*pair, params.temperature)}

    return _train_downwards(
        params, run, stage, inputs, accelerator, "hidden", terms, feed,
        _held_out_loss(terms, held_out, {}, accelerator), _recipe(params, params.distil_epochs, params.logit_lr))


@_stage("labels")
def finetune_student(params: Params, run: Run, stage: Stage):
    """5. Stage 3: cross-entropy on labels, with gradual unfreezing; dev F1 selects."""
    accelerator, inputs = open_accelerator(params.device, params.opt_policy), Inputs(params, run)
    return _train_downwards(
        params, run, stage, inputs, accelerator, "logits", _label_terms,
        inputs.labelled(params.student_ft_batch_size), inputs.dev_f1(accelerator),
        _recipe(params, params.ft_epochs, params.ft_lr))


def _train_downwards(params, run, stage, inputs, accelerator, source: str, terms, feed, judge, recipe):
    """What stages 2 and 3 share: load, unfreeze from top to bottom while training, save, score on dev."""
    student = _load_student(run, source, inputs).to(accelerator.device)
    models.set_dropout(student, hidden=params.dropout, attention=params.dropout)
    steps = unfreezing_steps(layer_groups(student), params.unfreeze, _frozen_words(params, student))
    summary = fit(student, terms, feed, judge, recipe, steps, accelerator=accelerator, folder=stage.dir,
                  name=stage.name)
    models.save_model(student, inputs.tokenizer, stage.dir)
    return {"dev": inputs.score(student, "dev", accelerator)[0], **summary}


@_stage("evaluation")
def evaluate_student(params: Params, run: Run, stage: Stage):
    """6. Teacher and student on dev and, for the first and only time, on test; size, speed, likeness."""
    accelerator, inputs = open_accelerator(params.device, params.opt_policy), Inputs(params, run)
    pair = {"teacher": _load_teacher(params, run, inputs), "student": _load_student(run, "labels", inputs)}
    (gold, test), metrics = inputs.read("test"), {}
    for name, model in pair.items():
        model.to(accelerator.device)
        scores, tags = inputs.score(model, "test", accelerator)
        metrics[name] = {
            "test": scores, "dev": inputs.score(model, "dev", accelerator)[0], **models.size_of(model),
            **evaluate.measure_speed(model, test, inputs.pad_id, accelerator)}
        metrics[name]["mb"] = metrics[name]["parameters"] * 4 / 1e6
    data.write_tagged(stage.dir / "predictions.tsv", gold, tags)  # the student's: it comes second
    metrics["retention"] = evaluate.retention(metrics["student"]["test"], metrics["teacher"]["test"])
    metrics["cka"] = alignment.measure_alignment(
        *pair.values(), {}, inputs.read("dev")[1], inputs.pad_id, accelerator.device)["cka"]
    return metrics


@_stage("student")
def export_student(params: Params, run: Run, stage: Stage):
    """7. The student as a plain Hugging Face folder with a model card, loaded again and compared."""
    from transformers import AutoModelForTokenClassification

    accelerator, inputs = open_accelerator(params.device, params.opt_policy), Inputs(params, run)
    student = _load_student(run, "labels", inputs)
    inputs.tokenizer.model_max_length = params.seq_len  # positions past it were never trained
    models.save_model(student, inputs.tokenizer, stage.dir)
    again = AutoModelForTokenClassification.from_pretrained(stage.dir)
    tags = [inputs.score(model.to(accelerator.device), "dev", accelerator)[1] for model in (student, again)]
    if tags[0] != tags[1]:
        raise RuntimeError(f"{stage.dir} does not reproduce the student's predictions on dev")
    card = MODEL_CARD.format(
        parameters=f"{models.size_of(student)['parameters']:,}", labels=", ".join(inputs.labels),
        seq_len=params.seq_len, teacher=params.pt_teacher_checkpoint.split("/")[-1],
        retention=f"{run.stage('evaluation').metrics['retention']['macro'] or 0:.1%}",
        f1=f"{run.stage('evaluation').metrics['student']['test']['macro']:.4f}")
    save_atomic(stage.dir / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
    return {"same_predictions": True, "dev_words": sum(map(len, tags[0]))}


MODEL_CARD = """---
pipeline_tag: token-classification
library_name: transformers
tags: [distillation, xdistil]
---
# Distilled token classifier

{parameters} parameters, distilled with xdistil from a fine-tuned {teacher}. Strict entity F1 on the task's
test set, mean over languages: {f1}, {retention} of the teacher's. Labels: {labels}.

    from transformers import pipeline
    tag = pipeline("token-classification", model="FOLDER", aggregation_strategy="first")

It was trained on windows of {seq_len} sub-words: for longer text pass `stride` to the pipeline, or use
`xdistil predict FOLDER INPUT`.
"""
