"""The seven stages on the smoke task: what they leave behind, repeat, refuse, resume and never touch."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from seqeval.metrics.v1 import precision_recall_fscore_support
from seqeval.scheme import IOB2

from xdistil import data, losses, models, stages, training, views
from xdistil.checkpoints import save_checkpoint
from xdistil.inputs import Inputs
from xdistil.models import CheckpointError
from xdistil.params import load_params
from xdistil.provenance import depends
from xdistil.runs import STAGES, Run, baselines_of, stages_of

ROOT = Path(__file__).resolve().parent.parent
TOY = ROOT / "tests" / "data" / "toy"
TRAINED = ("teacher", "hidden", "logits", "labels")
WITH_WEIGHTS = ("teacher", "student-init", "hidden", "logits", "labels", "student")


def smoke_params(model_dir, **overrides):
    """The parameters of params/smoke.yaml for a run in `model_dir`, on one kind of hardware."""
    return load_params(str(ROOT / "params/smoke.yaml"), {
        "model_dir": str(model_dir), "device": "cpu", "opt_policy": "float32", **overrides})


def run_stages(params, first="teacher", last="student"):
    """Call the stages from `first` to `last`; returns the run."""
    run, names = Run(params), list(STAGES)
    for name in names[names.index(first) : names.index(last) + 1]:
        getattr(stages, STAGES[name])(params, run)
    return run


def finished_smoke_run(tmp_path_factory) -> Path:
    """The folder of a finished smoke run, made once per session, for all test files. Only to be read."""
    folder = tmp_path_factory.getbasetemp() / "smoke"
    if not (folder / "student" / "done.json").is_file():
        run_stages(smoke_params(folder))
    return folder


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    return finished_smoke_run(tmp_path_factory)


@pytest.fixture
def copied(smoke, tmp_path):
    """Copies the finished run up to and with stage `last`; returns the folder."""

    def copy(last="student", name="run"):
        target = tmp_path / name
        shutil.copytree(smoke, target)
        for later in list(STAGES)[list(STAGES).index(last) + 1 :]:
            shutil.rmtree(target / later)
        if last in ("teacher", "student-init"):
            shutil.rmtree(target / "targets")
        return target

    return copy


def weights(folder):
    return load_file(folder / "model.safetensors")


def hashes(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in folder.rglob("*") if p.is_file()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def read_rows(path):
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]


def test_the_folders_and_files_of_a_run(smoke):
    for name in WITH_WEIGHTS:
        for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
            assert (smoke / name / file).is_file(), (name, file)
    for name in TRAINED:
        assert (smoke / name / "history.jsonl").is_file()
    for name in STAGES:
        assert (smoke / name / "done.json").is_file()
        metrics = json.loads((smoke / name / "metrics.json").read_text())
        assert metrics["stage_seconds"] > 0 and metrics["peak_memory_mb"] > 50
    for file in ("tokenizer/tokenizer.json", "hidden/projections.safetensors", "evaluation/predictions.tsv",
                 "student/README.md"):
        assert (smoke / file).is_file(), file
    asked = json.loads((smoke / "params.json").read_text())
    assert asked == smoke_params(smoke).model_dump()
    left = [p for p in smoke.rglob("*") if p.name.startswith(".") or "checkpoint" in p.name or "partial" in p.name]
    assert left == []


@pytest.mark.parametrize("name", ["hidden", "logits"])
def test_distillation_lowers_its_own_held_out_loss(smoke, name):
    stage = Run(smoke_params(smoke)).stage(name)
    scores = [r["score"] for r in stage.history if r["kind"] == "eval"]
    losses = [r["loss"] for r in stage.history if r["kind"] == "train"]
    assert stage.metrics["metric"] == "held-out loss"
    assert stage.metrics["score"] == min(scores) < 0.95 * scores[0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("name", ["teacher", "labels"])
def test_fine_tuning_never_lowers_the_dev_score_and_saves_the_best(smoke, name):
    stage = Run(smoke_params(smoke)).stage(name)
    scores = [r["score"] for r in stage.history if r["kind"] == "eval"]
    losses = [r["loss"] for r in stage.history if r["kind"] == "train"]
    assert stage.metrics["metric"] == "dev macro F1"
    assert stage.metrics["score"] == max(scores) >= scores[0]
    assert stage.metrics["dev"]["macro"] == pytest.approx(stage.metrics["score"])  # of the weights that were saved
    assert losses[-1] < losses[0]


def test_hidden_states_come_closer_to_the_teachers(smoke):
    metrics = Run(smoke_params(smoke)).stage("hidden").metrics
    before, after = metrics["alignment_before"]["cosine"], metrics["alignment_after"]["cosine"]
    assert len(after) == 3 and all(b < a for b, a in zip(before, after, strict=True))


def test_frozen_word_embeddings_stay_bit_equal(smoke):
    name = "bert.embeddings.word_embeddings.weight"
    found = [weights(smoke / stage) for stage in ("student-init", "hidden", "logits", "labels", "student")]
    assert all(torch.equal(found[0][name], other[name]) for other in found[1:])
    for a, b in zip(found[:2], found[1:3], strict=True):  # distillation moves whatever is not frozen
        still = {n for n in a if torch.equal(a[n], b[n])}
        assert {n for n in still if n != name} <= {n for n in a if n.endswith("key.bias")}
    assert changed(found[3], found[4]) == set()  # export copies


def test_free_word_embeddings_learn(copied):
    folder = copied("student-init")
    run_stages(smoke_params(folder, freeze_word_embedding=False, distil_epochs=1), "hidden", "hidden")
    assert "bert.embeddings.word_embeddings.weight" in changed(
        weights(folder / "student-init"), weights(folder / "hidden"))


def test_a_second_call_trains_nothing_and_says_so(smoke, capsys):
    before = {p: p.stat().st_mtime_ns for p in smoke.rglob("*") if p.is_file()}
    run_stages(smoke_params(smoke))
    said = capsys.readouterr().out
    said = [line for line in said.splitlines() if "] [alarm] " not in line]  # these are said again
    assert [f"[{name}] done before with the same parameters and data" for name in STAGES] == said
    assert before == {p: p.stat().st_mtime_ns for p in smoke.rglob("*") if p.is_file()}


def test_a_changed_parameter_reruns_what_follows_from_it(copied, capsys):
    folder = copied()
    before = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in WITH_WEIGHTS}
    run_stages(smoke_params(folder, distil_epochs=1))
    said = capsys.readouterr().out
    after = {name: (folder / name / "model.safetensors").stat().st_mtime_ns for name in WITH_WEIGHTS}
    assert {n for n in before if before[n] == after[n]} == {"teacher", "student-init"}
    for name in ("teacher", "student-init"):
        assert f"[{name}] done before" in said
    assert "[hidden] runs again: distil_epochs changed (2 -> 1)\n" in said
    assert "[logits] runs again: distil_epochs changed (2 -> 1), stage hidden changed (" in said
    for name, earlier in (("labels", "logits"), ("evaluation", "labels"), ("student", "evaluation")):
        assert f"[{name}] runs again: stage {earlier} changed (" in said
    assert Run(smoke_params(folder)).stage("hidden").metrics["epochs"] == 1


@pytest.mark.parametrize("name", list(STAGES)[1:])
def test_a_later_stage_first_names_the_stage_to_run(tmp_path, name):
    params = smoke_params(tmp_path / "none")
    with pytest.raises(RuntimeError, match=f"{name} needs stage teacher: .*run finetune_teacher first"):
        getattr(stages, STAGES[name])(params, Run(params))
    assert not (tmp_path / "none").exists()


def test_a_missing_stage_between_is_named(copied):
    params = smoke_params(copied("student-init"))
    with pytest.raises(RuntimeError, match="logits needs stage hidden: .*run distil_hidden first"):
        stages.distil_logits(params, Run(params))


def test_another_value_or_file_upstream_makes_a_stage_refuse(smoke, tmp_path):
    before = hashes(smoke)
    params = smoke_params(smoke, teacher_lr=1e-4)
    with pytest.raises(RuntimeError, match=r"teacher_lr changed \(5e-05 -> 0.0001\); run finetune_teacher first"):
        stages.distil_logits(params, Run(params))
    task = shutil.copytree(TOY, tmp_path / "task")
    with open(task / "transfer.tsv", "a", encoding="utf-8") as file:
        file.write("one sentence more\n")
    params = smoke_params(smoke, task=str(task))
    with pytest.raises(RuntimeError, match=r"transfer file changed \(\w+ -> \w+\); run distil_hidden first"):
        stages.evaluate_student(params, Run(params))
    assert hashes(smoke) == before


def test_a_folder_that_no_run_wrote_is_left_alone(tmp_path):
    mine = tmp_path / "run" / "teacher" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years of work")
    params = smoke_params(tmp_path / "run")
    with pytest.raises(FileExistsError, match="model_dir: .*teacher holds files"):
        stages.finetune_teacher(params, Run(params))
    assert mine.read_text() == "years of work"


def test_predictions_are_of_the_test_set_in_its_order(smoke):
    gold, found = read_rows(TOY / "test.tsv"), read_rows(smoke / "evaluation/predictions.tsv")
    assert [(words, language) for words, _, language in found] == [(words, language) for words, _, language in gold]
    gold, found = ([tags.split(" ") for _, tags, _ in rows] for rows in (gold, found))
    assert list(map(len, found)) == list(map(len, gold))
    metrics = json.loads((smoke / "evaluation/metrics.json").read_text())
    f1 = precision_recall_fscore_support(gold, found, average="micro", scheme=IOB2, zero_division=0)[2]
    assert metrics["student"]["test"]["micro"] == pytest.approx(float(f1))
    student, teacher = (metrics[model]["test"]["micro"] for model in ("student", "teacher"))
    assert metrics["retention"]["micro"] == (pytest.approx(student / teacher) if teacher else None)


PLAIN = """
import json, sys
sys.modules["xdistil"] = None  # whatever is installed: it must not be needed
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline
folder, sentences = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForTokenClassification.from_pretrained(folder).eval()
tokenizer, tags = AutoTokenizer.from_pretrained(folder), []
for words in sentences:
    encoded = tokenizer(words, is_split_into_words=True, return_tensors="pt")
    if encoded["input_ids"].shape[1] > tokenizer.model_max_length:
        tags.append(None)
        continue
    with torch.no_grad():
        best = model(**encoded).logits[0].argmax(-1).tolist()
    at = encoded.word_ids()
    tags.append([model.config.id2label[best[at.index(i)]] for i in range(len(words))])
tag = pipeline("token-classification", model=folder)
found = [(e["entity"], e["word"]) for e in tag(" ".join(sentences[0][:3]), ignore_labels=[])]
print(json.dumps([tags, found, tokenizer.model_max_length]))
"""


@pytest.mark.slow
def test_the_exported_folder_needs_transformers_alone(smoke, tmp_path):
    rows = sorted(read_rows(smoke / "evaluation/predictions.tsv"), key=lambda row: len(row[0]))[:12]
    words = [row[0].split(" ") for row in rows]
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, str(smoke / "student"), json.dumps(words)],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tags, found, longest = json.loads(done.stdout.splitlines()[-1])
    whole = [(plain, row[1].split(" ")) for plain, row in zip(tags, rows, strict=True) if plain]
    assert len(whole) > 2 and all(plain == ours for plain, ours in whole)
    labels = (TOY / "labels.tsv").read_text().split()
    assert found and {label for label, _ in found} <= set(labels)
    assert "".join(piece.removeprefix("##") for _, piece in found) == "".join(words[0][:3])
    assert longest == 32


def plain_teacher(smoke, folder):
    """The smoke run's teacher as somebody else would hand it over."""
    folder.mkdir()
    for file in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smoke / "teacher" / file, folder)
    return folder


def test_a_given_teacher_is_used_and_stays_as_it_is(smoke, tmp_path, capsys):
    given = plain_teacher(smoke, tmp_path / "given")
    before = hashes(given)
    run = run_stages(smoke_params(tmp_path / "run", teacher_model_dir=str(given)), "teacher", "student-init")
    assert "fine-tuning skipped" in capsys.readouterr().out
    assert hashes(given) == before
    whole = Run(smoke_params(smoke))
    assert run.stage("teacher").metrics["dev"] == whole.stage("teacher").metrics["dev"]
    assert not (run.dir / "teacher" / "model.safetensors").exists()
    assert changed(weights(smoke / "student-init"), weights(run.dir / "student-init")) == set()
    run_stages(run.params, "teacher", "student-init")
    assert capsys.readouterr().out.count("done before") == 2


def test_a_given_teacher_whose_labels_stand_in_another_order(smoke, tmp_path):
    task = shutil.copytree(TOY, tmp_path / "task")
    labels = (task / "labels.tsv").read_text().split()
    (task / "labels.tsv").write_text("\n".join(reversed(labels)) + "\n")
    given = plain_teacher(smoke, tmp_path / "given")
    run = run_stages(
        smoke_params(tmp_path / "run", teacher_model_dir=str(given), task=str(task)), "teacher", "student-init")
    assert run.stage("teacher").metrics["dev"] == Run(smoke_params(smoke)).stage("teacher").metrics["dev"]
    config = json.loads((run.dir / "student-init/config.json").read_text())
    assert list(config["id2label"].values()) == labels


def test_a_given_teacher_of_other_labels_is_refused(smoke, tmp_path):
    task = shutil.copytree(TOY, tmp_path / "task")
    for path in task.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("-PER", "-WHO"), encoding="utf-8")
    given = plain_teacher(smoke, tmp_path / "given")
    params = smoke_params(tmp_path / "run", teacher_model_dir=str(given), task=str(task))
    with pytest.raises(CheckpointError, match="teacher_model_dir.*'B-PER'.*labels.tsv.*'B-WHO'"):
        stages.finetune_teacher(params, Run(params))


def quick_teacher(model_dir, folder, **overrides):
    return smoke_params(model_dir, teacher_model_dir=str(folder), teacher_epochs=1, train_limit=8, **overrides)


def test_a_teacher_folder_that_does_not_exist_is_written(tmp_path, capsys):
    folder = tmp_path / "teachers" / "mine"
    run = run_stages(quick_teacher(tmp_path / "run", folder), "teacher", "student-init")
    before = hashes(folder)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= before.keys()
    assert not (run.dir / "teacher" / "model.safetensors").exists()
    assert run.stage("teacher").metrics["epochs"] == 1
    capsys.readouterr()
    run_stages(run.params, "teacher", "student-init")
    assert capsys.readouterr().out.count("done before") == 2
    assert hashes(folder) == before


def test_a_second_run_uses_the_teacher_that_a_first_one_wrote(tmp_path):
    folder = tmp_path / "teacher"
    first = run_stages(quick_teacher(tmp_path / "a", folder), "teacher", "student-init")
    before = hashes(folder)
    run_stages(quick_teacher(tmp_path / "b", folder, seed=7), "teacher", "student-init")
    assert hashes(folder) == before  # "used as it is if it is there"
    assert changed(weights(first.dir / "student-init"), weights(tmp_path / "b" / "student-init"))
    run_stages(first.params, "teacher", "student-init")  # and the first run is still whole


def test_a_teacher_folder_named_after_the_run_is_filled(copied, tmp_path):
    params = smoke_params(copied("teacher"), teacher_model_dir=str(tmp_path / "new"))
    run_stages(params, "teacher", "student-init")
    assert (tmp_path / "new" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_student_of_teacher_layers_goes_all_the_way(copied):
    folder = copied("teacher")
    params = smoke_params(
        folder, student_init="teacher_layers", compress_word_embedding=False, unfreeze="module",
        distil_epochs=1, ft_epochs=1)
    run = run_stages(params)
    teacher, student = weights(folder / "teacher"), weights(folder / "student-init")
    for s, t in ((0, 1), (1, 3)):  # two layers of four, evenly spread, the last included
        name = "bert.encoder.layer.{}.output.dense.weight"
        assert torch.equal(student[name.format(s)], teacher[name.format(t)])
    words = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(weights(folder / "student")[words], teacher[words])
    assert load_file(folder / "hidden/projections.safetensors") == {}
    assert run.stage("evaluation").metrics["student"]["parameters"] < (
        run.stage("evaluation").metrics["teacher"]["parameters"])
    scores = [r["score"] for r in run.stage("hidden").history if r["kind"] == "eval"]
    assert run.stage("hidden").metrics["score"] == min(scores)


def n_transfer_windows(params):
    return len(Inputs(params, Run(params)).read("transfer")[1])


def test_the_teacher_reads_the_transfer_set_once_in_a_whole_run(smoke):
    params = smoke_params(smoke)
    asked = [Run(params).stage(name).metrics["teacher_windows"] for name in ("hidden", "logits")]
    assert asked == [n_transfer_windows(params), 0]


@pytest.mark.parametrize("cache, repeats", [
    ({"targets_cache": "none"}, 2), ({"targets_cache_gb": 0}, 1), ({"targets_cache": "memory"}, 0)])
def test_the_cache_of_teacher_outputs_changes_no_result(copied, smoke, cache, repeats):
    folder = copied("student-init")
    run = run_stages(params := smoke_params(folder, **cache), "hidden", "logits")
    once = {"hidden": n_transfer_windows(params), "logits": 0}
    again = [run.stage(name).metrics["teacher_windows"] > n for name, n in once.items()]
    assert again == [repeats > 0, repeats > 1 or cache.get("targets_cache") == "memory"]
    for stage in ("hidden", "logits"):
        whole, found = weights(smoke / stage), weights(folder / stage)
        for name in whole:
            assert torch.allclose(whole[name], found[name], atol=1e-3), name


def test_hidden_states_and_attention_are_dropped_after_stage_1(smoke):
    assert {p.name.split("-")[0] for p in (smoke / "targets").rglob("*.bin")} == {"logits"}


@pytest.mark.parametrize("values, terms", [
    ({"hidden_loss": "cka", "attention_loss": "relation", "layer_map": [[2, 3], [1, 2]], "layer_weights": [2, 1]},
     ["hidden_1", "hidden_2", "attention_1", "attention_2"]),
    ({"hidden_weight": 0, "attention_loss": "relation", "layer_map": "last"}, ["attention_2"])])
def test_a_student_of_other_heads_learns_without_projections(copied, values, terms):
    folder = copied("teacher")
    params = smoke_params(folder, num_attention_heads=3, distil_lr=5e-3, **values)
    run = run_stages(params, "student-init", "hidden")
    stage = run.stage("hidden")
    train, scores = ([r for r in stage.history if r["kind"] == kind] for kind in ("train", "eval"))
    assert [name for name in train[0] if name.startswith(("hidden", "attention"))] == terms
    assert all(train[-1][name] < train[0][name] for name in terms)
    assert stage.metrics["score"] < scores[0]["score"] and "least squares" in stage.metrics["head"]
    assert load_file(folder / "hidden/projections.safetensors") == {}
    after = stage.metrics["alignment_after"]
    assert after["attention_kl"] == [] and set(after["cosine"]) <= {None}
    if len(terms) > 1:
        first = scores[0]
        assert first["score"] == pytest.approx(sum(
            first[f"held_out_{name}"] * (2 if name.endswith("1") else 1) for name in terms))
    assert {p.name.split("-")[0] for p in (folder / "targets").rglob("*.bin")} == {"logits"}


def test_the_head_fitted_by_least_squares_starts_closer_than_a_fresh_one(copied):
    folder = copied("student-init")
    run = run_stages(smoke_params(folder, hidden_loss="cka"), "hidden", "hidden")
    inputs = Inputs(run.params, run)
    batch = data.collate(inputs.read("dev")[1], range(16), 0)
    with torch.inference_mode():
        goal, *found = (models.run_model(models.load_classifier(folder / name, inputs.labels, "x").eval(), batch)[0]
                        for name in ("teacher", "student-init", "hidden"))
    fresh, folded = (float(losses.logit_mse(x, goal, batch["attention_mask"])) for x in found)
    spread = goal[batch["attention_mask"] > 0].var(0, correction=0).mean()
    assert folded < 0.5 * fresh and folded < spread


def test_labels_beside_the_logits_whether_frozen_layers_are_kept_or_the_stage_is_interrupted(copied, monkeypatch):
    folders, saved = {name: copied("hidden", name) for name in ("kept", "redone", "broken")}, save_checkpoint

    def save(path, at, *others):
        saved(path, at, *others)
        if (at.step, at.epoch, at.chunk) == (0, 1, 1):
            raise KeyboardInterrupt

    for name, folder in folders.items():
        cache = {"targets_cache_gb": 0 if name == "redone" else 4}
        params = smoke_params(folder, hard_label_weight=0.5, unfreeze="module", **cache)
        if name == "broken":
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(training, "save_checkpoint", save)
                stages.distil_logits(params, Run(params))
        stages.distil_logits(params, Run(params))
    kept, redone = (weights(folders[name] / "logits") for name in ("kept", "redone"))
    assert all(torch.allclose(weight, redone[name], atol=2e-3) for name, weight in kept.items())
    for file in ("model.safetensors", "history.jsonl"):
        assert (folders["broken"] / "logits" / file).read_bytes() == (folders["kept"] / "logits" / file).read_bytes()
    stage = Run(params).stage("logits")
    train, held = ([r for r in stage.history if r["kind"] == kind] for kind in ("train", "eval"))
    assert all(r["loss"] == pytest.approx(r["logits"] + 0.5 * r["labels"], rel=1e-4) for r in train)
    assert held[0]["score"] == pytest.approx(held[0]["held_out_logits"] + 0.5 * held[0]["held_out_labels"])
    assert train[-1]["labels"] < train[0]["labels"] and stage.metrics["score"] < held[0]["score"]
    without = smoke_params(folder, hard_label_weight=0)
    assert set(depends(params, Run(params), "logits")) - set(depends(without, Run(without), "logits")) == {
        "train file", "train_limit", "student_ft_batch_size"}


@pytest.mark.parametrize("values, message", [
    ({"layer_map": [[1, 2], [3, 4]]}, r"^layer_map: found .*student layers are 0..2, .* teacher layers 0..4"),
    ({"layer_weights": [1.0]}, "^layer_weights: found 1, but the layer map has 3 pairs"),
    ({"num_attention_heads": 3}, "^distil_attention: .*set attention_loss: relation"),
    ({"attention_loss": "relation", "relation_heads": 5}, r"^relation_heads: 5 must divide both widths, 48 \(t")])
def test_what_cannot_work_is_told_before_anything_is_written(tmp_path, values, message):
    params = smoke_params(tmp_path / "run", **values)
    with pytest.raises(ValueError, match=message):
        stages.check(params, Run(params))
    assert not (tmp_path / "run").exists()


STAGE_1 = """
import json, sys
from xdistil import stages
from xdistil.inputs import Inputs
from xdistil.params import load_params
from xdistil.runs import Run
params = load_params(json.loads(sys.argv[1]))
stages.distil_hidden(params, Run(params))
"""


@pytest.mark.slow
def test_a_killed_stage_1_ends_with_the_bytes_of_an_unbroken_one(copied):
    def start(folder):
        params = smoke_params(folder, transfer_limit=50, distil_chunk_size=10).model_dump()
        asked = json.dumps({k: v for k, v in params.items() if v is not None})
        return subprocess.Popen(
            [sys.executable, "-c", STAGE_1, asked], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XDISTIL_HEADLESS": "1"})

    broken, unbroken = copied("student-init", "broken"), copied("student-init", "unbroken")
    other, process = start(unbroken), start(broken)
    deadline = time.monotonic() + 120
    while not (broken / "hidden" / "checkpoint.safetensors").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (broken / "hidden/model.safetensors").exists()
    again = start(broken)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    assert "interrupted before" in said and "[hidden] resumes at step 1/1, epoch" in said
    whole = other.communicate()[0]
    assert other.returncode == 0, whole
    for file in ("model.safetensors", "projections.safetensors", "history.jsonl"):
        assert (broken / "hidden" / file).read_bytes() == (unbroken / "hidden" / file).read_bytes(), file


@pytest.mark.slow
def test_onnx_files_are_scored_beside_the_student(copied):
    folder = copied("evaluation")
    run = run_stages(smoke_params(folder, onnx=True), "student")
    found, wanted = run.stage("student").metrics["onnx"], run.stage("labels").metrics["dev"]
    assert found["fp32"]["dev"] == wanted and set(found) == {"fp32", "int8"}
    assert all(x["ms_per_sentence"] > 0 and x["mb"] > 0 for x in found.values())
    assert found["fp32"]["farthest_logit"] < 1e-4 < found["int8"]["farthest_logit"]
    assert sorted(p.name for p in (folder / "student" / "onnx").iterdir()) == ["model-int8.onnx", "model.onnx"]


def test_the_model_card_names_a_given_teacher(smoke, tmp_path):
    given = plain_teacher(smoke, tmp_path / "their-teacher")
    run = run_stages(smoke_params(tmp_path / "run", teacher_model_dir=str(given), distil_epochs=1, ft_epochs=1))
    card = (run.dir / "student/README.md").read_text(encoding="utf-8")
    assert "from a fine-tuned their-teacher" in card and "tiny-teacher" not in card


def test_the_order_of_the_stages_is_followed(copied, smoke, capsys):
    folder = copied("student-init")
    params = smoke_params(folder, student_stages="labels, logits", unfreeze="none", distil_epochs=1, ft_epochs=1)
    run = run_stages(params, "hidden", "hidden")
    assert "[hidden] not one of this run's stages, teacher, student-init, labels, logits, " in capsys.readouterr().out
    assert not (folder / "hidden").exists()
    with pytest.raises(RuntimeError, match="logits needs stage labels: it has not finished"):
        stages.distil_logits(params, run)
    for name in stages_of(params)[2:]:
        getattr(stages, STAGES[name])(params, run)
    names = ("teacher", "student-init", "labels", "logits", "evaluation", "student")
    assert stages_of(params) == [*names]
    assert [name for name in depends(params, run, "labels") if name.startswith("stage ")] == ["stage student-init"]
    assert [name for name in depends(params, run, "logits") if name.startswith("stage ")] == ["stage labels"]
    assert changed(weights(folder / "logits"), weights(folder / "student")) == set()  # the last one is given away
    assert changed(weights(folder / "logits"), weights(folder / "labels"))
    first = run.stage("logits").history[0]["held_out_logits"]
    assert first > 0
    assert list(views.dev_by_stage(run)[0]) == ["labels", "logits"]
    again = smoke_params(folder, student_stages=["logits", "labels"], unfreeze="none", distil_epochs=1, ft_epochs=1)
    run_stages(again, "logits", "logits")
    assert "[logits] runs again: stage labels changed" in (said := capsys.readouterr().out)
    assert "stage student-init changed (None -> " in said


def test_a_student_of_labels_alone_asks_its_teacher_nothing(copied, capsys):
    folder = copied("student-init")
    run = run_stages(smoke_params(folder, student_stages=["labels"], ft_epochs=1), "hidden")
    assert capsys.readouterr().out.count("nothing is done") == 2 and not (folder / "targets").exists()
    found = run.stage("evaluation").metrics
    assert found["student"]["dev"] == run.stage("labels").metrics["dev"] and found["teacher"]["test"]
    again = stages.distil_hidden(run.params, run)
    assert (again.done, again.metrics, again.history) == (None, {}, [])


def test_baselines_share_teacher_and_budget_and_stand_beside_the_result(copied, capsys):
    folder = copied("labels")
    before = hashes(folder)
    run = Run(params := smoke_params(folder, baselines=True))
    with pytest.raises(RuntimeError, match="^baselines: .* run evaluate_student first"):
        stages.run_baselines(params, run)
    stages.evaluate_student(params, run)
    stages.run_baselines(params, run)
    assert {name: before[name] for name in before if name != "params.json"}.items() <= hashes(folder).items()
    spent = sum(run.stage(name).metrics["windows"] for name in ("hidden", "logits", "labels"))
    for name, taught in (("labels", ["labels"]), ("logits", ["logits", "labels"])):
        other = folder / "baselines" / name
        assert {x.name for x in other.iterdir()} == {*taught, "evaluation", "params.json"}
        found = {stage: json.loads((other / stage / "metrics.json").read_text()) for stage in taught}
        epoch = sum(m["windows"] / m["epochs"] for m in found.values())  # half a one of each stage is rounded off
        assert abs(sum(m["windows"] for m in found.values()) - spent) <= epoch / 2
        asked = json.loads((other / "params.json").read_text())
        assert {name for name in asked if asked[name] != getattr(params, name)} <= {
            "model_dir", "baselines", "student_stages", "unfreeze", "patience", "distil_epochs", "ft_epochs"}
        begun = json.loads((other / taught[0] / "begun.json").read_text())
        assert begun["stage student-init"] == run.stage("student-init").fingerprint
    assert found["logits"]["teacher_windows"] == 0  # its logits were there
    table = views.results(run)
    assert table.columns == ["", "teacher", "only labels", "only logits, labels", "student", "student / teacher (%)"]
    (row,) = [row for row in table.rows if row[""] == "macro F1 (%)"]
    metrics = json.loads((folder / "baselines/labels/evaluation/metrics.json").read_text())
    assert row["only labels"] == 100 * metrics["student"]["test"]["macro"] and "teacher" not in metrics
    stages.export_student(params, run)
    assert "macro F1: only labels " in (folder / "student/README.md").read_text()
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    capsys.readouterr()
    stages.run_baselines(params, run)
    assert capsys.readouterr().out.count("done before") == 5  # two and three stages
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert views.results(Run(smoke_params(folder))).columns == ["", "teacher", "student", "student / teacher (%)"]


@pytest.mark.parametrize("student_stages, wanted", [
    (["hidden", "logits", "labels"], {"labels": ["labels"], "logits": ["logits", "labels"]}),
    (["hidden", "labels"], {"labels": ["labels"], "logits": ["logits", "labels"]}),
    (["hidden"], {"labels": ["labels"], "logits": ["logits"]}), (["logits", "labels"], {"labels": ["labels"]}),
    (["labels"], {})])
def test_no_baseline_is_the_run_again(tmp_path, student_stages, wanted):
    params = smoke_params(tmp_path, student_stages=student_stages, baselines=True)
    assert baselines_of(params) == wanted and baselines_of(smoke_params(tmp_path)) == {}
