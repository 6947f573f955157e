"""Without a teacher: an encoder, or a finished student, fine-tuned on labels by the stages that every run has."""

import json

import pytest
from transformers import AutoModelForTokenClassification

from xdistil import cli, stages
from xdistil.params import ParamsError, load_params
from xdistil.runs import STAGES, Run, stages_of

LAST = ["labels", "evaluation", "student"]


def params_of(toy, folder, checkpoint, **changes):
    return load_params({"task": str(toy), "model_dir": str(folder), "pt_student_checkpoint": str(checkpoint),
                        "distil": False, "seq_len": 32, "ft_epochs": 2, "ft_lr": 1e-3, "device": "cpu",
                        "opt_policy": "float32"} | changes)


@pytest.fixture(scope="module")
def tuned(toy, teacher_folder, tmp_path_factory):
    """A run on the tiny encoder."""
    params = params_of(toy, tmp_path_factory.mktemp("tuned"), teacher_folder)
    run = Run(params)
    stages.check(params, run)
    for name in stages_of(params):
        getattr(stages, STAGES[name])(params, run)
    return run


def test_only_the_stages_on_labels_run_and_leave_what_a_run_leaves(tuned):
    assert {x.name for x in tuned.dir.iterdir() if x.is_dir()} == set(LAST)
    scores = [r["score"] for r in tuned.stage("labels").history if r["kind"] == "eval"]
    assert max(scores) > scores[0] and tuned.stage("labels").metrics["score"] == max(scores)
    found = tuned.stage("evaluation").metrics
    assert "teacher" not in found and "retention" not in found and found["student"]["test"]["macro"] > 0
    assert found["cka_with"] == "what it was before" and (tuned.dir / "evaluation/predictions.tsv").is_file()
    model = AutoModelForTokenClassification.from_pretrained(tuned.dir / "student")
    assert model.config.num_hidden_layers == 4
    assert "fine-tuned" in (tuned.dir / "student/README.md").read_text()


def test_a_finished_student_goes_on_where_it_stopped(tuned, toy, tmp_path):
    more = params_of(toy, tmp_path, tuned.dir / "student", train_limit=30)
    run = Run(more)
    stages.finetune_student(more, run)
    first = run.stage("labels").history[0]  # the head of before: its score on dev, not that of a new one
    assert first["kind"] == "eval" and first["score"] == pytest.approx(tuned.stage("labels").metrics["score"])
    again = params_of(toy, tmp_path, tuned.dir / "student", train_limit=30, ft_lr=2e-3)
    assert run.stage("labels").done and stages.finetune_student(again, Run(again)).metrics["score"] >= first["score"]


def test_another_checkpoint_of_the_same_name_runs_again(toy, teacher_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(teacher_folder, tmp_path / "encoder")
    params = params_of(toy, tmp_path / "run", tmp_path / "encoder", ft_epochs=1)
    before = stages.finetune_student(params, Run(params)).done
    weights = load_file(tmp_path / "encoder/model.safetensors")
    weights = {name: w + 0.01 for name, w in weights.items()}
    save_file(weights, tmp_path / "encoder/model.safetensors", {"format": "pt"})
    assert stages.finetune_student(params, Run(params)).done != before


@pytest.mark.parametrize("changes", [{"pt_student_checkpoint": None}, {"compress_word_embedding": True},
                                     {"trim_vocab": True}])
def test_what_needs_a_teacher_is_refused(toy, tmp_path, changes):
    with pytest.raises(ParamsError, match="distil: false fine-tunes pt_student_checkpoint as it is; name one"):
        load_params({"task": str(toy), "model_dir": str(tmp_path), "distil": False, "pt_student_checkpoint": "x"}
                    | changes)


@pytest.mark.notebook
def test_the_command_runs_the_notebooks_of_these_stages(toy, teacher_folder, tmp_path, capsys):
    flags = {"task": toy, "model_dir": tmp_path / "run", "pt_student_checkpoint": teacher_folder, "seq_len": 32,
             "ft_epochs": 1, "device": "cpu", "opt_policy": "float32"}
    assert cli.main(["finetune", *(str(x) for name, value in flags.items() for x in (f"--{name}", value))]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 stages ran" in out and "teacher" not in out
    assert sorted(x.name[:2] for x in (tmp_path / "run/notebooks").iterdir()) == ["05", "06", "07"]
    assert json.loads((tmp_path / "run/params.json").read_text())["distil"] is False
    assert (tmp_path / "run/report.html").is_file()
