"""What notebooks and the command line show of a run: tables, and one sentence looked at closely."""

import numpy as np
import torch

from xdistil import data, errors, evaluate, models, stages
from xdistil.feeds import layer_pairs
from xdistil.inputs import Inputs
from xdistil.inside import Pair
from xdistil.params import Params
from xdistil.results import predictions
from xdistil.runs import Run, Stage, stages_of
from xdistil.tables import Table


def describe(params: Params, run: Run) -> list[Table]:
    """Tables of the task: counts and lengths per file, words (or texts) per label, sentences found in two files."""
    inputs, files, tags = Inputs(params, run), [], {}
    for name in ("train", "dev", "test", "transfer"):
        sentences, examples = inputs.read(name)
        tags[name] = [tag for sentence in sentences.tags or () for tag in sentence]
        median, most, longest = map(int, np.quantile(examples.lengths, (0.5, 0.95, 1.0)))
        files.append({"file": name, "sentences": len(sentences),
                      "words": sum(len(" ".join(words).split()) for words in sentences.words),
                      "languages": len(set(sentences.languages) - {""}) or None, "windows": len(examples),
                      "sub-words a window: median": median, "95 %": most, "longest": longest})
    counts = [{"label": label, **{name: tags[name].count(label) for name in tags if tags[name]}}
              for label in inputs.labels]
    tested = {name: inputs.keys(name) for name in ("dev", "test")}
    overlap = [{"in both": f"{a} and {b}", "sentences": len(set(inputs.keys(a, rows)[2].tolist()))}
               for a in ("transfer", "train") for b, rows in tested.items()]
    return [Table(files, f"{params.task}, seq_len {params.seq_len}"), Table(counts, f"{params.unit}s per label"),
            Table(overlap, "sentences in two files")]


def needs(params: Params, run: Run) -> Table:
    """Memory of weights and training state, and disk for teacher outputs, in GB (1e9 bytes)."""
    teacher, student = stages.read_configs(params, run)
    *_, spec = layer_pairs(params, teacher, student)
    outputs = spec.n_bytes(Inputs(params, run).read("transfer")[1].lengths, teacher) / 1e9
    if params.student_tokenizer == "teacher":
        student.vocab_size = teacher.vocab_size
    with torch.device("meta"):
        large, small = (models.from_config(c, params.unit).num_parameters() * 4 / 1e9 for c in (teacher, student))
    rows = {"memory: teacher weights": large, "memory: fine-tuning the teacher, without activations": 4 * large,
            "memory: training the student, without activations": 4 * small, "disk: teacher outputs, all": outputs,
            "disk: teacher outputs kept (targets_cache_gb)": min(outputs, params.targets_cache_gb)}
    return Table([{"what": what, "GB": size} for what, size in rows.items()], "needs, estimated")


def alarms(run: Run) -> Table:
    """What the stages of a run warned of."""
    rows = [{"stage": name, "alarm": text} for name in stages_of(run.params)
            for text in run.stage(name).metrics.get("alarms", ())]
    return Table(rows or [{"alarms": "none"}])


def scores(stage: Stage) -> Table:
    """F1 of a stage on dev, per language and in the mean; of texts and pairs also accuracy and Matthews.
    Of stage 2 what `results.compare_teachers` says of several."""
    found = stage.metrics["dev"]
    rows = found["by_language"] | {title: found[mean] for mean, title in evaluate.MEANS.items() if mean in found}
    rows |= stage.metrics.get("teachers", {})
    score = "%" if "accuracy" in found else "F1 (%)"
    return Table([{"dev": name, score: x and 100 * x} for name, x in rows.items()])


def sizes(run: Run) -> Table:
    """Parameters of teacher and student, with and without embedding tables."""
    found = run.stage("student-init").metrics
    return Table([{"model": name, "parameters": m["parameters"], "without embeddings": m["non_embedding"],
                   "pieces": m["pieces"]}
                  for name, m in (("teacher", found["teacher"]), ("student", found))])


def dev_by_stage(run: Run) -> tuple[dict[str, float], float | None]:
    """Macro F1 on dev after each training stage of the student; and the teacher's, if there is one."""
    names = [name for name in stages_of(run.params)[:-2] if name != "student-init"]
    macro = {name: run.stage(name).metrics["dev"]["macro"] for name in names}
    return macro, macro.pop("teacher", None)


def sides(run: Run) -> tuple[dict | None, dict]:
    """What evaluation found of the teacher, if there is one, and of the student."""
    found = run.stage("evaluation").metrics
    return found.get("teacher"), found["student"]


def by_language(run: Run) -> tuple[dict | None, dict]:
    """Test F1 per language, of the teacher, if there is one, and of the student."""
    return tuple(side and side["test"]["by_language"] for side in sides(run))


def results(run: Run) -> Table:
    """Teacher, if there is one, baselines and student: F1 on test per language and in the mean, size and speed."""
    titles = {"parameters": "parameters", "non_embedding": "without embeddings", "mb": "MB on disk",
              "ms_per_sentence": "ms/sentence, batch 1", "sentences_per_second": "sentences/s, batch 32"}

    def column(side: dict) -> dict:
        f1 = {f"F1 {language}": x for language, x in side["test"]["by_language"].items()}
        f1 |= {title: side["test"][mean] for mean, title in evaluate.MEANS.items() if mean in side["test"]}
        percent = {f"{title} (%)": x and 100 * x for title, x in f1.items()}
        return percent | {title: side.get(name) for name, title in titles.items()}

    teacher, student = sides(run)
    columns = {name: column(x) for name, x in {"teacher": teacher, **run.baselines, "student": student}.items() if x}
    if teacher:
        columns["student / teacher (%)"] = {
            title: 100 * columns["student"][title] / x if x and columns["student"][title] is not None else None
            for title, x in columns["teacher"].items()}
    return Table([{"": title, **{name: x[title] for name, x in columns.items()}} for title in columns["student"]])


def typical_sentence(sentences: data.Sentences) -> list[str]:
    """The words of the first sentence of 8 to 16 words with two entities, else of the first sentence."""
    pairs = zip(sentences.words, sentences.tags, strict=True)
    good = (words for words, tags in pairs if 8 <= len(words) <= 16 and "".join(tags).count("B-") > 1)
    return next(good, sentences.words[0])


def attention_example(params: Params, run: Run, stage: str = "hidden", text: str | None = None) -> dict:
    """Attention in the top layer of a stage's student and in the teacher's that is paired with it (on the CPU): tokens
    [S], teacher and student [A, S, S], see `inside.Look.attention`. `text`: one sentence, words separated by spaces, a
    text, or a pair with a tab between; default: a dev sentence with entities, or the first text."""
    pair = Pair(params, run)
    words = pair.words_of(text) if text else typical_sentence(pair.inputs.sentences("dev"))
    look = pair.look(stage, tuple(words))
    teacher, student = look.attention(max(look.paired))
    return {"tokens": look.tokens, "teacher": teacher, "student": student}


def _predictions(params: Params, run: Run):
    """Gold of the test set, and what teacher, if there is one, and student say: sentences, spans of both."""
    gold = Inputs(params, run).sentences("test")
    said = predictions(run.stage("evaluation"), params.do_NER)
    return gold, errors.spans(gold.tags, params.do_NER), {
        who: errors.spans(tags, params.do_NER) for who, tags in said.items()}


def confusion(params: Params, run: Run) -> tuple[list[str], dict[str, np.ndarray]]:
    """Entity types or labels that teacher and student take for each other on test, see `errors.confusion`."""
    _, gold, sides = _predictions(params, run)
    return errors.confusion(gold, sides)


def wrong_words(params: Params, run: Run, n: int = 15) -> Table:
    """The words of the test set that the student most often tags wrongly."""
    if not params.do_NER:
        return Table([{"words": "texts have one label; see the confusion of labels"}])
    gold, said = Inputs(params, run).sentences("test"), predictions(run.stage("evaluation"), True)
    rows = errors.wrong_words(gold.words, gold.tags, said, n)
    return Table(rows or [{"words": "none is wrong"}], "words of test that the student most often tags wrongly")


def lost(params: Params, run: Run, n: int = 10) -> Table:
    """Test sentences in which the student lost most of what the teacher had."""
    sentences, gold, sides = _predictions(params, run)
    if "teacher" not in sides:
        return Table([{"lost": "no predictions of a teacher are there to compare with"}])
    rows = errors.lost(sentences.words, gold, **sides, n=n)
    return Table(rows or [{"lost": "nothing"}], "test sentences in which the student lost what the teacher had")


def score_by_length(params: Params, run: Run) -> tuple[list[dict], str]:
    """What there is on test by the length of the sentence, see `errors.by_length`, and what it is called."""
    sentences, *sides = _predictions(params, run)
    return errors.by_length(sentences.words, *sides), "micro F1" if params.do_NER else "accuracy"


def score_by_frequency(params: Params, run: Run) -> list[dict]:
    """F1 on test by how often an entity is in the training set, see `errors.by_frequency`; [] of texts."""
    if not params.do_NER:
        return []
    train = Inputs(params, run).sentences("train")
    sentences, *sides = _predictions(params, run)
    return errors.by_frequency(sentences.words, *sides, train.words, errors.spans(train.tags))


def trial(params: Params, run: Run) -> tuple[str, object, dict]:
    """What transformers' pipeline needs to try the student: its task, an input, its options."""
    if params.unit == "word":
        text = "Angela Braun moved from Lisbon to work for Siemens AG in Hamburg ."
        return "token-classification", text, {"aggregation_strategy": "first"}
    texts = Inputs(params, run).sentences("dev").words[0][0].split("\t")
    return "text-classification", dict(zip(("text", "text_pair"), texts, strict=False)), {"truncation": True}


def onnx(stage: Stage) -> Table:
    """Size, dev F1 and speed of the exported ONNX files."""
    found = stage.metrics.get("onnx", {})
    rows = [{"ONNX": name, "MB": x["mb"], "logits differ by": x["farthest_logit"],
             "dev macro F1 (%)": 100 * x["dev"]["macro"], "ms/sentence, batch 1": x["ms_per_sentence"],
             "sentences/s, batch 32": x["sentences_per_second"]}
            for name, x in found.items()]
    return Table(rows or [{"ONNX": "not asked for; set onnx: true"}])
