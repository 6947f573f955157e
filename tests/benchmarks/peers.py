"""What others run: the loop that a typical user writes with the Hugging Face Trainer, and TextBrewer's distillers.
Both pad to `seq_len` and ask the teacher at every step, but for the logits that TextBrewer caches."""

import copy
import importlib
import sys
import tempfile
import types
from functools import cache, partial

import numpy as np
import torch
import transformers
from benchmarks.work import BATCH, CLIP, LEARNING_RATE, Setting, now
from torch import nn


@cache
def textbrewer():
    """The package, or None and a line that says why there are no rows of it."""
    # Its log writer is imported always and used never here.
    stub = types.ModuleType("tensorboardX")
    stub.SummaryWriter = None
    sys.modules.setdefault("tensorboardX", stub)
    try:
        return importlib.import_module("textbrewer")
    except ImportError as error:
        print(f"no rows of TextBrewer: {error}; pip install --no-deps textbrewer==0.2.1.post1", file=sys.stderr)
        return None


def pad(sentences: list[np.ndarray], seq_len: int) -> list[dict[str, torch.Tensor]]:
    """A dataset as tokenizers give it with padding="max_length"."""
    rows = []
    for ids in sentences:
        row = {"input_ids": torch.zeros(seq_len, dtype=torch.long)}
        row["input_ids"][: len(ids)] = torch.from_numpy(ids)
        rows.append(row | {"attention_mask": (torch.arange(seq_len) < len(ids)).long()})
    return rows


def masked_mse(student, teacher, mask):
    """Mean squared error where the mask, broadcast, is 1."""
    mask = mask.expand_as(student)
    return (((student.float() - teacher.float()) ** 2) * mask).sum() / mask.sum()


class Student(nn.Module):
    """Student and projections as the one model of a Trainer."""

    def __init__(self, student, projections):
        super().__init__()
        self.student, self.projections = student, projections

    def forward(self, **inputs):
        return self.student(**inputs)


class LoopTrainer(transformers.Trainer):
    """Distils with `compute_loss`, the usual way."""

    def __init__(self, *args, teacher, setting: Setting, stage: str, **options):
        super().__init__(*args, **options)
        self.teacher, self.setting, self.stage = teacher, setting, stage

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the terms; the teacher runs in the student's precision."""
        mask, deep = inputs["attention_mask"], self.stage == "stage1"
        asked = {"output_hidden_states": deep, "output_attentions": deep}
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            goal = self.teacher(**inputs, **asked)
        out = model(**inputs, **asked)
        if not deep:
            return masked_mse(out.logits, goal.logits, mask[..., None])
        loss, both = 0.0, mask[:, None, :, None] * mask[:, None, None, :]
        projections = self.accelerator.unwrap_model(model).projections
        with torch.autocast("cpu", torch.bfloat16, enabled=self.args.bf16):
            for s, t in self.setting.pairs:
                projected = projections[str(s)](out.hidden_states[s])
                loss = loss + masked_mse(projected, goal.hidden_states[t], mask[..., None])
            for s, t in self.setting.pairs[1:]:
                loss = loss + masked_mse(out.attentions[s - 1], goal.attentions[t - 1], both)
        return loss


class Epoch(transformers.TrainerCallback):
    """When the epoch began and ended: no set-up, no saving."""

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Before the first batch is fetched."""
        self.began = now()

    def on_epoch_end(self, args, state, control, **kwargs):
        """After the last update."""
        self.ended = now()


class Loop:
    """A Trainer that pads to `seq_len` and runs the teacher at every step, in "fp32" or "bf16"."""

    def __init__(self, setting: Setting, stage: str, precision: str, models):
        self.setting, self.stage, self.precision = setting, stage, precision
        self.teacher, self.student, self.projections = models
        self.name = f"loop {precision}"

    def trainer(self, sentences, folder: str) -> LoopTrainer:
        """A new Trainer over the student as it stands."""
        args = transformers.TrainingArguments(
            folder, per_device_train_batch_size=BATCH, num_train_epochs=1, learning_rate=LEARNING_RATE,
            max_grad_norm=CLIP, bf16=self.precision == "bf16", use_cpu=True, save_strategy="no", report_to="none",
            disable_tqdm=True, remove_unused_columns=False)
        trainer = LoopTrainer(
            Student(self.student, self.projections), args, train_dataset=pad(sentences, self.setting.seq_len),
            teacher=self.teacher, setting=self.setting, stage=self.stage)
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer

    def loss(self, sentences) -> float:
        """Of one batch, as the students stand."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(sentences, folder)
            batch = transformers.default_data_collator(trainer.train_dataset)
            return float(trainer.compute_loss(trainer.model, batch).detach())

    def unit(self, sentences) -> dict[str, np.ndarray]:
        """One epoch: seconds by part."""
        with tempfile.TemporaryDirectory() as folder:
            trainer, epoch = self.trainer(sentences, folder), Epoch()
            trainer.add_callback(epoch)
            trainer.train()
        return {"first": epoch.ended - epoch.began}


def _states(batch, out):
    return {"hidden": out.hidden_states, "attention": out.attentions, "inputs_mask": batch["attention_mask"]}


def _logits(batch, out):
    return {"logits": out.logits, "logits_mask": batch["attention_mask"]}


class TextBrewer:
    """GeneralDistiller on hidden states and attention maps, or BasicDistiller on logits that it caches; float32."""

    name, precision = "TextBrewer fp32", "fp32"

    def __init__(self, setting: Setting, stage: str, models):
        self.setting, self.stage, (self.teacher, self.student, self.projections) = setting, stage, models

    def distiller(self, folder: str):
        """A new distiller over the student as it stands."""
        tb, deep = textbrewer(), self.stage == "stage1"
        width = self.setting.student.hidden, self.setting.teacher.hidden
        matches = [{"layer_T": t, "layer_S": s, "feature": "hidden", "loss": "hidden_mse", "weight": 1,
                    "proj": ["linear", *width]} for s, t in self.setting.pairs]
        matches += [{"layer_T": t - 1, "layer_S": s - 1, "feature": "attention", "loss": "attention_mse", "weight": 1}
                    for s, t in self.setting.pairs[1:]]
        how = {"intermediate_matches": matches} if deep else {"is_caching_logits": True}
        distiller = (tb.GeneralDistiller if deep else tb.BasicDistiller)(
            tb.TrainingConfig(output_dir=folder, device="cpu"),
            tb.DistillationConfig(kd_loss_type="mse", temperature=1, **how), self.teacher, self.student,
            *[_states if deep else _logits] * 2)
        for own, (s, _) in zip(getattr(distiller, "projs", ()), self.setting.pairs, strict=False):
            own.load_state_dict(self.projections[str(s)].state_dict())
        distiller.save_and_callback = lambda *args: None  # no unit of ours or of the loop saves either
        return distiller

    def loss(self, sentences) -> float:
        """Of one batch of stage 1, as the student stands."""
        batch = transformers.default_data_collator(pad(sentences, self.setting.seq_len))
        asked = {"output_hidden_states": True, "output_attentions": True}
        with tempfile.TemporaryDirectory() as folder:
            return float(self.distiller(folder).train_on_batch(batch, asked)[0].detach())

    def unit(self, sentences) -> dict[str, np.ndarray]:
        """One epoch: seconds by part; with cached logits, `later` is what an epoch costs after the first."""
        deep, cached = self.stage == "stage1", []
        loader = torch.utils.data.DataLoader(pad(sentences, self.setting.seq_len), BATCH, shuffle=True)
        optimizer = torch.optim.AdamW([p for p in self.student.parameters() if p.requires_grad], LEARNING_RATE)
        with tempfile.TemporaryDirectory() as folder:
            distiller = self.distiller(folder)
            ask = distiller.cache_logits
            distiller.cache_logits = lambda *args: cached.append((ask(*args), now())[1])
            asked = {"output_hidden_states": True, "output_attentions": True} if deep else {}
            with distiller:
                began = now()
                distiller.train(optimizer, loader, num_epochs=1, max_grad_norm=CLIP, **asked)
                ended = now()
        return {"first": ended - began} | ({} if deep else {"later": ended - cached[-1]})


def all_peers(setting: Setting, stage: str, models, precisions) -> list:
    """Every peer that can run here: one teacher for all, a student for each."""
    makers = [partial(Loop, setting, stage, precision) for precision in precisions]
    makers += [partial(TextBrewer, setting, stage)] if textbrewer() else []
    return [make((models[0], *copy.deepcopy(models[1:]))) for make in makers]


def encode(path, tokenizer, seq_len: int, labels: list[str]) -> tuple[list, list]:
    """Ids and labels of a labelled file with the fast tokenizer, in batches of 1,000; labels on first sub-words."""
    with open(path, encoding="utf-8") as file:
        rows = [[column.split(" ") for column in line.rstrip("\n").split("\t")[:2]] for line in file if line.strip()]
    ids, tags, label_id = [], [], {label: i for i, label in enumerate(labels)}
    for at in range(0, len(rows), 1000):
        batch = rows[at : at + 1000]
        encoded = tokenizer([words for words, _ in batch], is_split_into_words=True, truncation=True,
                            max_length=seq_len)
        ids += encoded["input_ids"]
        for i, (_, names) in enumerate(batch):
            last, row = None, []
            for word in encoded.word_ids(i):
                row.append(-100 if word is None or word == last else label_id[names[word]])
                last = word
            tags.append(row)
    return ids, tags
