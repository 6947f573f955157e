"""What keeps the library small and safe: who may import whom, sizes, docstrings, forbidden calls."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PATHS = sorted((ROOT / "xdistil").glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PATHS}
LEVELS = [  # a module may import those of lower levels only
    {"tables", "processes"},
    {"params", "files", "losses", "unfreeze", "embeddings", "grouping", "plots", "tf_weights", "bilstm", "families",
     "card", "alarms"},
    {"dropout", "alignment_plots", "result_plots", "sources"},
    {"runs", "devices", "data", "demo_data", "models", "checkpoints"},
    {"narrow", "wordwise"},
    {"texts", "transfer", "students", "targets", "vocab", "training", "export", "evaluate", "alignment", "report",
     "live", "errors", "compare"},
    {"ensemble", "predict", "frozen", "shards"}, {"provenance"}, {"inputs"}, {"feeds", "staging"},
    {"results", "inside"}, {"stages"}, {"views", "study", "explore"}, {"cli"},
]
LEVEL = {name: i for i, names in enumerate(LEVELS) for name in names} | {"__init__": -1, "__main__": len(LEVELS)}
HOLD_PARAMS = {"params", "runs", "provenance", "inputs", "feeds", "inside", "staging", "results", "stages", "views",
               "study", "cli"}
LAZY = {"papermill", "IPython", "ipywidgets", "zmq", "nbformat", "onnx", "torch_xla", "h5py", "pyarrow",
        "datasets"}


def imports(nodes):
    """Full names of what these nodes import: ("xdistil.data", "os", ...)."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(nodes):
    """Modules of this library that these nodes import; what `from xdistil import` names is one or `__init__`."""
    for name in imports(nodes):
        first, _, rest = name.partition(".")
        if first == "xdistil":
            module = rest.split(".")[0]
            yield module if module in TREES else "__init__"


def at_import(tree):
    """Statements that run when the module is imported: all but the insides of functions."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield node
            yield from at_import(node)


def test_every_module_has_a_level():
    assert set(TREES) == set(LEVEL)


@pytest.mark.parametrize("name", TREES)
def test_a_module_imports_only_from_below(name):
    for other in set(ours(ast.walk(TREES[name]))):
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_plots_know_nothing_of_ours():
    assert not list(ours(ast.walk(TREES["plots"]))) and set(ours(ast.walk(TREES["alignment_plots"]))) == {"plots"}
    for name in ("plots", "alignment_plots"):
        assert {x.split(".")[0] for x in imports(ast.walk(TREES[name]))} <= {
            "functools", "io", "itertools", "numpy", "matplotlib", "xdistil"}


@pytest.mark.parametrize("name", TREES)
def test_what_few_need_is_imported_where_it_is_used(name):
    assert not {x.split(".")[0] for x in imports(at_import(TREES[name]))} & LAZY


@pytest.mark.parametrize("name", TREES)
def test_only_those_on_top_hold_params(name):
    found = any(getattr(node, field, None) == "Params" for node in ast.walk(TREES[name])
                for field in ("id", "attr", "name"))
    assert found <= (name in HOLD_PARAMS), f"{name} takes plain values, not Params"


def test_notebooks_use_the_doors_only():
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(paths) >= 7
    for path in paths:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        code = re.sub(r"(?m)^(\s*)[!%].*", r"\1pass", code)  # shell lines and magics
        found = set(ours(ast.walk(ast.parse(code))))
        assert "params" in found and found <= {"params", "runs", "stages", "views", "plots", "result_plots", "study",
                                               "compare", "explore"}, path.name


def test_importing_the_package_loads_nothing_heavy():
    code = ("import sys, xdistil; heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib'}; "
            "print(xdistil.__version__, sorted(heavy & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    version, loaded = done.stdout.split(maxsplit=1)
    assert loaded.strip() == "[]" and version.count(".") == 2


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_module_fits_in_the_head(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < 300


def test_the_library_stays_small():
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PATHS)
    assert lines <= 7266


@pytest.mark.parametrize("name", TREES)
def test_all_that_is_public_has_a_docstring(name):
    tree = TREES[name]
    holders = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] != "_")]
    public = [node for holder in holders for node in holder.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
              and node.name[0] != "_" and node.name != "forward"]  # what forward does is torch's to say
    bare = [node.name for node in public if not ast.get_docstring(node)]
    assert ast.get_docstring(tree) and not bare, bare


@pytest.mark.parametrize("name", TREES)
def test_nothing_unpickles_or_runs_what_it_reads(name):
    for node in (x for x in ast.walk(TREES[name]) if isinstance(x, ast.Call)):
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "os.system", "yaml.load"}
        on = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
        assert not on & {"allow_pickle", "trust_remote_code", "shell"}, called
    imported = set(imports(ast.walk(TREES[name]))) - {"joblib.Parallel", "joblib.delayed"}  # own processes, no files
    assert not {x.split(".")[0] for x in imported} & {"pickle", "joblib", "dill", "shelve"}
