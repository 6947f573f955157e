"""A study: one parameter at a time around those of a run, over seeds; each cell is a run, all have one teacher."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from joblib import Parallel, delayed

from xdistil import evaluate, stages
from xdistil.files import save_json
from xdistil.inputs import Inputs
from xdistil.params import Params, load_params, repo_root
from xdistil.provenance import is_done, task_file, teacher_dir
from xdistil.results import predictions
from xdistil.runs import Run, stages_of
from xdistil.tables import Table

Cells = dict[str, list[Params]]  # by what is varied, one for each seed; the first is the base


def plan(params: Params, run: Run, vary: dict[str, list | dict], seeds: list[int]) -> Cells:
    """The cells around a run: itself ("base") and each value of each parameter, in MODEL_DIR/study/NAME=VALUE/SEED,
    with its task and teacher. What goes together is a mapping under a title: {"relations": {"distil_attention": True,
    "attention_loss": "relation"}}. Raises ParamsError before any cell runs."""
    shared = {"task": str(task_file(params, run, "train").parent)}
    shared |= {"teacher_model_dir": str(teacher_dir(params, run))} if params.distil else {}
    changes = {title: change for name, values in vary.items() for title, change in (
        [(name, values)] if isinstance(values, dict) else [(f"{name}={value}", {name: value}) for value in values])}
    cells = {}
    for title, change in ({"base": {}} | changes).items():
        folder = run.dir / "study" / re.sub(r"[^\w=.,+-]+", "_", title)
        asked = params.model_dump(exclude_none=True) | shared | change
        if title == "base" or load_params(params.model_dump(exclude_none=True), change) != params:
            cells[title] = [load_params(asked, {"seed": seed, "model_dir": str(folder / str(seed))}) for seed in seeds]
    return cells


def _run_cell(cell: Params) -> str | None:
    """Run a cell through its notebooks, in a process with one thread; the path of its log if it failed."""
    folder = Path(cell.model_dir)
    asked = save_json(folder.with_suffix(".json"), {"experiment": cell.model_dump(exclude_none=True)})
    with open(log := folder.with_suffix(".log"), "w", encoding="utf-8") as out:
        failed = subprocess.run([sys.executable, "-m", "xdistil", "run", asked], cwd=repo_root(), stdout=out,
                                stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    print(f"[study] {folder.parent.name}, seed {cell.seed}: {f'failed, see {log}' if failed else 'done'}", flush=True)
    return str(log) if failed else None


def run_cells(params: Params, run: Run, cells: Cells, n_jobs: int = 1) -> Table:
    """Fine-tune the teacher if it is not there, then run what is not finished, `n_jobs` cells at a time; macro F1 of
    each and its minutes. Raises RuntimeError at the end, naming the logs of cells that failed."""
    stages.finetune_teacher(params, run)
    first, *others = (Run(cell) for group in cells.values() for cell in group) if params.distil else [None]
    scored = first and stages.finetune_teacher(first.params, first).dir  # once for all of them
    for other in others:
        if not other.stage("teacher").dir.exists():
            shutil.copytree(scored, other.stage("teacher").dir)
    todo = [cell for group in cells.values() for cell in group if not is_done(cell, Run(cell), "student")]
    print(f"[study] {sum(map(len, cells.values())) - len(todo)} cells done before, {len(todo)} to run", flush=True)
    if failed := list(filter(None, Parallel(n_jobs, prefer="threads")(map(delayed(_run_cell), todo)))):
        raise RuntimeError(f"{len(failed)} cells failed; see {', '.join(failed)}, then call this again")
    return Table([{"cell": title, "seed": cell.seed, **_scores(cell)} for title, group in cells.items()
                  for cell in group], "the cells of the study: macro F1 (%), and how long the student learnt")


def _scores(cell: Params) -> dict[str, float]:
    run, learnt = Run(cell), [name for name in stages_of(cell)[:-2] if name != "teacher"]
    found = {name: 100 * run.stage("evaluation").metrics["student"][name]["macro"] for name in ("dev", "test")}
    return found | {"minutes": sum(run.stage(name).metrics["stage_seconds"] for name in learnt) / 60}


def compare(params: Params, run: Run, cells: Cells) -> list[dict]:
    """What each cell gains over the base on test, over its seeds: rows of `evaluate.paired_bootstrap`."""
    gold = Inputs(params, run).sentences("test")
    tags = {title: [predictions(Run(cell).stage("evaluation"), params.do_NER)["student"] for cell in group]
            for title, group in cells.items()}
    base = tags.pop("base")
    return [{"cell": title, **evaluate.paired_bootstrap(gold, base, found, by_word=params.do_NER)}
            for title, found in tags.items()]
