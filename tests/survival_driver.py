"""Runs the stages of a run in a child that is killed at seeded random instants and started again, until it ends.

Arguments, as JSON: params, a seed, the seconds and the kills of each stage by its folder. Prints JSON: of each child
the stage it was killed in and how, and the optimizer updates of each stage beside those its checkpoints gained."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from xdistil import stages, staging
from xdistil.checkpoints import load_checkpoint
from xdistil.params import load_params
from xdistil.runs import STAGES, Run


def work(params, folder: Path):
    """What a child does: all stages, with a byte written to a file of each stage for each update."""
    fit, step = staging.fit, torch.optim.AdamW.step

    def counted(*args, name, **options):
        def one(self, *args, **options):
            with open(folder / name, "ab") as file:
                file.write(b".")
            return step(self, *args, **options)

        torch.optim.AdamW.step = one
        return fit(*args, name=name, **options)

    staging.fit = counted
    for verb in STAGES.values():
        getattr(stages, verb)(params, Run(params))


def start(params, folder: Path) -> int:
    """A child at work; its words go to a file."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        work(params, folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def updates(run, name) -> int:
    """The updates that a stage need not do again."""
    stage = run.stage(name)
    if stage.done is not None:
        return stage.metrics.get("updates", 0)
    checkpoint = stage.dir / "checkpoint.safetensors"
    return load_checkpoint(checkpoint)[0].updates if checkpoint.is_file() else 0


def main():
    asked, seed, seconds, n_kills = map(json.loads, sys.argv[1:])
    params, rng, found = load_params(asked), random.Random(seed), []
    run, counts = Run(params), Path(params.model_dir).with_name("counts")
    counts.mkdir()
    plan = [name for name in STAGES for _ in range(n_kills[name])]
    for target in [*plan, None]:
        before = {name: updates(run, name) for name in STAGES}
        done = [name for name in STAGES if run.stage(name).done is not None]
        for path in (counts / name for name in STAGES):
            path.unlink(missing_ok=True)
        pid, how = start(params, counts), rng.choice(["any instant", "any instant", "half a file"])
        ended = lambda pid=pid: os.waitpid(pid, os.WNOHANG)[0]  # noqa: E731
        while target and not (run.dir / target / "begun.json").is_file() and not (code := ended()):
            time.sleep(0.001)
        wait = time.monotonic() + (rng.random() * seconds[target] if target else 3600)
        while time.monotonic() < wait and not (code := ended()):
            if target and how == "half a file" and any(run.dir.glob("*/.*.tmp")):
                break
            time.sleep(0.0005)
        if not code:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        trained = {name: (counts / name).stat().st_size for name in STAGES if (counts / name).is_file()}
        gained = {name: updates(run, name) - before[name] for name in STAGES}
        killed_in = next((name for name in STAGES if run.stage(name).done is None), None)
        temporaries = [str(path.relative_to(run.dir)) for path in run.dir.glob("*/.*.tmp")]
        found.append({"in": killed_in, "how": how, "ended": bool(code), "trained": trained, "gained": gained,
                      "undone": [name for name in done if run.stage(name).done is None], "temporaries": temporaries})
    print(json.dumps(found))


main()
