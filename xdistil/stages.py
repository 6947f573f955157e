"""The spine: seven calls, in order, each reading and writing folders of a run.

A finished stage whose parameters, data and upstream stages are unchanged is loaded, not repeated;
an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import time

import torch
from safetensors.torch import save_file
from torch import nn

from xdistil import alignment, data, devices, embeddings, evaluate, losses, models, students
from xdistil.files import save_atomic
from xdistil.inputs import (  # noqa: F401 - describe and lengths are for notebooks
    Inputs, depends, describe, given_teacher, lengths, task_file, teacher_dir,
)
from xdistil.params import RANDOM_TEACHER, Params, fingerprint
from xdistil.runs import STAGES, Run, Stage, describe_changes
from xdistil.tables import Table
from xdistil.targets import TargetSpec, TargetStore, teacher_outputs
from xdistil.training import Feed, Recipe, fit
from xdistil.unfreeze import layer_groups, unfreezing_steps, word_embedding

def _stage(name: str):
    """A stage function: checks what is before it, begins, works, writes metrics and done mark."""

    def wrap(work):
        @functools.wraps(work)
        def call(params: Params, run: Run) -> Stage:
            before = list(STAGES)[: list(STAGES).index(name)]
            for earlier in before:
                found, wanted = run.stage(earlier).done, depends(params, run, earlier)
                if found != wanted:
                    why = describe_changes(found, wanted) if found else "it has not finished"
                    raise RuntimeError(
                        f"{name} needs stage {earlier}: {why}; run {STAGES[earlier]} first"
                    )
            stage, wanted = run.stage(name), depends(params, run, name)
            if stage.begin(wanted):
                run.save_params()
                start = time.monotonic()
                devices.seed_everything(params.seed)
                metrics = work(params, run, stage)
                metrics["stage_seconds"] = round(time.monotonic() - start, 2)
                metrics["peak_memory_mb"] = round(devices.peak_memory_mb(), 1)
                stage.finish(metrics)
                stage.say(f"finished in {metrics['stage_seconds']} s")
            return stage

        return call

    return wrap


def _recipe(params: Params, epochs: int, lr: float) -> Recipe:
    rest = params.pick("patience", "warmup_ratio", "lr_schedule", "weight_decay", "max_grad_norm",
                       "seed")
    return Recipe(epochs=epochs, lr=lr, **rest)


def _label_terms(model, batch):
    return {"labels": losses.tag_loss(models.run_model(model, batch)[0], batch["labels"])}


@_stage("teacher")
def finetune_teacher(params: Params, run: Run, stage: Stage):
    """1. Fine-tune the teacher on labels; or score the one in teacher_model_dir, untouched."""
    accelerator = devices.open_accelerator(params.device, params.opt_policy)
    folder = teacher_dir(params, run)
    if given_teacher(params, run):
        inputs = Inputs(params, run)
        teacher = models.load_encoder(str(folder), inputs.labels, "teacher_model_dir")
        stage.say(f"fine-tuning skipped: {folder} holds a fine-tuned teacher")
        scores, _ = inputs.score(teacher.to(accelerator.device), "dev", accelerator)
        return {"dev": scores, "fine_tuned": False, **models.size_of(teacher)}
    checkpoint = params.pt_teacher_checkpoint
    if checkpoint == RANDOM_TEACHER:
        labels = data.read_labels(task_file(params, run, "labels"))
        words = data.read_tagged(task_file(params, run, "train"), labels).words
        words = {word for sentence in words for word in sentence}
        checkpoint = models.random_teacher(words, labels, stage.dir / "untrained")
    models.check_family(params.pt_teacher, models.load_config(str(checkpoint)))
    inputs = Inputs(params, run, tokenizer_from=checkpoint)
    teacher = models.load_encoder(str(checkpoint), inputs.labels, "pt_teacher_checkpoint")
    names = [n for n, _ in teacher.named_parameters()]
    summary = fit(
        teacher, _label_terms, inputs.labelled(params.teacher_batch_size),
        inputs.dev_f1(accelerator),
        _recipe(params, params.teacher_epochs or params.ft_epochs, params.teacher_lr),
        [("all", names)], accelerator=accelerator, folder=stage.dir, name=stage.name,
    )
    models.save_model(teacher, inputs.tokenizer, folder)
    if params.teacher_model_dir:
        save_atomic(folder / "xdistil.json", lambda p: p.write_text('{"written_by": "xdistil"}\n'))
    scores, _ = inputs.score(teacher, "dev", accelerator)
    return {"dev": scores, "fine_tuned": True, **models.size_of(teacher), **summary}


def _configs(params: Params, teacher_checkpoint: str, parameter: str):
    sizes = params.pick("hidden_size", "num_hidden_layers", "num_attention_heads",
                        "intermediate_size")
    teacher = models.load_config(teacher_checkpoint, parameter)
    student = students.student_config(
        teacher, params.initialisation, params.pt_student_checkpoint, sizes
    )
    students.check_shapes(
        teacher, student, seq_len=params.seq_len, init=params.initialisation,
        compressed=params.compress_word_embedding,
        attention_loss=params.attention_loss if params.distil_attention else None,
    )
    return teacher, student


def check_models(params: Params, run: Run) -> None:
    """Read both configs (no weights) and stop if they cannot work together.

    Raises CheckpointError naming the parameter and the remedy."""
    if params.pt_teacher_checkpoint == RANDOM_TEACHER and not params.teacher_model_dir:
        return
    given = given_teacher(params, run)
    checkpoint = str(given.parent) if given else params.pt_teacher_checkpoint
    teacher, _ = _configs(params, checkpoint, "teacher_model_dir" if given else "pt_teacher_checkpoint")
    check = params.pt_teacher if not given else None
    models.check_family(check, teacher)


@_stage("student-init")
def build_student(params: Params, run: Run, stage: Stage):
    """2. Build the student on the teacher's vocabulary; compress or copy its word embeddings."""
    inputs, folder = Inputs(params, run), str(teacher_dir(params, run))
    _, config = _configs(params, folder, "teacher_model_dir")
    teacher = models.load_encoder(folder, inputs.labels, "teacher_model_dir")
    student, own = students.build_student(
        config, teacher, params.initialisation, params.pt_student_checkpoint, inputs.labels,
        inputs.pad_id,
    )
    metrics, words = {}, word_embedding(teacher).detach()
    if params.compress_word_embedding:
        new, metrics = students.compressed_words(
            words, word_embedding(student).detach(), inputs.tokenizer, own,
            params.pt_student_checkpoint,
        )
        with torch.no_grad():
            word_embedding(student).copy_(new)
    elif own is not None:
        students.check_same_vocabulary(inputs.tokenizer, params.pt_student_checkpoint)
    models.save_model(student, inputs.tokenizer, stage.dir)
    inputs.tokenizer.save_pretrained(run.dir / "tokenizer")
    _, spectrum = embeddings.compress(words, 1)
    return {"singular_values": [round(x, 4) for x in spectrum.tolist()],
            "rank": student.config.hidden_size, "teacher": models.size_of(teacher),
            **models.size_of(student), **metrics}


def _load_student(inputs: Inputs, run: Run, name: str):
    return models.load_encoder(str(run.stage(name).dir), inputs.labels, "model_dir")


def _load_teacher(inputs: Inputs, params: Params, run: Run, accelerator, maps: bool = False):
    teacher = models.load_encoder(str(teacher_dir(params, run)), inputs.labels, "teacher_model_dir")
    if maps:
        models.use_attention_maps(teacher)
    return teacher.eval().to(accelerator.device)


def _pairs(params: Params, teacher, student):
    """Hidden-state pairs and attention pairs (student, teacher) of the layer map."""
    every = students.spread(
        student.config.num_hidden_layers, teacher.config.num_hidden_layers, params.layer_map
    )
    hidden = every if params.distil_multi_hidden_states else every[-1:]
    maps = every[1:] if params.distil_attention and params.attention_loss != "relation" else []
    return hidden, maps


def _frozen_words(params: Params, student) -> frozenset[str]:
    """The name of the word embeddings if they must never change."""
    words = word_embedding(student)
    names = [n for n, p in student.named_parameters() if p is words]
    return frozenset(names if params.freeze_word_embedding else ())


def _transfer_feed(params: Params, run: Run, inputs: Inputs, teacher, spec, accelerator):
    """The store of teacher outputs, a Feed over the chunks, and the held-out batches."""
    _, examples = inputs.read("transfer")
    held_out, chunks = data.split_transfer(
        len(examples), params.distil_chunk_size, params.holdout_ratio, params.seed
    )
    key = fingerprint([run.stage("teacher").fingerprint, *params.pick(
        "seed", "opt_policy", "seq_len", "transfer_limit", "distil_chunk_size", "holdout_ratio"
    ).values(), depends(params, run, "hidden")["transfer file"]])
    store = TargetStore(
        teacher_outputs(teacher, spec), spec, teacher.config, examples, inputs.pad_id,
        accelerator=accelerator, batch_size=params.student_distil_batch_size,
        where=params.targets_cache, budget_bytes=params.targets_cache_gb * 1e9,
        folder=run.dir / "targets" / key,
    )
    size = params.student_distil_batch_size

    def batches(pass_number: int, chunk: int):
        seed = params.seed + 7919 * pass_number + chunk
        return store.batches(f"chunk-{chunk}", chunks[chunk], size, seed)

    feed = Feed(batches, sum(map(len, chunks)), len(chunks))
    return store, feed, lambda: store.batches("held-out", held_out, size)


def _held_out_loss(terms, held_out, weights: dict, accelerator):
    """An `evaluate` for `fit`: each term and their weighted sum over the held-out windows."""

    def judge(model):
        model.eval()
        sums, n = {}, 0
        for batch in held_out():
            batch = {k: v.to(accelerator.device) for k, v in batch.items()}
            with torch.inference_mode(), accelerator.autocast():
                found = terms(model, batch)
            for name, value in found.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch["input_ids"])
            n += len(batch["input_ids"])
        means = {f"held_out_{name}": value / n for name, value in sums.items()}
        total = sum(
            weights.get(name.split("_")[0], 1.0) * value / n for name, value in sums.items()
        )
        return {"metric": "held-out loss", "score": total, **means}

    return judge


@_stage("hidden")
def distil_hidden(params: Params, run: Run, stage: Stage):
    """3. Stage 1: hidden states and attention on the transfer set; then fold the head."""
    accelerator = devices.open_accelerator(params.device, params.opt_policy)
    inputs = Inputs(params, run)
    student = _load_student(inputs, run, "student-init").to(accelerator.device)
    teacher = _load_teacher(inputs, params, run, accelerator)
    hidden, maps = _pairs(params, teacher, student)
    relation = params.distil_attention and params.attention_loss == "relation"
    for model in (teacher, student) if maps else ():
        models.use_attention_maps(model)
    models.set_dropout(student, hidden=params.dropout, attention=0.0)
    projections = students.make_projections(
        hidden, student.config.hidden_size, teacher.config.hidden_size
    ).to(accelerator.device)
    spec = TargetSpec(
        tuple(t for _, t in hidden), tuple(t for _, t in maps),
        teacher.config.num_hidden_layers if relation else None,
    )
    store, feed, held_out = _transfer_feed(params, run, inputs, teacher, spec, accelerator)
    terms = students.distil_terms(
        student, hidden, maps, relation, params.hidden_loss, params.attention_loss,
        teacher.config,
    )
    both = nn.ModuleDict({"student": student, "projections": projections})
    frozen = {f"student.{n}" for n in _frozen_words(params, student)}
    frozen |= {f"student.{n}" for n in dict(layer_groups(
        student, student.config.num_hidden_layers))["head"]}
    names = [n for n, _ in both.named_parameters() if n not in frozen]
    sample = dict(hidden_pairs=hidden, attention_pairs=maps, accelerator=accelerator,
                  pad_id=inputs.pad_id, examples=inputs.read("dev")[1])
    before = alignment.measure_alignment(teacher, student, projections, **sample)
    weights = {"hidden": params.hidden_weight, "attention": params.attention_weight}
    summary = fit(
        both, terms, feed, _held_out_loss(terms, held_out, weights, accelerator),
        _recipe(params, params.distil_epochs, params.distil_lr), [("all", names)],
        accelerator=accelerator, folder=stage.dir, name=stage.name, weights=weights,
    )
    after = alignment.measure_alignment(teacher, student, projections, **sample)
    top = str(hidden[-1][0])
    students.fold_head(student, teacher, projections[top] if top in projections else None)
    scores, _ = inputs.score(student, "dev", accelerator)
    models.save_model(student, inputs.tokenizer, stage.dir)
    save_atomic(stage.dir / "projections.safetensors", lambda p: save_file(
        {n: w.contiguous().cpu() for n, w in projections.state_dict().items()}, p))
    store.drop(("hidden", "attention", "relation"))
    return {"dev": scores, "alignment_before": before, "alignment_after": after, **summary}


@_stage("logits")
def distil_logits(params: Params, run: Run, stage: Stage):
    """4. Stage 2: the teacher's logits on the transfer set, with gradual unfreezing."""
    accelerator = devices.open_accelerator(params.device, params.opt_policy)
    inputs = Inputs(params, run)
    teacher = _load_teacher(inputs, params, run, accelerator)
    store, feed, held_out = _transfer_feed(
        params, run, inputs, teacher, TargetSpec(), accelerator)

    def terms(model, batch):
        logits, mask = models.run_model(model, batch)[0], batch["attention_mask"]
        if params.logit_loss == "mse":
            return {"logits": losses.logit_mse(logits, batch["teacher_logits"], mask)}
        return {"logits": losses.logit_kl(
            logits, batch["teacher_logits"], mask, params.temperature)}

    judge = _held_out_loss(terms, held_out, {}, accelerator)
    return _train_head_down(params, run, stage, inputs, accelerator, "hidden", terms, feed, judge,
                            _recipe(params, params.distil_epochs, params.logit_lr))


@_stage("labels")
def finetune_student(params: Params, run: Run, stage: Stage):
    """5. Stage 3: cross-entropy on labels, with gradual unfreezing; dev F1 selects."""
    accelerator = devices.open_accelerator(params.device, params.opt_policy)
    inputs = Inputs(params, run)
    return _train_head_down(
        params, run, stage, inputs, accelerator, "logits", _label_terms,
        inputs.labelled(params.student_ft_batch_size), inputs.dev_f1(accelerator),
        _recipe(params, params.ft_epochs, params.ft_lr),
    )


def _train_head_down(params, run, stage, inputs, accelerator, source, terms, feed, judge, recipe):
    """What stages 2 and 3 share: load, unfreeze top to bottom, train, score on dev, save."""
    student = _load_student(inputs, run, source).to(accelerator.device)
    models.set_dropout(student, hidden=params.dropout, attention=params.dropout)
    groups = layer_groups(student, student.config.num_hidden_layers)
    steps = unfreezing_steps(groups, params.unfreeze, _frozen_words(params, student))
    summary = fit(student, terms, feed, judge, recipe, steps, accelerator=accelerator,
                  folder=stage.dir, name=stage.name)
    scores, _ = inputs.score(student, "dev", accelerator)
    models.save_model(student, inputs.tokenizer, stage.dir)
    return {"dev": scores, **summary}


@_stage("evaluation")
def evaluate_student(params: Params, run: Run, stage: Stage):
    """6. Teacher and student on dev and, for the first and only time, on test; size and speed."""
    accelerator = devices.open_accelerator(params.device, params.opt_policy)
    inputs = Inputs(params, run)
    gold, examples = inputs.read("test")
    metrics, both = {}, []
    for name, folder in (("teacher", teacher_dir(params, run)), ("student", run.dir / "labels")):
        model = models.load_encoder(str(folder), inputs.labels, "model_dir").to(accelerator.device)
        scores, tags = inputs.score(model, "test", accelerator)
        both.append(model)
        metrics[name] = {
            "test": scores, "dev": inputs.score(model, "dev", accelerator)[0],
            **models.size_of(model),
            "mb": sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 1e6,
            **evaluate.measure_speed(model, examples, accelerator=accelerator,
                                     pad_id=inputs.pad_id),
        }
    data.write_tagged(stage.dir / "predictions.tsv", gold, tags)
    metrics["cka"] = alignment.measure_alignment(
        *both, {}, inputs.read("dev")[1], hidden_pairs=[], attention_pairs=[],
        accelerator=accelerator, pad_id=inputs.pad_id)["cka"]
    metrics["retention"] = evaluate.retention(*(
        metrics[name]["test"] for name in ("student", "teacher")))
    return metrics


@_stage("student")
def export_student(params: Params, run: Run, stage: Stage):
    """7. The student as a plain Hugging Face folder with a model card; reloaded and compared."""
    from transformers import AutoModelForTokenClassification

    accelerator = devices.open_accelerator(params.device, params.opt_policy)
    inputs = Inputs(params, run)
    student = _load_student(inputs, run, "labels")
    models.save_model(student, inputs.tokenizer, stage.dir)
    again = AutoModelForTokenClassification.from_pretrained(stage.dir)
    (_, ours), (_, theirs) = (
        inputs.score(model.to(accelerator.device), "dev", accelerator) for model in (student, again)
    )
    if ours != theirs:
        raise RuntimeError(f"{stage.dir} does not reproduce the student's predictions on dev")
    card = students.model_card(run.stage("evaluation").metrics, inputs.labels,
                               params.pt_teacher_checkpoint)
    save_atomic(stage.dir / "README.md", lambda p: p.write_text(card, encoding="utf-8"))
    return {"same_predictions": True, "dev_words": sum(map(len, ours))}


def estimate(params: Params, run: Run) -> list[str]:
    """Lines on the memory of the weights and the disk that teacher outputs take."""
    given = given_teacher(params, run)
    checkpoint = str(given.parent) if given else params.pt_teacher_checkpoint
    if checkpoint == RANDOM_TEACHER:
        return ["random teacher: a few megabytes"]
    inputs = Inputs(params, run, tokenizer_from=checkpoint)
    teacher_config, student_config = _configs(params, checkpoint, "pt_teacher_checkpoint")
    student_config.vocab_size = teacher_config.vocab_size
    with torch.device("meta"):
        teacher, student = map(models.from_config, (teacher_config, student_config))
    hidden, maps = _pairs(params, teacher, student)
    spec = TargetSpec(tuple(t for _, t in hidden), tuple(t for _, t in maps))
    need = spec.n_bytes(inputs.read("transfer")[1].lengths, teacher_config) / 1e9
    sizes = [models.size_of(m)["parameters"] for m in (teacher, student)]
    return [f"memory: teacher {sizes[0] * 4 / 1e9:.2f} GB of weights ({sizes[0] * 16 / 1e9:.2f} GB "
            f"while it trains), student {sizes[1] * 16 / 1e9:.2f} GB while it trains",
            f"disk: teacher outputs {need:.2f} GB, of which targets_cache_gb keeps at most "
            f"{params.targets_cache_gb} GB; checkpoints {sizes[1] * 16 / 1e9:.2f} GB"]


def result_table(run: Run) -> Table:
    """Teacher and student: F1 per language and macro on test, size, speed."""
    metrics = run.stage("evaluation").metrics
    rows = []
    for name in ("teacher", "student"):
        found = metrics[name]
        rows.append({
            "model": name, "macro F1": found["test"]["macro"], "micro F1": found["test"]["micro"],
            **{f"F1 {x}": f1 for x, f1 in found["test"]["by_language"].items()},
            "parameters": found["parameters"], "without embeddings": found["non_embedding"],
            "MB": found["mb"], "ms/sentence": found["ms_per_sentence"],
            "sentences/s": found["sentences_per_second"],
        })
    return Table.transposed(rows, "model")


def attention_example(params: Params, run: Run, name: str = "hidden", text: str | None = None) -> dict:
    """Attention maps of one sentence, top distilled layer: the student of stage `name` and the teacher.

    Args: text: a sentence, words separated by spaces; default: a dev sentence with entities.
    Returns: tokens [S], teacher [A_t, S, S], student [A_s, S, S], pair (student, teacher) of layers.
    """
    accelerator = devices.open_accelerator(params.device, "float32", quiet=True)
    inputs = Inputs(params, run)
    if text is None:
        text = " ".join(data.typical_sentence(inputs.read("dev")[0]))
    sentence = data.Sentences([text.split()], None, [""])
    examples = data.encode(sentence, inputs.tokenizer, params.seq_len)
    batch = data.collate(examples, [0], inputs.pad_id, multiple=1)
    teacher = _load_teacher(inputs, params, run, accelerator)
    student = _load_student(inputs, run, name).eval().to(accelerator.device)
    pair = (student.config.num_hidden_layers, teacher.config.num_hidden_layers)
    found = {}
    for side, model, layer in (("teacher", teacher, pair[1]), ("student", student, pair[0])):
        models.use_attention_maps(model)
        on_device = {k: v.to(accelerator.device) for k, v in batch.items()}
        with torch.inference_mode():
            found[side] = models.run_model(model, on_device, False, True)[2][layer - 1][0].cpu().numpy()
    tokens = inputs.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    return {"tokens": tokens, **found, "pair": pair}


def try_student(run: Run, text: str) -> Table:
    """Entities that the exported student finds in a text, through transformers' own pipeline."""
    from transformers import pipeline

    tag = pipeline("token-classification", model=str(run.stage("student").dir),
                   aggregation_strategy="first")
    return Table([{"entity": e["entity_group"], "words": e["word"], "score": float(e["score"])}
                  for e in tag(text)] or [{"entity": "none found"}], text)


def score_table(stage: Stage) -> Table:
    """F1 of a stage on dev, per language and in the mean."""
    scores = stage.metrics["dev"]
    rows = [{"dev": language, "F1": f1} for language, f1 in scores["by_language"].items()]
    return Table(rows + [{"dev": f"{mean} mean", "F1": scores[mean]} for mean in ("macro", "micro")])


def size_table(run: Run) -> Table:
    """Parameters of teacher and student, with and without embedding tables."""
    found = run.stage("student-init").metrics
    return Table([{"model": name, **{k: m[k] for k in ("parameters", "non_embedding")}}
                  for name, m in (("teacher", found["teacher"]), ("student", found))])


def dev_scores(run: Run) -> tuple[dict[str, float], float]:
    """Macro F1 on dev after each training stage of the student, and the teacher's."""
    macro = {name: run.stage(name).metrics["dev"]["macro"]
             for name in ("teacher", "hidden", "logits", "labels")}
    return macro, macro.pop("teacher")


def size_speed(run: Run) -> list[dict]:
    """Rows for `plots.plot_size_speed`: teacher and student."""
    metrics = run.stage("evaluation").metrics
    return [{"name": n, "f1": metrics[n]["test"]["macro"], **metrics[n]} for n in ("teacher", "student")]
