"""What the tricks are worth over stages 1 to 3, and what bfloat16 costs in F1, on a task given by its parameters.

python tests/benchmarks/whole_run.py tricks PARAMS.yaml [--NAME VALUE ...]       every trick on and off
python tests/benchmarks/whole_run.py precision PARAMS.yaml [--NAME VALUE ...]    float32 and bfloat16, three seeds
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from xdistil import frozen, grouping, stages, targets  # noqa: E402
from xdistil.params import load_params  # noqa: E402
from xdistil.runs import STAGES, Run  # noqa: E402

OFF = {"opt_policy": "float32", "targets_cache": "none", "targets_cache_gb": 0}


@contextlib.contextmanager
def tricks_off(seq_len: int):
    """What most people write: batches of a constant number of sentences, padded to `seq_len`."""
    def plain(_lengths, batch_size, fixed=False):
        return np.array([seq_len]), np.array([batch_size])

    with contextlib.ExitStack() as stack:
        for module in (grouping, targets, frozen):
            stack.enter_context(mock.patch.object(module, "grid", plain))
        yield


def prepare(params) -> Run:
    """A run whose teacher is there."""
    run = Run(params)
    stages.finetune_teacher(params, run)
    return run


def distil(params, run: Run, last: str) -> dict[str, float]:
    """Seconds of each stage from the student's first weights up to `last`."""
    seconds, names = {}, list(STAGES)
    for name in names[1 : names.index(last) + 1]:
        start = time.perf_counter()
        getattr(stages, STAGES[name])(params, run)
        seconds[name] = round(time.perf_counter() - start, 1)
    return seconds


def tricks(asked: dict) -> dict:
    """Seconds and dev F1 with every trick on and off, the same teacher before both."""
    with tempfile.TemporaryDirectory() as folder:
        asked = {"teacher_model_dir": f"{folder}/teacher"} | asked
        prepare(load_params(asked | {"model_dir": f"{folder}/first"}))
        found = {}
        for name, changed in (("on", {}), ("off", OFF)):
            params = load_params(asked | changed | {"model_dir": f"{folder}/{name}"})
            run = prepare(params)
            with tricks_off(params.seq_len) if name == "off" else contextlib.nullcontext():
                seconds = distil(params, run, "labels")
            found[name] = {"seconds": seconds, "total": sum(seconds.values()),
                           "dev macro F1": run.stage("labels").metrics["dev"]["macro"]}
    return found | {"ratio": found["off"]["total"] / found["on"]["total"]}


def precision(asked: dict, seeds=(1, 2, 3)) -> dict:
    """Test macro F1 of the student by precision and seed, the same teacher before all."""
    scores = {"float32": [], "mixed_bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        teacher_dir = asked.get("teacher_model_dir", f"{folder}/teacher")
        prepare(load_params(asked | {"teacher_model_dir": teacher_dir, "model_dir": f"{folder}/first"}))
        for seed in seeds:
            for policy, found in scores.items():
                changed = {"opt_policy": policy, "seed": seed, "teacher_model_dir": teacher_dir}
                params = load_params(asked | changed | {"model_dir": f"{folder}/{policy}{seed}"})
                run = prepare(params)
                distil(params, run, "evaluation")
                metrics = run.stage("evaluation").metrics
                found.append(metrics["student"]["test"]["macro"])
                teacher = metrics["teacher"]["test"]["macro"]
                print(f"seed {seed}, {policy}: {found[-1]:.4f}", file=sys.stderr, flush=True)
    return {"teacher": teacher, **{policy: {"scores": found, "mean": statistics.fmean(found),
                                            "stdev": statistics.stdev(found)} for policy, found in scores.items()}}


if __name__ == "__main__":
    what, path, *flags = sys.argv[1:]
    values = {name.removeprefix("--"): value for name, value in zip(flags[::2], flags[1::2], strict=True)}
    params = load_params(path, values)
    asked = params.model_dump(exclude_none=True)
    print(json.dumps({"tricks": tricks, "precision": precision}[what](asked), indent=1))
