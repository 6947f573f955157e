"""The model card of a student, `card.md` filled in: what it does, how well, how large and how fast."""

from importlib import resources
from string import Template

WORDS = {"task": "token-classification", "function": "tag", "option": 'aggregation_strategy="first"',
         "reads": "It was trained on windows of", "longer": ": for longer text pass `stride` to the pipeline, or use",
         "measure": "Strict entity F1 (IOB2) on the task's test set"}
TEXTS = {"task": "text-classification", "function": "classify", "option": "truncation=True",
         "reads": "It reads the first", "longer": ", to which `truncation=True` cuts what is longer. Files:",
         "measure": "Scores on the task's test set, macro F1 over classes"}
EXAMPLES = {"word": '"a sentence"', "text": '"a text"', "pair": '{"text": "one", "text_pair": "another"}'}
MEANS = {"macro": "macro mean", "micro": "micro", "accuracy": "accuracy", "matthews": "Matthews correlation"}


def percent(share: float | None) -> str:
    """A share of one as text."""
    return "–" if share is None else f"{100 * share:.1f}"


def _table(head, rows) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def write_card(unit: str, student: dict, teacher: dict | None, onnx: dict, baselines: dict, *, source: str,
               labels: list[str], data: str, seq_len: int, licence: str, registers: str = "") -> str:
    """README.md of a student of words, texts or pairs (`unit`), with the fields that the hub reads on top. `student`,
    `teacher`: what evaluation found, shares of one, milliseconds and counts; no teacher: fine-tuned only. `onnx`: by
    precision, megabytes, scores on dev after conversion, milliseconds per sentence. `baselines`: as `student`, by what
    these were taught. `source`: the checkpoint that the teacher, or without one the student, comes from. `registers`:
    Python that has to run before the model loads."""
    sides = {"teacher": teacher, "student": student} if teacher else {"student": student}
    scores = [side["test"]["by_language"] | {f"**{title}**": side["test"][mean] for mean, title in MEANS.items()
                                             if mean in side["test"]} for side in sides.values()]
    rows = []
    for name, own in scores[-1].items():
        other = scores[0].get(name)
        kept = f"{percent(own / other)} %" if own is not None and other else "–"
        rows.append([name, *(percent(side.get(name)) for side in scores), *[kept] * bool(teacher)])
    onnx = {f"ONNX {name}, dev F1 {percent(x['dev']['macro'])}": x | {"parameters": student["parameters"]}
            for name, x in onnx.items()}
    sizes = [[name, f"{x['parameters']:,}", f"{x['mb']:.1f}", f"{x['ms_per_sentence']:.1f}"]
             for name, x in (sides | onnx).items()]
    others = ", ".join(f"{name} {percent(x['test']['macro'])}" for name, x in (baselines | sides).items())
    parts, languages = WORDS if unit == "word" else TEXTS, [x for x in student["test"]["by_language"] if x != "all"]
    return Template(resources.files("xdistil").joinpath("card.md").read_text(encoding="utf-8")).substitute(
        parts, licence=licence, languages=f"language: [{', '.join(map(repr, languages))}]\n" * bool(languages),
        title=f"{'Distilled' if teacher else 'Fine-tuned'} {parts['task'].replace('-', ' ')} model",
        made=f"distilled with xdistil from a fine-tuned {source}" if teacher else f"{source}, fine-tuned with xdistil",
        parameters=f"{student['parameters']:,}", data=data, labels=", ".join(labels), example=EXAMPLES[unit],
        registers=f"{registers}\n    " * bool(registers), seq_len=seq_len,
        baselines=f"The same student from as many training windows, macro F1: {others}.\n\n" * bool(baselines),
        scores=_table(["", *sides, *["kept"] * bool(teacher)], rows),
        sizes=_table(["", "parameters", "MB", "ms"], sizes))
