"""The model card of a student: what it does, how well, how large and how fast, as the hub reads it."""

FIELDS = {"word": "token-classification", "text": "text-classification", "pair": "text-classification"}
SCORES = {"word": "Strict entity F1 (IOB2) on the task's test set",
          "text": "Scores on the task's test set, macro F1 over classes",
          "pair": "Scores on the task's test set, macro F1 over classes"}
USES = {"word": '''tag = pipeline("token-classification", model="FOLDER", aggregation_strategy="first")
tag("a sentence")''',
        "text": '''classify = pipeline("text-classification", model="FOLDER", truncation=True)
classify("a text")''',
        "pair": '''classify = pipeline("text-classification", model="FOLDER", truncation=True)
classify({"text": "one", "text_pair": "another"})'''}
LENGTH = {"word": "It was trained on windows of {} sub-words: for longer text pass `stride` to the pipeline, or use",
          "text": "It reads the first {} sub-words, to which `truncation=True` cuts longer texts. Files:",
          "pair": "It reads the first {} sub-words, to which `truncation=True` cuts longer pairs. Files:"}


def percent(share: float | None) -> str:
    """A share of one as text."""
    return "–" if share is None else f"{100 * share:.1f}"


def write_card(unit: str, student: dict, teacher: dict | None, onnx: dict, *, source: str, labels: list[str],
               data: str, seq_len: int, licence: str, registers: str = "") -> str:
    """README.md of a student of words, texts or pairs (`unit`), with the fields that the hub reads on top.

    Args:
        student, teacher: what evaluation found, shares of one, milliseconds and counts; no teacher: fine-tuned only.
        onnx: by precision, megabytes, scores on dev after conversion, milliseconds per sentence.
        source: the checkpoint that the teacher, or without one the student, comes from.
        registers: a line of Python that has to run before the model loads.
    """
    scores, languages = student["test"], [x for x in student["test"]["by_language"] if x != "all"]
    goal = teacher["test"] if teacher else {"by_language": {}}
    head = ["---", f"pipeline_tag: {FIELDS[unit]}", "library_name: transformers", "tags: [distillation, xdistil]",
            f"license: {licence}", *[f"language: [{', '.join(map(repr, languages))}]"] * bool(languages), "---"]
    columns = ["", *["teacher"] * bool(teacher), "student", *["kept"] * bool(teacher)]

    def row(name, own, other):
        shared = percent(own / other) + " %" if own is not None and other else "–"
        return [name, *[percent(other)] * bool(teacher), percent(own), *[shared] * bool(teacher)]

    rows = [row(name, own, goal["by_language"].get(name)) for name, own in scores["by_language"].items()]
    rows += [row(f"**{title}**", scores[mean], goal.get(mean)) for mean, title in (
        ("macro", "macro mean"), ("micro", "micro"), ("accuracy", "accuracy"), ("matthews", "Matthews correlation"))
        if mean in scores]
    sides = {"teacher": teacher, "student": student} if teacher else {"student": student}
    sizes = [[name, f"{x['parameters']:,}", f"{x['mb']:.1f}", f"{x['ms_per_sentence']:.1f}"]
             for name, x in sides.items()]
    sizes += [[f"ONNX {name}, dev F1 {percent(x['dev']['macro'])}", f"{student['parameters']:,}", f"{x['mb']:.1f}",
               f"{x['ms_per_sentence']:.1f}"] for name, x in onnx.items()]

    def table(head, rows):
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))

    made = f"distilled with xdistil from a fine-tuned {source}" if teacher else f"{source}, fine-tuned with xdistil"
    lines = [*[registers] * bool(registers), "from transformers import pipeline", *USES[unit].splitlines()]
    use = "\n".join(f"    {line}" for line in lines)
    return "\n\n".join([
        "\n".join(head), f"# {'Distilled' if teacher else 'Fine-tuned'} {FIELDS[unit].replace('-', ' ')} model",
        f"{student['parameters']:,} parameters, {made}. Data: {data}. Labels: {', '.join(labels)}.", use,
        f"{LENGTH[unit].format(seq_len)}\n`xdistil predict FOLDER INPUT`.", f"{SCORES[unit]}, in percent:",
        table(columns, rows), "Size, and the model's part of one sentence at batch 1 on the machine that exported it:",
        table(["", "parameters", "MB", "ms"], sizes)]) + "\n"
