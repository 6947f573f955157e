"""How a student is made: layer pairs, shapes that fit, weights and where they come from, the folded head."""

import numpy as np
import pytest
import torch
from tiny import head_of, random_teacher
from torch import nn
from transformers import BertConfig, RobertaConfig

from xdistil import embeddings, models
from xdistil.data import collate
from xdistil.devices import open_accelerator
from xdistil.models import CheckpointError, load_classifier, load_tokenizer, run_model, save_model
from xdistil.students import (
    build_student,
    check_shapes,
    copied,
    distil_terms,
    fit_projection,
    fold_head,
    make_projections,
    spread,
    student_config,
)
from xdistil.targets import TargetSpec, TargetStore
from xdistil.unfreeze import encoder_layers, word_embedding

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": None}


@pytest.fixture
def batch(examples):
    return collate(examples, range(4), 0)


@pytest.fixture
def build(teacher, labels, tokenizer):
    def builder(init="scratch", checkpoint=None, compress=False, **sizes):
        torch.manual_seed(3)
        config = student_config(teacher.config, init, checkpoint, **SIZES | sizes)
        return build_student(config, teacher, init, checkpoint, labels, tokenizer, compress)
    return builder


def save_pretrained_student(folder, words, labels, width):
    """A checkpoint of its own vocabulary, which shares words with the teacher's."""
    source = random_teacher(words, labels, folder / "raw")
    tokenizer = load_tokenizer(source)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=32, num_labels=len(labels))
    save_model(models.from_config(config), tokenizer, folder / "student")
    return folder / "student"


@pytest.mark.parametrize("n_student, n_teacher, layer_map, pairs", [
    (3, 6, "top", [(0, 3), (1, 4), (2, 5), (3, 6)]), (3, 6, "uniform", [(0, 0), (1, 2), (2, 4), (3, 6)]),
    (2, 4, "top", [(0, 2), (1, 3), (2, 4)]), (4, 6, "uniform", [(0, 0), (1, 2), (2, 3), (3, 4), (4, 6)]),
    (1, 12, "uniform", [(0, 0), (1, 12)]), (2, 2, "top", [(0, 0), (1, 1), (2, 2)]),
    (2, 2, "uniform", [(0, 0), (1, 1), (2, 2)]), (3, 6, "last", [(3, 6)]),
    (3, 6, [[3, 5], [1, 2], [0, 2]], [(0, 2), (1, 2), (3, 5)])])
def test_layers_are_paired(n_student, n_teacher, layer_map, pairs):
    assert spread(n_student, n_teacher, layer_map) == pairs


@pytest.mark.parametrize("n_student, n_teacher, layers, wanted", [
    (3, 12, "uniform", [4, 8, 12]), (3, 12, "lower", [1, 3, 5]), (6, 12, "lower", [1, 2, 3, 4, 5, 6]),
    (4, 12, "lower", [1, 2, 4, 5]), (8, 12, "lower", [*range(1, 9)]), (1, 1, "lower", [1]), (2, 12, [2, 9], [2, 9])])
def test_copied_layers(n_student, n_teacher, layers, wanted):
    assert copied(layers, n_student, n_teacher) == wanted


@pytest.mark.parametrize("layers", [[1, 2], [1, 2, 13], [2, 1, 3], [1, 1, 2]])
def test_copied_layers_that_do_not_fit_are_named(layers):
    with pytest.raises(CheckpointError, match=r"^copied_layers: found \[.*; name 3 layers .*of the teacher's 1..12"):
        copied(layers, 3, 12)


def test_uniform_pairs_never_meet_twice():
    for n_teacher in range(1, 25):
        for n_student in range(1, n_teacher + 1):
            teachers = [t for _, t in spread(n_student, n_teacher, "uniform")]
            assert teachers == sorted(set(teachers)) and teachers[0] == 0 and teachers[-1] == n_teacher


@pytest.mark.parametrize("layer_map", [[[1, 2], [4, 6]], [[1, 7]], [[1, 2], [1, 3]]])
def test_a_map_of_layers_that_are_not_there_names_those_that_are(layer_map):
    with pytest.raises(CheckpointError, match=r"^layer_map: found \[\[1, .*student layers are 0..3, each at most "
                                              r"once, teacher layers 0..6"):
        spread(3, 6, layer_map)


def config(**changes):
    return BertConfig(**{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
                         "max_position_embeddings": 64} | changes)


TEACHER = config(hidden_size=48, num_hidden_layers=4)


@pytest.mark.parametrize("teacher, student, parameter, remedy", [
    (TEACHER, config(num_hidden_layers=5), "num_hidden_layers", "choose at most 4"),
    (TEACHER, config(num_attention_heads=2), "distil_attention",
     "set attention_loss: relation, or num_attention_heads: 4 .*or distil_attention: false"),
    (TEACHER, config(hidden_size=52), "hidden_size", "choose at most 48"),
    (config(hidden_size=48, num_hidden_layers=4, max_position_embeddings=31), config(), "seq_len",
     "teacher has 31 positions.*; choose at most 31"),
    (TEACHER, config(max_position_embeddings=16), "seq_len", "student.* 16( positions)?; choose at most 16")])
def test_shapes_that_cannot_work_name_parameter_and_remedy(teacher, student, parameter, remedy):
    with pytest.raises(CheckpointError, match=f"^{parameter}: .*{remedy}"):
        check_shapes(teacher, student, seq_len=32, init="scratch", compress=True, distil_attention=True)


def test_shapes_that_can_work_pass():
    check_shapes(TEACHER, config(), seq_len=64, init="scratch", compress=True, distil_attention=True)
    check_shapes(TEACHER, config(num_attention_heads=2), seq_len=64, init="scratch", compress=True,
                 distil_attention=False)
    check_shapes(TEACHER, config(hidden_size=52), seq_len=64, init="checkpoint", compress=True,
                 distil_attention=True)  # mapped, not compressed
    check_shapes(TEACHER, TEACHER, seq_len=64, init="teacher_layers", compress=False, distil_attention=True)


def test_relations_need_heads_that_divide_both_widths_and_no_others():
    shapes = {"seq_len": 64, "init": "scratch", "compress": True, "distil_attention": False}
    for n_heads in (1, 2, 3, 4, 6, 8, 12, 24, None):
        check_shapes(TEACHER, config(num_attention_heads=3), **shapes, relation_heads=n_heads)
    with pytest.raises(CheckpointError, match=r"^relation_heads: 16 must divide both widths, 48 \(teacher\) and 24 "
                                              r"\(student\); choose from \[1, 2, 3, 4, 6, 8, 12, 24\]"):
        check_shapes(TEACHER, config(), **shapes, relation_heads=16)


def test_the_positions_that_roberta_reserves_are_not_counted():
    """RoBERTa numbers positions from padding id + 1, so 34 rows carry 32 tokens."""
    roberta = RobertaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
                            intermediate_size=8, max_position_embeddings=34)
    model = models.from_config(roberta)
    ids = torch.full((1, 32), 5)
    run_model(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    check_shapes(roberta, roberta, seq_len=32, init="scratch", compress=False, distil_attention=False)
    with pytest.raises(CheckpointError, match="^seq_len: .*choose at most 32"):
        check_shapes(roberta, roberta, seq_len=33, init="scratch", compress=False, distil_attention=False)


def test_scratch_has_the_sizes_asked_for_on_the_teachers_vocabulary(build, teacher, labels):
    student, origin = build()
    found = student.config
    assert (found.hidden_size, found.num_hidden_layers, found.num_attention_heads, found.intermediate_size) == (
        24, 2, 4, 96)
    assert word_embedding(student).shape == (len(word_embedding(teacher)), 24) and origin == "random"
    assert found.id2label == dict(enumerate(labels)) and found.pad_token_id == 0
    assert build(intermediate_size=40)[0].config.intermediate_size == 40


def test_compressed_embeddings_are_the_svd_at_the_scale_of_fresh_ones(build, teacher):
    fresh, _ = build()
    student, origin = build(compress=True)
    small, _ = embeddings.compress(word_embedding(teacher), 24)
    found, size = word_embedding(student).detach(), word_embedding(fresh).detach().norm(dim=-1).mean()
    torch.testing.assert_close(found.norm(dim=-1).mean(), size)
    torch.testing.assert_close(found, small * (found.norm() / small.norm()))  # one number for all rows
    assert "truncated SVD" in origin and word_embedding(student).requires_grad
    torch.testing.assert_close(head_of(student).weight, head_of(fresh).weight)


@pytest.mark.parametrize("n_layers, copied", [(1, [4]), (2, [2, 4]), (4, [1, 2, 3, 4])])
def test_copied_layers_are_spread_and_the_rest_is_the_teachers(build, teacher, n_layers, copied, batch):
    student, origin = build("teacher_layers", num_hidden_layers=n_layers)
    for layer, i in zip(encoder_layers(student), copied, strict=True):
        wanted = encoder_layers(teacher)[i - 1].state_dict()
        assert all(torch.equal(x, wanted[n]) for n, x in layer.state_dict().items())
    wanted = teacher.state_dict()
    rest = {n: x for n, x in student.state_dict().items() if "encoder.layer." not in n}
    assert len(rest) >= 7 and all(torch.equal(x, wanted[n]) for n, x in rest.items())
    assert origin == "the teacher's"
    if n_layers == 4:
        pair = [run_model(m.eval(), batch)[0][batch["attention_mask"] > 0] for m in (student, teacher)]
        torch.testing.assert_close(*pair)


def test_a_checkpoint_of_the_same_vocabulary_keeps_its_weights(build, sentences, labels, tmp_path):
    words = {word for sentence in sentences.words for word in sentence}
    folder = save_pretrained_student(tmp_path, words, labels, 24)
    plain = load_classifier(folder, labels, "x").state_dict()
    for compress in (False, True):
        student, origin = build("checkpoint", str(folder), compress)
        assert origin == "the student's own"
        assert all(torch.equal(x, plain[n]) for n, x in student.state_dict().items())


def test_a_checkpoint_of_another_vocabulary_is_mapped_or_refused(build, sentences, labels, tokenizer, teacher,
                                                                 tmp_path):
    words = sorted({word for sentence in sentences.words for word in sentence})[::2] + ["Zebra", "zum"]
    folder = save_pretrained_student(tmp_path, set(words), labels, 20)
    with pytest.raises(CheckpointError, match="^pt_student_checkpoint: .*set compress_word_embedding: true"):
        build("checkpoint", str(folder))
    student, origin = build("checkpoint", str(folder), True)
    own, other = load_classifier(folder, labels, "x"), load_tokenizer(folder)
    assert word_embedding(student).shape == (len(tokenizer), 20) and student.config.vocab_size == len(tokenizer)
    pieces = [t.convert_ids_to_tokens(list(range(len(t)))) for t in (tokenizer, other)]
    wanted, n_shared = embeddings.map_to_student(
        word_embedding(teacher).detach(), pieces[0], word_embedding(own).detach(), pieces[1])
    torch.testing.assert_close(word_embedding(student).detach(), wanted)
    assert f"mapped by {n_shared} shared pieces" in origin and n_shared > 300
    kept, found = own.state_dict(), student.state_dict()
    assert all(torch.equal(found[n], x) for n, x in kept.items() if "word_embeddings" not in n)


@pytest.mark.parametrize("projected", [True, False])
def test_the_folded_head_is_the_teachers_classifier_on_projected_states(build, teacher, batch, projected):
    nn.init.normal_(head_of(teacher).bias)
    student = build()[0] if projected else build("teacher_layers")[0]
    nn.init.normal_(head_of(student).weight)
    projection = nn.Linear(24, 48) if projected else None
    fold_head(student, teacher, projection)
    with torch.inference_mode():
        logits, states, _ = run_model(student.eval(), batch, True)
        state = projection(states[-1]) if projected else states[-1]
        torch.testing.assert_close(logits, head_of(teacher)(state), rtol=1e-4, atol=1e-5)


def test_the_fitted_projection_is_the_least_squares_one(build, teacher, examples, accelerator):
    student, windows = build()[0].eval(), np.arange(len(examples))
    found = fit_projection(student, teacher, examples, windows, 0, accelerator)
    batch = collate(examples, windows, 0)
    with torch.inference_mode():
        x, y = (run_model(m, batch, True)[1][-1][batch["attention_mask"] > 0].double() for m in (student, teacher))
        ones = torch.cat([x, torch.ones(len(x), 1)], 1)
        best = torch.linalg.lstsq(ones, y).solution  # on these windows nothing is better
        errors = [(y - z).square().mean().item() for z in (ones @ best, found(x.float()), y.mean(0))]
        assert errors[0] <= errors[1] < 1.001 * errors[0] and errors[1] < 0.9 * errors[2]
        itself = fit_projection(teacher, teacher, examples, windows, 0, accelerator)
        torch.testing.assert_close(itself(y.float()), y.float(), rtol=0, atol=0.02)
    few = fit_projection(student, teacher, examples, windows, 0, accelerator, n_windows=1)  # fewer tokens than widths
    assert few.weight.isfinite().all() and few.weight.abs().max() < 100


def test_a_head_that_is_not_one_linear_map_stays_as_it_is(build, teacher):
    student, _ = build()
    student.classifier = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 7))
    before = [p.clone() for p in student.classifier.parameters()]
    assert not fold_head(student, teacher, nn.Linear(24, 48)) and not fold_head(teacher, student, nn.Linear(48, 24))
    assert all(map(torch.equal, student.classifier.parameters(), before))


def test_projections_are_one_for_each_pair_and_none_at_equal_widths():
    found = make_projections([(0, 2), (1, 3)], [24, 24], 48)
    assert sorted(found) == ["0", "1"] and found["0"].weight.shape == (48, 24)
    assert len(make_projections([(0, 2), (1, 3)], [48, 48], 48)) == 0
    assert list(make_projections([(0, 2), (1, 3)], [20, 48], 48)) == ["0"]


@pytest.mark.parametrize("hidden, maps, names", [
    ([(2, 4)], [], ["hidden_2"]), ([(0, 2), (1, 3), (2, 4)], [(1, 3), (2, 4)],
     ["hidden_0", "hidden_1", "hidden_2", "attention_1", "attention_2"])])
@pytest.mark.parametrize("kinds", [("mse", "mse"), ("cosine", "kl")])
def test_terms_are_named_by_student_layer_and_vanish_for_the_teacher_itself(build, teacher, batch, hidden, maps,
                                                                            names, kinds):
    student = build()[0].eval()
    student.set_attn_implementation("eager")
    modules = nn.ModuleDict({"student": student, "projections": make_projections(hidden, [24] * 3, 48)})
    with torch.inference_mode():
        _, states, found = run_model(teacher, batch, True, True)
        goal = {"teacher_hidden": torch.stack([states[t] for _, t in hidden], 2)}
        if maps:
            goal["teacher_attention"] = torch.stack([found[t - 1] for _, t in maps], 1)
        values = distil_terms(hidden, maps, *kinds)(modules, batch | goal)
        assert list(values) == names and all(x.ndim == 0 and x > 0 for x in values.values())
        # the teacher as its own student, paired with itself
        itself = nn.ModuleDict({"student": teacher, "projections": nn.ModuleDict()})
        same = distil_terms([(t, t) for _, t in hidden], [(t, t) for _, t in maps], *kinds)(itself, batch | goal)
        assert [n.replace(n[-1], str(t)) for n, (_, t) in zip(names, hidden + maps, strict=True)] == list(same)
        assert all(float(x) == pytest.approx(0, abs=1e-6) for x in same.values())


@pytest.mark.parametrize("kinds, n_heads, hidden", [
    (("cka", "relation"), None, [(2, 4)]), (("mse", "relation"), 4, [])])
def test_relations_and_cka_are_learnt_whatever_the_heads_and_widths(build, teacher, batch, kinds, n_heads, hidden):
    student, maps = build(num_attention_heads=3)[0], [(1, 2), (2, 4)]
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if "attention.self" in name and "weight" in name:
                parameter.mul_(6)  # else all of its relations are near uniform
    store = TargetSpec(tuple(t for _, t in hidden), qkv=(2, 4))
    ask = TargetStore(lambda: teacher, teacher.config, store, None, 0, open_accelerator("cpu", "float32", quiet=True),
                      folder="none", mode="none").ask
    batch = batch | {f"teacher_{kind}": x.clone() for kind, x in ask(batch).items()}
    modules = nn.ModuleDict({"student": student.eval(), "projections": nn.ModuleDict()})
    terms, optimizer = distil_terms(hidden, maps, *kinds, n_heads), torch.optim.Adam(student.parameters(), 3e-3)
    seen = []
    for _ in range(60):
        seen.append(terms(modules, batch))
        optimizer.zero_grad()
        sum(seen[-1].values()).backward()
        optimizer.step()
    assert list(seen[0]) == [*(f"hidden_{s}" for s, _ in hidden), "attention_1", "attention_2"]
    for name in seen[0]:
        assert 1e-2 < seen[0][name] and seen[-1][name] < 0.5 * seen[0][name], name
    # the teacher as its own student
    itself = nn.ModuleDict({"student": teacher, "projections": nn.ModuleDict()})
    same = distil_terms([(t, t) for _, t in hidden], [(t, t) for _, t in maps], *kinds, n_heads)(itself, batch)
    assert all(x.item() < 1e-3 for x in same.values()) and len(same) == len(seen[0])
