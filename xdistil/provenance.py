"""What a stage's result follows from: parameters, the task's files, the teacher's weights, the stage before."""

from pathlib import Path

from xdistil import demo_data, ensemble, models, sources, tf_weights
from xdistil.files import read_json
from xdistil.params import DEMO_TASK, Params, fingerprint
from xdistil.runs import SHARED, Run, stage_before, stages_of

RECIPE = ("seed", "opt_policy", "seq_len", "patience", "warmup_ratio", "lr_schedule", "weight_decay", "max_grad_norm")
TEXT = ("transfer_limit", "transfer_select", "language_temperature", "transfer_train", "augment_mentions")
TRANSFER = (*TEXT, "distil_chunk_size", "holdout_ratio", "student_distil_batch_size", "distil_epochs")
STUDENT = ("dropout", "freeze_word_embedding")
USES = {  # the parameters that each stage's result follows from
    "teacher": (*RECIPE, "pt_teacher_checkpoint", "tf_model_check", "train_limit", "teacher_batch_size",
                "teacher_epochs", "teacher_lr"),
    "student-init": ("seed", "student_init", "pt_student_checkpoint", "student_arch", "embedding_size", "hidden_size",
                     "num_hidden_layers", "copied_layers", "num_attention_heads", "intermediate_size",
                     "compress_word_embedding", "trim_vocab", "student_tokenizer"),
    "hidden": (*RECIPE, *TRANSFER, *STUDENT, "distil_multi_hidden_states", "distil_attention", "layer_map",
               "layer_weights", "projection_gelu", "hidden_loss", "attention_loss", "relation_heads", "hidden_weight",
               "attention_weight", "distil_lr"),
    "logits": (*RECIPE, *TRANSFER, *STUDENT, "logit_loss", "temperature", "hard_label_weight", "unfreeze", "logit_lr"),
    "labels": (*RECIPE, *STUDENT, "train_limit", "unfreeze", "student_ft_batch_size", "ft_epochs", "ft_lr"),
    "evaluation": ("baselines",), "student": ("onnx", "licence")}
FILES = {"teacher": ("train", "dev", "labels"), "hidden": ("transfer", "dev"), "logits": ("transfer", "dev"),
         "labels": ("train", "dev"), "evaluation": ("dev", "test")}


def task_file(params: Params, run: Run, name: str) -> Path:
    """The path of train, dev, test, labels or transfer; writes the demo corpus when first asked."""
    folder = run.origin.dir / "task" if params.task == DEMO_TASK else Path(params.task)
    if params.task == DEMO_TASK and not (folder / "transfer.tsv").is_file():
        demo_data.write_demo_corpus(folder)
    return Path(params.transfer_file if name == "transfer" and params.transfer_file else folder / f"{name}.tsv")


def hash_input(path: Path) -> str:
    """The hash of a file that a stage reads, or of many. Raises DataError if it is absent."""
    facts = sources.facts_of(path)
    return facts[0].get("sha256", facts[0]["file"]) if len(facts) == 1 else fingerprint(facts)


def teacher_dir(params: Params, run: Run) -> Path:
    """Where the fine-tuned teacher is, or will be."""
    return Path(params.teacher_model_dir or run.stage("teacher").dir)


def _tf_file(params: Params, parameter: str) -> Path | None:
    """The TensorFlow file of what a parameter names, if tf_model_check says so. Raises CheckpointError if there are no
    other weights and it does not."""
    source = getattr(params, parameter)
    found = tf_weights.find_checkpoint(source)
    if found and not params.tf_model_check and not any(Path(source).glob("*.safetensors")):
        raise models.CheckpointError(f"{parameter}: {source} holds a TensorFlow checkpoint, {found.name}, and no "
                                     "model.safetensors; set tf_model_check: true")
    return found if params.tf_model_check else None


def given_teacher(params: Params, run: Run) -> Path | None:
    """The fine-tuned teacher that teacher_model_dir holds and this run did not write: folder or TensorFlow file."""
    begun, folder = read_json(run.stage("teacher").dir / "begun.json", {}, lenient=True), teacher_dir(params, run)
    ours = "teacher_model_dir" in begun and begun["teacher_model_dir"] in (None, params.teacher_model_dir)
    if not params.teacher_model_dir or ours:
        return None
    return _tf_file(params, "teacher_model_dir") or (folder if any(folder.glob("*.safetensors")) else None)


def teacher_source(params: Params, run: Run) -> tuple[str, str]:
    """The fine-tuned teacher, or the checkpoint that it starts from, a TensorFlow one by its file; without a teacher,
    the student's; and the parameter that names it. CheckpointError: tf_model_check is at odds with the files."""
    if not params.distil:
        return params.pt_student_checkpoint, "pt_student_checkpoint"
    if given := given_teacher(params, run):
        return str(given), "teacher_model_dir"
    if is_done(params, run, "teacher"):
        return str(teacher_dir(params, run)), "teacher_model_dir"
    found = _tf_file(params, "pt_teacher_checkpoint")
    if params.tf_model_check and not found:
        raise models.CheckpointError(f"tf_model_check: no tf_model.h5 or *.ckpt.index in pt_teacher_checkpoint "
                                     f"{params.pt_teacher_checkpoint!r}; give a folder that has one, or set "
                                     "tf_model_check: false")
    return str(found or params.pt_teacher_checkpoint), "pt_teacher_checkpoint"


def depends(params: Params, run: Run, name: str) -> dict:
    """Everything the result of a stage follows from, as flat names and values."""
    params, run = (run.origin.params, run.origin) if name in SHARED and run.origin is not run else (params, run)
    values, files, given = params.pick(*USES.get(name, ())), FILES.get(name, ()), given_teacher(params, run)
    unit = {} if params.unit == "word" else {"unit": params.unit}
    if name == "teacher" and given:
        weights = fingerprint([hash_input(path) for path in sorted(given.glob("*.safetensors")) or [given]])
        values, files = {"teacher weights": weights, "seq_len": params.seq_len, **unit}, ("dev", "labels")
    elif name == "teacher":
        values |= {"teacher_epochs": params.teacher_epochs or params.ft_epochs, **unit,
                   "teacher_model_dir": params.teacher_model_dir}  # where it is written
    elif name == "student-init" and params.trim_vocab:
        values |= params.pick("train_limit", "seq_len", *TEXT)
        files = ("train", "dev", "transfer")
    elif name == "student-init" and params.initialisation == "teacher_pca":
        values, files = values | params.pick("seq_len", *TEXT), ("transfer",)
    elif name == "logits" and params.hard_label_weight:
        values, files = values | params.pick("train_limit", "student_ft_batch_size"), (*files, "train")
    elif name == "labels" and not params.distil:
        weights = [hash_input(path) for path in sorted(Path(params.pt_student_checkpoint).glob("*.safetensors"))]
        values, files = values | unit | {"student": weights or params.pt_student_checkpoint}, (*files, "labels")
    if "transfer" in files and (params.transfer_train or params.augment_mentions):
        values, files = values | params.pick("train_limit"), (*files, "train")
    if "transfer" in files and params.more_teachers and (name == "logits" or params.transfer_select == "uncertain"):
        values |= {"more_teachers": ensemble.hash_weights(params.more_teachers)}
    values |= {f"{file} file": hash_input(task_file(params, run, file)) for file in files}
    before = stage_before(params, name)
    return values | ({f"stage {before}": run.stage(before).fingerprint} if before else {})


def is_done(params: Params, run: Run, name: str) -> bool:
    """Whether the stage, and every one before it, is finished with these parameters and data."""
    names = stages_of(params)[: stages_of(params).index(name) + 1]
    return all(run.stage(n).done == depends(params, run, n) for n in names)
