"""The command line: bad input is one line and exit code 2 before anything is written; check; predict."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_stages import TOY, finished_smoke_run, hashes, plain_teacher, read_rows
from test_students import save_pretrained_student

from xdistil import cli, devices
from xdistil.params import Params

ROOT = Path(__file__).resolve().parent.parent
SMOKE = str(ROOT / "params/smoke.yaml")
LABELS = (TOY / "labels.tsv").read_text().split()


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    return finished_smoke_run(tmp_path_factory)


@pytest.fixture
def task(tmp_path):
    return shutil.copytree(TOY, tmp_path / "task")


@pytest.fixture(autouse=True)
def no_notebook_runs(monkeypatch):
    """`run` stops this test if it ever gets as far as a notebook; the environment is as before after it."""
    import papermill

    def refuse(*_, **__):
        raise AssertionError("a notebook was about to run")

    monkeypatch.setattr(papermill, "execute_notebook", refuse)
    for name in ("XDISTIL_HEADLESS", "PYDEVD_DISABLE_FILE_VALIDATION"):
        monkeypatch.setenv(name, "1")


@pytest.fixture
def asked(monkeypatch):
    """Calls `xdistil run` with arguments and returns the Params that it would have run."""
    seen = []
    monkeypatch.setattr(cli, "run_notebooks", lambda params: seen.append(params) or 0)

    def call(*arguments):
        assert cli.main(["run", *map(str, arguments)]) == 0
        return seen.pop()

    return call


def refused(capsys, *arguments):
    """The one line that bad input ends with."""
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("xdistil: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def assert_matches(message, line):
    assert re.search(message, line), line


def replace_line(path, number, new: bytes):
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = new
    path.write_bytes(b"\n".join(lines))


BAD_FILES = {
    "missing-file": (lambda t: (t / "train.tsv").unlink(), r"train\.tsv: no such file; .*'dev\.tsv'"),
    "missing-labels": (lambda t: (t / "labels.tsv").unlink(), r"labels\.tsv: no such file"),
    "missing-transfer": (lambda t: (t / "transfer.tsv").unlink(), r"transfer\.tsv: no such file"),
    "missing-folder": (shutil.rmtree, r"task.train\.tsv: no such file"),
    "tag-count": (lambda t: replace_line(t / "train.tsv", 2, b"a b c\tO O\ten"),
                  r"train\.tsv:2: 3 words and 2 tags; expected"),
    "no-tags": (lambda t: replace_line(t / "dev.tsv", 1, b"just text"), r"dev\.tsv:1: 2 words and 1 tags"),
    "two-spaces": (lambda t: replace_line(t / "dev.tsv", 1, b"a  b\tO O O"), r"dev\.tsv:1: .*single spaces"),
    "columns": (lambda t: replace_line(t / "dev.tsv", 1, b"a\tO\ten\tmore"), r"dev\.tsv:1: "),
    "unknown-label": (lambda t: replace_line(t / "test.tsv", 3, b"a b\tO B-XYZ\ten"),
                      r"test\.tsv:3: unknown label 'B-XYZ'; labels\.tsv has \['O'"),
    "utf-8": (lambda t: replace_line(t / "dev.tsv", 4, b"ab\xff\tO\ten"), r"dev\.tsv:4: invalid UTF-8 at byte 3"),
    "utf-8-transfer": (lambda t: replace_line(t / "transfer.tsv", 2, b"\xff"), r"transfer\.tsv:2: invalid UTF-8"),
    "empty-dev": (lambda t: (t / "dev.tsv").write_text(""), r"dev\.tsv: no sentence in this file"),
    "empty-transfer": (lambda t: (t / "transfer.tsv").write_text("\n\n"), r"transfer\.tsv: no sentence"),
    "empty-labels": (lambda t: (t / "labels.tsv").write_text(""), r"labels\.tsv: found \[\]; expected"),
    "wrong-labels": (lambda t: (t / "labels.tsv").write_text("O\nPER\n"), r"labels\.tsv: found \['PER'\]"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_named_with_its_line(task, tmp_path, capsys, command, case):
    spoil, message = BAD_FILES[case]
    spoil(task)
    line = refused(capsys, command, SMOKE, "--task", task, "--model_dir", tmp_path / "run")
    assert_matches(message, line)
    assert not (tmp_path / "run").exists()


BAD_FLAGS = {
    "unknown": (["--hiden_size", "32"], r"unknown parameter '--hiden_size'; did you mean --hidden_size\?"),
    "unknown=": (["--distil_epoch=3"], r"unknown parameter .*did you mean --distil_epochs\?"),
    "nothing-like-it": (["--zzzzqq", "3"], r"unknown parameter '--zzzzqq'; see xdistil run --help"),
    "type": (["--hidden_size", "wide"], r"hidden_size: found 'wide', but .*integer"),
    "two-wrong": (["--hidden_size", "wide", "--seed", "x"], r"seed: found 'x'.*hidden_size: found 'wide'"),
    "range": (["--distil_lr", "0"], r"distil_lr: found '?0'?, but .*greater than 0"),
    "negative": (["--seed", "-1"], r"seed: found '?-1'?"),
    "choice": (["--layer_map", "botom"], r"layer_map: found 'botom', but .*'uniform', 'top' or 'last'"),
    "heads": (["--num_attention_heads", "5"],
              r"hidden_size: 24 is not divisible by num_attention_heads 5; .*\[1, 2, 3, 4, 6, 8, 12, 24\]"),
    "not-ner": (["--no-do_NER"], r"train.tsv:1: found .* after text; expected label"),
    "both": (["--do_NER", "--do_pairwise"], r"do_pairwise: true, but so is do_NER.*set do_NER: false"),
    "tensorflow": (["--tf_model_check"], r"set tf_model_check: false"),
    "freeze": (["--no-compress_word_embedding"], r"freeze_word_embedding: .*compress_word_embedding: true"),
    "no-params-file": (["--seed", "3"], r"params file .*nowhere\.yaml does not exist; in params/: \['"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", BAD_FLAGS)
def test_a_bad_flag_is_explained(tmp_path, capsys, command, case):
    flags, message = BAD_FLAGS[case]
    file = str(tmp_path / "nowhere.yaml") if case == "no-params-file" else SMOKE
    assert_matches(message, refused(capsys, command, file, "--model_dir", tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text, message", [
    ("experiment:\n  distil_epoch: 2\n", r"unknown parameter 'distil_epoch'; did you mean 'distil_epochs'\?"),
    ("experiment:\n  do_NER: maybe\n", r"do_NER: found 'maybe', but .*boolean"),
    ("experiment:\n  - seed\n", r"expected names and values under one key `experiment:`"),
    ("just words\n", r"expected names and values under one key `experiment:`"),
    ("experiment:\n  seed: [1, 2\n  task: x\n", r"x\.yaml: not readable as YAML"),
    ("experiment:\n  seed: 1\nother: 2\n", r"unknown parameter 'experiment'"),
], ids=["name", "type", "list", "text", "syntax", "keys"])
def test_a_bad_params_file_is_explained(tmp_path, capsys, text, message):
    (tmp_path / "x.yaml").write_text(text)
    assert_matches(message, refused(
        capsys, "run", tmp_path / "x.yaml", "--model_dir", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


BAD_MODELS = {
    "hub": (["--pt_teacher_checkpoint", "nobody/nothing"],
            r"pt_teacher_checkpoint: cannot load 'nobody/nothing' .*machine with network"),
    "student-hub": (["--pt_student_checkpoint", "nobody/nothing"], r"pt_student_checkpoint: cannot load 'nobody/noth"),
    "empty-folder": (["--pt_teacher_checkpoint", "{tmp}"], r"pt_teacher_checkpoint: cannot load .*needs config\.json"),
    "heads": (["--num_attention_heads", "3"],
              r"distil_attention: the teacher has 4 heads, the student 3; set attention_loss: relation, or num_att"
              r"ention_heads: 4 "),
    "width": (["--hidden_size", "96"], r"hidden_size: 96\b.*word embeddings.*choose at most 48"),
    "layers": (["--num_hidden_layers", "9"], r"num_hidden_layers: the student has 9, the teacher 4; .*at most 4"),
    "positions": (["--seq_len", "4096"], r"seq_len: 4096, but the teacher has 512 positions.*choose at most 512"),
    "class": (["--pt_teacher", "RobertaModel"], r"pt_teacher: 'RobertaModel', but .*'bert' model"),
}


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_models_that_do_not_fit_are_refused_before_training(smoke, tmp_path, capsys, monkeypatch, command, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # it was read at import
    flags, message = BAD_MODELS[case]
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    teacher = ["--pt_teacher_checkpoint", plain_teacher(smoke, tmp_path / "teacher")]
    line = refused(capsys, command, SMOKE, "--model_dir", tmp_path / "run", *teacher, *flags)
    assert_matches(message, line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["check", "run"])
@pytest.mark.parametrize("case", ["heads", "width", "layers"])
def test_what_does_not_fit_the_random_teacher_is_refused_before_training(tmp_path, capsys, command, case):
    flags, message = BAD_MODELS[case]
    assert_matches(message, refused(capsys, command, SMOKE, "--model_dir", tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_given_teacher_of_other_labels_is_refused_before_training(smoke, task, tmp_path, capsys, command):
    for path in task.iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("-PER", "-WHO"), encoding="utf-8")
    line = refused(capsys, command, SMOKE, "--task", task, "--model_dir", tmp_path / "run",
                   "--teacher_model_dir", plain_teacher(smoke, tmp_path / "teacher"))
    assert_matches("teacher_model_dir.*'B-PER'.*labels.tsv.*'B-WHO'", line)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_absent_device_is_refused_before_training(tmp_path, capsys, monkeypatch, command):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refused(capsys, command, SMOKE, "--model_dir", tmp_path / "run", "--device", "cuda")
    assert_matches("device: 'cuda'", line)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "run").write_text("mine")
    assert_matches("run", refused(capsys, "run", SMOKE, "--model_dir", tmp_path / "run"))
    assert (tmp_path / "run").read_text() == "mine"


def rows_of(text, title):
    """The cells of the table under a title, by the first cell of each row."""
    block = next(b for b in text.split("\n\n") if b.splitlines()[0].startswith(title))
    rows = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in block.splitlines()[1:]]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_check_prints_counts_labels_overlap_and_needs_and_writes_nothing(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dev = read_rows(task / "dev.tsv")[:2]
    with open(task / "transfer.tsv", "a", encoding="utf-8") as file:
        file.writelines(f"{row[0]}\n" for row in dev)
    before = hashes(task)
    assert cli.main(["check", SMOKE, "--task", str(task), "--model_dir", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    files, labels = rows_of(out, str(task)), rows_of(out, "words per label")
    overlap, needs = rows_of(out, "sentences in two files"), rows_of(out, "needs")
    for name, column in (("train", 0), ("dev", 0), ("test", 0), ("transfer", 0)):
        rows = [row for row in read_rows(task / f"{name}.tsv") if row[0].strip()]
        assert files[name]["sentences"] == str(len(rows))
        assert files[name]["words"].replace(",", "") == str(sum(len(row[column].split()) for row in rows))
        assert int(files[name]["windows"]) >= len(rows) and int(files[name]["longest"]) <= 32
    assert files["dev"]["languages"] == "2"
    assert list(labels) == LABELS
    for label in LABELS:
        counted = sum(row[1].split().count(label) for row in read_rows(task / "train.tsv"))
        assert labels[label]["train"].replace(",", "") == str(counted)
    assert int(overlap["transfer and dev"]["sentences"]) >= 2
    assert overlap["transfer and test"]["sentences"] == "0"
    assert len(needs) == 5 and all(float(row["GB"]) > 0 for row in needs.values())
    assert not (tmp_path / "run").exists() and hashes(task) == before


def test_check_leaves_no_temporary_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert cli.main(["check", SMOKE, "--model_dir", str(tmp_path / "run")]) == 0
    assert list(tmp_path.iterdir()) == []


def test_flags_are_relative_to_the_working_directory_and_yaml_to_the_repository(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("experiment:\n  task: tests/data/toy\n  teacher_model_dir: runs/t\n")
    params = asked("mine.yaml", "--model_dir", "out", "--transfer_file", "../text.txt")
    assert params.model_dir == str(tmp_path / "out")
    assert params.transfer_file == str(tmp_path.parent / "text.txt")
    assert params.task == str(TOY) and params.teacher_model_dir == str(ROOT / "runs/t")
    assert asked("mine.yaml", "--task", "here").task == str(tmp_path / "here")
    (tmp_path / "checkpoint").mkdir()  # a folder that is there is a path, anything else a hub name
    params = asked("--pt_teacher_checkpoint", "checkpoint", "--pt_student_checkpoint", "some/model")
    assert params.pt_teacher_checkpoint == str(tmp_path / "checkpoint")
    assert params.pt_student_checkpoint == "some/model"
    assert asked("params/smoke.yaml").model_dir == str(ROOT / "runs/smoke")  # found from anywhere


def test_yes_and_no_of_flags_win_over_the_params_file(asked):
    assert asked(SMOKE).distil_attention and asked(SMOKE, "--distil_attention").distil_attention
    assert not asked(SMOKE, "--no-distil_attention").distil_attention
    assert asked(SMOKE, "--do_NER").do_NER
    assert asked(SMOKE, "--distil_lr", "3e-5", "--transfer_limit", "7").pick("distil_lr", "transfer_limit") == {
        "distil_lr": 3e-5, "transfer_limit": 7}


def test_without_params_file_flags_stand_alone_and_nothing_means_the_demo(asked):
    assert asked("--seed", "7") == Params(seed=7, model_dir=str(ROOT / "runs/demo"))
    assert asked() == asked(ROOT / "params/demo.yaml") != asked("--seed", "42")


def test_the_flags_of_the_original_command_line(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    params = asked(*"""--task D --model_dir M --seq_len 32 --transfer_file F --do_NER --pt_teacher BertModel
        --pt_teacher_checkpoint C --student_distil_batch_size 32 --student_ft_batch_size 16 --teacher_batch_size 8
        --pt_student_checkpoint S --distil_chunk_size 10000 --teacher_model_dir T --distil_multi_hidden_states
        --distil_attention --compress_word_embedding --freeze_word_embedding --opt_policy mixed_bfloat16""".split())
    assert params == Params(
        task=str(tmp_path / "D"), model_dir=str(tmp_path / "M"), seq_len=32, transfer_file=str(tmp_path / "F"),
        do_NER=True, pt_teacher="BertModel", pt_teacher_checkpoint="C", student_distil_batch_size=32,
        student_ft_batch_size=16, teacher_batch_size=8, pt_student_checkpoint="S", distil_chunk_size=10000,
        teacher_model_dir=str(tmp_path / "T"), distil_multi_hidden_states=True, distil_attention=True,
        compress_word_embedding=True, freeze_word_embedding=True, opt_policy="mixed_bfloat16")


def test_every_parameter_has_a_flag_with_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for name, field in Params.model_fields.items():
        assert f"--{name}" in text and " ".join(field.description.split()) in text.replace("- ", "-"), name


LONG = " ".join(["Angela Braun moved from Lisbon to Siemens AG in Hamburg ,"] * 40)
TEXT = f"Trọng Phong không nói gì\n\n{LONG}\nShares in Leland City fell \u200d .\n   \na\n{'x' * 500} y\n"


@pytest.fixture
def predict(smoke, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "multiplies_bf16", lambda _: False)  # float32, as the run was

    def call(text, *flags, name="in.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return cli.main(["predict", str(smoke / "student"), str(tmp_path / name), "--device", "cpu", *flags])

    return call


def test_predict_keeps_lines_blank_lines_order_and_every_word(predict, tmp_path, capsys):
    assert predict(TEXT) == 0
    out = capsys.readouterr().out
    lines = [line.split("\t") for line in out.split("\n")]
    assert lines.pop() == [""]
    assert [line[0].split(" ") if line != [""] else [] for line in lines] == [x.split() for x in TEXT.splitlines()]
    tagged = [line for line in lines if line != [""]]
    assert len(tagged) == 5
    for words, tags in tagged:
        assert len(words.split(" ")) == len(tags.split(" ")) and set(tags.split(" ")) <= set(LABELS)
    assert predict("\n".join(reversed(TEXT.splitlines()))) == 0
    assert list(reversed(out.splitlines())) == capsys.readouterr().out.splitlines()


def test_predict_reads_the_first_column_and_says_what_evaluation_said(predict, smoke, capsys):
    assert predict((TOY / "test.tsv").read_bytes(), name="test.tsv") == 0
    found = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert found == [row[:2] for row in read_rows(smoke / "evaluation/predictions.tsv")]


def test_predict_batch_size_changes_nothing(predict, capsys):
    assert predict(TEXT) == 0 == predict(TEXT, "--batch_size", "2")
    out = capsys.readouterr().out
    assert out[: len(out) // 2] == out[len(out) // 2 :]


def test_predict_writes_a_file_whole_or_not_at_all(predict, tmp_path, capsys):
    target = tmp_path / "out" / "tags.tsv"
    assert predict(TEXT, "-o", str(target)) == 0
    assert capsys.readouterr().out == ""
    whole = target.read_bytes()
    assert predict(TEXT) == 0 and capsys.readouterr().out.encode() == whole
    assert predict(b"a b\n" * 4100 + b"bad \xff byte\n", "-o", str(target)) == 2  # past the first block
    err = capsys.readouterr().err
    assert err.startswith("xdistil: ") and "in.txt:4101: invalid UTF-8" in err and err.count("\n") == 1
    assert target.read_bytes() == whole
    assert [p.name for p in target.parent.iterdir()] == ["tags.tsv"]


def test_predict_refuses_in_one_line(smoke, tmp_path, capsys):
    text = tmp_path / "in.txt"
    text.write_text("a b\n")
    assert_matches("no such file", refused(capsys, "predict", smoke / "student", tmp_path / "nothing.txt"))
    assert_matches("cannot load", refused(capsys, "predict", tmp_path, text))
    assert_matches("unknown", refused(capsys, "predict", smoke / "student", text, "--seq_len", "3"))


@pytest.mark.slow
def test_predict_reads_standard_input(smoke, predict, tmp_path, capsys):
    assert predict(TEXT) == 0
    expected = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "xdistil", "predict", str(smoke / "student"), "-", "--device", "cpu"], cwd=tmp_path,
        input=TEXT.encode(), capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr.decode()
    found, expected = ([line.split("\t") for line in text.splitlines()] for text in (done.stdout.decode(), expected))
    assert [line[0] for line in found] == [line[0] for line in expected]
    assert all(len(line[0].split(" ")) == len(line[-1].split(" ")) for line in found)


@pytest.mark.parametrize("arguments, code", [(["--version"], 0), ([], 2), (["train"], 2)])
def test_the_bare_command(capsys, arguments, code):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == code


def test_interrupting_says_how_to_go_on(monkeypatch, capsys):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run_notebooks", interrupt)
    assert cli.main(["run", SMOKE]) == 130
    assert_matches("^xdistil: interrupted; the same command goes on", capsys.readouterr().err)


def test_push_uploads_what_is_named_and_only_when_asked(smoke, monkeypatch, capsys):
    calls = []

    class Hub:
        def create_repo(self, repo, **options):
            calls.append((repo, options))

        def upload_folder(self, **options):
            calls.append(options)
            return "https://hub/me/tagger"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert cli.main(["push", str(smoke / "student"), "me/tagger"]) == 0
    assert calls == [("me/tagger", {"private": True, "exist_ok": True}),
                     {"folder_path": str(smoke / "student"), "repo_id": "me/tagger"}]
    assert capsys.readouterr().out.strip() == "https://hub/me/tagger"
    calls.clear()
    assert_matches("STUDENT_DIR: cannot load", refused(capsys, "push", smoke, "me/tagger"))
    assert not calls


def test_push_without_network_says_so(smoke, capsys):
    found = refused(capsys, "push", smoke / "student", "me/tagger")
    assert_matches("push: me/tagger was not written .*network", found)


@pytest.mark.parametrize("command", ["check", "run"])
def test_another_vocabulary_is_refused_before_training(tmp_path, capsys, command, sentences, labels):
    words = {word for words in sentences.words for word in words}
    student = save_pretrained_student(tmp_path, set(sorted(words)[::2]), labels, 24)
    flags = ["--no-compress_word_embedding", "--no-freeze_word_embedding", "--no-distil_attention"]
    line = refused(capsys, command, SMOKE, "--model_dir", tmp_path / "run", "--pt_student_checkpoint", student, *flags)
    assert_matches("has another vocabulary than the teacher .*set compress_word_embedding: true", line)
    assert not (tmp_path / "run").exists()
