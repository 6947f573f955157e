"""ONNX files answer like the student they come from."""

import numpy as np
import pytest
import torch

from xdistil import cli, evaluate
from xdistil.data import collate
from xdistil.export import OnnxTagger, export_onnx
from xdistil.models import CheckpointError, load_classifier, run_model


@pytest.fixture(scope="module")
def exported(teacher_folder, labels):
    """The tiny teacher, exported beside its own files."""
    model = load_classifier(teacher_folder, labels, "STUDENT_DIR").eval()
    export_onnx(model, teacher_folder / "onnx")
    return teacher_folder, model


@pytest.mark.parametrize("rows", [[3], [0, 7, 19], list(range(32))])
def test_float32_answers_to_the_last_digits_whatever_the_shape(exported, examples, rows):
    folder, model = exported
    batch = collate(examples, np.array(rows), 0)
    with torch.inference_mode():
        wanted, found = run_model(model, batch)[0], run_model(OnnxTagger(folder, "fp32"), batch)[0]
    real = batch["attention_mask"] > 0
    assert (wanted - found)[real].abs().max() < 1e-4


def test_padding_changes_no_answer(exported, examples):
    tagger, row = OnnxTagger(exported[0], "fp32"), int(examples.lengths.argmin())
    alone = run_model(tagger, collate(examples, np.array([row]), 0))[0]
    among = run_model(tagger, collate(examples, np.array([row, int(examples.lengths.argmax())]), 0))[0]
    assert among.shape[1] > alone.shape[1]
    torch.testing.assert_close(among[:1, : alone.shape[1]], alone, rtol=1e-4, atol=1e-5)


def test_int8_is_smaller_and_mostly_of_one_mind(exported, examples, sentences, labels, accelerator):
    folder, model = exported
    assert (folder / "onnx/model-int8.onnx").stat().st_size < 0.7 * (folder / "onnx/model.onnx").stat().st_size
    tags = [[tag for sentence in evaluate.predict(m, examples, sentences.words, labels, 0, accelerator)[0]
             for tag in sentence] for m in (model, OnnxTagger(folder, "fp32"), OnnxTagger(folder, "int8"))]
    assert tags[0] == tags[1]
    assert np.mean([a == b for a, b in zip(tags[0], tags[2], strict=True)]) > 0.9


def test_without_files_the_command_to_run_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="model-int8.onnx does not exist; run `xdistil export"):
        OnnxTagger(tmp_path)


def test_the_commands_export_and_predict(exported, tmp_path, capsys):
    folder, _ = exported
    (tmp_path / "in.txt").write_text("Storm company\nAda\n", encoding="utf-8")
    assert cli.main(["export", str(folder)]) == 0
    assert "model-int8.onnx" in capsys.readouterr().out
    answers = []
    for flags in ([], ["--onnx", "fp32"], ["--onnx", "int8"]):
        assert cli.main(["predict", str(folder), str(tmp_path / "in.txt"), "--device", "cpu", *flags]) == 0
        answers.append([line.split("\t")[0] for line in capsys.readouterr().out.splitlines()])
    assert answers == [["Storm company", "Ada"]] * 3
    assert cli.main(["predict", str(tmp_path), str(tmp_path / "in.txt"), "--onnx", "fp32"]) == 2
