"""What every stage does: check what is before it, begin, work, write what came out; read and write students."""

import functools
import itertools
import time
from contextlib import nullcontext

from accelerate.utils import set_seed

from xdistil import alarms, live, models, processes
from xdistil.checkpoints import checkpoint_bytes
from xdistil.devices import open_accelerator, peak_memory_mb
from xdistil.files import clear_temporaries, explained, hold, save_json
from xdistil.inputs import Inputs
from xdistil.params import Params, ParamsError
from xdistil.provenance import depends
from xdistil.runs import STAGES, Run, Stage, describe_changes, stage_before, stages_of
from xdistil.training import Recipe, fit

TOGETHER = ("teacher", "hidden", "logits", "labels")  # the stages that several processes do together


def as_stage(work):
    """Make a stage of its work: check what is before it, begin, work, write metrics and done mark. One process at a
    time works in a run's folder (RuntimeError); what a killed one left half written is deleted. OSError: a full disk,
    or a folder that may not be written."""
    name = next(folder for folder, verb in STAGES.items() if verb == work.__name__)

    @functools.wraps(work)
    def call(params: Params, run: Run) -> Stage:
        if name not in stages_of(params):
            Stage(run.dir / name).say(f"not one of this run's stages, {', '.join(stages_of(params))}: nothing is done")
            return Stage(run.dir / "none" / name)  # whatever an earlier run of other stages left is not shown
        before = list(itertools.takewhile(lambda other: other != name, stages_of(params)))
        for earlier in before:
            found, wanted = run.stage(earlier).done, depends(params, run, earlier)
            if found != wanted:
                why = describe_changes(found, wanted) if found else run.stage(earlier).damage or "it has not finished"
                raise RuntimeError(f"{name} needs stage {earlier}: {why}; run {STAGES[earlier]} first")
        stage, wanted, together = run.stage(name), depends(params, run, name), name in TOGETHER
        first, done = processes.rank() == 0, stage.done == wanted
        if together and processes.size() < params.num_processes and not done:
            processes.launch(params.model_dump(), params.num_processes, name)
            return stage
        with explained(run.origin.dir), hold(run.origin.dir / "stage.lock") if first and not done else nullcontext():
            if processes.agree(lambda: _begin(run, stage, wanted, before)) and (together or first):
                with nullcontext() if together else processes.alone():
                    _do(work, params, run, stage, before)
        processes.wait()
        for text in stage.metrics.get("alarms", ()):
            stage.say(f"[alarm] {text}")
        return stage

    return call


def _begin(run: Run, stage: Stage, wanted: dict, before: list[str]) -> bool:
    """Whether there is work to do; if so, in a folder without what killed processes left."""
    if stage.done != wanted:
        clear_temporaries(run.dir)
        for earlier in map(run.stage, before):
            earlier.drop_checkpoints()
    return stage.begin(wanted)


def _do(work, params: Params, run: Run, stage: Stage, before: list[str]) -> None:
    """Work, and write what came out."""
    save_json(run.dir / "params.json", params.model_dump())
    start = time.monotonic()
    set_seed(params.seed + processes.rank())  # of dropout; orders are the same in all
    metrics = work(params, run, stage, open_accelerator(params.device, params.opt_policy))
    dev = [m["dev"]["macro"] for m in (*(run.stage(x).metrics for x in before[-1:]), metrics) if "dev" in m]
    metrics["alarms"] = [*metrics.get("alarms", ()), *alarms.overfitting(stage.history, dev)]
    seconds = round(time.monotonic() - start, 2)
    if processes.rank() == 0:
        stage.finish(metrics | {"stage_seconds": seconds, "peak_memory_mb": peak_memory_mb()})
    stage.say(f"finished in {seconds} s")


def fit_stage(params: Params, stage: Stage, accelerator, model, terms, feed, judge, epochs, lr, steps, weights=None):
    """`fit` with what all stages of a run share: its patience, schedule and decay."""
    for part in (model, *model.children()) if accelerator.device.type == "cpu" else ():
        if hasattr(part, "set_attn_implementation"):
            models.return_maps(part)  # plain attention: the fused one learns slower there, and cannot drop out
    need, room = checkpoint_bytes(model, params.keep_checkpoints), processes.agree(lambda: Run(params).room)
    if need > room and not (stage.dir / "checkpoint.safetensors").is_file():
        raise ParamsError(f"disk_budget_gb: {params.disk_budget_gb}, of which {max(room, 0) / 1e9:.3g} are left in "
                          f"{params.model_dir}, but checkpoints and result of stage {stage.name} take up to "
                          f"{need / 1e9:.3g}; raise it, lower keep_checkpoints, or delete what is no longer needed")
    same = params.pick("patience", "warmup_ratio", "lr_schedule", "weight_decay", "max_grad_norm")
    with live.watching(stage.name, epochs) as watch:
        return fit(model, terms, feed, judge, Recipe(epochs, lr, **same), steps, accelerator=accelerator,
                   folder=stage.dir, name=stage.name, weights=weights, watch=watch, keep=params.keep_checkpoints)


def load_student(run: Run, name: str, inputs: Inputs, device="cpu"):
    """The student that stage `name` goes on from: of the stage before, or where none is, its own checkpoint."""
    params, before = inputs.params, stage_before(inputs.params, name)
    source = run.stage(before).dir if before else params.pt_student_checkpoint
    parameter = "model_dir" if before else "pt_student_checkpoint"
    return models.load_classifier(source, inputs.labels, parameter, params.unit).to(device)


def save_student(stage: Stage, student, inputs: Inputs, accelerator) -> dict:
    """Write the trained student; its scores on dev."""
    models.save_model(student, inputs.tokenizer, stage.dir)
    return {"dev": inputs.score(student, "dev", accelerator)[0]}
