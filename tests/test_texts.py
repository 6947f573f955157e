"""Texts and pairs with one label each: read, cut, trained through all stages, and answered by plain transformers."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from test_notebooks import xdistil
from test_stages import run_stages, smoke_params
from tiny import random_teacher

from xdistil import cli, data, evaluate, explore, export, frozen, losses, models, stages, students, texts, views
from xdistil.data import DataError, Sentences
from xdistil.inputs import Inputs
from xdistil.params import ParamsError, load_params
from xdistil.runs import STAGES, Run
from xdistil.unfreeze import freeze_to, layer_groups

TOPICS = {"sport": "goal team match player score coach", "food": "bread soup cook salt plate oven",
          "law": "court judge trial crime jury appeal"}
FILLERS = "the a of in it was we they very old new on with and".split()
UNITS = ["text", "pair"]


def write_task(folder: Path, unit: str) -> Path:
    """A task of topics, for pairs that of the second text; labels are names, in dev numbers."""
    rng, names = random.Random(0), list(TOPICS)

    def text(topic):
        words = rng.choices(FILLERS, k=rng.randint(1, 3)) + rng.choices(TOPICS[topic].split(), k=rng.randint(2, 5))
        rng.shuffle(words)
        return " ".join(words)

    def row():
        topic = rng.choice(names)
        return (text(topic), topic) if unit == "text" else (text(rng.choice(names)), text(topic), topic)

    folder.mkdir(parents=True)
    (folder / "labels.tsv").write_text("\n".join(names) + "\n")
    for name, n in (("train", 120), ("dev", 30), ("test", 24), ("transfer", 90)):
        rows = [row() for _ in range(n)]
        if name == "transfer":
            rows = [columns[:-1] for columns in rows]
        if name == "dev":
            rows = [(*columns[:-1], str(names.index(columns[-1]))) for columns in rows]
        if name == "test":
            rows = [(*columns, "en" if i % 2 else "de") for i, columns in enumerate(rows)]
        (folder / f"{name}.tsv").write_text("".join("\t".join(columns) + "\n" for columns in rows))
    return folder


@pytest.fixture(scope="session", params=UNITS)
def unit(request):
    return request.param


@pytest.fixture(scope="session")
def task(unit, tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task") / unit, unit)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny untrained BERT whose words are those of the tasks, with matrices large enough to learn in seconds."""
    words = {word for topic in TOPICS.values() for word in topic.split()} | set(FILLERS)
    torch.manual_seed(0)
    folder = random_teacher(words, ["O", "B-X"], tmp_path_factory.mktemp("base"))
    tensors = {name: x * 6 if x.ndim > 1 else x for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def ask(unit, task, base, model_dir, **changes):
    given = {"task": str(task), "do_NER": False, "do_pairwise": unit == "pair", "pt_teacher_checkpoint": str(base),
             "teacher_epochs": 7, "teacher_lr": 1e-3, "student_init": "teacher_layers", "unfreeze": "module",
             "compress_word_embedding": False, "distil_epochs": 3, "distil_lr": 1e-3, "logit_lr": 3e-4, "ft_lr": 5e-4,
             "holdout_ratio": 0.2, "train_limit": 100}
    return smoke_params(model_dir, **given | changes)


@pytest.fixture(scope="session")
def run(unit, task, base, tmp_path_factory):
    """A run of all seven stages."""
    return run_stages(ask(unit, task, base, tmp_path_factory.mktemp("runs") / unit))


def rows_of(path):
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


# Files


def write(folder, content, name="train.tsv"):
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def test_labels_are_names_or_their_lines_and_a_language_may_follow(tmp_path):
    path = write(tmp_path, " good one \tyes\ten\n\nbad\t0\n  two  words\t1\tde\r\n")
    assert texts.read_texts(path, "text", ["no", "yes"]) == Sentences(
        [["good one"], ["bad"], ["two  words"]], [["yes"], ["no"], ["yes"]], ["en", "", "de"])
    path = write(tmp_path, "a\tb b\tyes\nc\td\t0\tsv\n")
    assert texts.read_texts(path, "pair", ["no", "yes"]) == Sentences(
        [["a\tb b"], ["c\td"]], [["yes"], ["no"]], ["", "sv"])
    assert texts.read_texts(path, "pair") == Sentences([["a\tb b"], ["c\td"]], None, ["yes", "0"])
    assert texts.read_texts(path, "text").words == [["a"], ["c"]]  # the column after a transfer text is its language


def test_where_names_are_numbers_a_number_is_a_name(tmp_path):
    path = write(tmp_path, "a\t1\nb\t2\n")
    assert texts.read_texts(path, "text", ["2", "1"]).tags == [["1"], ["2"]]
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:1: found \\['1'\\].*one of \\['2', '3'\\]$"):
        texts.read_texts(path, "text", ["2", "3"])


@pytest.mark.parametrize("unit, content, line, message", [
    ("text", "a\tyes\nb\tmaybe\n", 2, r"found \['maybe'\] after text; expected label.*one of \['no', 'yes'\] or its"),
    ("text", "a\tyes\nb\t2\n", 2, r"found \['2'\]"), ("text", "a\n", 1, r"found \[\] after text"),
    ("text", "a\tno\ten\tmore\n", 1, r"found \['no', 'en', 'more'\]"), ("text", "\tno\n", 1, ".*expected text at"),
    ("text", "a\tyes\na\tb\tno\n", 2, r"found \['b', 'no'\] after text"), ("pair", "a\tb\tyes\n\na\tb\n", 3, "found"),
    ("pair", "a\tyes\n", 1, "found .* after text<TAB>text"),
    ("pair", "a\t \tyes\n", 1, ".*expected text<TAB>text at")])
def test_a_bad_line_is_named(tmp_path, unit, content, line, message):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: {message}"):
        texts.read_texts(path, unit, ["no", "yes"])


def test_a_transfer_line_without_its_second_text_is_named(tmp_path):
    path = write(tmp_path, "a\tb\nonly one\n", "transfer.tsv")
    with pytest.raises(DataError, match=r"transfer.tsv:2: found 'only one'; expected text<TAB>text"):
        texts.read_texts(path, "pair")


def test_one_class_is_one_clear_error(tmp_path):
    path = write(tmp_path, "a\tyes\nb\tyes\nc\tno\n")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}: all 1 texts .* label '(yes|no)'; .* two classes"):
        texts.read_texts(path, "text", ["no", "yes"], limit=1)
    for content in ("yes\n", "", "yes\nno\nyes\n"):
        path = write(tmp_path, content, "labels.tsv")
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: found .*two or more distinct classes"):
            data.read_labels(path, "text")
    with pytest.raises(DataError, match="train.tsv: no text in this file"):
        texts.read_texts(write(tmp_path, "\n \n"), "text", ["no", "yes"])
    with pytest.raises(DataError, match="labels.tsv: no such file"):
        data.read_labels(tmp_path / "none" / "labels.tsv", "text")


@pytest.mark.parametrize("values, message", [
    ({"do_pairwise": True}, "^do_pairwise: true, but so is do_NER .*set do_NER: false"),
    ({"do_NER": False}, "^task: 'demo' labels words; set do_NER: true")])
def test_tasks_at_odds_name_both_parameters(values, message):
    with pytest.raises(ParamsError, match=message):
        load_params(values)


@pytest.mark.data
@pytest.mark.parametrize("unit, folder, counts", [
    ("text", "sib200_topic", {
        "train": [1760, 1380, 1020, 850, 770, 650, 580], "dev": [250, 200, 140, 120, 110, 90, 80],
        "test": [510, 400, 300, 250, 220, 190, 170], "transfer": 9000}),
    ("pair", "sick_nli", {"train": [1276, 2526, 638], "dev": [142, 281, 72], "test": [1414, 2793, 720],
                          "transfer": 8000})])
def test_real_tasks_are_read_whole(shared, unit, folder, counts):
    folder = shared / "data" / folder
    classes = data.read_labels(folder / "labels.tsv", "text")
    for name in ("train", "dev", "test"):
        tags = [label for (label,) in texts.read_texts(folder / f"{name}.tsv", unit, classes).tags]
        assert [tags.count(name) for name in classes] == counts[name]
    assert len(texts.read_texts(folder / "transfer.tsv", unit)) == counts["transfer"]


# Windows


def test_a_window_is_what_the_tokenizer_gives_and_cuts_are_counted(base):
    tokenizer = models.load_tokenizer(base)
    long, short = " ".join(["goal"] * 20), "the soup"
    given = [[long], [], [short]], [[f"{long}\t{short}"], [f"{short}\t{long}"], [f"{short}\t{short}"]]
    for unit, words, n_cut in zip(UNITS, given, (1, 2), strict=True):
        examples, found = texts.encode(Sentences(words, [["b"], ["a"], ["b"]]), unit, tokenizer, 12, ["a", "b"])
        assert found == n_cut and examples.lengths.max() == 12
        kept = [words for words in words if words]
        assert examples.sentences.tolist() == [i for i, words in enumerate(words) if words]
        for i, (text,) in enumerate(kept):
            wanted = tokenizer(*text.split("\t"), truncation=True, max_length=12)
            batch = data.collate(examples, [i], 0)
            for name, values in wanted.items():
                assert batch[name][0].tolist() == values, name
            assert batch["words"][0].tolist() == [0] + [-1] * (len(wanted["input_ids"]) - 1)
        first = examples.labels[examples.offsets[:-1]].tolist()
        assert first == ([1, 1] if unit == "text" else [1, 0, 1])
        assert (examples.labels != losses.IGNORED).sum() == len(kept)
    first, second = (tokenizer.convert_ids_to_tokens(examples.input_ids[a:b]) for a, b in ((0, 12), (12, 24)))
    assert first.count("goal") == second.count("goal") == 7 and "soup" in first and "soup" in second  # longest first
    nothing, _ = texts.encode(Sentences([[], []]), "text", tokenizer, 12)
    assert len(nothing) == 0


# Models


CONFIGS = {
    "bert": transformers.BertConfig, "roberta": transformers.RobertaConfig, "electra": transformers.ElectraConfig,
    "distilbert": transformers.DistilBertConfig, "deberta": transformers.DebertaV2Config,
    "albert": transformers.AlbertConfig, "mpnet": transformers.MPNetConfig, "xlm": transformers.XLMConfig,
    "modernbert": transformers.ModernBertConfig, "xlnet": transformers.XLNetConfig, "gpt2": transformers.GPT2Config}
NAMES = {"distilbert": ("dim", "n_layers", "n_heads", "hidden_dim"), "xlm": ("emb_dim", "n_layers", "n_heads"),
         "xlnet": ("d_model", "n_layer", "n_head", "d_inner"), "gpt2": ("n_embd", "n_layer", "n_head", "n_inner")}


def build(family, width=24, n_layers=3, unit="pair"):
    """A random classifier on the tokenizer of `base`; the pooler of BERT is far from its small initialisation."""
    names = NAMES.get(family, ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"))
    sizes = dict(zip(names, (width, n_layers, 4, 2 * width), strict=False))
    config = CONFIGS[family](vocab_size=200, pad_token_id=0, num_labels=3, **sizes)
    model = models.from_config(config, unit).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture
def pairs(base):
    rng = random.Random(1)
    words = [word for topic in TOPICS.values() for word in topic.split()]
    rows = [[f"{' '.join(rng.choices(words, k=rng.randint(1, 9)))}\t{' '.join(rng.choices(words, k=3))}"]
            for _ in range(20)]
    return texts.encode(Sentences(rows), "pair", models.load_tokenizer(base), 32)[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_answers_as_each_pair_alone_and_as_plain_transformers(family, base, pairs):
    model = build(family)
    together = models.run_model(model, data.collate(pairs, np.arange(20), 0))[0]
    assert together.shape == (20, 1, 3) and together.std() > 1e-3
    for i in range(20):
        alone = data.collate(pairs, [i], 0)
        assert torch.allclose(models.run_model(model, alone)[0], together[i : i + 1], atol=1e-5)
        plain = {"input_ids": alone["input_ids"], "token_type_ids": alone["token_type_ids"]}
        if not models.reads_token_types(model):
            plain.pop("token_type_ids")
        assert torch.allclose(model(**plain).logits, together[i], atol=1e-5)
    del alone["token_type_ids"]
    same = torch.allclose(models.run_model(model, alone)[0], together[19:], atol=1e-5)
    assert same != models.reads_token_types(model)  # they matter wherever they are read
    assert models.reads_token_types(model) == (family not in ("distilbert", "deberta", "mpnet", "modernbert"))


@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_frozen_layers_are_not_recomputed_and_change_nothing(family, base, pairs, accelerator):
    model = build(family)
    groups = dict(layer_groups(model))
    assert all(name.split(".")[0] != "embeddings" for name in groups["head"]) and len(groups["head"]) == 4
    batch = data.collate(pairs, np.arange(8), 0)
    for n_frozen, learning in ((3, groups["head"]), (2, groups["head"] + groups["layer_3"]), (0, list(
            dict(model.named_parameters())))):
        freeze_to(model, learning)
        model.eval()
        kept = frozen.FrozenStates(model, pairs, np.arange(20), 0, accelerator, 1e9)
        (fed,) = kept.feed([dict(batch)])
        assert ("frozen_states" in fed) == (n_frozen > 0) and kept.n_layers == n_frozen
        gradients = []
        for given in (fed, batch):
            model.zero_grad()
            logits = frozen.run_upper(model, given)
            logits.square().sum().backward()
            gradients.append((logits.detach(), {n: model.get_parameter(n).grad for n in learning}))
        (a, grads_a), (b, grads_b) = gradients
        assert torch.allclose(a, b, atol=1e-5)
        for name in groups["head"]:
            assert grads_b[name].abs().max() > 0 and torch.allclose(grads_a[name], grads_b[name], atol=1e-4), name


def test_only_a_head_that_fits_is_copied(base):
    teacher, same, narrow = (build(f, width) for f, width in (("roberta", 24), ("bert", 24), ("bert", 16)))
    assert students.fold_head(same, teacher, None)
    states = torch.randn(5, 7, 24)
    with torch.no_grad():  # both are dense, tanh, linear
        pooled = same.bert.pooler(states)
        assert torch.allclose(same.classifier(pooled), teacher.classifier(states), atol=1e-6)
    before = {name: weight.clone() for name, weight in narrow.state_dict().items()}
    assert not students.fold_head(narrow, teacher, torch.nn.Linear(16, 24))
    assert all(torch.equal(weight, before[name]) for name, weight in narrow.state_dict().items())


@pytest.mark.parametrize("wanted, found", [
    (list("aabbc"), list("aabbc")), (list("aabbc"), list("abbbc")), (list("aaab"), list("aaaa")),
    (list("ab"), list("cc"))])
def test_scores_are_those_of_scikit_learn(wanted, found):
    gold = Sentences([["x"]] * len(wanted), [[x] for x in wanted], ["en", "de"] * (len(wanted) // 2) + ["en"] * (
        len(wanted) % 2))
    scores = evaluate.score_classes(gold, [[x] for x in found])
    assert scores["macro"] == pytest.approx(f1_score(wanted, found, average="macro", zero_division=0))
    assert scores["accuracy"] == accuracy_score(wanted, found)
    assert scores["matthews"] == matthews_corrcoef(wanted, found)
    assert scores["by_language"].keys() == {"en", "de"}
    assert scores["by_language"]["en"] == f1_score(wanted[::2], found[::2], average="macro", zero_division=0)
    kept = evaluate.retention(scores, scores)
    assert kept["accuracy"] in (1, None) and kept.keys() == {"macro", "accuracy", "matthews", "by_language"}


# Whole runs


def test_all_seven_stages_run_and_learn(run, unit):
    metrics = {name: run.stage(name).metrics for name in STAGES}
    for name in ("teacher", "student-init", "hidden", "logits", "labels", "student"):
        config = json.loads((run.dir / name / "config.json").read_text())
        assert config["architectures"] == ["BertForSequenceClassification"]
        assert list(config["id2label"].values()) == list(TOPICS)
        assert models.unit_of(models.load_config(run.dir / name)) == unit
    for name in ("teacher", "labels"):
        scores = [r["score"] for r in run.stage(name).history if r["kind"] == "eval"]
        assert metrics[name]["metric"] == "dev macro F1" and metrics[name]["score"] == max(scores)
        assert metrics[name]["dev"]["macro"] == pytest.approx(metrics[name]["score"])
    for name in ("hidden", "logits"):
        scores = [r["score"] for r in run.stage(name).history if r["kind"] == "eval"]
        assert metrics[name]["score"] == min(scores) < 0.98 * scores[0]
    for model in ("teacher", "student"):  # a constant answer is right for 10 of the 24
        assert metrics["evaluation"][model]["test"]["accuracy"] > 0.6
    assert metrics["hidden"]["teacher_windows"] == 90 and metrics["logits"]["teacher_windows"] == 0
    logits = list((run.dir / "targets").rglob("logits-*.bin"))
    assert sum(path.stat().st_size for path in logits) == 90 * 3 * 4  # a row for each text


def test_the_test_set_is_scored_and_written_in_its_order(run, task, unit):
    gold, found = rows_of(task / "test.tsv"), rows_of(run.dir / "evaluation/predictions.tsv")
    n = 1 + (unit == "pair")
    assert [(row[:n], row[-1]) for row in found] == [(row[:n], row[-1]) for row in gold]
    wanted, got = ([row[n] for row in rows] for rows in (gold, found))
    scores = run.stage("evaluation").metrics["student"]["test"]
    assert scores["accuracy"] == pytest.approx(accuracy_score(wanted, got))
    assert scores["macro"] == pytest.approx(f1_score(wanted, got, average="macro"))
    assert scores["matthews"] == pytest.approx(matthews_corrcoef(wanted, got))
    assert set(scores["by_language"]) == {"de", "en"}


PLAIN = """
import json, sys
sys.modules["xdistil"] = None  # whatever is installed: it must not be needed
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
folder, rows = sys.argv[1], json.loads(sys.argv[2])
AutoModelForSequenceClassification.from_pretrained(folder)
classify = pipeline("text-classification", model=folder, truncation=True)
given = [dict(zip(("text", "text_pair"), row)) for row in rows]
print(json.dumps([[classify(row)["label"] for row in given], [x["label"] for x in classify(given, batch_size=8)],
                  AutoTokenizer.from_pretrained(folder).model_max_length]))
"""


def test_the_student_needs_transformers_alone(run, unit, tmp_path):
    n, rows = 1 + (unit == "pair"), rows_of(run.dir / "evaluation/predictions.tsv")
    done = subprocess.run([sys.executable, "-I", "-c", PLAIN, str(run.dir / "student"),
                           json.dumps([row[:n] for row in rows])], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    alone, together, longest = json.loads(done.stdout.splitlines()[-1])
    assert alone == together == [row[n] for row in rows] and longest == 32
    card = (run.dir / "student/README.md").read_text()
    scores = run.stage("evaluation").metrics["student"]["test"]
    assert "pipeline_tag: text-classification" in card and "| **accuracy** |" in card
    assert f"{100 * scores['accuracy']:.1f}" in card


def test_predict_keeps_order_and_blank_lines(run, unit, task, tmp_path, capsys):
    n, rows = 1 + (unit == "pair"), rows_of(run.dir / "evaluation/predictions.tsv")
    lines = (task / "test.tsv").read_text().splitlines()
    long = "\t".join(["goal " * 50] * n)
    source = write(tmp_path, "\n".join([*lines[:5], "", *lines[5:], long]) + "\n", "input.tsv")
    for more in ([], ["--batch_size", "3"]):
        assert cli.main(["predict", str(run.dir / "student"), str(source), *more]) == 0
        said = capsys.readouterr()
        found = [line.split("\t") for line in said.out.splitlines()]
        assert found.pop(5) == [""] and len(found.pop()) == n + 1
        assert found == [row[: n + 1] for row in rows]
        assert f"1 {unit}s are longer than 32 sub-words and were cut" in said.err
    if unit == "pair":
        source = write(tmp_path, "a\tb\nalone\n", "input.tsv")
        assert cli.main(["predict", str(run.dir / "student"), str(source)]) == 2
        assert "input.tsv:2: found 'alone'; expected text<TAB>text" in capsys.readouterr().err


@pytest.mark.slow
def test_onnx_answers_as_torch(run, unit, tmp_path, capsys):
    student = run.dir / "student"
    assert cli.main(["export", str(student)]) == 0
    inputs = Inputs(run.params, run)
    model = models.load_classifier(student, inputs.labels, "STUDENT_DIR", unit).eval()
    tagger, (gold, examples) = export.OnnxTagger(student, "fp32"), inputs.read("test")
    for rows in np.split(np.arange(len(examples)), 4):
        batch = data.collate(examples, rows, inputs.pad_id)
        with torch.no_grad():
            (a, *_), (b, *_) = models.run_model(model, batch), models.run_model(tagger, batch)
        assert torch.allclose(a, b, atol=1e-4)
    assert len(tagger.session.get_inputs()) == (3 if unit == "pair" else 2)
    source = write(tmp_path, "".join("\t".join(words) + "\n" for words in gold.words), "input.tsv")
    capsys.readouterr()
    for precision in ("fp32", "int8"):
        assert cli.main(["predict", str(student), str(source), "--onnx", precision]) == 0
        found = [line.split("\t")[-1] for line in capsys.readouterr().out.splitlines()]
        wanted = [row[-2] for row in rows_of(run.dir / "evaluation/predictions.tsv")]
        agree = np.mean([a == b for a, b in zip(found, wanted, strict=True)])
        assert agree == 1 if precision == "fp32" else agree > 0.8


def test_what_notebooks_show(run, unit, task, base, capsys):
    files, labels, _ = views.describe(run.params, run)
    assert [row["sentences"] for row in files.rows] == [100, 30, 24, 90] and labels.title == f"{unit}s per label"
    assert sum(row["train"] for row in labels.rows) == 100 and sum(row["dev"] for row in labels.rows) == 30
    rows = views.scores(run.stage("labels")).rows
    assert [row["dev"] for row in rows] == ["all", "macro F1", "accuracy", "Matthews"]
    names = [row[""] for row in views.results(run).rows]
    assert names[:5] == ["F1 de (%)", "F1 en (%)", "macro F1 (%)", "accuracy (%)", "Matthews (%)"]
    example = views.attention_example(run.params, run)
    n = len(example["tokens"])
    assert example["teacher"].shape[1:] == example["student"].shape[1:] == (n, n)
    explorer = explore.Explorer(views.Pair(run.params, run))
    assert set(explorer.look.tags) == {"gold", "teacher", "student"} and explorer.attention.value
    explorer.text.value = "one text | another"
    assert explorer.look.words == ["one text\tanother" if unit == "pair" else "one text | another"]
    assert explorer.look.student.tags[0] in explorer.spans.value
    kind, given, options = views.trial(run.params, run)
    answer = transformers.pipeline(kind, model=str(run.dir / "student"), **options)(given)
    assert answer["label"] in Inputs(run.params, run).labels
    assert all(row["GB"] >= 0 for row in views.needs(run.params, run).rows)
    capsys.readouterr()
    cut = Inputs(ask(unit, task, base, run.dir, seq_len=8), run)
    lengths = cut.read("train")[1].lengths
    said = capsys.readouterr().out
    assert lengths.max() == 8
    assert re.match(rf"\[data\] train: \d+ of 100 {unit}s are longer than seq_len 8 and cut", said)


def test_another_task_on_the_same_teacher_is_refused(run, toy, tmp_path):
    other = smoke_params(tmp_path / "words", teacher_model_dir=str(run.dir / "teacher"), task=str(toy))
    with pytest.raises(models.CheckpointError, match=r"^teacher_model_dir: .*BertForSequenceClassification.*do_NER"):
        stages.check(other, Run(other))


@pytest.mark.slow
@pytest.mark.parametrize("family, changes, head", [
    ("roberta", {"student_init": "scratch", "hidden_size": 24}, "the teacher's"),
    ("electra", {"student_init": "scratch", "hidden_size": 16}, "its own"),
    ("bert", {"student_init": "teacher_layers"}, "the teacher's"),
    ("bert", {"pt_student_checkpoint": "distilbert", "student_init": "auto"}, "the teacher's")])
def test_other_families_go_all_the_way_with_pairs(family, changes, head, base, tmp_path):
    for name in ("distilbert", family):
        models.save_model(build(name), models.load_tokenizer(base), tmp_path / name)
    if "pt_student_checkpoint" in changes:
        changes = changes | {"pt_student_checkpoint": str(tmp_path / "distilbert")}
    run = run_stages(ask(
        "pair", write_task(tmp_path / "task", "pair"), tmp_path / family, tmp_path / "run", teacher_epochs=1,
        distil_epochs=1, ft_epochs=1, freeze_word_embedding=False, seq_len=24, **changes))
    assert run.stage("hidden").metrics["head"].startswith(head)
    classify = transformers.pipeline("text-classification", model=str(run.dir / "student"))
    rows = rows_of(run.dir / "evaluation/predictions.tsv")
    given = [{"text": a, "text_pair": b} for a, b, *_ in rows]
    assert [answer["label"] for answer in classify(given)] == [row[2] for row in rows]


@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.parametrize("unit", ["pair"], indirect=True)  # texts take the same way
def test_the_seven_notebooks_run_and_report(unit, task, base, tmp_path):
    params = ask(unit, task, base, tmp_path / "run", teacher_epochs=1, distil_epochs=1, ft_epochs=1,
                 onnx=unit == "pair")
    file = write(tmp_path, yaml.safe_dump({"experiment": params.model_dump(exclude_none=True)}), "params.yaml")
    done = xdistil("run", file)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {line.split("  ")[0]: line.split()[-3:] for line in done.stdout.splitlines() if "  " in line}
    scores = json.loads((tmp_path / "run/evaluation/metrics.json").read_text())["student"]["test"]
    assert float(rows["accuracy (%)"][1]) == pytest.approx(100 * scores["accuracy"], abs=0.051)
    assert "7 of 7 stages ran" in done.stdout and (tmp_path / "run/report.html").is_file()
