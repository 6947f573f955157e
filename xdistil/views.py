"""What notebooks and the command line show of a run: tables, and one sentence looked at closely."""

import numpy as np
import torch

from xdistil import data, evaluate, models, stages, students, wordwise
from xdistil.feeds import layer_pairs
from xdistil.inputs import Inputs
from xdistil.params import Params
from xdistil.runs import Run, Stage, stages_of
from xdistil.tables import Table


def describe(params: Params, run: Run) -> list[Table]:
    """Tables of the task: counts and lengths per file, words (or texts) per label, sentences found in two files."""
    inputs, files, texts, tags = Inputs(params, run), [], {}, {}
    for name in ("train", "dev", "test", "transfer"):
        sentences, examples = inputs.read(name)
        texts[name] = set(inputs.keys(name)[1].tolist())
        tags[name] = [tag for sentence in sentences.tags or () for tag in sentence]
        median, most, longest = map(int, np.quantile(examples.lengths, (0.5, 0.95, 1.0)))
        files.append({"file": name, "sentences": len(sentences),
                      "words": sum(len(" ".join(words).split()) for words in sentences.words),
                      "languages": len(set(sentences.languages) - {""}) or None, "windows": len(examples),
                      "sub-words a window: median": median, "95 %": most, "longest": longest})
    counts = [{"label": label, **{name: tags[name].count(label) for name in tags if tags[name]}}
              for label in inputs.labels]
    overlap = [{"in both": f"{a} and {b}", "sentences": len(texts[a] & texts[b])}
               for a in ("transfer", "train") for b in ("dev", "test")]
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
    """Attention in the top layers of the teacher and of a stage's student (on the CPU): tokens [S], teacher [A_t, S,
    S], student [A_s, S, S], NaN if it is a BiLSTM. `text`: one sentence, words separated by spaces, a text, or a pair
    with a tab between; default: a dev sentence with entities, or the first text. With two tokenizers: between words,
    by their first sub-words in the student's."""
    inputs = Inputs(params, run)
    given = (text.split() if inputs.by_word else [text]) if text else typical_sentence(inputs.read("dev")[0])
    examples = inputs.encode(data.Sentences([given]))
    batch = data.collate(examples, [0], inputs.pad_id)
    shown = wordwise.compared(batch)[0] > 0
    found = {"tokens": inputs.tokenizer.convert_ids_to_tokens(batch["input_ids"][0, shown].tolist())}
    student = models.load_classifier(run.stage(stage).dir, inputs.labels, "model_dir", params.unit).eval()
    for name, model in (("teacher", inputs.load_teacher()), ("student", student)):
        if students.is_bilstm(model.config):
            found[name] = np.full((1, *[len(found["tokens"])] * 2), np.nan)
            continue
        models.return_maps(model)
        with torch.inference_mode():
            read = wordwise.as_teacher_reads(examples, batch, model) if name == "teacher" else batch
            maps = wordwise.pool_maps(models.run_model(model, read, False, True)[2][-1], read, batch)
            found[name] = maps[0][:, shown][..., shown].numpy()
    return found


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
