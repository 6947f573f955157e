"""Parity with the original TensorFlow code (microsoft/xtreme-distil-transformers), see data/reference/README.md."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from xdistil import losses
from xdistil.models import load_classifier, run_model
from xdistil.students import distil_terms, spread
from xdistil.training import Feed, Recipe, fit

FOLDER = Path(__file__).parent / "data" / "reference"
EXPECTED = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
LABELS = [f"L{i}" for i in range(5)]
HIDDEN = spread(2, 4, "top")  # all of them, embeddings as well
MAPS = HIDDEN[1:]
# our names of the terms: the reference counts layers from the top
TERMS = {"hidden_2": "dense_1_loss", "hidden_1": "dense_1_1_loss", "hidden_0": "dense_1_2_loss",
         "attention_2": "student_1_loss", "attention_1": "student_1_1_loss"}
STAGE_1, STAGE_2 = ({name: torch.from_numpy(x) for name, x in np.load(FOLDER / file).items()}
                    for file in ("stage1.npz", "stage2.npz"))


def load(name):
    model = load_classifier(FOLDER / name, LABELS, name).eval()
    model.set_attn_implementation("eager")
    return model


def linear(arrays, name):
    """A Keras dense layer as a torch one."""
    kernel = arrays[f"{name}/kernel"]
    layer = nn.Linear(*kernel.shape)
    with torch.no_grad():
        layer.weight.copy_(kernel.T)
        layer.bias.copy_(arrays[f"{name}/bias"])
    return layer


@pytest.fixture
def stage_1():
    """Student and projections, and all sixteen sentences as one batch."""
    projections = nn.ModuleDict({"2": linear(STAGE_1, "dense_1"), "1": linear(STAGE_1, "dense_1_1"),
                                 "0": linear(STAGE_1, "dense_1_2")})
    ids = STAGE_1["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids),
             "teacher_hidden": torch.stack([STAGE_1[f"teacher_output_{i}"] for i in (2, 1, 0)], 2),
             "teacher_attention": torch.stack([STAGE_1[f"teacher_output_{i}"] for i in (4, 3)], 1)}
    return nn.ModuleDict({"student": load("student"), "projections": projections}), batch


@pytest.fixture
def stage_2():
    ids = STAGE_2["input_ids"]
    modules = {"student": load("student"), "projection": linear(STAGE_2, "dense_2"), "head": linear(STAGE_2, "dense")}
    return nn.ModuleDict(modules), {"input_ids": ids, "attention_mask": torch.ones_like(ids),
                                    "teacher_logits": STAGE_2["teacher_logits"]}


def logit_terms(modules, batch):
    state = run_model(modules["student"], batch, True)[1][-1]
    logits = modules["head"](modules["projection"](state))
    return {"logits": losses.logit_mse(logits, batch["teacher_logits"], batch["attention_mask"])}


def test_our_layer_pairs_are_those_of_the_reference(stage_1):
    modules, batch = stage_1
    with torch.no_grad():
        _, states, maps = run_model(load("teacher"), batch, True, True)
        _, own_states, own_maps = run_model(modules["student"], batch, True, True)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for i, (_, t) in enumerate(HIDDEN):
        torch.testing.assert_close(states[t], batch["teacher_hidden"][:, :, i], **close)
    for i, (_, t) in enumerate(MAPS):
        torch.testing.assert_close(maps[t - 1], batch["teacher_attention"][:, i], **close)
    for i in range(3):  # the student's outputs before training, from the top
        torch.testing.assert_close(modules["projections"][str(2 - i)](own_states[2 - i]),
                                   STAGE_1[f"student_output_{i}"], **close)
    for i in range(2):
        torch.testing.assert_close(own_maps[1 - i], STAGE_1[f"student_output_{3 + i}"], **close)


def test_each_term_of_stage_1_and_their_sum(stage_1):
    modules, batch = stage_1
    with torch.inference_mode():
        found = {name: float(x) for name, x in distil_terms(HIDDEN, MAPS, "mse", "mse")(modules, batch).items()}
    assert {TERMS[name]: x for name, x in found.items()} == pytest.approx(EXPECTED["stage1"]["terms"], rel=1e-5)
    assert sum(found.values()) == pytest.approx(EXPECTED["stage1"]["loss"], rel=1e-5)


def test_the_logit_loss(stage_2):
    modules, batch = stage_2
    with torch.inference_mode():
        assert float(logit_terms(modules, batch)["logits"]) == pytest.approx(EXPECTED["stage2"]["loss"], rel=1e-5)
        head = linear({f"head/{x}": STAGE_2[f"teacher_head_{x}"] for x in ("kernel", "bias")}, "head")
        torch.testing.assert_close(head(STAGE_1["teacher_output_0"]), batch["teacher_logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_six_epochs_follow_the_reference(stage, request, accelerator, tmp_path):
    modules, whole = request.getfixturevalue(stage.replace("stage", "stage_"))
    terms = distil_terms(HIDDEN, MAPS, "mse", "mse") if stage == "stage1" else logit_terms

    def feed(_pass_number, _chunk):
        for i in range(0, 16, 4):
            yield {name: x[i:i + 4] for name, x in whole.items()}

    def evaluate(model):
        with torch.inference_mode():
            return {"metric": "loss", "score": sum(map(float, terms(model, whole).values()))}

    recipe = Recipe(epochs=6, lr=3e-5, patience=6, warmup_ratio=0.0, lr_schedule="constant", weight_decay=0.0,
                    max_grad_norm=1e9)
    names = [name for name, _ in modules.named_parameters() if "student.classifier" not in name]
    result = fit(modules, terms, Feed(feed, 16), evaluate, recipe, [("all", names)], accelerator=accelerator,
                 folder=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text(encoding="utf-8").splitlines()]
    epochs = [record["loss"] for record in records if record["kind"] == "train"]
    assert epochs == pytest.approx(EXPECTED[stage]["fit_batch4_no_shuffle_epoch_loss"], rel=1e-4)
    assert result["score"] == pytest.approx(EXPECTED[stage]["loss_after"], rel=1e-4)
    assert evaluate(modules)["score"] == result["score"] and result["updates"] == 24
