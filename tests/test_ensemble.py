"""Several teachers: the mean of their logits is learnt, how far they differ is told, others are refused."""

import shutil

import pytest
import torch
from test_stages import TOY, finished_smoke_run, run_stages, smoke_params

from xdistil import data, models, stages, views
from xdistil.ensemble import Ensemble
from xdistil.inputs import Inputs
from xdistil.models import CheckpointError
from xdistil.params import load_params
from xdistil.provenance import depends
from xdistil.runs import Run


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    return finished_smoke_run(tmp_path_factory)


@pytest.fixture(scope="session")
def others(smoke, tmp_path_factory):
    """Two more teachers: of other weights, the second one with its labels in another order."""
    folders = [tmp_path_factory.mktemp("others") / name for name in ("a", "b")]
    labels = data.read_labels(TOY / "labels.tsv")
    for seed, folder in enumerate(folders):
        shutil.copytree(smoke / "teacher", folder)
        model = models.load_classifier(folder, labels, "more_teachers")
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn_like(weight)
            if seed:
                model.classifier.weight.copy_(model.classifier.weight.flip(0))
                model.classifier.bias.copy_(model.classifier.bias.flip(0))
                model.config.id2label = dict(enumerate(reversed(labels)))
                model.config.label2id = {label: i for i, label in enumerate(reversed(labels))}
        model.save_pretrained(folder)
    return [str(folder) for folder in folders]


@pytest.fixture
def half_done(smoke, tmp_path):
    for name in ("teacher", "student-init"):
        shutil.copytree(smoke / name, tmp_path / "run" / name)
    return tmp_path / "run"


def test_logits_are_the_mean_and_all_else_is_the_firsts(smoke, others, accelerator):
    params = smoke_params(smoke, more_teachers=others)
    inputs = Inputs(params, Run(params))
    teacher = inputs.load_teacher()
    models.return_maps(teacher)
    whole = inputs.with_others(teacher, accelerator)
    batch = data.collate(inputs.read("dev")[1], range(8), inputs.pad_id)
    with torch.inference_mode():
        logits, states, maps = models.run_model(whole, batch, True, True)
        own, own_states, own_maps = models.run_model(teacher, batch, True, True)
        a, b = (models.run_model(models.AUTO_CLASSES["word"].from_pretrained(x), batch)[0] for x in others)
        assert (logits - (own + a + b.flip(-1)) / 3).abs().max() < 1e-6  # b has its labels the other way round
        assert (own - a).abs().max() > 0.01
        assert all(torch.equal(x, y) for x, y in zip((*states, *maps), (*own_states, *own_maps), strict=True))
        with models.keep_qkv(whole, [1, 4]) as kept, models.keep_qkv(teacher, [1, 4]) as own_kept:
            models.run_model(whole, batch)
    assert all(torch.equal(kept[layer], own_kept[layer]) for layer in (1, 4))
    params = smoke_params(smoke)
    assert Inputs(params, Run(params)).with_others(teacher, accelerator) is teacher


def test_stage_2_learns_the_mean_and_tells_how_far_they_differ(half_done, others, monkeypatch):
    alone = run_stages(smoke_params(half_done, distil_epochs=1), "hidden", "logits")
    asked_alone = [alone.stage(name).metrics["teacher_windows"] for name in ("hidden", "logits")]
    run = run_stages(smoke_params(half_done, distil_epochs=1, more_teachers=others), "hidden", "logits")
    found, before = run.stage("logits").metrics, alone.stage("hidden").metrics
    n = len(Inputs(run.params, run).read("transfer")[1])
    # hidden states are the first teacher's, so stage 1 stands; all teachers are asked for logits once
    assert run.stage("hidden").metrics == before and asked_alone == [n, 0] and found["teacher_windows"] == n
    teachers = found["teachers"]
    assert list(teachers) == [
        "teacher 1, macro F1", "teacher 2, macro F1", "teacher 3, macro F1", "teachers as one, macro F1",
        "words of dev on which two teachers agree", "transfer words on which not all teachers do"]
    assert teachers["teacher 1, macro F1"] == pytest.approx(run.stage("teacher").metrics["dev"]["macro"])
    assert 0 < teachers["words of dev on which two teachers agree"] < 1
    assert 0 < teachers["transfer words on which not all teachers do"] < 1
    shown = str(views.scores(run.stage("logits")))
    assert "teachers as one, macro F1" in shown and "transfer words on which not all teachers do" in shown
    assert "teachers" not in run_stages(smoke_params(half_done, distil_epochs=1), "hidden", "logits").stage(
        "logits").metrics


def test_stages_follow_from_all_teachers(smoke, others, tmp_path):
    one, two = smoke_params(smoke, more_teachers=others[:1]), smoke_params(smoke, more_teachers=others)
    def value(params, stage="logits"):
        return depends(params, Run(params), stage).get("more_teachers")

    assert value(smoke_params(smoke)) is None and value(one) != value(two) and value(two, "hidden") is None
    assert value(smoke_params(smoke, more_teachers=others, transfer_select="uncertain", transfer_limit=20), "hidden")
    moved = shutil.copytree(others[0], tmp_path / "moved")
    assert value(smoke_params(smoke, more_teachers=[str(moved)])) == value(one)


def test_a_teacher_that_cannot_be_averaged_is_refused_before_training(smoke, others, tmp_path):
    folder = shutil.copytree(others[0], tmp_path / "other")

    def refused(message):
        params = smoke_params(tmp_path / "run", more_teachers=[str(folder)])
        with pytest.raises(CheckpointError, match=f"more_teachers: .*{message}"):
            stages.check(params, Run(params))

    config, vocab = (folder / name for name in ("config.json", "tokenizer.json"))
    text = config.read_text()
    config.write_text(text.replace("-PER", "-WHO"))
    refused("labels .*B-WHO.*labels.tsv .*B-PER.*give a teacher of this task")
    config.write_text(text)
    vocab.write_text(vocab.read_text(encoding="utf-8").replace('"a":', '"qqq":', 1), encoding="utf-8")
    refused("another vocabulary than the teacher .*give teachers of one tokenizer")
    shutil.rmtree(folder)
    refused("cannot load")


@pytest.mark.parametrize("given, found", [
    ([], []), ("runs/a", ["runs/a"]), ('["runs/a", "runs/b"]', ["runs/a", "runs/b"]), (["runs/b"], ["runs/b"])])
def test_folders_are_read_from_files_and_flags(root, given, found):
    assert load_params({"more_teachers": given}).more_teachers == [str(root / name) for name in found]


def test_the_mean_is_nearest_to_all(teacher, labels, accelerator):
    whole = Ensemble([teacher], labels)
    assert whole.config is teacher.config and whole.base_model is teacher.base_model
    targets = torch.randn(3, 5)
    student = torch.randn(5, requires_grad=True)
    all_of_them = torch.autograd.grad(((student - targets) ** 2).mean(0).sum(), student)[0]
    assert torch.allclose(all_of_them, torch.autograd.grad(((student - targets.mean(0)) ** 2).sum(), student)[0])
