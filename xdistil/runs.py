"""Where things lie: a run is a folder, a stage is a folder of it with a done mark."""

import math
import os
import shutil
from functools import partial
from pathlib import Path

from xdistil.files import DamagedError, folder_bytes, hash_file, read_json, read_jsonl, save_atomic, save_json
from xdistil.params import Params, fingerprint

STAGES = {"teacher": "finetune_teacher", "student-init": "build_student", "hidden": "distil_hidden",
          "logits": "distil_logits", "labels": "finetune_student", "evaluation": "evaluate_student",
          "student": "export_student"}  # folder of the run: function of `stages`, and notebook without its number
SHARED = ("teacher", "student-init")  # what a run beside another has from there
INSTEAD = {"labels": {"hidden": "labels", "logits": "labels"}, "logits": {"hidden": "logits"}}  # what baselines do


def stages_of(params: Params) -> list[str]:
    """The stages of a run in order, by their folders; without distillation the student learns from labels alone."""
    taught = ["teacher", "student-init", *params.student_stages] if params.distil else ["labels"]
    return [*taught, "evaluation", "student"]


def stage_before(params: Params, name: str) -> str | None:
    """The stage that another goes on from; None for the first of a run."""
    names = [None, *stages_of(params)]
    return names[names.index(name) - 1]


def baselines_of(params: Params) -> dict[str, list[str]]:
    """The baselines that are asked for and the stages of their student; none that would be the run again."""
    found = {name: list(dict.fromkeys(instead.get(stage, stage) for stage in params.student_stages))
             for name, instead in INSTEAD.items() if params.baselines}
    return {name: taught for name, taught in found.items() if taught != params.student_stages}


class Stage:
    """One stage's folder: what it depends on, its metrics, its history, checksums of what it wrote, its done mark."""

    def __init__(self, folder: Path):
        self.dir, self.name = Path(folder), Path(folder).name

    def say(self, text: str) -> None:
        """One line of log, headed by the stage's name."""
        print(f"[{self.name}] {text}", flush=True)

    @property
    def damage(self) -> str | None:
        """Which file is no longer as the finished stage wrote it, in words; None if all are."""
        if not (self.dir / "done.json").is_file():
            return None
        try:
            read_json(self.dir / "done.json")
            sums = read_json(self.dir / "checksums.json", {})
        except DamagedError as error:
            return str(error).partition(";")[0]
        return next((f"{self.dir / name} is damaged or gone" for name, known in sums.items()
                     if not (self.dir / name).is_file() or hash_file(self.dir / name) != known), None)

    @property
    def done(self) -> dict | None:
        """What the finished stage depended on; None while it is unfinished, or if what it wrote is damaged."""
        return None if self.damage else read_json(self.dir / "done.json")

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of what the finished stage depended on."""
        return fingerprint(self.done) if self.done is not None else None

    @property
    def metrics(self) -> dict:
        """The numbers that the stage left in metrics.json."""
        return read_json(self.dir / "metrics.json", {})

    @property
    def history(self) -> list[dict]:
        """The training records of the stage, see `training.fit`."""
        return read_jsonl(self.dir / "history.jsonl")

    def begin(self, depends: dict) -> bool:
        """Whether there is work to do; says why, and clears what is out of date. An unfinished stage with the same
        dependencies is left, to be resumed. Raises FileExistsError if the folder holds files that no run wrote."""
        begun, damage = read_json(self.dir / "begun.json", lenient=True), self.damage
        if begun == depends and not damage:
            self.say("done before with the same parameters and data" if self.done
                     else "interrupted before: goes on from its last checkpoint")
            return self.done is None
        if (self.dir / "begun.json").is_file():
            self.say(f"runs again: {describe_changes(begun or depends, depends) or damage or 'begun.json is damaged'}")
            os.rename(self.dir, aside := self.dir.with_name(f".{self.name}.tmp"))  # killed here, it is a temporary
            shutil.rmtree(aside)
        elif self.dir.is_dir() and any(self.dir.iterdir()):
            raise FileExistsError(f"model_dir: {self.dir} holds files that no run of xdistil wrote; move them away or "
                                  "choose another model_dir")
        save_json(self.dir / "begun.json", depends)
        return True

    def finish(self, metrics: dict) -> None:
        """Write the metrics and checksums, then the done mark; drop the checkpoints."""
        save_json(self.dir / "metrics.json", metrics)
        kept = [path for path in sorted(self.dir.rglob("*")) if path.is_file()]
        save_json(self.dir / "checksums.json", {
            str(path.relative_to(self.dir)): hash_file(path) for path in kept
            if not path.name.startswith(("begun.json", "checksums.json", "checkpoint"))})
        save_json(self.dir / "done.json", read_json(self.dir / "begun.json"))
        self.drop_checkpoints()

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints; a stage killed just after its done mark has them still."""
        for path in self.dir.glob("checkpoint*.safetensors"):
            path.unlink()


def describe_changes(old: dict, new: dict) -> str:
    """What differs between two flat mappings, in words."""
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return ", ".join(f"{name} changed ({old.get(name)} -> {new.get(name)})" for name in names)


class Run:
    """The folder of a run and the parameters in force; nothing is written until a stage begins. A run `beside` another
    has its teacher, first student, generated corpus and teacher outputs from there."""

    def __init__(self, params: Params, beside: "Run | None" = None):
        self.params, self.dir, self.origin = params, Path(params.model_dir), beside or self

    def stage(self, name: str) -> Stage:
        """The stage in folder `name`, one of STAGES."""
        return Stage((self.origin if name in SHARED else self).dir / name)

    def baseline(self, name: str, **values) -> "Run":
        """The baseline in MODEL_DIR/baselines/NAME, with other parameters than this run where named."""
        values |= {"model_dir": str(self.dir / "baselines" / name), "baselines": False}
        return Run(self.params.model_copy(update=values), self)

    @property
    def room(self) -> float:
        """Bytes that disk_budget_gb leaves beside what the run takes; without a budget, endless."""
        budget = self.params.disk_budget_gb
        return budget * 1e9 - folder_bytes(self.origin.dir) if budget else math.inf

    @property
    def baselines(self) -> dict[str, dict]:
        """What evaluation found of the students of the baselines, as far as they are there, by what taught them."""
        found = {f"only {', '.join(taught)}": self.baseline(name).stage("evaluation").metrics.get("student")
                 for name, taught in baselines_of(self.params).items()}
        return {title: side for title, side in found.items() if side}

    def save_figure(self, figure, name: str) -> Path:
        """Save a matplotlib figure as figures/NAME.svg and NAME.png, and return the latter's path."""
        for form, more in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            path = save_atomic(self.dir / "figures" / f"{name}.{form}", partial(figure.savefig, format=form, **more))
        return path
