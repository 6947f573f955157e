"""Files are whole or absent; a stage folder knows whether it is done, interrupted or out of date."""

import json

import pytest
from matplotlib.figure import Figure

from xdistil.files import hash_file, read_json, read_jsonl, save_atomic, save_json
from xdistil.params import fingerprint, load_params
from xdistil.runs import STAGES, Run, Stage, describe_changes

DEPENDS = {"seed": 42, "train file": "abc", "limit": None}


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "hidden")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = save_atomic(tmp_path / "deep" / "a.txt", lambda p: p.write_text("old"))

    def half(temporary):
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_atomic(path, half)
    assert path.read_text() == "old"
    save_atomic(path, lambda p: p.write_text("new"))
    assert contents(path.parent) == {"a.txt": b"new"}


def test_json_comes_back_and_absent_files_have_a_default(tmp_path):
    save_json(tmp_path / "a.json", {"ü": [1, None, 2.5], "path": tmp_path})
    assert read_json(tmp_path / "a.json") == {"ü": [1, None, 2.5], "path": str(tmp_path)}
    assert "ü" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "b.json", 3) == 3 and read_json(tmp_path / "b.json") is None
    (tmp_path / "c.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    assert read_jsonl(tmp_path / "c.jsonl") == [{"a": 1}, {"a": 2}] and read_jsonl(tmp_path / "d.jsonl") == []


def test_a_hash_is_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(tmp_path / "a") == "ba7816bf8f01cfea"  # FIPS 180-2's own example
    (tmp_path / "a").write_bytes(b"abd")
    assert hash_file(tmp_path / "a") != "ba7816bf8f01cfea"


def test_a_fresh_stage_begins(stage, capsys):
    assert stage.begin(DEPENDS) is True
    assert stage.done is None and stage.fingerprint is None and stage.metrics == {} and stage.history == []
    assert capsys.readouterr().out == ""


def test_a_finished_stage_is_not_begun_again(stage, capsys):
    stage.begin(DEPENDS)
    stage.finish({"f1": 0.5})
    before = contents(stage.dir)
    again = Stage(stage.dir)
    assert again.begin(dict(reversed(DEPENDS.items()))) is False  # the order of names means nothing
    assert capsys.readouterr().out == "[hidden] done before with the same parameters and data\n"
    assert contents(stage.dir) == before
    assert again.metrics == {"f1": 0.5} and again.done == DEPENDS and again.fingerprint == fingerprint(DEPENDS)


def test_an_interrupted_stage_keeps_its_checkpoint(stage, capsys):
    stage.begin(DEPENDS)
    (stage.dir / "checkpoint.safetensors").write_bytes(b"half way")
    (stage.dir / "history.jsonl").write_text('{"update": 1}\n')
    assert stage.begin(DEPENDS) is True
    assert "interrupted before" in capsys.readouterr().out
    assert (stage.dir / "checkpoint.safetensors").read_bytes() == b"half way" and stage.history == [{"update": 1}]


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_stage_says_what_changed_and_starts_clean(stage, capsys, finished):
    stage.begin(DEPENDS)
    (stage.dir / "model.safetensors").write_bytes(b"old")
    if finished:
        stage.finish({"f1": 0.5})
    assert stage.begin(DEPENDS | {"seed": 7}) is True
    out = capsys.readouterr().out
    assert "runs again: seed changed (42 -> 7)" in out and "train file" not in out
    assert stage.done is None and stage.metrics == {} and not (stage.dir / "model.safetensors").exists()
    stage.finish({})
    assert stage.done == DEPENDS | {"seed": 7}


def test_foreign_files_are_refused_and_untouched(stage):
    stage.dir.mkdir()
    (stage.dir / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match="model_dir: .*hidden holds files that no run of xdistil wrote"):
        stage.begin(DEPENDS)
    assert contents(stage.dir) == {"thesis.txt": b"three years"}


def test_an_empty_folder_is_nobodys(stage):
    stage.dir.mkdir()
    assert stage.begin(DEPENDS) is True


def test_the_done_mark_comes_after_the_metrics_and_before_the_checkpoint_goes(stage):
    stage.begin(DEPENDS)
    checkpoint = stage.dir / "checkpoint.safetensors"
    checkpoint.write_bytes(b"end")
    endless = {}
    endless["self"] = endless
    with pytest.raises(ValueError, match="[Cc]ircular"):
        stage.finish(endless)
    assert stage.done is None and checkpoint.exists()
    stage.finish({"f1": 1.0})
    assert stage.done == DEPENDS and stage.metrics == {"f1": 1.0} and not checkpoint.exists()


@pytest.mark.parametrize("old, new, text", [
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}, "b changed (2 -> 3)"),
    ({"a": 1}, {"b": 2}, "a changed (1 -> None), b changed (None -> 2)"),
    ({"a": 1}, {"a": 1}, "")])
def test_changes_are_told_in_words(old, new, text):
    assert describe_changes(old, new) == text


def test_a_run_is_a_folder_of_stages_in_order(tmp_path):
    run = Run(load_params({"model_dir": str(tmp_path / "run")}))
    assert not run.dir.exists()  # nothing is written until a stage begins
    assert list(STAGES) == ["teacher", "student-init", "hidden", "logits", "labels", "evaluation", "student"]
    assert run.stage("logits").dir == tmp_path / "run" / "logits" and run.stage("logits").name == "logits"


def test_a_figure_is_saved_whole(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.subplots().plot([1, 2])
    path = Run(load_params({"model_dir": str(tmp_path)})).save_figure(figure, "line")
    assert path == tmp_path / "figures" / "line.png"
    assert path.read_bytes().startswith(b"\x89PNG") and list(contents(path.parent)) == ["line.png", "line.svg"]


def test_a_done_mark_is_json_that_people_can_read(stage):
    stage.begin(DEPENDS)
    stage.finish({})
    assert json.loads((stage.dir / "done.json").read_text(encoding="utf-8")) == DEPENDS
