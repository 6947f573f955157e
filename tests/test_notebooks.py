"""The notebooks: one shape for all, nothing of logic in them; and all seven run from the command line."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from test_stages import finished_smoke_run

from xdistil import cli
from xdistil.params import load_params
from xdistil.runs import STAGES

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ROOT / "params/smoke.yaml"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBERED = [f"{number:02d}_{verb}" for number, verb in enumerate(STAGES.values(), 1)]
LOGIC = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.For, ast.AsyncFor, ast.While, ast.Lambda, ast.Try,
         ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def tagged(path, tag):
    """The one cell of a notebook with a tag."""
    (cell,) = [cell for cell in read(path).cells if tag in cell.metadata.get("tags", ())]
    return cell


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def without_magics(source):
    """Python alone: lines for IPython become `pass`, indented as they were."""
    return re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", source)


def lines(source):
    return [line for line in source.splitlines() if line.strip()]


def test_the_seven_are_there():
    assert [path.stem for path in NOTEBOOKS if re.match(r"\d\d_", path.name)] == NUMBERED


@each
def test_is_valid_and_committed_without_results(path):
    notebook = read(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.metadata.kernelspec.name) == (4, "python3")
    assert not {"widgets", "papermill"} & notebook.metadata.keys()
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.id
    for cell in code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None


@each
def test_holds_no_logic_and_few_lines(path):
    n_lines = 0
    for cell in code_cells(path):
        found = [type(node).__name__ for node in ast.walk(ast.parse(without_magics(cell.source)))
                 if isinstance(node, LOGIC)]
        assert found == [], cell.source
        n_lines += 0 if "setup" in cell.metadata.get("tags", ()) else len(lines(cell.source))
    assert 2 < n_lines <= 40


@each
def test_parameters_and_set_up_are_the_same_everywhere(path):
    parameters, setup = tagged(path, "parameters"), tagged(path, "setup")
    assert lines(parameters.source) == parameters.source.splitlines() and len(lines(parameters.source)) == 2
    for cell, tag in ((parameters, "parameters"), (setup, "setup")):
        assert cell.source == tagged(NOTEBOOKS[0], tag).source
    order = [cell.source for cell in code_cells(path)]
    assert order[:2] == [parameters.source, setup.source]
    assert re.fullmatch(r'experiment: str = "(.*)"  #@param \{type:"string"\}\noverrides = \{\}', parameters.source)


@each
def test_papermill_finds_the_two_parameters(path):
    found = papermill.inspect_notebook(path)
    assert list(found) == ["experiment", "overrides"]
    default = ast.literal_eval(found["experiment"]["default"])
    assert load_params(default) and (ROOT / default).is_file()


@each
def test_says_where_it_reads_and_writes_and_opens_itself_in_colab(path):
    first = read(path).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")
    assert "reads" in first.source and "writes" in first.source
    (link,) = re.findall(r"/colab-badge\.svg\)\]\(https://colab\.research\.google\.com(/github/\S+)\)", first.source)
    assert link.endswith(f"/blob/main/notebooks/{path.name}")
    clone = re.search(r"git clone .*github\.com/(\S+)", tagged(path, "setup").source)
    assert f"/github/{clone.group(1)}/blob/" in link


@each
def test_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not t.startswith("http")]
    for target in targets:
        assert (path.parent / target).is_file(), target
    if path.stem in NUMBERED[:-1]:
        assert f"{NUMBERED[NUMBERED.index(path.stem) + 1]}.ipynb" in targets


@each
def test_names_of_the_library_exist_and_one_stage_is_called(path):
    source = "\n".join(without_magics(cell.source) for cell in code_cells(path))
    ours = ("stages", "views", "plots", "result_plots", "study", "compare")
    places = {name: f"xdistil.{name}" for name in ours} | {"figures": "benchmarks.figures"}
    used = {(node.value.id, node.attr) for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in places}
    assert used
    for module, name in used:
        assert callable(getattr(importlib.import_module(places[module]), name, None)), f"{module}.{name}"
    if path.stem in NUMBERED:
        verb = path.stem[3:]
        more = {"run_baselines"} if verb == "evaluate_student" else set()
        assert {name for module, name in used if module == "stages"} == {verb} | more
        assert source.count(f"stages.{verb}(params, run)") == 1


@each
def test_figures_have_names_of_their_own(path):
    own = re.findall(r'save_figure\(figure, "([\w-]+)"\)', path.read_text().replace('\\"', '"'))
    others = [name for other in NOTEBOOKS if other != path
              for name in re.findall(r'save_figure\(figure, "([\w-]+)"\)', other.read_text().replace('\\"', '"'))]
    assert len(set(own)) == len(own) and not set(own) & set(others)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def xdistil(*arguments):
    return subprocess.run([sys.executable, "-m", "xdistil", *map(str, arguments)], cwd=ROOT, env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """`xdistil run params/smoke.yaml` into a new folder: the folder, and the finished process."""
    folder = tmp_path_factory.mktemp("executed") / "run"
    return folder, xdistil("run", "params/smoke.yaml", "--model_dir", folder)


@pytest.mark.notebook
@pytest.mark.slow
def test_the_command_runs_all_notebooks_and_reports(executed):
    folder, done = executed
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(p.stem for p in (folder / "notebooks").iterdir()) == NUMBERED
    pictures = 0
    for path in (folder / "notebooks").iterdir():
        notebook = read(path)
        assert not notebook.metadata.papermill.exception
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert all(cell.execution_count for cell in cells)
        outputs = [output for cell in cells for output in cell.outputs]
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output for output in outputs if output.get("name") == "stderr"], path.name
        shown = sum("image/png" in output.get("data", {}) for output in outputs)
        saved = sum(cell.source.count("save_figure") for cell in cells)
        assert shown == saved
        pictures += shown
        injected = next(c for c in cells if "injected-parameters" in c.metadata.get("tags", ()))
        assert "tests/data/toy" in injected.source  # each executed notebook records what it ran with
    files = list((folder / "figures").iterdir())
    for form in (".png", ".svg"):
        assert len([path for path in files if path.suffix == form]) == pictures > 10
    assert len(files) == 2 * pictures
    for name in STAGES:
        assert (folder / name / "done.json").is_file()


@pytest.mark.notebook
@pytest.mark.slow
def test_the_command_prints_the_table(executed):
    folder, done = executed
    metrics = json.loads((folder / "evaluation/metrics.json").read_text())
    rows = {line.split("  ")[0]: line.split()[-3:] for line in done.stdout.splitlines() if "  " in line}
    for mean in ("macro", "micro"):
        for column, model in enumerate(("teacher", "student")):
            wanted = 100 * metrics[model]["test"][mean]
            assert float(rows[f"{mean} F1 (%)"][column]) == pytest.approx(wanted, abs=0.051)
    assert rows["parameters"][1] == f"{metrics['student']['parameters']:,}"
    assert "7 of 7 stages ran" in done.stdout and str(folder / "report.html") in done.stdout
    assert done.stdout.count("[teacher]") + done.stderr.count("[teacher]") >= 2  # its progress came through


@pytest.mark.notebook
@pytest.mark.slow
def test_the_report_holds_everything_itself(executed):
    page = (executed[0] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r"""\bsrc\s*=\s*["']?([^"'>\s]{,40})""", page)
    assert len(sources) > 10 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.findall(r"(?i)<(?:script|link|iframe|object|embed)\b|@import|url\(", page)
    assert all(href.startswith(("#", "https://")) for href in re.findall(r'\bhref="([^"]*)"', page))
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    assert {href[1:] for href in re.findall(r'\bhref="(#[^"]+)"', page)} <= ids  # links inside lead somewhere
    text = re.sub(r"<[^>]+>", "", page)
    for path in NOTEBOOKS[:7]:
        assert read(path).cells[0].source.splitlines()[0].removeprefix("# ") in text
    assert "macro F1" in text


@pytest.mark.notebook
@pytest.mark.slow
def test_a_second_call_executes_nothing(executed, capsys, monkeypatch):
    folder, _ = executed
    for name in ("XDISTIL_HEADLESS", "PYDEVD_DISABLE_FILE_VALIDATION"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(papermill, "execute_notebook", None)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert cli.main(["run", str(SMOKE), "--model_dir", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert "0 of 7 stages ran" in out and "macro F1" in out
    assert (out + err).count("done before with the same parameters and data") == 7
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.mark.notebook
@pytest.mark.slow
def test_a_stage_that_fails_is_named_with_its_cell_and_what_ran_is_kept(executed, tmp_path):
    folder = shutil.copytree(executed[0], tmp_path / "run")
    done = xdistil("run", "params/smoke.yaml", "--model_dir", folder, "--hidden_weight", "1e39")  # infinite in float32
    assert done.returncode == 1, done.stderr[-3000:]
    for name in NUMBERED[:2]:  # not executed again
        before, after = (path / "notebooks" / f"{name}.ipynb" for path in (executed[0], folder))
        assert before.stat().st_mtime_ns == after.stat().st_mtime_ns
    partial = folder / "notebooks" / "03_distil_hidden.ipynb"
    said = done.stderr[done.stderr.index("xdistil:") :]
    match = re.match(r"xdistil: distil_hidden failed in cell (\d+): FloatingPointError: (.*)\n(.*)\n", said)
    assert "learning rate" in match.group(2) and str(partial) in match.group(3)
    cells = [cell for cell in read(partial).cells if cell.cell_type == "code"]
    failed = next(cell for cell in cells if "stages.distil_hidden" in cell.source)
    assert failed.execution_count == int(match.group(1))
    assert [output.ename for output in failed.outputs if output.output_type == "error"] == ["FloatingPointError"]
    assert "Traceback" not in done.stderr
    assert not (folder / "hidden" / "done.json").exists() and (folder / "student-init" / "done.json").is_file()


def execute(name, out, parameters):
    """Execute a notebook from its own folder, as `papermill -f` does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of papermill, jupyter_client and zmq
        os.environ["PYTHONPATH"], old = str(ROOT), os.environ.get("PYTHONPATH")
        try:
            papermill.execute_notebook(ROOT / f"notebooks/{name}.ipynb", out, parameters, kernel_name="python3",
                                       cwd=str(ROOT / "notebooks"), progress_bar=False)
        finally:
            os.environ.pop("PYTHONPATH") if old is None else os.environ.__setitem__("PYTHONPATH", old)
    return [o for c in read(out).cells if c.cell_type == "code" for o in c.outputs]


@pytest.mark.notebook
def test_papermill_runs_a_notebook_from_its_own_folder(tmp_path, tmp_path_factory):
    run = tmp_path / "run"
    shutil.copytree(finished_smoke_run(tmp_path_factory) / "teacher", run / "teacher")
    parameters = yaml.safe_load(SMOKE.read_text())  # as `papermill -f params/smoke.yaml` injects it
    parameters["overrides"] = {"model_dir": str(run), "device": "cpu", "opt_policy": "float32"}
    outputs = execute("02_build_student", tmp_path / "out.ipynb", parameters)
    assert (run / "student-init" / "done.json").is_file() and (run / "figures" / "spectrum.png").is_file()
    assert not (ROOT / "notebooks" / "runs").exists()
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.notebook
def test_a_notebook_of_a_stage_that_the_run_lacks_says_so_and_ends(tmp_path):
    parameters = {"experiment": str(SMOKE), "overrides": {"model_dir": str(tmp_path), "student_stages": ["labels"]}}
    outputs = execute("03_distil_hidden", tmp_path / "out.ipynb", parameters)  # no error, for papermill
    assert "[hidden] not one of this run's stages, teacher, student-init, labels, " in str(outputs)
    assert not any("image/png" in output.get("data", {}) for output in outputs)
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


@pytest.mark.notebook
def test_the_notebook_of_evaluation_runs_the_baselines(tmp_path, tmp_path_factory):
    run = shutil.copytree(finished_smoke_run(tmp_path_factory), tmp_path / "run")
    overrides = {"model_dir": str(run), "device": "cpu", "opt_policy": "float32", "baselines": True}
    parameters = {"experiment": str(SMOKE), "overrides": overrides}
    outputs = execute("06_evaluate_student", tmp_path / "out.ipynb", parameters)
    assert "only logits, labels" in str([output.get("data", {}).get("text/html") for output in outputs])
    assert (run / "baselines/logits/evaluation/done.json").is_file()
    for name in ("confusion", "by-length", "by-frequency"):
        assert (run / f"figures/{name}.png").stat().st_size > 5000 and (run / f"figures/{name}.svg").is_file()
    shown = str([output.get("data", {}).get("text/html") for output in outputs])
    assert "most frequent mistake" in shown and "teacher and gold" in shown


@pytest.mark.notebook
def test_runs_are_compared_side_by_side(tmp_path, tmp_path_factory):
    for name in ("first", "second"):
        shutil.copytree(finished_smoke_run(tmp_path_factory), tmp_path / name)
    path = tmp_path / "second/evaluation/metrics.json"
    metrics = json.loads(path.read_text())
    metrics["student"]["test"]["macro"] += 0.1
    path.write_text(json.dumps(metrics))
    path.with_name("checksums.json").unlink()  # else the run is known as damaged
    parameters = {"experiment": str(SMOKE), "overrides": {"model_dir": str(tmp_path / "first")}}
    outputs = execute("compare_runs", tmp_path / "out.ipynb", parameters)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert {p.stem for p in (tmp_path / "first/figures").iterdir()} >= {"compare-front", "compare-retention"}
    text = "".join(output.get("text", "") for output in outputs)
    assert "| first | " in text and "| second | " in text and r"\begin{tabular}{lrrrrrr}" in text
