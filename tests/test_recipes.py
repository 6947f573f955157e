"""The recipes of both papers and the original example's flags, on a tiny teacher as deep as theirs."""

import shutil

import pytest
import transformers
from test_stages import run_stages
from test_students import save_pretrained_student

from xdistil import models
from xdistil.params import load_params

SMALL = {"seq_len": 32, "hidden_size": 20, "embedding_size": 12, "num_attention_heads": 4, "teacher_epochs": 1,
         "distil_epochs": 1, "ft_epochs": 1, "transfer_limit": 24, "train_limit": 16, "device": "cpu",
         "opt_policy": "float32"}
RECIPES = {  # the file or the flags, layer pairs, steps of unfreezing, class of the student
    "2020": ("params/xtremedistil2020.yaml", [[1, 7]], ["head", "layer_1", "embeddings"],
             "BiLstmForTokenClassification"),
    "2021": ("params/xtremedistil2021.yaml", [[s, s + 6] for s in range(7)], ["head", "all"],
             "BertForTokenClassification"),
    "modern": ("params/modern.yaml", None, ["all"], "BertForTokenClassification"),
    "flags": ({"do_NER": True, "pt_teacher": "TFBertModel", "distil_attention": True, "distil_chunk_size": 10000,
               "distil_multi_hidden_states": True, "compress_word_embedding": True, "freeze_word_embedding": True},
              [[0, 0], [1, 6], [2, 12]], ["head", "all"], "BertForTokenClassification")}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_to_the_end_and_needs_no_test_set_before(name, teacher_folder, toy, root, sentences, labels,
                                                               tmp_path):
    recipe, pairs, steps, kind = RECIPES[name]
    config, tokenizer = models.load_config(teacher_folder), models.load_tokenizer(teacher_folder)
    config.num_hidden_layers = 12
    models.save_model(models.from_config(config), tokenizer, tmp_path / "teacher")
    task = shutil.copytree(toy, tmp_path / "task")
    given = SMALL | {"task": str(task), "model_dir": str(tmp_path / "run"),
                     "pt_teacher_checkpoint": str(tmp_path / "teacher")}
    given |= {"hidden_size": 30} if name == "2020" else {}  # in each direction: wider than the teacher, as the paper's
    if name == "flags":  # its student has half of the words
        words = sorted({word for words in sentences.words for word in words})[::2]
        given |= {"pt_student_checkpoint": str(save_pretrained_student(tmp_path, set(words), labels, 20))}
    params = load_params(root / recipe if isinstance(recipe, str) else recipe, given)
    shutil.move(task / "test.tsv", tmp_path)  # nothing is selected on what is not there
    run = run_stages(params, last="labels")
    shutil.move(tmp_path / "test.tsv", task)
    run_stages(params, "evaluation")
    assert run.stage("hidden").metrics.get("alignment_after", {}).get("hidden_pairs") == pairs  # modern: no stage 1
    for stage in ("logits", "labels"):
        found = dict.fromkeys(row["step_name"] for row in run.stage(stage).history if row["kind"] == "eval")
        assert list(found) == steps, stage
    student = transformers.AutoModelForTokenClassification.from_pretrained(run.dir / "student")
    assert type(student).__name__ == kind and student.config.vocab_size == len(tokenizer)
    assert len(run.stage("evaluation").metrics["student"]["test"]["by_language"]) == 2
