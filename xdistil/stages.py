"""The spine: seven calls, in order. What is finished and unchanged is not repeated, what was interrupted goes on."""

import functools
import sys

import numpy as np
from safetensors.torch import save_file
from torch import nn

from xdistil import alarms, alignment, dropout, embeddings, feeds, losses, models, processes, students, wordwise
from xdistil.checkpoints import part
from xdistil.devices import open_accelerator
from xdistil.files import save_atomic
from xdistil.frozen import run_upper
from xdistil.inputs import Inputs
from xdistil.params import Params, load_params
from xdistil.provenance import is_done, teacher_dir, teacher_source
from xdistil.results import compare_teachers, evaluate_student, export_student  # noqa: F401  two of the seven
from xdistil.runs import INSTEAD, STAGES, Run, Stage, baselines_of, stages_of
from xdistil.staging import as_stage, fit_stage, load_student, save_student
from xdistil.targets import TargetSpec
from xdistil.training import Feed
from xdistil.unfreeze import layer_groups, unfreezing_steps, word_embedding


def _label_terms(model, batch):
    logits = run_upper(model, batch)
    return {"labels": losses.tag_loss(logits, batch["labels"][:, : logits.shape[1]])}


@as_stage
def finetune_teacher(params: Params, run: Run, stage: Stage, accelerator):
    """1. Fine-tune the teacher on labels; or score the one in teacher_model_dir, which stays as it is."""
    (source, parameter), inputs, summary = teacher_source(params, run), Inputs(params, run).teacher, {}
    teacher = models.load_classifier(source, inputs.labels, parameter, params.unit).to(accelerator.device)
    if parameter == "teacher_model_dir":
        stage.say(f"fine-tuning skipped: {source} holds a fine-tuned teacher")
    else:
        feed = feeds.labelled_feed(params, teacher, inputs, params.teacher_batch_size, accelerator)
        judge = functools.partial(inputs.dev_f1, accelerator)
        summary = fit_stage(params, stage, accelerator, teacher, _label_terms, feed, judge, params.teacher_epochs or
                            params.ft_epochs, params.teacher_lr, [("all", list(dict(teacher.named_parameters())))])
        models.save_model(teacher, inputs.tokenizer, teacher_dir(params, run))
        summary["alarms"] = inputs.leaks("dev", "train")
    return {"dev": inputs.score(teacher, "dev", accelerator)[0], **models.size_of(teacher), **summary}


def read_configs(params: Params, run: Run):
    """Teacher and student config, no weights. Raises CheckpointError if they cannot work together."""
    checkpoint, parameter = teacher_source(params, run)
    teacher = models.load_config(checkpoint, parameter)  # without distillation: the student's
    models.check_class(params.distil and params.pt_teacher, teacher, parameter)
    student = students.student_config(teacher, params.initialisation, params.pt_student_checkpoint,
                                      params.student_arch, **params.pick(
        "embedding_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
        "copied_layers"))
    relation = params.distil_attention and params.attention_loss == "relation"
    students.check_shapes(teacher, student, seq_len=params.seq_len, init=params.initialisation,
                          compress=params.compress_word_embedding, distil_attention=params.distil_attention and
                          not relation, relation_heads=params.relation_heads if relation else None,
                          own_tokenizer=params.student_tokenizer == "own")
    feeds.layer_pairs(params, teacher, student)
    return teacher, student


def check(params: Params, run: Run) -> None:
    """Everything that can be checked before anything is written: device, models (configs only), files. Raises
    ValueError naming the parameter, or the file and line, and the remedy."""
    open_accelerator(params.device, params.opt_policy, quiet=True)
    read_configs(params, run)
    Inputs(params, run).check()


@as_stage
def build_student(params: Params, run: Run, stage: Stage, accelerator):
    """2. Build the student on the teacher's vocabulary; compress, map or copy its word embeddings; trim both. Or take
    a checkpoint with a tokenizer of its own."""
    inputs, (_, config) = Inputs(params, run), read_configs(params, run)
    teacher = inputs.load_teacher()
    def sample():  # before the vocabulary is trimmed
        examples = inputs.read("transfer")[1]
        return students.sample_batches(examples, np.arange(len(examples)), inputs.pad_id, accelerator)

    student, origin = students.build_student(config, teacher, params.initialisation, params.pt_student_checkpoint,
                                             inputs.labels, inputs.tokenizer, params.compress_word_embedding, sample)
    _, spectrum = embeddings.compress(word_embedding(teacher), 1)
    trimmed = inputs.trim_vocab(student, stage, accelerator) if params.trim_vocab else {}
    models.save_model(student, inputs.tokenizer, stage.dir)
    inputs.tokenizer.save_pretrained(run.dir / "tokenizer")
    return {"word_embeddings": origin, **models.size_of(student), "teacher": models.size_of(teacher), **trimmed,
            "rank": word_embedding(student).shape[1], "singular_values": [round(x, 4) for x in spectrum.tolist()]}


def _frozen_words(params: Params, student) -> frozenset[str]:
    names = (name for name, parameter in student.named_parameters() if parameter is word_embedding(student))
    return frozenset(names if params.freeze_word_embedding else ())


@as_stage
def distil_hidden(params: Params, run: Run, stage: Stage, accelerator):
    """3. Stage 1: hidden states and attention on the transfer set; then fold the head."""
    inputs, device = Inputs(params, run), accelerator.device
    teacher = models.prepare_to_answer(inputs.load_teacher(), accelerator, exact=False)
    student = load_student(run, "hidden", inputs, device)
    hidden, attention, weights, spec = feeds.layer_pairs(params, teacher.config, student.config)
    for model in (teacher, student) if spec.attention else ():
        models.return_maps(model)
    dropout.set_dropout(student, hidden=params.dropout, attention=0.0)
    projected = hidden if params.hidden_loss != "cka" else []
    projections = students.make_projections(projected, students.state_widths(student.config),
                                            teacher.config.hidden_size, params.projection_gelu)
    both = nn.ModuleDict({"student": student, "projections": projections}).to(device)
    store, feed, held_out, windows = feeds.transfer(params, run, inputs, student, lambda: teacher, spec, accelerator)
    terms = students.distil_terms(hidden, attention, params.hidden_loss, params.attention_loss, params.relation_heads)
    fixed = {f"student.{n}" for n in (*dict(layer_groups(student))["head"], *_frozen_words(params, student))}
    measure = accelerator.autocast()(functools.partial(
        alignment.measure_alignment, teacher, student, projections, inputs.read("dev")[1], inputs.pad_id, device,
        hidden_pairs=hidden, attention_pairs=attention if spec.attention else ()))
    before, judge = measure(), feeds.held_out_loss(terms, held_out, weights, accelerator)
    learning = [name for name, _ in both.named_parameters() if name not in fixed]
    summary = fit_stage(params, stage, accelerator, both, terms, feed, judge, params.distil_epochs, params.distil_lr,
                        [("all", learning)], weights)
    top, head = (student.config.num_hidden_layers, teacher.config.num_hidden_layers), "the teacher's, on top states "
    if params.projection_gelu and projected:
        head = "new: none can be folded through GELU"
    else:  # without a loss on the teacher's own states at the top, no projection is there to be folded
        projection = dict(projections.items()).get(str(top[0])) if top in projected else students.fit_projection(
            student, teacher, inputs.read("transfer")[1], windows, inputs.pad_id, accelerator)
        head += "as stage 1 trained them" if top in projected else "mapped by least squares"
        head = head if students.fold_head(student, teacher, projection) else "its own, to be trained"
    stage.say(f"the student's head is {head}")
    found = save_student(stage, student, inputs, accelerator)
    tensors = {name: weight.contiguous().cpu() for name, weight in projections.state_dict().items()}
    save_atomic(stage.dir / "projections.safetensors", lambda path: save_file(tensors, path))
    store.drop("hidden", "attention", "qkv")
    return found | summary | {"head": head, "teacher_windows": store.all_asked, "alignment_before": before,
                              "alignment_after": (after := measure()), "alarms": [
        *alarms.projection_alone(stage.history, before, after, projections), *inputs.leaks("dev", "transfer"),
        *alarms.collapse(after, "the teacher's" in head)]}


@as_stage
def distil_logits(params: Params, run: Run, stage: Stage, accelerator):
    """4. Stage 2: the teacher's logits on the transfer set, with gradual unfreezing."""
    inputs = Inputs(params, run)
    student, steps = _student_and_steps(params, run, "logits", inputs, accelerator.device)

    def load_teacher():  # seldom called: stage 1 left its logits
        return models.prepare_to_answer(inputs.load_teacher(), accelerator, exact=False)

    store, feed, held_out, _ = feeds.transfer(params, run, inputs, student, load_teacher, TargetSpec(), accelerator)
    if params.hard_label_weight:
        train, dev = (feeds.labelled_feed(params, student, inputs, params.student_ft_batch_size, accelerator, name)
                      for name in ("train", "dev"))
        feed = Feed(feeds.with_labelled(feed.batches, train), feed.n_windows, feed.n_chunks)
        held_out = feeds.with_labelled(held_out, dev)
    loss = {"mse": losses.logit_mse, "kl": functools.partial(losses.logit_kl, temperature=params.temperature)}

    def terms(model, batch):
        logits = run_upper(model, batch)
        mask = wordwise.compared(batch)[:, : logits.shape[1]]
        values = {"logits": loss[params.logit_loss](logits, batch["teacher_logits"], mask)}
        return values | (_label_terms(model, part(batch, "labelled_")) if params.hard_label_weight else {})

    weights = {"labels": params.hard_label_weight}
    judge = feeds.held_out_loss(terms, held_out, weights, accelerator)
    summary = fit_stage(params, stage, accelerator, student, terms, feed, judge, params.distil_epochs, params.logit_lr,
                        steps, weights)
    found = save_student(stage, student, inputs, accelerator) | summary | {"teacher_windows": store.all_asked}
    return found | ({"teachers": compare_teachers(inputs, accelerator)} if params.more_teachers else {})


@as_stage
def finetune_student(params: Params, run: Run, stage: Stage, accelerator):
    """5. Stage 3: cross-entropy on labels, with gradual unfreezing; dev F1 selects."""
    inputs = Inputs(params, run)
    student, steps = _student_and_steps(params, run, "labels", inputs, accelerator.device)
    feed = feeds.labelled_feed(params, student, inputs, params.student_ft_batch_size, accelerator)
    judge = functools.partial(inputs.dev_f1, accelerator)
    summary = fit_stage(params, stage, accelerator, student, _label_terms, feed, judge, params.ft_epochs, params.ft_lr,
                        steps)
    return save_student(stage, student, inputs, accelerator) | summary | {"alarms": inputs.leaks("dev", "train")}


def run_baselines(params: Params, run: Run) -> None:
    """The same student beside the result, if `baselines` asks: runs in MODEL_DIR/baselines on the same teacher outputs
    and first student. One learns from labels alone; one from logits where this run has hidden states, and from labels
    if it does, so that stage 1 is all it lacks. Each takes over the training windows of what it replaces, whatever
    patience says, in one step of all layers: epochs of several would not add up to them."""
    spent = {name: run.stage(name).metrics for name in params.student_stages}
    calls = {"logits": distil_logits, "labels": finetune_student, "evaluation": evaluate_student}
    for name, taught in baselines_of(params).items():
        if not is_done(params, run, "evaluation"):
            raise RuntimeError("baselines: their budget is that of a finished run; run evaluate_student first")
        size = {"labels": len(Inputs(params, run).read("train")[1]),  # windows of an epoch
                "logits": next((m["windows"] // m["epochs"] for x, m in spent.items() if x != "labels"), None)}
        budget = dict.fromkeys(taught, 0)
        for stage, found in spent.items():
            budget[INSTEAD[name].get(stage, stage)] += found["windows"]
        epochs = {stage: max(1, round(windows / size[stage])) for stage, windows in budget.items()}
        beside = run.baseline(name, student_stages=taught, unfreeze="none", patience=max(epochs.values()),
                              ft_epochs=epochs.get("labels", 1), distil_epochs=epochs.get("logits", 1))
        for stage in (*taught, "evaluation"):
            calls[stage](beside.params, beside)


def _student_and_steps(params: Params, run: Run, name: str, inputs: Inputs, device):
    """The student that a stage goes on from, and the steps that unfreeze it from top to bottom."""
    student = load_student(run, name, inputs, device)
    dropout.set_dropout(student, hidden=params.dropout, attention=params.dropout)
    return student, unfreezing_steps(layer_groups(student), params.unfreeze, _frozen_words(params, student))


def main() -> int:
    """`python -m xdistil.stages PARAMS [STAGE ...]`: the stages of a params file, by default all, without notebooks;
    under torchrun in all of its processes, which share the folder of the run. Exit codes as of `xdistil`."""
    try:
        params = load_params(sys.argv[1])
        with processes.joined(params.device == "cpu"):
            run = Run(params)
            processes.agree(lambda: check(params, run))
            for name in sys.argv[2:] or stages_of(params):
                globals()[STAGES[name]](params, run)
        return 0
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"xdistil: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, RuntimeError) else 2


if __name__ == "__main__":
    raise SystemExit(main())
