"""What xdistil runs, through its public calls. All that knows how the library is put together is in this file."""

import copy
import tempfile
from pathlib import Path

import numpy as np
import torch
from benchmarks.work import BATCH, CLIP, LEARNING_RATE, Setting, now
from torch import nn

from xdistil import data, dropout, embeddings, evaluate, export, losses, models, stages, students
from xdistil.devices import multiplies_bf16, open_accelerator
from xdistil.frozen import FrozenStates, run_upper
from xdistil.inputs import Inputs
from xdistil.params import load_params
from xdistil.runs import STAGES, Run
from xdistil.targets import TargetSpec, TargetStore
from xdistil.training import Feed, Recipe, fit
from xdistil.unfreeze import layer_groups

POLICIES = {"fp32": "float32", "bf16": "mixed_bfloat16"}


def precisions() -> list[str]:
    """What this processor multiplies natively."""
    return ["fp32", *(["bf16"] if multiplies_bf16("cpu") else [])]


def as_examples(sentences: list[np.ndarray]) -> data.Examples:
    """Sentences of ids as the library keeps them."""
    offsets = np.cumsum([0, *map(len, sentences)]).astype(np.int64)
    ids, n = np.concatenate(sentences).astype(np.int32), len(sentences)
    return data.Examples(ids, np.full(len(ids), losses.IGNORED, np.int16), np.full(len(ids), -1, np.int32), offsets,
                         np.arange(n, dtype=np.int32))


def logit_terms(model, batch):
    """The loss of the logit stage, as `stages.distil_logits` has it."""
    return {"logits": losses.logit_mse(run_upper(model, batch), batch["teacher_logits"], batch["attention_mask"])}


class Ours:
    """`fit` over `TargetStore.batches` for one stage ("stage1" or "logits") in "fp32" or "bf16". With `head_only`,
    nothing below the classifier learns."""

    def __init__(self, setting: Setting, stage: str, precision: str, given, head_only: bool = False):
        self.setting, self.stage, self.precision = setting, stage, precision
        self.name = f"ours {precision}" + " (head only)" * head_only
        self.teacher, student, projections = given
        dropout.pool_dropout(student)  # as `load_classifier` does
        models.return_maps(student)  # as the stages do on a CPU
        self.terms, self.spec, self.model = logit_terms, TargetSpec(), student
        fixed = {name for name, p in student.named_parameters() if p is student.get_input_embeddings().weight}
        head = dict(layer_groups(student))["head"]
        if stage == "stage1":
            hidden, maps = setting.pairs, setting.pairs[1:]
            self.terms = students.distil_terms(hidden, maps, "mse", "mse")
            self.spec = TargetSpec(tuple(t for _, t in hidden), tuple(t for _, t in maps))
            self.model = nn.ModuleDict({"student": student, "projections": projections})
            fixed = {f"student.{name}" for name in (*fixed, *head)}
        self.learning = head if head_only else [n for n, _ in self.model.named_parameters() if n not in fixed]

    def store(self, sentences, folder: str) -> TargetStore:
        """A new store of the teacher's outputs; the accelerator is new too, as its state is shared by all of them."""
        self.accelerator = open_accelerator("cpu", POLICIES[self.precision], quiet=True)
        models.prepare_to_answer(self.teacher, self.accelerator, exact=False)
        return TargetStore(lambda: self.teacher, self.teacher.config, self.spec, as_examples(sentences), 0,
                           self.accelerator, folder=Path(folder) / "targets", budget_bytes=1e12)

    def loss(self, sentences) -> float:
        """Of one batch, as the student stands."""
        with tempfile.TemporaryDirectory() as folder:
            windows = np.arange(len(sentences))
            batch, *more = self.store(sentences, folder).batches("one", windows, 10 * len(sentences))
            assert not more
            return float(sum(self.terms(self.model, batch).values()).detach())

    def unit(self, sentences) -> dict[str, np.ndarray]:
        """Two epochs over new sentences: seconds by part, from asking for the first batch to asking for a score. What
        `fit` does once per call or epoch (preparing, scoring, checkpoints) is left out, as it is for the peers."""
        marks = []

        def batches(pass_number: int, _chunk: int):
            marks.append(now())
            return frozen.feed(store.batches("chunk-0", windows, BATCH, pass_number))

        def score(_model):
            marks.append(now())
            return {"metric": "held-out loss", "score": -len(marks)}  # always better: `fit` keeps the best weights

        with tempfile.TemporaryDirectory() as folder:
            store, windows = self.store(sentences, folder), np.arange(len(sentences))
            student = self.model["student"] if self.stage == "stage1" else self.model
            frozen = FrozenStates(student, store.examples, windows, 0, self.accelerator, 1e12)
            fit(self.model, self.terms, Feed(batches, len(windows)), score,
                Recipe(2, LEARNING_RATE, patience=9, max_grad_norm=CLIP), [("all", self.learning)],
                accelerator=self.accelerator, folder=Path(folder))
            self.stored = sum(path.stat().st_size for path in (Path(folder) / "targets").rglob("*.bin"))
        _, began, ended, again, over = marks
        return {"first": ended - began, "later": over - again}


def all_ours(setting: Setting, stage: str, given) -> list[Ours]:
    """Every way of ours that can run here, each with models of its own; the head alone in the best precision."""
    ways = [(precision, False) for precision in precisions()] + [(precisions()[-1], True)] * (stage == "logits")
    return [Ours(setting, stage, precision, copy.deepcopy(given), head_only) for precision, head_only in ways]


def encode(path, tokenizer, seq_len: int, labels: list[str]) -> data.Examples:
    """A labelled file as ids and labels, no word remembered from before."""
    data.REMEMBERED.pop(tokenizer, None)
    return data.encode(data.read_tagged(path, labels), tokenizer, seq_len, labels)


def compress(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Word embeddings in the width of a student's rows, and written into them."""
    return embeddings.compress(matrix, rows.shape[1], out=rows)[0]


class Predictor:
    """Tags of one sentence, and the model's part of it, in the precision that the library chooses by itself."""

    def __init__(self, model, tokenizer, seq_len: int, labels: list[str]):
        self.tokenizer, self.seq_len, self.labels = tokenizer, seq_len, labels
        is_onnx = isinstance(model, export.OnnxTagger)  # it comes as it is
        self.accelerator = open_accelerator("cpu", "float32" if is_onnx else "auto", quiet=True)
        self.model = model if is_onnx else models.prepare_to_answer(model, self.accelerator)

    def prepare(self, words: list[str]) -> data.Examples:
        """The ids of a sentence."""
        return data.encode(data.Sentences([words]), self.tokenizer, self.seq_len)

    def run(self, examples: data.Examples, words: list[str]) -> list[str]:
        """From ids to tags."""
        (tags,), _ = evaluate.predict(self.model, examples, [words], self.labels, self.tokenizer.pad_token_id,
                                      self.accelerator, 1)
        return tags


def onnx_int8(model, folder) -> export.OnnxTagger:
    """The model as an int8 ONNX file, to be run."""
    model.save_pretrained(folder)
    export.export_onnx(model, Path(folder) / "onnx")
    return export.OnnxTagger(folder, "int8")


def teacher_passes(root: Path) -> float:
    """How often the teacher runs over the transfer set in stages 1 to 4 of params/smoke.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        params = load_params(str(root / "params/smoke.yaml"), {"model_dir": folder, "device": "cpu"})
        run = Run(params)
        for name in list(STAGES.values())[:4]:
            getattr(stages, name)(params, run)
        asked = sum(run.stage(name).metrics["teacher_windows"] for name in ("hidden", "logits"))
        return asked / len(Inputs(params, run).read("transfer")[1])
