"""Files of any size labelled as a stream: constant memory, input order, one line out for each line in."""

import json
import re
import statistics
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from xdistil import data, devices, evaluate, export, families, models, texts

AT_ONCE = 4096  # lines that are sorted by length together


class Labeller:
    """A student's folder, ready to label lines of text; `onnx`: "fp32" or "int8" runs a file of `xdistil export`, None
    runs torch. Raises CheckpointError if it cannot be loaded."""

    def __init__(self, folder, onnx: str | None = None, device: str = "auto", batch_size: int = 64):
        config = models.load_config(folder, "STUDENT_DIR")
        self.labels = [config.id2label[i] for i in range(config.num_labels)]
        self.tokenizer, self.unit = models.load_tokenizer(folder, "STUDENT_DIR"), models.unit_of(config)
        self.accelerator = devices.open_accelerator(device, "float32" if onnx else "auto", quiet=True)
        if onnx:
            self.model = export.OnnxTagger(folder, onnx)
        else:
            model = models.load_classifier(folder, self.labels, "STUDENT_DIR", self.unit)
            self.model = models.prepare_to_answer(model, self.accelerator)
        self.seq_len, self.n_cut = min(self.tokenizer.model_max_length, families.n_positions(config)), 0
        self.batch_size = batch_size

    def label(self, path) -> Iterator[tuple[str, list[str], list[str], list[float]]]:
        """For each line of a file ("-": stdin): its text or tab-separated pair, its words (or the one text or pair),
        their labels and the probabilities (0..1) of these; no words on a blank line. Raises DataError for the file."""
        lines = ((line, texts.units_of(line, self.unit, f"{path}:{n}")) for n, line in data.read_lines(path))
        n_lines = sum(1 for _ in data.read_lines(path)) if Path(path).is_file() else None  # a pipe is read once
        with tqdm(total=n_lines, unit="line", disable=None) as bar:
            while some := list(islice(lines, AT_ONCE)):
                words = [units for _, units in some]
                examples, n_cut = texts.encode(data.Sentences(words), self.unit, self.tokenizer, self.seq_len)
                self.n_cut += n_cut
                found = evaluate.predict(self.model, examples, words, self.labels, self.tokenizer.pad_token_id,
                                         self.accelerator, self.batch_size)
                for (line, units), tags, scores in zip(some, *found, strict=True):
                    text = line.split("\t")[0] if self.unit == "word" else "".join(units)
                    yield text, units, tags, scores
                bar.update(len(some))


def entities(text: str, tags: list[str], scores: list[float]) -> list[dict]:
    """The entities of a text whose words are separated by white space: type, first character and the one after the
    last, text, mean probability (0..1) of its words' tags, first word and the one after the last. An I- that continues
    nothing starts an entity, as in conlleval. Raises ValueError unless there is a tag and a score for each word."""
    from seqeval.metrics.sequence_labeling import get_entities

    words, found = list(zip(re.finditer(r"\S+", text), tags, scores, strict=True)), []
    for kind, first, last in get_entities(tags):
        start, end = words[first][0].start(), words[last][0].end()
        found.append({"type": kind, "start": start, "end": end, "text": text[start:end],
                      "score": round(statistics.fmean(scores[first : last + 1]), 4), "words": [first, last + 1]})
    return found


def format_line(form: str, unit: str, text: str, words: list[str], tags: list[str], scores: list[float]) -> str:
    """One of what `Labeller.label` yields. tsv: words<TAB>tags, text<TAB>label or text<TAB>text<TAB>label, blank for a
    blank line. jsonl: an object with probabilities; of words with entities and their places in the text."""
    if form == "tsv":
        return f"{' '.join(words)}\t{' '.join(tags)}" if words else ""
    scores = [round(score, 4) for score in scores]
    if unit == "word":
        row = {"text": text, "words": words, "tags": tags, "scores": scores, "entities": entities(text, tags, scores)}
    else:
        row = dict(zip(("text", "text_pair"), text.split("\t"), strict=False))
        row |= {"label": tags[0] if tags else None, "score": scores[0] if scores else None}
    return json.dumps(row, ensure_ascii=False)
