"""The XLA path on torch_xla's CPU device: not part of `make test`, as it wants torch 2.9 with torch_xla beside it.

    pip install torch==2.9.0 torch-xla==2.9.0 && pip install -e .
    python tests/xla/run.py

Runs stages 1 to 3 of params/smoke.yaml on XLA and on the plain CPU from one first student, and prints as JSON the
losses of both, how far they are apart, and the compilations of each stage. Fails if they differ by more than 1e-3.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT, STAGE_NAMES = Path(__file__).resolve().parents[2], ("hidden", "logits", "labels")
SAME = {"opt_policy": "float32", "dropout": 0.0, "distil_epochs": 4, "ft_epochs": 4, "unfreeze": "none"}


def compilations() -> int:
    """How often XLA compiled so far."""
    from torch_xla.debug import metrics

    return (metrics.metric_data("CompileTime") or [0])[0]


def run(folder: str, device: str) -> dict:
    """The losses of each stage, and how often XLA compiled in it."""
    from xdistil import frozen, grouping, stages, targets
    from xdistil.params import load_params
    from xdistil.runs import STAGES, Run

    for module in (grouping, targets, frozen):  # the same batches on both
        module.shapes_for = lambda accelerator: "fixed"
    params = load_params(str(ROOT / "params/smoke.yaml"), SAME | {"model_dir": folder, "device": device})
    count, found = compilations if device == "xla" else int, {}
    for name in ("teacher", "student-init", *STAGE_NAMES):
        before = count()
        stage = getattr(stages, STAGES[name])(params, Run(params))
        found[name] = {"compilations": count() - before, "updates": stage.metrics.get("updates"),
                       "seconds": stage.metrics["stage_seconds"],
                       "losses": [record["loss"] for record in stage.history if record["kind"] == "train"]}
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for device, names in (("cpu", {"USE_TORCH_XLA": "0"}), ("xla", {"PJRT_DEVICE": "CPU"})):
            model_dir, out = Path(folder, device), Path(folder, f"{device}.json")
            if found:  # the first student is drawn on the device
                for name in ("teacher", "student-init"):
                    shutil.copytree(Path(folder, "cpu", name), model_dir / name)
            subprocess.run([sys.executable, __file__, str(model_dir), device, str(out)], check=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT), **names})
            found[device] = json.loads(out.read_text())
    plain, xla = found["cpu"], found["xla"]
    for name in STAGE_NAMES:
        xla[name]["apart"] = max(abs(a - b) for a, b in zip(plain[name]["losses"], xla[name]["losses"], strict=True))
        xla[name]["on the CPU"] = plain[name]["losses"]
    print(json.dumps({name: xla[name] for name in STAGE_NAMES}, indent=1))
    return int(any(xla[name]["apart"] > 1e-3 for name in STAGE_NAMES))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        raise SystemExit(main())
    Path(sys.argv[3]).write_text(json.dumps(run(*sys.argv[1:3])))
