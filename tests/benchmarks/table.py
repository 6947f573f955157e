"""Results to Markdown: the table of what is to be reached, with what was measured, and every row behind it."""

# The original TensorFlow code is not run here. Its later epochs were measured once, on one thread of an EPYC (Zen 4)
# beside this loop in float32, in sentences per second: 30.7 to 10.3 at 32 tokens, 6.4 to 2.5 at 128.
ORIGINAL_LATER = {"big32": 30.7 / 10.3, "big128": 6.4 / 2.5}
BIG = ("big32", "big128")


def ratio(value, form="{:.2f}x") -> str:
    """A number as text, or a dash where there is none."""
    return "–" if value is None else form.format(value)


class Rates:
    """Sentences per second by setting, stage, name and part."""

    def __init__(self, rows: list[dict]):
        self.rows = {(r["setting"], r["stage"], r["name"], r["part"]): r for r in rows}

    def get(self, setting, stage, name, part, field="sentences_per_second"):
        """A field of a row, or None."""
        return self.rows.get((setting, stage, name, part), {}).get(field)

    def faster(self, setting, stage, one, other, factor=1.0):
        """How many times faster `one` (name, part) is than `factor` times `other`; None if either is missing."""
        first, second = (self.get(setting, stage, *who) for who in (one, other))
        return first / (factor * second) if first and second else None

    def big(self, one, other, factors=None) -> str:
        """`faster` in stage 1 for the big models at 32 / 128 tokens."""
        return " / ".join(ratio(self.faster(s, "stage1", one, other, (factors or {}).get(s, 1.0))) for s in BIG)


def per(numbers: dict | None, above: str, below: str):
    """A quotient of two measures, or None."""
    return numbers[above] / numbers[below] if numbers and numbers.get(above) and numbers.get(below) else None


def ended(whole: dict | None) -> str:
    """Seconds and dev F1 with every trick on and off."""
    return f"{whole['ratio']:.2f}x; dev F1 " + ", ".join(
        f"{100 * whole[name]['dev macro F1']:.1f} {name}" for name in ("on", "off")) if whole else "–"


def wanted_rows(results: dict) -> list[tuple[str, str, str, str, str]]:
    """(measure, against, floor, goal, measured), as the goals were set."""
    rates = Rates(results.get("training", []))
    other, memory = results.get("other", {}), results.get("memory", {})
    precision = "bf16" if "bf16" in results["limits"] else "fp32"
    own = f"ours {precision}"
    later, loop32, brewer = (own, "later"), ("loop fp32", "first"), "TextBrewer fp32"
    limit = [" / ".join(ratio(rates.get(s, "stage1", own, part, "limit")) for part in ("first", "later")) for s in BIG]
    stored = [" / ".join(ratio(per(results.get("stored", {}).get(s), "padded", "ours"), "{:.1f}x smaller")
                         for s in BIG)]
    compress, single = other.get("compress"), other.get("inference")
    peak = memory.get("ours")
    return [
        ("stage 1, first pass, big, 32 / 128, bf16", "loop bf16", "1.6x / 5x", "1.8x / 6.5x",
         rates.big(("ours bf16", "first"), ("loop bf16", "first"))),
        ("the same", "loop fp32", "2.7x / 9x", "3.2x / 11x", rates.big(("ours bf16", "first"), loop32)),
        ("the same", "TextBrewer", "2.7x / 9x", "3.2x / 11x", rates.big(("ours bf16", "first"), (brewer, "first"))),
        ("the same in fp32", "loop fp32", "1.5x / 5x", "1.65x / 6x", rates.big(("ours fp32", "first"), loop32)),
        (f"stage 1, later epochs, big, 32 / 128, {precision}", "the original's later epochs, from loop fp32 (note 1)",
         "2.5x / 8.5x", "3.3x / 12x", rates.big(later, loop32, ORIGINAL_LATER)),
        (f"logit stage, later epochs, whole student, small 32, {precision}", "TextBrewer with cached logits", "2.5x",
         "3.3x", ratio(rates.faster("small32", "logits", later, (brewer, "later")))),
        (f"logit stage, later epochs, head only, small 32, {precision}", "our own full-training logit stage", "10x",
         "20x", ratio(rates.faster("small32", "logits", (f"{own} (head only)", "later"), later))),
        (f"distance from the {precision} limit, big 32, first / later", "limit", "1.5x / 1.75x", "1.25x / 1.4x",
         limit[0]),
        (f"distance from the {precision} limit, big 128, first / later", "limit", "1.5x / 1.75x", "1.25x / 1.4x",
         limit[1]),
        ("teacher passes over the transfer set, stages 1 to 4", "the original: one per stage", "1", "1",
         ratio(other.get("teacher_passes"), "{:.2f}")),
        ("stored targets per sentence, big, 32 / 128", "float32 padded", "3.4x / 20x smaller", "same, memory-mapped",
         stored[0]),
        (f"peak resident memory, stage 1 big 128, chunk of {peak['sentences']:,}" if peak else
         "peak resident memory, stage 1 big 128", "the original's 75 GB of targets for 10,000", "1.5 GB", "1 GB",
         f"{peak['peak'] / 1000:.2f} GB, {peak['anonymous'] / 1000:.2f} GB without mapped files" if peak else "–"),
        *((f"tokenise, align and store labelled TSV ({tsv['text']}, {tsv['sentences']:,} sentences)",
           "batched fast tokenizer with word_ids", "3x on real text", "4x", ratio(per(tsv, "peer", "ours")))
          for name, tsv in other.items() if name.startswith("tsv-")),
        ("compress 119,547 x 768 to 384: time", "scikit-learn PCA", "1x", "1.25x",
         ratio(per(compress, "peer", "ours"))),
        ("the same: memory beyond the matrix and the student's own rows", "scikit-learn PCA", "half", "–",
         ratio(per(compress, "ours_mb", "peer_mb"))),
        ("student 6x384, one sentence, p50, torch: text to tags", "the Hugging Face pipeline", "1.5x", "2x",
         ratio(per(single, "peer", "ours"))),
        ("the same, the model alone", "the Hugging Face pipeline", "–", "–", ratio(per(single, "peer", "ours_model"))),
        ("the same, ONNX int8", "the Hugging Face pipeline", "6x", "7x", ratio(per(single, "peer", "onnx"))),
        ("end to end: stages 1 to 3 of `demo`, part of its text", "the same stages with every trick off", "3x",
         "5x, same F1 within seed noise", ended(other.get("whole"))),
    ]


def grid(head: list[str], rows: list) -> str:
    """A Markdown table."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in row) + " |" for row in cells) + "\n"


def training_rows(results: dict) -> list[list[str]]:
    """Every setting, stage and name: what was measured."""
    return [[r["setting"], r["stage"], r["name"], r["part"], f"{r['sentences_per_second']:.1f}",
             f"{r['tokens_per_second']:,.0f}", f"{1000 * r['best']:.2f}–{1000 * r['worst']:.2f}", r["rounds"],
             ratio(r["limit"]) + f" {r['limit_of']}" * bool(r["limit"])] for r in results.get("training", [])]


def write(results: dict) -> str:
    """The page."""
    clock = "CPU seconds, one thread" if results["threads"] == 1 else f"wall seconds, {results['threads']} threads"
    few = " A quick run: single rounds of few sentences, good for orders of magnitude." if results["quick"] else ""
    facts = [[name, ", ".join(value) if isinstance(value, list) else value]
             for name, value in results["machine"].items()]
    facts += [[f"matrix products in {name}", f"{peak / 1e9:.0f} GFLOP/s"] for name, peak in results["limits"].items()]
    other = [[name, *(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}"
                      for key, value in numbers.items())] for name, numbers in
             {**{k: v for k, v in results.get("other", {}).items() if isinstance(v, dict)},
              **{f"memory, {k} (MB)": v for k, v in results.get("memory", {}).items()}}.items()]
    skipped = [f"- {name}: {reason}\n" for name, reason in results.get("skipped", {}).items()]
    return "\n".join([
        "# Benchmark", "", f"Written by `tests/benchmarks/run.py`; {clock}, medians of interleaved rounds.{few}", "",
        grid(["measure", "against", "floor", "goal", "measured"], wanted_rows(results)),
        "Note 1: the original's code does not run here; its speed is this machine's loop in float32 times 2.98 (32 "
        "tokens) or 2.56 (128), as measured once side by side on another machine.", "",
        "## Machine", "", grid(["fact", "value"], facts),
        "## Training", "",
        "Limit: seconds as a multiple of operations on real tokens / the measured peak of matrix products. `first` is "
        "a pass with the teacher, `later` one with stored outputs.", "",
        grid(["setting", "stage", "who", "part", "sentences/s", "real tokens/s", "ms per sentence, best–worst",
              "rounds", "x limit"], training_rows(results)),
        *(["## Other measures", "", "CPU seconds (inference: milliseconds) and MB (`_mb`).", "",
           "".join("- " + "; ".join(row) + "\n" for row in other)] if other else []),
        *(["## Left out", "", "".join(skipped)] if skipped else [])]).rstrip("\n") + "\n"
