"""What several processes are worth on this machine: stage 1 and 2 of the demo by one process with N threads and by N
processes with one thread each, in turns.

    python tests/scale/processes.py --processes 2 --rounds 3

Prints windows a second of each, medians, and their ratio."""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHORT = {"train_limit": 400, "teacher_epochs": 1, "transfer_limit": 1200, "distil_epochs": 2, "device": "cpu"}


def run(folder: Path, names, n_processes: int, n_threads: int) -> dict[str, float]:
    """Windows a second of each of these stages."""
    params = {"experiment": json.loads((folder / "params.json").read_text()) | {"num_processes": n_processes}}
    path = folder / "asked.json"
    path.write_text(json.dumps(params))
    subprocess.run([sys.executable, "-m", "xdistil.stages", str(path), *names], check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": str(n_threads)})
    run_dir = Path(params["experiment"]["model_dir"])
    metrics = {name: json.loads((run_dir / name / "metrics.json").read_text()) for name in names}
    return {name: found["windows_per_second"] for name, found in metrics.items() if "windows_per_second" in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from xdistil.params import load_params

    with tempfile.TemporaryDirectory() as folder:
        folder, found = Path(folder), {"threads": [], "processes": []}
        params = load_params(str(ROOT / "params/demo.yaml"), SHORT | {"model_dir": str(folder / "run")})
        (folder / "params.json").write_text(json.dumps(params.model_dump()))
        run(folder, ("teacher", "student-init"), 1, asked.processes)
        for _ in range(asked.rounds):
            for kind, shape in (("threads", (1, asked.processes)), ("processes", (asked.processes, 1))):
                for name in ("hidden", "logits", "targets"):
                    shutil.rmtree(folder / "run" / name, ignore_errors=True)
                found[kind].append(run(folder, ("hidden", "logits"), *shape))
    for name in ("hidden", "logits"):
        one, many = (statistics.median(each[name] for each in found[kind]) for kind in ("threads", "processes"))
        print(f"{name}: {one:.1f} windows a second with {asked.processes} threads, {many:.1f} with as many processes: "
              f"{many / one:.2f}")


if __name__ == "__main__":
    main()
