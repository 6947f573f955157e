"""The map of choices: several finished runs side by side."""

from pathlib import Path

from xdistil.files import read_json
from xdistil.runs import Stage
from xdistil.tables import Table


def finished_runs(folder) -> list[Path]:
    """The folders of finished runs in a folder, by name."""
    return sorted(path.parents[1] for path in Path(folder).glob("*/evaluation/done.json"))


def load(folders) -> dict[str, dict]:
    """By name (of the folder, with the one above where two have the same): what evaluation found, with "asked", the
    parameters. Raises ValueError naming the folder that holds no finished run."""
    found, paths = {}, [Path(folder).absolute() for folder in folders]
    for path in paths:
        stage = Stage(path / "evaluation")
        if not (stage.done and stage.metrics):
            raise ValueError(f"{path} is no finished run: {stage.damage or 'it has no evaluation/done.json'}; run "
                             "`xdistil run` with model_dir set to it, or leave it out")
        same = sum(path.name == other.name for other in paths) > 1
        name = "/".join(path.parts[-2:]) if same else path.name
        found[name] = stage.metrics | {"asked": read_json(path / "params.json", {}), "test": stage.done["test file"]}
    if not found:
        raise ValueError("folders: no finished run among them; run `xdistil run` first")
    return found


def scores(runs: dict[str, dict]) -> Table:
    """Test F1, retention, size and speed of each run's student; the test file's hash if it is not the same."""
    tests = {run["test"] for run in runs.values()}
    rows = []
    for name, run in runs.items():
        side, share = run["student"], run.get("retention", {}).get("macro")
        rows.append({"run": name, "macro F1 (%)": 100 * side["test"]["macro"],
                     "of the teacher's (%)": share and 100 * share, "parameters (M)": side["parameters"] / 1e6,
                     "outside embeddings (M)": side["non_embedding"] / 1e6, "ms/sentence": side["ms_per_sentence"],
                     "sentences/s": side["sentences_per_second"],
                     **({"test file": run["test"]} if len(tests) > 1 else {})})
    return Table(rows, "test scores, size and speed of the students")


def choices(runs: dict[str, dict]) -> Table:
    """The parameters in which the runs differ, a column for each run."""
    asked = {name: {key: str(value) for key, value in run["asked"].items()} for name, run in runs.items()}
    names = sorted({key for values in asked.values() for key in values} - {"model_dir"})
    rows = [{"parameter": key, **{name: values.get(key) for name, values in asked.items()}} for key in names]
    return Table([row for row in rows if len(set(row.values()) - {row["parameter"]}) > 1] or [{"parameter": "none"}],
                 "what differs")


def pareto_front(costs: list[float], gains: list[float]) -> list[bool]:
    """Of each point, whether no other is as cheap and as good, and better in one of the two."""
    points = list(zip(costs, gains, strict=True))
    return [not any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points) for cost, gain in points]


def points(runs: dict[str, dict]) -> list[dict]:
    """Students, and each teacher once, as `result_plots.plot_front` takes them."""
    rows = [{"name": name, "is_teacher": False, **_point(run["student"])} for name, run in runs.items()]
    teachers = {run["teacher"]["test"]["macro"]: run["teacher"] for run in runs.values() if "teacher" in run}
    rows += [{"name": f"teacher, F1 {100 * f1:.1f} %", "is_teacher": True, **_point(found)}
             for f1, found in teachers.items()]
    for cost in ("parameters", "ms"):
        known = [row for row in rows if row[cost]]
        front = pareto_front([row[cost] for row in known], [row["f1"] for row in known])
        for row, best in zip(known, front, strict=True):
            row[f"front_{cost}"] = best
    return rows


def _point(side: dict) -> dict:
    return {"f1": side["test"]["macro"], "parameters": side["non_embedding"] / 1e6, "ms": side["ms_per_sentence"]}


def retention(runs: dict[str, dict]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """Names of the runs, languages, and of each pair the student's test F1 as a share of its teacher's."""
    shares = {name: run.get("retention", {}).get("by_language", {}) for name, run in runs.items()}
    languages = list(dict.fromkeys(language for row in shares.values() for language in row))
    return list(runs), languages, [[row.get(language) for language in languages] for row in shares.values()]
