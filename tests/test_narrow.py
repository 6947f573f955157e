"""Copied layers made narrower: what is exact at full width, what stays alike below it, what is refused."""

import numpy as np
import pytest
import torch
from test_stages import copied, run_stages, smoke, smoke_params, weights  # noqa: F401  two are fixtures
from tiny import head_of
from transformers import AutoModelForTokenClassification

from xdistil import alignment, models, narrow
from xdistil.models import CheckpointError, run_model
from xdistil.provenance import depends
from xdistil.students import build_student, check_shapes, sample_batches, student_config
from xdistil.unfreeze import encoder_layers, word_embedding

SIZES = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": None}


@pytest.fixture
def teacher(teacher):
    """One whose states are not all alike in all directions, as those of a trained one are not: its gains differ, and
    its words lie near a plane."""
    with torch.no_grad():
        for module in teacher.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.copy_(torch.rand(48) + 0.5), module.bias.copy_(0.3 * torch.randn(48))
            elif isinstance(module, torch.nn.Linear):
                module.weight.mul_(4), module.bias.normal_(0, 0.2)
        words = word_embedding(teacher)
        words.copy_(10 * words @ torch.linalg.qr(torch.randn(48, 48))[0] * 0.8 ** torch.arange(48))
    return teacher


@pytest.fixture
def batches(examples, accelerator):
    return list(sample_batches(examples, np.arange(len(examples)), 0, accelerator))


@pytest.fixture
def build(teacher, labels, tokenizer, batches):
    def builder(init="teacher_pca", compress=False, of=teacher, **sizes):
        torch.manual_seed(3)
        config = student_config(of.config, init, None, **SIZES | {"hidden_size": 24} | sizes)
        student, origin = build_student(config, of, init, None, labels, tokenizer, compress, lambda: batches)
        return student.eval(), origin
    return builder


def copy_of(teacher, build, n_layers):
    """The teacher's layers at its own width."""
    return build("teacher_layers", num_hidden_layers=n_layers)[0]


def basis_of(wide, student):
    """P, by what became of the position embeddings."""
    tables = (x.base_model.embeddings.position_embeddings.weight for x in (wide, student))
    return torch.linalg.lstsq(*tables).solution


def test_at_full_width_it_is_the_student_of_copied_layers(build, teacher, batches):
    """The basis only reorders coordinates there, with which norms do commute."""
    found, wide = build(hidden_size=48, intermediate_size=96)[0], copy_of(teacher, build, 2)
    for batch in batches:
        real = batch["attention_mask"] > 0
        (logits, _, _), (wanted, _, _) = (run_model(model, batch) for model in (found, wide))
        torch.testing.assert_close(logits[real], wanted[real], rtol=0, atol=4e-3)  # of about 1, in float32
        torch.testing.assert_close(*(run_model(m, batch, True)[1][-1][real].norm(dim=-1) for m in (found, wide)),
                                   rtol=1e-3, atol=0)


def test_attention_is_exact_in_any_basis_at_full_width(build, teacher, batches):
    """Maps, and what is added to the stream: norms apart, nothing is lost by a rotation. One by one, heads also stay
    what they are."""
    wide, own = copy_of(teacher, build, 2), build(hidden_size=48)[0]
    basis = torch.linalg.qr(torch.randn(48, 48).double())[0]
    batch = max(batches, key=lambda x: x["input_ids"].shape[1])
    states = run_model(wide, batch, True)[1][0]
    real = batch["attention_mask"][:, None, None] > 0
    bias = torch.zeros(real.shape).masked_fill(~real, -1e9)
    given, mine = (encoder_layers(m)[0].attention for m in (wide, own))
    x = torch.nn.functional.pad(states[batch["attention_mask"] > 0].double(), (0, 1), value=1.0)
    turn = torch.block_diag(basis, torch.ones(1, 1))
    for model in (wide, own):
        model.set_attn_implementation("eager")
    with torch.no_grad():
        narrow._narrow_attention(given, mine, basis, turn.T @ (x.T @ x / len(x)) @ turn)
        (out_t, maps_t), (out_s, maps_s) = (a.self(x, bias) for a, x in (
            (given, states), (mine, (states.double() @ basis).float())))
        torch.testing.assert_close(maps_s, maps_t, rtol=0, atol=1e-4)
        torch.testing.assert_close(mine.output.dense(out_s), given.output.dense(out_t) @ basis.float(), rtol=1e-3,
                                   atol=1e-3)
    assert torch.equal(mine.self.key.bias, torch.zeros(48))
    assert (maps_t[:, :, 0] - maps_t[:, :, 1]).abs().max() > 0.01  # no even maps


def test_the_basis_is_orthonormal_principal_and_turned_by_the_gains():
    x, gains = torch.randn(500, 12).double() * 0.7 ** torch.arange(12), torch.rand(12).double()
    moments = [x.T @ x, 9 * (x @ torch.diag(torch.arange(12.0).double())).T @ x.mul(torch.arange(12))]
    found = narrow.principal_basis(moments, 5, gains)
    torch.testing.assert_close(found.T @ found, torch.eye(5).double())
    turned = found.T @ (gains[:, None] * found)
    torch.testing.assert_close(turned, turned.diagonal().diag(), atol=1e-5, rtol=0)
    pooled = sum(m / m.trace() for m in moments)
    torch.testing.assert_close((found.T @ pooled @ found).trace(), torch.linalg.eigvalsh(pooled)[-5:].sum())
    scaled = narrow.principal_basis([moments[0], 100 * moments[1]], 5, gains)  # size is nothing
    torch.testing.assert_close(scaled, found)
    whole = narrow.principal_basis(moments, 12, gains)
    assert torch.equal(whole.round(), whole.round().abs()) and whole.round().sum(0).tolist() == [1] * 12


def test_a_product_of_lower_rank_is_the_best_for_its_inputs():
    left, right = torch.randn(3, 6, 10).double(), torch.randn(3, 6, 8).double()
    x, y = torch.randn(4000, 10).double() * 0.6 ** torch.arange(10), torch.randn(4000, 8).double() + 2
    moments = x.T @ x / len(x), y.T @ y / len(y)

    def error(a, b, i=0):  # of all pairs of x and y
        off = left[i].T @ right[i] - a.T @ b
        return float((off.T @ moments[0] @ off @ moments[1]).trace())

    a, b = narrow.best_product(left, right, 6, *moments)
    assert a.shape == (3, 6, 10) and b.shape == (3, 6, 8)
    torch.testing.assert_close(a.mT @ b, left.mT @ right)
    a, b = narrow.best_product(left, right, 3, *moments)
    plain = narrow.best_product(left, right, 3, torch.eye(10).double(), torch.eye(8).double())
    for i in range(3):
        best = error(a[i], b[i], i)
        assert best < 0.8 * error(plain[0][i], plain[1][i], i)
        for _ in range(5):
            noise = 1e-2 * torch.randn(3, 10).double()
            assert best <= error(a[i] + noise, b[i], i)


def test_its_states_are_nearer_to_the_teachers_than_those_of_other_students(build, teacher, examples):
    wide = copy_of(teacher, build, 2)

    def likeness(student):
        found = alignment.measure_alignment(wide, student, {}, examples, 0, "cpu")["cka"]
        return [found[i][i] for i in range(3)]

    mine, (svd, _), (fresh, _) = likeness(build()[0]), build("scratch", True), build("scratch")
    for other in (likeness(svd), likeness(fresh)):
        assert all(a > b for a, b in zip(mine, other, strict=True)) and mine[-1] > other[-1] + 0.1, (mine, other)
    assert min(mine) > 0.8, mine


def test_its_classifier_is_the_teachers_through_the_basis(build, teacher, batches):
    student, origin = build()
    assert origin == "the teacher's, by principal components of its states"
    basis = basis_of(teacher, student)
    torch.testing.assert_close(head_of(student).weight, head_of(teacher).weight @ basis, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(head_of(student).bias, head_of(teacher).bias)
    again = build()[0].state_dict()
    assert all(torch.equal(x, again[name]) for name, x in student.state_dict().items())


def test_of_more_heads_the_largest_stay(build, teacher):
    attention = encoder_layers(teacher)[1].attention
    with torch.no_grad():  # one head of the second layer, copied first, is silent
        attention.output.dense.weight[:, 12:24] = 0
    wide, own = copy_of(teacher, build, 4), build(num_hidden_layers=4, num_attention_heads=3)[0]
    basis = basis_of(wide, own)
    reads = (wide.get_parameter("bert.encoder.layer.1.attention.self.value.weight") @ basis).reshape(4, 12, 24)
    mine = encoder_layers(own)[1].attention.self.value.weight.reshape(3, 8, 24)
    for i, head in enumerate((0, 2, 3)):  # what a head reads is in the span of what it read
        rest = mine[i].T - reads[head].T @ torch.linalg.lstsq(reads[head].T, mine[i].T).solution
        assert rest.norm() < 1e-2 * mine[i].norm()


@pytest.mark.parametrize("changes, parameter, remedy", [
    ({"hidden_size": 52}, "hidden_size", "choose at most 48"),
    ({"num_attention_heads": 1}, "num_attention_heads", r"of width 24 .*4 of width 12; choose from \[2, 3, 4\]"),
    ({"num_attention_heads": 6}, "num_attention_heads", r"choose from \[2, 3, 4\]"),
    ({"intermediate_size": 200}, "intermediate_size", "the teacher's 96; leave it out")])
def test_sizes_that_the_teacher_does_not_have_name_parameter_and_remedy(teacher, changes, parameter, remedy):
    config = student_config(teacher.config, "teacher_pca", None, **SIZES | {"hidden_size": 24} | changes)
    with pytest.raises(CheckpointError, match=f"^{parameter}: .*{remedy}"):
        check_shapes(teacher.config, config, seq_len=32, init="teacher_pca", compress=False, distil_attention=False)


@pytest.mark.parametrize("config", [
    models.transformers.DistilBertConfig(dim=48, n_layers=4), models.transformers.GPT2Config(),
    models.transformers.ElectraConfig(hidden_size=48, embedding_size=24)])
def test_other_families_name_the_alternatives(config):
    with pytest.raises(CheckpointError, match="^student_init: .*bert, roberta, .* not .*teacher_layers .*scratch"):
        student_config(config, "teacher_pca", None, **SIZES, hidden_size=24)


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "Camembert", "Electra"])
def test_every_family_of_the_layout(family, build, teacher, labels, batches, tmp_path):
    extra = {"embedding_size": 48} if family == "Electra" else {"pad_token_id": 0, "max_position_embeddings": 514}
    config = getattr(models.transformers, family + "Config")(
        vocab_size=len(word_embedding(teacher)), hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=96, id2label=dict(enumerate(labels)), label2id={x: i for i, x in enumerate(labels)}, **extra)
    student, _ = build(of=models.from_config(config).eval())
    student.save_pretrained(tmp_path)
    plain = AutoModelForTokenClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(*(run_model(m, batches[0])[0] for m in (student, plain)))
    assert type(plain).__name__ == f"{family}ForTokenClassification" and plain.config.hidden_size == 24


def test_a_run_from_end_to_end(copied):  # noqa: F811
    folder = copied("teacher")
    params = smoke_params(folder, student_init="teacher_pca", compress_word_embedding=False, trim_vocab=True)
    run = run_stages(params, "teacher", "logits")
    assert run.stage("student-init").metrics["word_embeddings"].startswith("the teacher's, by principal")
    words = "bert.embeddings.word_embeddings.weight"
    assert weights(folder / "logits")[words].shape[1] == 24
    assert torch.equal(weights(folder / "logits")[words], weights(folder / "student-init")[words])  # frozen
    scores = [r["score"] for r in run.stage("hidden").history if r["kind"] == "eval"]
    assert scores[-1] < scores[0]
    other = smoke_params(folder, student_init="teacher_pca", compress_word_embedding=False, trim_vocab=True,
                         transfer_limit=40)
    assert depends(other, run, "student-init") != depends(params, run, "student-init")
