"""The spine: seven calls, in order. What is finished and unchanged is not repeated, what was interrupted goes on."""

import functools
import itertools
import time
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors.torch import save_file
from torch import nn

from xdistil import alignment, card, data, dropout, embeddings, evaluate, export, losses, models, students
from xdistil.devices import open_accelerator, peak_memory_mb
from xdistil.feeds import (
    from_frozen,
    held_out_loss,
    labelled_feed,
    layer_pairs,
    transfer,
    transfer_feeds,
    with_labelled,
)
from xdistil.files import save_atomic, save_json, save_text
from xdistil.frozen import run_upper
from xdistil.inputs import Inputs, depends, given_teacher, teacher_dir, teacher_source
from xdistil.params import Params
from xdistil.runs import STAGES, Run, Stage, describe_changes, stages_of
from xdistil.targets import TargetSpec
from xdistil.training import Feed, Recipe, fit, part
from xdistil.unfreeze import layer_groups, unfreezing_steps, word_embedding


def _stage(work):
    """Make a stage of its work: check what is before it, begin, work, write metrics and done mark."""
    name = next(folder for folder, verb in STAGES.items() if verb == work.__name__)

    @functools.wraps(work)
    def call(params: Params, run: Run) -> Stage:
        for earlier in itertools.takewhile(lambda other: other != name, stages_of(params)):
            found, wanted = run.stage(earlier).done, depends(params, run, earlier)
            if found != wanted:
                why = describe_changes(found, wanted) if found else "it has not finished"
                raise RuntimeError(f"{name} needs stage {earlier}: {why}; run {STAGES[earlier]} first")
        stage = run.stage(name)
        if stage.begin(depends(params, run, name)):
            save_json(run.dir / "params.json", params.model_dump())
            start = time.monotonic()
            set_seed(params.seed)
            metrics = work(params, run, stage, open_accelerator(params.device, params.opt_policy))
            seconds = round(time.monotonic() - start, 2)
            stage.finish(metrics | {"stage_seconds": seconds, "peak_memory_mb": peak_memory_mb()})
            stage.say(f"finished in {seconds} s")
        return stage

    return call


def _fit(params: Params, stage: Stage, accelerator, model, terms, feed, judge, epochs, lr, steps, weights=None):
    same = params.pick("patience", "warmup_ratio", "lr_schedule", "weight_decay", "max_grad_norm")
    return fit(model, terms, feed, judge, Recipe(epochs, lr, **same), steps, accelerator=accelerator, folder=stage.dir,
               name=stage.name, weights=weights)


def _load_student(run: Run, name: str, inputs: Inputs, device="cpu"):
    return models.load_classifier(run.stage(name).dir, inputs.labels, "model_dir", inputs.params.unit).to(device)


def _load_checkpoint(params: Params, inputs: Inputs, device="cpu"):
    return models.load_classifier(params.pt_student_checkpoint, inputs.labels, "pt_student_checkpoint",
                                  params.unit).to(device)


def _label_terms(model, batch):
    logits = run_upper(model, batch)
    return {"labels": losses.tag_loss(logits, batch["labels"][:, : logits.shape[1]])}


@_stage
def finetune_teacher(params: Params, run: Run, stage: Stage, accelerator):
    """1. Fine-tune the teacher on labels; or score the one in teacher_model_dir, which stays as it is."""
    (source, parameter), inputs, summary = teacher_source(params, run), Inputs(params, run), {}
    teacher = models.load_classifier(source, inputs.labels, parameter, params.unit).to(accelerator.device)
    if parameter == "teacher_model_dir":
        stage.say(f"fine-tuning skipped: {source} holds a fine-tuned teacher")
    else:
        feed = inputs.labelled(params.teacher_batch_size, accelerator)
        judge = functools.partial(inputs.dev_f1, accelerator)
        summary = _fit(params, stage, accelerator, teacher, _label_terms, feed, judge, params.teacher_epochs or
                       params.ft_epochs, params.teacher_lr, [("all", list(dict(teacher.named_parameters())))])
        models.save_model(teacher, inputs.tokenizer, teacher_dir(params, run))
    return {"dev": inputs.score(teacher, "dev", accelerator)[0], **models.size_of(teacher), **summary}


def read_configs(params: Params, run: Run):
    """Teacher and student config, no weights. Raises CheckpointError if they cannot work together."""
    checkpoint, parameter = teacher_source(params, run)
    teacher = models.load_config(checkpoint, parameter)  # without distillation: the student's
    models.check_class(params.distil and params.pt_teacher, teacher, parameter)
    student = students.student_config(teacher, params.initialisation, params.pt_student_checkpoint,
                                      params.student_arch, **params.pick(
        "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    relation = params.distil_attention and params.attention_loss == "relation"
    students.check_shapes(teacher, student, seq_len=params.seq_len, init=params.initialisation,
                          compress=params.compress_word_embedding, distil_attention=params.distil_attention and
                          not relation, relation_heads=params.relation_heads if relation else None)
    layer_pairs(params, teacher, student)
    return teacher, student


def check(params: Params, run: Run) -> None:
    """Everything that can be checked before anything is written: device, models (configs only), files. Raises
    ValueError naming the parameter, or the file and line, and the remedy."""
    open_accelerator(params.device, params.opt_policy, quiet=True)
    read_configs(params, run)
    Inputs(params, run).check()


@_stage
def build_student(params: Params, run: Run, stage: Stage, accelerator):
    """2. Build the student on the teacher's vocabulary; compress, map or copy its word embeddings; trim both."""
    inputs, (_, config) = Inputs(params, run), read_configs(params, run)
    teacher = inputs.load_teacher()
    student, origin = students.build_student(config, teacher, params.initialisation, params.pt_student_checkpoint,
                                             inputs.labels, inputs.tokenizer, params.compress_word_embedding)
    _, spectrum = embeddings.compress(word_embedding(teacher), 1)
    trimmed = inputs.trim_vocab(student, stage, accelerator) if params.trim_vocab else {}
    models.save_model(student, inputs.tokenizer, stage.dir)
    inputs.tokenizer.save_pretrained(run.dir / "tokenizer")
    return {"word_embeddings": origin, **models.size_of(student), "teacher": models.size_of(teacher), **trimmed,
            "rank": word_embedding(student).shape[1], "singular_values": [round(x, 4) for x in spectrum.tolist()]}


def _frozen_words(params: Params, student) -> frozenset[str]:
    names = (name for name, parameter in student.named_parameters() if parameter is word_embedding(student))
    return frozenset(names if params.freeze_word_embedding else ())


@_stage
def distil_hidden(params: Params, run: Run, stage: Stage, accelerator):
    """3. Stage 1: hidden states and attention on the transfer set; then fold the head."""
    inputs, device = Inputs(params, run), accelerator.device
    teacher = models.prepare_to_answer(inputs.load_teacher(), accelerator, exact=False)
    student = _load_student(run, "student-init", inputs, device)
    hidden, attention, weights, spec = layer_pairs(params, teacher.config, student.config)
    for model in (teacher, student) if spec.attention else ():
        models.return_maps(model)
    dropout.set_dropout(student, hidden=params.dropout, attention=0.0)
    projected = hidden if params.hidden_loss != "cka" else []
    projections = students.make_projections(projected, students.state_widths(student.config),
                                            teacher.config.hidden_size, params.projection_gelu)
    both = nn.ModuleDict({"student": student, "projections": projections}).to(device)
    store, *windows = transfer(params, run, inputs, lambda: teacher, spec, accelerator)
    feed, held_out = transfer_feeds(params, store, *windows)
    terms = students.distil_terms(hidden, attention, params.hidden_loss, params.attention_loss, params.relation_heads)
    fixed = {f"student.{n}" for n in (*dict(layer_groups(student))["head"], *_frozen_words(params, student))}
    measure = accelerator.autocast()(functools.partial(
        alignment.measure_alignment, teacher, student, projections, inputs.read("dev")[1], inputs.pad_id, device,
        hidden_pairs=hidden, attention_pairs=attention if spec.attention else ()))
    before, judge = measure(), held_out_loss(terms, held_out, weights, accelerator)
    learning = [name for name, _ in both.named_parameters() if name not in fixed]
    summary = _fit(params, stage, accelerator, both, terms, feed, judge, params.distil_epochs, params.distil_lr,
                   [("all", learning)], weights)
    top, head = (student.config.num_hidden_layers, teacher.config.num_hidden_layers), "the teacher's, on top states "
    if params.projection_gelu and projected:
        head = "new: none can be folded through GELU"
    else:  # without a loss on the teacher's own states at the top, no projection is there to be folded
        projection = dict(projections.items()).get(str(top[0])) if top in projected else students.fit_projection(
            student, teacher, inputs.read("transfer")[1], np.concatenate(windows[0]), inputs.pad_id, accelerator)
        head += "as stage 1 trained them" if top in projected else "mapped by least squares"
        head = head if students.fold_head(student, teacher, projection) else "its own, to be trained"
    stage.say(f"the student's head is {head}")
    found = _save_student(stage, student, inputs, accelerator)
    tensors = {name: weight.contiguous().cpu() for name, weight in projections.state_dict().items()}
    save_atomic(stage.dir / "projections.safetensors", lambda path: save_file(tensors, path))
    store.drop("hidden", "attention", "qkv")
    return found | summary | {"head": head, "teacher_windows": store.asked, "alignment_before": before,
                              "alignment_after": measure()}


@_stage
def distil_logits(params: Params, run: Run, stage: Stage, accelerator):
    """4. Stage 2: the teacher's logits on the transfer set, with gradual unfreezing."""
    inputs = Inputs(params, run)
    student, steps = _student_and_steps(params, run, "hidden", inputs, accelerator.device)

    store, *windows = transfer(params, run, inputs, lambda: models.prepare_to_answer(  # seldom called: stage 1 left
        inputs.load_teacher(), accelerator, exact=False), TargetSpec(), accelerator)  # its logits
    through = from_frozen(params, student, inputs.read("transfer")[1], inputs.pad_id, accelerator)
    feed, held_out = transfer_feeds(params, store, *windows, through)
    if params.hard_label_weight:
        train, dev = (labelled_feed(params, student, inputs, accelerator, name) for name in ("train", "dev"))
        feed = Feed(with_labelled(feed.batches, train), feed.n_windows, feed.n_chunks)
        held_out = with_labelled(lambda *_, own=held_out: own(), dev)
    loss = {"mse": losses.logit_mse, "kl": functools.partial(losses.logit_kl, temperature=params.temperature)}

    def terms(model, batch):
        logits = run_upper(model, batch)
        mask = batch["attention_mask"][:, : logits.shape[1]]
        values = {"logits": loss[params.logit_loss](logits, batch["teacher_logits"], mask)}
        return values | (_label_terms(model, part(batch, "labelled_")) if params.hard_label_weight else {})

    weights = {"labels": params.hard_label_weight}
    judge = held_out_loss(terms, held_out, weights, accelerator)
    summary = _fit(params, stage, accelerator, student, terms, feed, judge, params.distil_epochs, params.logit_lr,
                   steps, weights)
    return _save_student(stage, student, inputs, accelerator) | summary | {"teacher_windows": store.asked}


@_stage
def finetune_student(params: Params, run: Run, stage: Stage, accelerator):
    """5. Stage 3: cross-entropy on labels, with gradual unfreezing; dev F1 selects."""
    inputs = Inputs(params, run)
    student, steps = _student_and_steps(params, run, "logits", inputs, accelerator.device)
    feed = labelled_feed(params, student, inputs, accelerator)
    judge = functools.partial(inputs.dev_f1, accelerator)
    summary = _fit(params, stage, accelerator, student, _label_terms, feed, judge, params.ft_epochs, params.ft_lr,
                   steps)
    return _save_student(stage, student, inputs, accelerator) | summary


def _student_and_steps(params: Params, run: Run, source: str, inputs: Inputs, device):
    """The student of an earlier stage, and the steps that unfreeze it from top to bottom."""
    student = _load_student(run, source, inputs, device) if params.distil else _load_checkpoint(params, inputs, device)
    dropout.set_dropout(student, hidden=params.dropout, attention=params.dropout)
    if params.dropout and device.type == "cpu":
        models.return_maps(student)  # no fused attention drops out there, and the plain one is 7 % faster
    return student, unfreezing_steps(layer_groups(student), params.unfreeze, _frozen_words(params, student))


def _save_student(stage: Stage, student, inputs: Inputs, accelerator) -> dict:
    """Write the trained student; its scores on dev."""
    models.save_model(student, inputs.tokenizer, stage.dir)
    return {"dev": inputs.score(student, "dev", accelerator)[0]}


@_stage
def evaluate_student(params: Params, run: Run, stage: Stage, accelerator):
    """6. Teacher and student on dev and, for the first and only time, on test; size, speed, likeness (without a
    teacher: to the checkpoint that the student was)."""
    inputs, device = Inputs(params, run), accelerator.device
    pair = {"teacher": inputs.load_teacher() if params.distil else _load_checkpoint(params, inputs),
            "student": _load_student(run, "labels", inputs)}
    pair = {name: models.prepare_to_answer(model, accelerator) for name, model in pair.items()}
    (gold, test), metrics = inputs.read("test"), {}
    sizes = {"teacher": run.stage("student-init").metrics.get("teacher"), "student": models.size_of(pair["student"])}
    for name, done in (("teacher", "teacher"), ("student", "labels"))[not params.distil :]:
        scores, tags = inputs.score(pair[name], "test", accelerator)
        metrics[name] = {"test": scores, "dev": run.stage(done).metrics["dev"], **sizes[name],
                         "mb": sizes[name]["parameters"] * 4 / 1e6,
                         **evaluate.measure_speed(pair[name], test, inputs.pad_id, accelerator)}
    data.write_tagged(stage.dir / "predictions.tsv", gold, tags)  # the student's: it comes last
    if params.distil:
        metrics["retention"] = evaluate.retention(metrics["student"]["test"], metrics["teacher"]["test"])
    with accelerator.autocast():
        likeness = alignment.measure_alignment(*pair.values(), {}, inputs.read("dev")[1], inputs.pad_id, device)
    return metrics | {"cka": likeness["cka"], "cka_with": "its teacher" if params.distil else "what it was before"}


@_stage
def export_student(params: Params, run: Run, stage: Stage, accelerator):
    """7. The student as a plain Hugging Face folder with a model card, loaded again and compared."""
    inputs, metrics = Inputs(params, run), run.stage("evaluation").metrics
    student = _load_student(run, "labels", inputs)
    inputs.tokenizer.model_max_length = params.seq_len  # positions past it were never trained
    if not models.reads_token_types(student):  # else transformers would hand it the token types of the teacher
        inputs.tokenizer.init_kwargs["model_input_names"] = ["input_ids", "attention_mask"]
    models.save_model(student, inputs.tokenizer, stage.dir)
    again = models.AUTO_CLASSES[params.unit].from_pretrained(stage.dir)
    tags = [inputs.score(model.to(accelerator.device), "dev", accelerator)[1] for model in (student, again)]
    if tags[0] != tags[1]:
        raise RuntimeError(f"{stage.dir} does not reproduce the student's predictions on dev")
    onnx = _export_onnx(stage, student, inputs, accelerator) if params.onnx else {}
    teacher = given_teacher(params, run) or params.pt_teacher_checkpoint
    source = str(teacher if params.distil else params.pt_student_checkpoint)
    save_text(stage.dir / "README.md", card.write_card(
        params.unit, metrics["student"], metrics.get("teacher"), onnx, source=source.split("/")[-1],
        labels=inputs.labels, data=Path(params.task).name, seq_len=params.seq_len, licence=params.licence,
        registers="import xdistil  # knows the BiLSTM" if students.is_bilstm(student.config) else ""))
    return {"same_predictions": True, f"dev_{params.unit}s": sum(map(len, tags[0])), "onnx": onnx}


def _export_onnx(stage: Stage, student, inputs: Inputs, accelerator) -> dict:
    """Write the ONNX files; of each its size, dev F1, speed, and how far at the most its logits are from torch's.
    Raises RuntimeError if the float32 file does not answer as the student does."""
    found, examples = {}, inputs.read("dev")[1]
    batch = data.collate(examples, range(min(64, len(examples))), inputs.pad_id)
    for name, path in export.export_onnx(student, stage.dir / "onnx").items():
        tagger = export.OnnxTagger(stage.dir, name)
        with torch.inference_mode():
            wanted, got = (models.run_model(model, batch)[0] for model in (student.cpu().eval(), tagger))
        far = float((wanted - got)[batch["attention_mask"][:, : got.shape[1]] > 0].abs().max())
        if name == "fp32" and far > 1e-3:
            raise RuntimeError(f"{path}: logits differ from the student's by {far:.2g}; set onnx: false")
        found[name] = {"mb": path.stat().st_size / 1e6, "dev": inputs.score(tagger, "dev", accelerator)[0],
                       "farthest_logit": far, **evaluate.measure_speed(tagger, examples, inputs.pad_id, accelerator)}
    return found
