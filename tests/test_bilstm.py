"""The BiLSTM student: what its states are, that it reads no padding, that other tools load it, and a whole run."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_stages import changed, run_stages, smoke_params, weights
from tiny import head_of
from torch import nn

from xdistil import cli, dropout, frozen, models, stages, views
from xdistil.bilstm import BiLstmConfig, BiLstmForTokenClassification, BiLstmLayer
from xdistil.data import collate
from xdistil.export import OnnxTagger, export_onnx
from xdistil.runs import Run
from xdistil.students import build_student, make_projections, state_widths, student_config
from xdistil.unfreeze import encoder_layers, freeze_to, layer_groups, n_frozen_layers, word_embedding

WHOLE = {"student_arch": "bilstm", "embedding_size": 12, "hidden_size": 10, "distil_attention": False}


@pytest.fixture
def model(tokenizer, labels):
    return tiny(len(tokenizer), labels)


def tiny(vocab_size, labels, embedding_size=12, hidden_size=20):
    """Two layers; weights far enough from zero that every step of the recurrence matters."""
    config = BiLstmConfig(vocab_size=vocab_size, embedding_size=embedding_size, hidden_size=hidden_size,
                          num_hidden_layers=2, id2label=dict(enumerate(labels)),
                          label2id={x: i for i, x in enumerate(labels)})
    model = models.from_config(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=2.5 / hidden_size**0.5)
    return model


@pytest.fixture
def batch(examples):
    found = collate(examples, range(6), 0)
    assert 0 < found["attention_mask"].float().mean() < 1
    return found


def test_hidden_states_are_embeddings_and_then_both_directions(model, batch):
    logits, states, _ = models.run_model(model, batch, True)
    n, length = batch["input_ids"].shape
    assert [tuple(x.shape) for x in states] == [(n, length, w) for w in (12, 20, 20)]
    assert state_widths(model.config) == [12, 20, 20]
    torch.testing.assert_close(states[0], word_embedding(model)[batch["input_ids"]])
    torch.testing.assert_close(logits, head_of(model)(states[-1]))
    assert model(**batch).attentions is None and model(**batch).hidden_states is None
    with pytest.raises(RuntimeError, match="set distil_attention: false"):
        models.run_model(model, batch, False, True)


def test_a_layer_is_torchs_bidirectional_lstm_on_each_sentence(model):
    """Against `nn.LSTM(bidirectional=True)` on single sentences, where there is no padding at all."""
    layer, lengths = encoder_layers(model)[0], torch.tensor([5, 1, 3])
    whole = nn.LSTM(12, 10, batch_first=True, bidirectional=True)
    for name, weight in whole.named_parameters():
        side = layer.leftward if name.endswith("_reverse") else layer.rightward
        weight.data.copy_(side.get_parameter(name.removesuffix("_reverse")))
    states = torch.randn(3, 5, 12)
    found = layer(states, lengths)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(found[row, :n], whole(states[row : row + 1, :n])[0][0])


@pytest.mark.parametrize("more", [1, 7])
def test_padding_is_never_read(model, batch, more):
    mask, n = batch["attention_mask"], len(batch["input_ids"])
    wide = {"input_ids": torch.cat([batch["input_ids"], torch.randint(5, 90, (n, more))], 1),
            "attention_mask": torch.cat([mask, torch.zeros(n, more, dtype=torch.int64)], 1)}
    wide["input_ids"][:, :-more][mask == 0] = 33  # whatever stands there
    with torch.no_grad():
        for a, b in zip(*(models.run_model(model, x, True)[1] for x in (batch, wide)), strict=True):
            torch.testing.assert_close(a[mask > 0], b[:, :-more][mask > 0])
    real = models.run_model(model, batch)[0][mask > 0]
    real.square().sum().backward()  # nor does it learn
    seen = set(batch["input_ids"][mask > 0].tolist())
    moved = set(word_embedding(model).grad.abs().sum(1).nonzero().flatten().tolist())
    assert moved <= seen and len(moved) > 10


def test_embeddings_start_at_the_scale_that_gates_work_at(labels, teacher, tokenizer):
    """Unit variance, compressed ones too: at BERT's 0.02 the states of a BiLSTM, which has no norms, are next to
    nothing (multi_ner, 3,000 sentences, 5 epochs on labels: dev loss 0.35, against 0.23)."""
    fresh = models.from_config(BiLstmConfig(vocab_size=900, embedding_size=12, hidden_size=20))
    assert word_embedding(fresh).detach().std().item() == pytest.approx(1, abs=0.05)
    config = student_config(teacher.config, "scratch", None, "bilstm", 12, hidden_size=10, num_hidden_layers=1)
    student, _ = build_student(config, teacher, "scratch", None, labels, tokenizer, True)
    assert word_embedding(student).detach().norm(dim=-1).mean().item() == pytest.approx(12**0.5, rel=0.05)


def test_without_a_mask_everything_is_real(model):
    ids = torch.randint(5, 90, (2, 4))
    torch.testing.assert_close(model(ids).logits, model(ids, torch.ones_like(ids)).logits)
    loss = model(ids, labels=torch.tensor([[1, -100, -100, -100]] * 2)).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(model(ids).logits[:, 0], torch.tensor([1, 1])))


def test_groups_and_frozen_layers_are_those_of_any_encoder(model, batch, examples, accelerator):
    groups = layer_groups(model)
    assert [name for name, _ in groups] == ["head", "layer_2", "layer_1", "embeddings"]
    assert sum((names for _, names in groups), []) and sorted(sum((names for _, names in groups), [])) == sorted(
        name for name, _ in model.named_parameters())
    dropout.pool_dropout(model)
    dropout.set_dropout(model, hidden=0.5, attention=0.0)
    for learning, n_frozen in ((groups[:1], 2), (groups[:2], 1), (groups[:3], 0)):
        freeze_to(model, sum((names for _, names in learning), []))
        assert n_frozen_layers(model) == n_frozen
        kept = frozen.FrozenStates(model, examples, np.arange(6), 0, accelerator, 1e9)
        found = next(kept.feed([dict(batch)]))
        assert ("frozen_states" in found) == (n_frozen > 0)
        torch.manual_seed(1)
        wanted = models.run_model(model, batch)[0]
        torch.manual_seed(1)
        real = batch["attention_mask"] > 0
        torch.testing.assert_close(frozen.run_upper(model, found)[real], wanted[real])


def test_widths_are_named_and_projections_fit_each_state(teacher):
    config = student_config(teacher.config, "scratch", None, "bilstm", 12, hidden_size=24, num_hidden_layers=1,
                            num_attention_heads=4, intermediate_size=None)
    assert isinstance(config, BiLstmConfig)
    assert (config.embedding_size, config.hidden_size, config.num_hidden_layers) == (12, 48, 1)
    pairs, widths = [(0, 0), (1, 4)], state_widths(config)
    found = make_projections(pairs, widths, 48)
    assert {name: tuple(x.weight.shape) for name, x in found.items()} == {"0": (48, 12)}  # the layer is as wide
    states = torch.randn(5, 48)
    gelu = make_projections(pairs, widths, 48, gelu=True)
    assert sorted(gelu) == ["0", "1"]
    torch.testing.assert_close(gelu["1"](states), nn.functional.gelu(gelu["1"][0](states)))


LOAD = """
import sys
import xdistil
assert "transformers" not in sys.modules
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline
model = AutoModelForTokenClassification.from_pretrained(sys.argv[1]).eval()
assert not any(name.startswith("xdistil.") for name in sys.modules if name != "xdistil.bilstm")
found = AutoTokenizer.from_pretrained(sys.argv[1])("Ada Storm", return_tensors="pt")
tags = [x["entity"] for x in pipeline("token-classification", sys.argv[1])("Ada Storm", ignore_labels=[])]
print(type(model).__name__, tags, model(**found).logits.detach().flatten().tolist(), sep="|")
"""


def test_the_auto_classes_load_it_after_import_xdistil_alone(model, tokenizer, labels, tmp_path, root):
    models.save_model(model, tokenizer, tmp_path)
    done = subprocess.run([sys.executable, "-W", "error", "-c", LOAD, str(tmp_path)], cwd=root, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    name, tags, logits = done.stdout.strip().split("|")
    wanted = model(**tokenizer("Ada Storm", return_tensors="pt")).logits
    torch.testing.assert_close(torch.tensor(json.loads(logits)), wanted.flatten())
    assert name == "BiLstmForTokenClassification" and tags == str(
        [labels[i] for i in wanted[0, 1:-1].argmax(-1).tolist()])
    again = models.load_classifier(tmp_path, labels, "model_dir")
    assert type(again) is BiLstmForTokenClassification and not changed(model.state_dict(), again.state_dict())


def test_import_xdistil_after_transformers_registers_it_too(root):
    code = ("from transformers import AutoConfig, AutoModel; import xdistil; "
            "print(type(AutoConfig.for_model('xdistil-bilstm')).__name__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout.strip() == "BiLstmConfig", done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer, labels):
    """Two layers as ONNX files beside the model, too large for the exporter to fold their weights by itself."""
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("onnx"), tiny(len(tokenizer), labels, 40, 128)
    models.save_model(model, tokenizer, folder)
    export_onnx(model, folder / "onnx")
    return folder, model


@pytest.mark.parametrize("rows", [[3], [0, 7, 19], list(range(32))])
@pytest.mark.filterwarnings("error")
def test_onnx_answers_like_torch_whatever_the_shape(exported, examples, rows, capfd):
    folder, model = exported
    batch = collate(examples, np.array(rows), 0)
    with torch.inference_mode():
        wanted, found = models.run_model(model, batch)[0], models.run_model(OnnxTagger(folder, "fp32"), batch)[0]
    assert (wanted - found)[batch["attention_mask"] > 0].abs().max() < 1e-4
    assert "Expected shape" not in capfd.readouterr().err


def test_int8_holds_the_recurrence_as_well(exported, examples):
    import onnx

    folder, model = exported
    operators = {node.op_type for node in onnx.load(folder / "onnx/model-int8.onnx").graph.node}
    assert "DynamicQuantizeLSTM" in operators and "LSTM" not in operators
    batch = collate(examples, range(32), 0)
    real = batch["attention_mask"] > 0
    wanted, found = (models.run_model(x, batch)[0][real].argmax(-1) for x in (model, OnnxTagger(folder, "int8")))
    assert (wanted == found).float().mean() > 0.9


def test_bfloat16_trains_and_stays_close(model, batch):
    wanted, mask = models.run_model(model, batch)[0], batch["attention_mask"] > 0
    with torch.autocast("cpu", torch.bfloat16):
        found = models.run_model(model, batch)[0]
    found[mask].float().square().mean().backward()
    assert (wanted - found.float())[mask].abs().max() < 0.1 * wanted[mask].abs().max()
    assert all(torch.isfinite(p.grad).all() and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.slow
def test_all_seven_stages(tmp_path, capsys):
    run = run_stages(smoke_params(tmp_path / "run", **WHOLE, num_hidden_layers=1, freeze_word_embedding=False,
                                  distil_lr=5e-3, logit_lr=5e-3, onnx=True))
    assert json.loads((run.dir / "student/config.json").read_text())["model_type"] == "xdistil-bilstm"
    built, found = run.stage("student-init").metrics, run.stage("hidden").metrics
    assert built["rank"] == 12 and "SVD" in built["word_embeddings"]
    assert [row["step_name"] for row in run.stage("logits").history if row["kind"] == "eval"][-1] == "embeddings"
    pairs = found["alignment_after"]["hidden_pairs"]
    assert pairs == [[0, 0], [1, 4]] and len(found["alignment_after"]["cka"][0]) == 2
    assert all(b < a for b, a in zip(found["alignment_before"]["cosine"], found["alignment_after"]["cosine"],
                                     strict=True))
    for name in ("hidden", "logits"):
        scores = [row["score"] for row in run.stage(name).history if row["kind"] == "eval"]
        assert min(scores) < 0.95 * scores[0]
    assert run.stage("student").metrics["onnx"]["fp32"]["dev"] == run.stage("labels").metrics["dev"]
    example = views.attention_example(run.params, run)
    assert np.isnan(example["student"]).all() and example["student"].shape[1:] == example["teacher"].shape[1:]
    assert "import xdistil" in (run.dir / "student/README.md").read_text()
    assert "GB" in str(views.needs(run.params, run))
    (tmp_path / "in.txt").write_text("Ada Storm\n")
    assert cli.main(["predict", str(run.dir / "student"), str(tmp_path / "in.txt"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Ada Storm\t")


def test_through_gelu_no_head_is_folded_and_the_run_says_so(tmp_path, capsys):
    params = smoke_params(tmp_path / "run", **WHOLE, num_hidden_layers=1, projection_gelu=True, distil_epochs=1)
    run = run_stages(params, "teacher", "hidden")
    assert "[hidden] the student's head is new: none can be folded through GELU" in capsys.readouterr().out
    before, after = weights(run.dir / "student-init"), weights(run.dir / "hidden")
    heads = {name for name in before if name.startswith("score")}
    moved = changed(before, after)
    assert heads and not heads & moved and any("layers.0" in name for name in moved)
    stages.distil_logits(params, Run(params))
    assert heads <= changed(after, weights(run.dir / "logits"))


def test_embeddings_wider_than_the_teachers_are_refused(tmp_path):
    params = smoke_params(tmp_path / "run", **WHOLE | {"embedding_size": 52})
    with pytest.raises(models.CheckpointError, match="^embedding_size: 52, .*choose at most 48"):
        stages.check(params, Run(params))


def test_a_frozen_layer_can_still_be_passed_through(model):
    """A layer in eval mode under one that learns gives no gradient trouble."""
    layer = BiLstmLayer(12, model.config).eval().requires_grad_(False)
    states = torch.randn(2, 4, 12, requires_grad=True)
    layer(states, torch.tensor([4, 2])).sum().backward()
    assert states.grad[1, 2:].abs().max() > 0  # padding is run too, to no one's harm
