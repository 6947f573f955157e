"""What a stage reads: its files, what it depends on, and the task's encoded sentences."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np

from xdistil import data, evaluate, models
from xdistil.files import hash_file
from xdistil.params import DEMO_TASK, RANDOM_TEACHER, Params
from xdistil.runs import STAGES, Run
from xdistil.tables import Table
from xdistil.training import Feed

OPTIMISER = ("seed", "opt_policy", "patience", "warmup_ratio", "lr_schedule", "weight_decay",
             "max_grad_norm")
TRANSFER = ("seq_len", "transfer_limit", "distil_chunk_size", "holdout_ratio")
USES = {  # what each stage depends on, beside its files and the stage before it
    "teacher": (*OPTIMISER, "pt_teacher", "pt_teacher_checkpoint", "seq_len", "train_limit",
                "teacher_batch_size", "teacher_epochs", "ft_epochs", "teacher_lr"),
    "student-init": ("seed", "student_init", "pt_student_checkpoint", "hidden_size",
                     "num_hidden_layers", "num_attention_heads", "intermediate_size",
                     "compress_word_embedding", "freeze_word_embedding"),
    "hidden": (*OPTIMISER, *TRANSFER, "distil_multi_hidden_states", "distil_attention", "layer_map",
               "hidden_loss", "attention_loss", "hidden_weight", "attention_weight", "dropout",
               "student_distil_batch_size", "distil_epochs", "distil_lr"),
    "logits": (*OPTIMISER, *TRANSFER, "logit_loss", "temperature", "unfreeze", "dropout",
               "student_distil_batch_size", "distil_epochs", "logit_lr"),
    "labels": (*OPTIMISER, "seq_len", "train_limit", "unfreeze", "dropout",
               "student_ft_batch_size", "ft_epochs", "ft_lr"),
    "evaluation": ("seq_len",),
    "student": (),
}
FILES = {"teacher": ("train", "dev", "labels"), "hidden": ("transfer", "dev"), "logits": ("dev",),
         "labels": ("train", "dev"), "evaluation": ("dev", "test")}


def task_file(params: Params, run: Run, name: str) -> Path:
    """The path of train, dev, test, labels or transfer; writes the demo corpus when first asked."""
    folder = Path(params.task)
    if params.task == DEMO_TASK:
        from xdistil.demo_data import write_demo_corpus

        folder = run.dir / "task"
        if not (folder / "labels.tsv").is_file():
            write_demo_corpus(folder)
    if name == "transfer" and params.transfer_file:
        return Path(params.transfer_file)
    return folder / f"{name}.tsv"


@functools.lru_cache(maxsize=64)
def _hash_as_it_is(path: Path, _modified: int, _size: int) -> str:
    return hash_file(path)


def _hash(path: Path) -> str:
    next(data.read_lines(path), None) if path.suffix == ".tsv" else None  # a clear error if absent
    return _hash_as_it_is(path, path.stat().st_mtime_ns, path.stat().st_size)


def teacher_dir(params: Params, run: Run) -> Path:
    """Where the fine-tuned teacher is, or will be."""
    return Path(params.teacher_model_dir or run.dir / "teacher")


def given_teacher(params: Params, run: Run) -> Path | None:
    """The weights of a fine-tuned teacher that we did not write, if teacher_model_dir holds one."""
    weights = sorted(teacher_dir(params, run).glob("*.safetensors"))
    ours = (teacher_dir(params, run) / "xdistil.json").is_file()
    return weights[0] if params.teacher_model_dir and weights and not ours else None


def depends(params: Params, run: Run, name: str) -> dict:
    """Everything the stage's result follows from, as flat names and values."""
    values = params.pick(*USES[name])
    given = given_teacher(params, run)
    if name == "teacher" and given:
        values = {"teacher_model_dir": _hash(given), "seq_len": params.seq_len}
    if name == "teacher" and not given:
        values["teacher_epochs"] = values["teacher_epochs"] or values.pop("ft_epochs")
    for file in FILES.get(name, ()):
        if not (file == "train" and name == "teacher" and given):
            values[f"{file} file"] = _hash(task_file(params, run, file))
    before = list(STAGES)[: list(STAGES).index(name)]
    if before:
        values[f"stage {before[-1]}"] = run.stage(before[-1]).fingerprint
    return values


def is_done(params: Params, run: Run, name: str) -> bool:
    """Whether the stage is finished with these parameters and data, and all before it as well."""
    names = list(STAGES)[: list(STAGES).index(name) + 1]
    return all(run.stage(n).done == depends(params, run, n) for n in names)


def check_files(params: Params, run: Run) -> None:
    """Read every file of the task once. Raises DataError naming file and line for bad input."""
    labels = data.read_labels(task_file(params, run, "labels"))
    for name in ("train", "dev", "test"):
        data.read_tagged(task_file(params, run, name), labels)
    data.read_text(task_file(params, run, "transfer"))


class Inputs:
    """Tokenizer, labels and encoded files of a run, read when first used."""

    def __init__(self, params: Params, run: Run, tokenizer_from: str | Path | None = None):
        self.params, self.run = params, run
        self.tokenizer = models.load_tokenizer(str(tokenizer_from or teacher_dir(params, run)))
        self.pad_id = self.tokenizer.pad_token_id
        self.labels = data.read_labels(task_file(params, run, "labels"))
        given = given_teacher(params, run)
        if given or tokenizer_from is None:
            known = models.load_config(str(teacher_dir(params, run)), "teacher_model_dir").id2label
            if set(known.values()) != set(self.labels):
                raise models.CheckpointError(
                    f"teacher_model_dir: {teacher_dir(params, run)} labels {sorted(known.values())}, "
                    f"but labels.tsv has {sorted(self.labels)}; give a teacher of this task"
                )
            self.labels = [known[i] for i in range(len(known))]

    @functools.lru_cache(maxsize=8)  # noqa: B019 - lives as long as one stage call
    def read(self, name: str) -> tuple[data.Sentences, data.Examples]:
        """Sentences and windows of train, dev, test or transfer."""
        path, p = task_file(self.params, self.run, name), self.params
        if name == "transfer":
            text, labels = data.read_text(path, p.transfer_limit, p.seed), ()
        else:
            labels = self.labels
            text = data.read_tagged(path, labels, p.train_limit if name == "train" else None, p.seed)
        return text, data.encode(text, self.tokenizer, p.seq_len, labels)

    def score(self, model, name: str, accelerator) -> tuple[dict, list[list[str]]]:
        """Scores on dev or test, and the predicted tags."""
        gold, examples = self.read(name)
        tags = evaluate.predict_tags(model, examples, gold.words, self.labels,
                                     accelerator=accelerator, pad_id=self.pad_id)
        return evaluate.score(gold, tags), tags

    def dev_f1(self, accelerator):
        """An `evaluate` for `fit`: macro F1 over languages on dev."""
        def judge(model):
            scores, _ = self.score(model, "dev", accelerator)
            return {"metric": "dev macro F1", "score": scores["macro"], "micro": scores["micro"]}
        return judge

    def labelled(self, batch_size: int) -> Feed:
        """The training set as batches for `fit`."""
        _, examples = self.read("train")
        def batches(pass_number, _chunk):
            seed = self.params.seed + 7919 * pass_number
            for rows in data.batches(examples.lengths, batch_size, seed):
                yield data.collate(examples, rows, self.pad_id)
        return Feed(batches, len(examples))


def _quantiles(values) -> dict:
    names = ("median", "95 %", "longest")
    return dict(zip(names, map(int, np.quantile(values, (0.5, 0.95, 1.0))), strict=True))


def describe(params: Params, run: Run) -> list[Table]:
    """Tables of the task: counts and lengths per file, tags per label, sentences in two files."""
    given = given_teacher(params, run)
    checkpoint = None if params.pt_teacher_checkpoint == RANDOM_TEACHER else (
        params.pt_teacher_checkpoint)
    checkpoint = str(given.parent) if given else checkpoint
    labels = data.read_labels(task_file(params, run, "labels"))
    if checkpoint is None:
        checkpoint = models.random_teacher({"a"}, labels, Path(tempfile.mkdtemp()))
    inputs = Inputs(params, run, tokenizer_from=checkpoint)
    files, tags, texts = [], {label: {"label": label} for label in labels}, {}
    for name in ("train", "dev", "test", "transfer"):
        text, examples = inputs.read(name)
        texts[name] = {" ".join(words) for words in text.words}
        files.append({
            "file": name, "sentences": len(text), "words": sum(map(len, text.words)),
            "languages": len(set(text.languages)), "windows": len(examples),
            **{f"sub-words {k}": v for k, v in _quantiles(examples.lengths).items()},
        })
        for label in labels if text.tags else ():
            tags[label][name] = sum(tag.count(label) for tag in text.tags)
    overlap = [{"in both": f"{a} and {b}", "sentences": len(texts[a] & texts[b])}
               for a, b in (("transfer", "dev"), ("transfer", "test"), ("train", "dev"),
                            ("train", "test"))]
    return [Table(files, f"task {params.task}, seq_len {params.seq_len}"),
            Table(list(tags.values()), "words per label"), Table(overlap, "sentences in two files")]


def lengths(params: Params, run: Run) -> dict[str, list[int]]:
    """Sub-words of each whole sentence of train, dev and transfer, with the teacher's tokenizer."""
    inputs = Inputs(params, run)
    return {
        name: [sum(map(len, pieces)) for pieces in
               data.word_pieces(inputs.tokenizer, inputs.read(name)[0].words)]
        for name in ("train", "dev", "transfer")
    }
