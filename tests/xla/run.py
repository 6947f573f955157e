"""The XLA path on torch_xla's CPU device: not part of `make test`, as it wants torch 2.9 with torch_xla beside it.

    pip install torch==2.9.0 torch-xla==2.9.0 && pip install -e .
    PJRT_DEVICE=CPU python tests/xla/run.py

Runs stages 1 to 3 of params/smoke.yaml on XLA and on the plain CPU from one first student, and prints as JSON the
losses of both, how far they are apart, and the compilations of each stage. Fails if they differ by more than 1e-3.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PJRT_DEVICE", "CPU")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch_xla.debug.metrics as metrics  # noqa: E402

from xdistil import frozen, grouping, stages, targets  # noqa: E402
from xdistil.params import load_params  # noqa: E402
from xdistil.runs import STAGES, Run  # noqa: E402

STAGE_NAMES = ("hidden", "logits", "labels")
SAME = {"opt_policy": "float32", "dropout": 0.0, "distil_epochs": 4, "ft_epochs": 4, "unfreeze": "none"}


def compilations() -> int:
    found = metrics.metric_data("CompileTime")
    return found[0] if found else 0


def run(folder: Path, device: str) -> dict:
    """The losses of each stage, and how often XLA compiled in it."""
    params = load_params(str(ROOT / "params/smoke.yaml"), SAME | {"model_dir": str(folder), "device": device})
    found = {}
    for name in ("teacher", "student-init", *STAGE_NAMES):
        before = compilations()
        stage = getattr(stages, STAGES[name])(params, Run(params))
        found[name] = {"compilations": compilations() - before, "updates": stage.metrics.get("updates"),
                       "losses": [record["loss"] for record in stage.history if record["kind"] == "train"]}
    return found


if __name__ == "__main__":
    for module in (grouping, targets, frozen):  # the same batches on both
        module.shapes_for = lambda accelerator: "fixed"
    with tempfile.TemporaryDirectory() as folder:
        plain = run(Path(folder) / "cpu", "cpu")
        for name in ("teacher", "student-init"):  # the first student is drawn on the device
            shutil.copytree(Path(folder) / "cpu" / name, Path(folder) / "xla" / name)
        xla = run(Path(folder) / "xla", "xla")
    for name in STAGE_NAMES:
        xla[name]["apart"] = max(abs(a - b) for a, b in zip(plain[name]["losses"], xla[name]["losses"], strict=True))
        xla[name]["cpu"] = plain[name]["losses"]
    print(json.dumps({name: xla[name] for name in STAGE_NAMES}, indent=1))
    raise SystemExit(any(xla[name]["apart"] > 1e-3 for name in STAGE_NAMES))
