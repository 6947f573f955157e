"""Studies: the grid, cells that are not repeated, what each value is worth; once through the command line."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_stages import copied, finished_smoke_run, smoke, smoke_params  # noqa: F401  fixtures

from xdistil import cli, stages, study
from xdistil.params import ParamsError, load_params
from xdistil.runs import STAGES, Run, stages_of

VARY = {"ft_lr": [2e-4, 1e-3], "student_stages": [["labels"]]}


@pytest.fixture
def base(copied):  # noqa: F811
    return smoke_params(copied("teacher"), student_stages=["labels"], ft_epochs=1, unfreeze="none")


@pytest.fixture
def called(monkeypatch):
    """Cells run here and now; the folders of those that did."""
    called = []

    def run(command, **_):
        params = load_params(command[-1])
        called.append(Path(params.model_dir))
        if params.ft_lr == 1e-3 and len(called) == 3:
            return SimpleNamespace(returncode=1)
        for name in stages_of(params):
            getattr(stages, STAGES[name])(params, Run(params))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run, STDOUT=None))
    return called


def test_one_parameter_at_a_time_with_each_seed(base):
    run = Run(base)
    cells = study.plan(base, run, VARY, [1, 2])
    assert list(cells) == ["base", "ft_lr=0.0002", "ft_lr=0.001"]  # what the base has already is not a cell
    for title, group in cells.items():
        assert [cell.seed for cell in group] == [1, 2]
        for cell in group:
            assert cell.model_dir == str(run.dir / "study" / title / str(cell.seed))
            assert cell.teacher_model_dir == str(run.dir / "teacher")
            other = {name for name, value in cell if value != getattr(base, name)}
            assert other - {"seed", "model_dir", "teacher_model_dir"} == ({"ft_lr"} if title != "base" else set())
    maps = study.plan(base, run, {"layer_map": [[[1, 2]], [[1, 4]]]}, [1])
    assert len({cell.model_dir for (cell,) in maps.values()}) == 3
    both = {"attention_loss": "relation", "distil_attention": True}
    (title, (cell,)) = list(study.plan(base, run, {"relations": both}, [1]).items())[1]
    assert title == "relations" and cell.distil_attention and cell.model_dir == str(run.dir / "study/relations/1")
    with pytest.raises(ParamsError, match="unknown parameter 'temprature'; did you mean 'temperature'"):
        study.plan(base, run, {"temprature": [2]}, [1])
    assert not (run.dir / "study").exists()


def test_finished_cells_are_not_repeated_and_failed_ones_are_named(base, called):
    run, vary = Run(base), {"ft_lr": [1e-3]}
    before = (run.dir / "teacher/model.safetensors").stat().st_mtime_ns
    cells = study.plan(base, run, vary, [1, 2])
    log = run.dir / "study/ft_lr=0.001/1.log"
    with pytest.raises(RuntimeError, match=f"^1 cells failed; see {log}, then call this again"):
        study.run_cells(base, run, cells)
    assert len(called) == 4 and log.is_file()  # the others went on
    table = study.run_cells(base, run, cells)
    assert called[4:] == [run.dir / "study/ft_lr=0.001/1"]
    assert study.run_cells(base, run, cells).rows == table.rows and len(called) == 5
    assert (run.dir / "teacher/model.safetensors").stat().st_mtime_ns == before
    assert not (called[0] / "teacher/model.safetensors").exists()
    scored = {(cell / "teacher/metrics.json").read_bytes() for cell in called}
    assert len(scored) == 1  # with the seconds that it took: the teacher was scored once
    assert [(row["cell"], row["seed"]) for row in table.rows] == [
        ("base", 1), ("base", 2), ("ft_lr=0.001", 1), ("ft_lr=0.001", 2)]
    metrics = json.loads((called[1] / "evaluation/metrics.json").read_text())
    assert table.rows[1]["test"] == 100 * metrics["student"]["test"]["macro"]
    learnt = [json.loads((called[1] / name / "metrics.json").read_text()) for name in ("student-init", "labels")]
    assert table.rows[1]["minutes"] * 60 == pytest.approx(sum(each["stage_seconds"] for each in learnt))
    (row,) = study.compare(base, run, cells)
    gain = sum((i // 2 * 2 - 1) * row["test"] / 200 for i, row in enumerate(table.rows))
    assert row["cell"] == "ft_lr=0.001" and row["difference"] == pytest.approx(gain, abs=1e-12)
    assert row["low"] <= row["difference"] <= row["high"]
    study.run_cells(base, run, study.plan(base, run, {"ft_lr": [1e-3, 3e-4]}, [1, 2]))
    assert [path.parent.name for path in called[5:]] == ["ft_lr=0.0003"] * 2  # the grid has grown


@pytest.mark.notebook
@pytest.mark.slow
def test_the_command_runs_cells_through_their_notebooks(base, capsys):
    values = {name: value for name, value in base if value is not None and name not in ("model_dir", "student_stages")}
    path = Path(base.model_dir) / "base.json"
    path.write_text(json.dumps({"experiment": values | {"student_stages": ["labels"]}}))
    arguments = ["study", str(path), "--model_dir", base.model_dir, "--vary", "ft_lr=1e-3", "--vary",
                 "ft_lr=1e-3+ft_epochs=2", "--seeds", "1", "--n_jobs", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "0 cells done before, 3 to run" in out and "difference" in out and "ft_lr=1e-3" in out
    for cell in ("base", "ft_lr=1e-3", "ft_lr=1e-3+ft_epochs=2"):
        assert (Path(base.model_dir) / "study" / cell / "1" / "report.html").is_file()
    assert cli.main(arguments) == 0 and "3 cells done before, 0 to run" in capsys.readouterr().out
    for text in ("ft_lr", "ft_lr=1,2+seed=3", "ft_lr=1+seed"):
        with pytest.raises(SystemExit):
            cli.main(["study", str(path), "--vary", text])
        assert f"--vary: found {text!r}; expected NAME=VALUE" in capsys.readouterr().err
