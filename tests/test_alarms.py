"""Each alarm is given on a case made for it, with its numbers and a remedy, and on no healthy run."""

import copy
import json
import shutil

import nbformat
import numpy as np
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook, new_output
from test_stages import ROOT, run_stages, smoke_params

from xdistil import alarms, cli, views
from xdistil.alignment import measure_alignment
from xdistil.inputs import Inputs
from xdistil.runs import STAGES, Run

FOUND = {"spread": [0.7, 0.8], "rank": [9.0, 10.0], "agreement": 0.95, "constant": 0.8, "words": 500}


def measured(teacher, student, examples):
    return measure_alignment(teacher, student, {}, examples, 0, "cpu", n_windows=20)


def test_a_student_as_varied_as_its_teacher_has_not_collapsed(teacher, examples):
    found = measured(teacher, copy.deepcopy(teacher), examples)
    assert found["agreement"] == 1 > found["constant"] and found["words"] > 100
    assert found["spread"][0] == found["spread"][1] > 0.1 and found["rank"][0] == found["rank"][1] > 2
    assert alarms.collapse(found) == alarms.collapse(FOUND) == []


def test_states_that_are_all_alike_have_collapsed(teacher, examples):
    student = copy.deepcopy(teacher)
    torch.nn.init.zeros_(student.bert.encoder.layer[-1].output.LayerNorm.weight)
    torch.nn.init.ones_(student.bert.encoder.layer[-1].output.LayerNorm.bias)
    found = measured(teacher, student, examples)
    spread, rank, answers = alarms.collapse(found)
    assert found["spread"][0] < 1e-6 and f"(alarm below {found['spread'][1] / 10:.3g})" in spread
    assert f"states is {found['spread'][0]:.3g}" in spread and "student_init: teacher_layers" in spread
    assert "rank of the student's" in rank
    assert f"{found['agreement']:.1%} of {found['words']} answers" in answers and "distil_epochs" in answers


def test_states_on_a_line_have_collapsed_and_so_have_answers_that_are_all_one():
    (rank,) = alarms.collapse(FOUND | {"rank": [1.2, 6.0]})
    assert "rank of the student's top states is 1.2, of the teacher's 6 (alarm below 1.5); lower" in rank
    (answers,) = alarms.collapse(FOUND | {"agreement": 0.803})
    assert "80.3% of 500 answers on dev are the teacher's, one answer for all would be at 80.0% (alarm" in answers
    assert "below 80.4%); raise distil_epochs" in answers
    assert alarms.collapse(FOUND | {"agreement": 0.803}, folded=False) == []  # a new head says nothing yet
    real = {"spread": [0.397, 0.563], "rank": [1.62, 3.50], "agreement": 0.8871, "constant": 0.8829, "words": 2356}
    assert alarms.collapse(real) == []  # copied layers, 2,000 sentences, stage 1: dev F1 0.03, and 0.37 after stage 2
    assert alarms.collapse(FOUND | {"agreement": 0.5, "constant": 0.98}) == []  # 10 words tell nothing


def test_spread_and_rank_are_blind_to_scale(teacher, examples):
    student = copy.deepcopy(teacher)
    for parameter in student.bert.encoder.layer[-1].output.LayerNorm.parameters():
        parameter.data *= 100
    found = measured(teacher, student, examples)
    assert found["spread"][0] == pytest.approx(found["spread"][1]) and found["rank"][0] == pytest.approx(
        found["rank"][1], rel=1e-3)


def evals(*scores, metric="held-out loss", **more):
    """The history of a step: an evaluation, then epochs whose training loss falls by a tenth of 1 each."""
    records = [{"kind": "eval", "step": 1, "step_name": "all", "epoch": 0, "metric": metric, "score": scores[0]}]
    for epoch, score in enumerate(scores[1:], 1):
        records += [{"kind": "train", "step": 1, "epoch": epoch, "loss": 1 - epoch / 10 + x} for x in (-0.02, 0.02)]
        records.append(records[0] | {"epoch": epoch, "score": score})
    return [record | (more if record["kind"] == "eval" else {}) for record in records]


@pytest.mark.parametrize("was, now, projections, given", [
    (0.5, 0.5, "2", True), (0.5, 0.4, "2", True), (0.5, 0.509, "2", True),
    (0.5, 0.52, "2", False),  # the student itself came nearer
    (0.97, 0.95, "2", False),  # it was near
    (0.5, 0.5, "1", False)])  # there is no projection that could do it
def test_a_projection_that_does_the_work_alone(was, now, projections, given):
    history = evals(3.0, 2.0)
    for record, loss in zip((history[0], history[-1]), (1.25, 0.75), strict=True):
        record["held_out_hidden_2"] = loss
    sides = [{"cka": [[0] * 3] * 4 + [[0, 0, cka]], "hidden_pairs": [[2, 4]]} for cka in (was, now)]
    found = alarms.projection_alone(history, *sides, {projections: None})
    assert len(found) == given
    for text in found:
        assert "layers 2 (student) and 4 (teacher): held-out loss fell from 1.25 to 0.75" in text
        assert f"CKA went from {was:.3f} to {now:.3f} (alarm below 0.510); raise distil_epochs" in text
    history[-1]["held_out_hidden_2"] = 1.3  # nothing was learnt there: the history shows that
    assert alarms.projection_alone(history, *sides, {projections: None}) == []


@pytest.mark.parametrize("scores, metric, text", [
    ((0.5, 0.7, 0.68, 0.66), "dev macro F1", r"dev macro F1 \(all\) went from 0.7 to 0.66 \(alarm from 1%\)"),
    ((3.0, 2.0, 2.1, 2.2), "held-out loss", r"held-out loss \(all\) went from 2 to 2.2 \(alarm from 1%\)"),
    ((0.5, 0.7, 0.68, 0.69), "dev macro F1", None), ((0.5, 0.7, 0.66), "dev macro F1", None),
    ((0.5, 0.7, 0.699, 0.698), "dev macro F1", None), ((0.0, 0.044, 0.042, 0.04), "dev macro F1", None),
    ((0.0, 0.0, 0.0, 0.0), "dev macro F1", None),
    ((3.0, 2.0, 1.9, 1.8), "held-out loss", None), ((3.0,), "held-out loss", None)])
def test_scores_that_grow_worse_while_the_loss_falls(scores, metric, text):
    history = evals(*scores, metric=metric)
    found = alarms.overfitting(history)
    assert len(found) == bool(text)
    if text:
        with pytest.raises(AssertionError, match=text + " while the loss fell from 0.8 to 0.7; give more text"):
            raise AssertionError(found[0])
        rising = [r | ({"loss": 1 - r["loss"]} if r["kind"] == "train" else {}) for r in history]
        assert alarms.overfitting(rising) == []
        second = [r | {"step": 2, "step_name": "layer_1"} for r in history if r["epoch"]]
        assert len(alarms.overfitting(history + second)) == 2  # of each step
    assert alarms.overfitting([]) == []


def test_dev_f1_that_falls_from_stage_to_stage_while_the_held_out_loss_falls():
    (text,) = alarms.overfitting(evals(0.9, 0.5, 0.4), [0.75, 0.735])
    assert "dev macro F1, from the stage before, went from 0.75 to 0.735 (alarm from 1%)" in text
    assert "the loss fell from 0.9 to 0.4" in text and "hard_label_weight" in text
    assert alarms.overfitting(evals(0.9, 0.5), [0.75, 0.745]) == alarms.overfitting(evals(0.9, 0.5), [0.6]) == []
    assert alarms.overfitting(evals(0.9, 0.95), [0.75, 0.5]) == []  # that stage kept the weights it had


def test_leaks_are_counted_by_sentence():
    tested, trained = np.array([[1, 2, 4], [7, 8, 7]]), np.array([[3, 5, 6], [9, 7, 7]])
    (text,) = alarms.leakage("dev", tested, "x/transfer.tsv", trained)
    assert "leakage: 2 of 3 of dev stand in x/transfer.tsv too, first in line 5 (alarm from 1): drop them" in text
    assert alarms.leakage("dev", tested, "x", trained[:, :1]) == []


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """The toy task with two sentences of dev and one of test in the transfer text, and one of dev in train."""
    task = shutil.copytree(ROOT / "tests/data/toy", tmp_path_factory.mktemp("leaky") / "task")
    rows = {name: (task / f"{name}.tsv").read_text(encoding="utf-8").splitlines() for name in ("dev", "test")}
    first, second, third = (row.split("\t")[0] for row in (*rows["dev"][3:5], rows["test"][0]))
    with open(task / "transfer.tsv", "a", encoding="utf-8") as file:
        file.write(f"\n{first.upper().replace(' ', '  ')}\n{second}\n{third.title()}\tja\n")  # after 84 lines
    with open(task / "train.tsv", "a", encoding="utf-8") as file:
        file.write(f"{rows['dev'][0]}\n")
    return task


LEAKS = {"dev in train": "leakage: 1 of 16 of dev stand in {}/train.tsv too, first in line 61 ",
         "dev": "leakage: 2 of 16 of dev stand in {}/transfer.tsv too, first in line 86 ",
         "test": "leakage: 1 of 24 of test stand in {}/transfer.tsv too, first in line 88 "}


def test_check_counts_leaks_and_names_the_line(leaky, tmp_path, capsys):
    arguments = ["check", str(ROOT / "params/smoke.yaml"), "--model_dir", str(tmp_path / "run")]
    assert cli.main([*arguments, "--task", str(leaky)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[alarm]")]
    assert len(told) == 3
    for line, text in zip(told, LEAKS.values(), strict=True):
        assert line.startswith(f"[alarm] {text.format(leaky)}(alarm from 1)")
    assert cli.main(arguments) == 0 and "[alarm]" not in capsys.readouterr().out


def test_what_is_not_read_does_not_leak(leaky, tmp_path):
    counts = set()
    for seed in range(4):
        params = smoke_params(tmp_path / "run", task=str(leaky), transfer_limit=40, seed=seed)
        inputs = Inputs(params, Run(params))
        read, dev = ([" ".join(words).casefold() for words in inputs.sentences(x).words] for x in ("transfer", "dev"))
        counts.add(n := len(set(read) & set(dev)))
        assert [f"leakage: {n} of 16 of dev" in text for text in inputs.leaks("dev", "transfer")] == [True] * bool(n)
    assert len(counts) > 1


@pytest.fixture(scope="module")
def bad(leaky, tmp_path_factory):
    """A run on the leaky task with an untrained teacher; test.tsv is not there before evaluation."""
    folder = tmp_path_factory.mktemp("bad") / "run"
    params = smoke_params(folder, task=str(leaky), unfreeze="none")
    shutil.move(leaky / "test.tsv", folder.parent)
    run_stages(params, last="labels")
    shutil.move(folder.parent / "test.tsv", leaky)
    return run_stages(params, "evaluation"), leaky


def test_a_bad_run_is_told_in_metrics_view_and_report(bad, capsys):
    run, task = bad
    found = {name: json.loads((run.dir / name / "metrics.json").read_text())["alarms"] for name in STAGES}
    for name, leak in (("teacher", "dev in train"), ("hidden", "dev"), ("labels", "dev in train"),
                       ("evaluation", "test")):
        assert any(text.startswith(LEAKS[leak].format(task)) for text in found[name]), (name, found[name])
    assert any(text.startswith("projection: ") for text in found["hidden"])  # layers from scratch, hardly trained
    assert any(text.startswith("collapse: ") for text in found["evaluation"])  # of a teacher that knows nothing
    texts = [(name, text) for name in STAGES for text in found[name]]
    assert [(row["stage"], row["alarm"]) for row in views.alarms(run).rows] == texts
    (run.dir / "notebooks").mkdir()
    for number, (name, verb) in enumerate(STAGES.items(), 1):
        said = "".join(f"[{name}] [alarm] {text}\n" for text in found[name])
        cell = new_code_cell("stage", outputs=[new_output("stream", name="stdout", text=f"[{name}] done\n{said}")])
        notebook = new_notebook(cells=[cell], metadata={"papermill": {"end_time": "now"}})
        nbformat.write(notebook, run.dir / "notebooks" / f"{number:02d}_{verb}.ipynb")
    flags = ["--model_dir", str(run.dir), "--task", str(task), "--device", "cpu", "--opt_policy", "float32"]
    assert cli.main(["run", str(ROOT / "params/smoke.yaml"), *flags, "--unfreeze", "none"]) == 0
    out, page = capsys.readouterr().out, (run.dir / "report.html").read_text(encoding="utf-8")
    assert all(text in out for _, text in texts)
    summary = page[page.index("<header") : page.index("</header>")]
    assert "class=alarm" in summary and LEAKS["test"].format(task) in summary
    assert page.count('<b class="alarm">[') == len(texts) and ".alarm {" in page
    assert f'<b class="alarm">[evaluation] [alarm] {LEAKS["test"].format(task)}' in page


def test_alarms_are_said_when_a_stage_ends_and_again_when_it_is_done(bad, capsys):
    run, _ = bad
    run_stages(run.params, "hidden", "hidden")
    said = capsys.readouterr().out.splitlines()
    assert said[1:] == [f"[hidden] [alarm] {text}" for text in run.stage("hidden").metrics["alarms"]] and said[1:]


def test_a_healthy_run_is_silent(tmp_path):
    params = smoke_params(tmp_path / "run", student_init="teacher_layers", hidden_size=48,
                          compress_word_embedding=False, unfreeze="none", teacher_lr=3e-3, teacher_epochs=20,
                          patience=20, distil_lr=1e-3, logit_lr=1e-3)
    run = run_stages(params, last="evaluation")
    assert {name: run.stage(name).metrics.get("alarms") for name in list(STAGES)[:6]} == dict.fromkeys(
        list(STAGES)[:6], [])
    after = run.stage("hidden").metrics["alignment_after"]
    assert after["agreement"] > 0.9 > after["constant"] and after["words"] == 256  # there was something to collapse
    assert views.alarms(run).rows == [{"alarms": "none"}]
