"""What was asked: names, types, ranges and combinations are checked, paths resolved, nothing else changed."""

import os
import re

import pytest
import yaml
from pydantic import ValidationError

from xdistil.params import Params, ParamsError, fingerprint, load_params

START, END = "<!-- table: written by XDISTIL_UPDATE=1 pytest tests/test_params.py -->", "<!-- end of table -->"
# just outside and just inside every limit
LIMITS = [
    ("seq_len", 7, 8), ("train_limit", 0, 1), ("transfer_limit", 1, 2), ("seed", -1, 0), ("num_processes", 0, 1),
    ("language_temperature", 0, 0.01), ("augment_mentions", -0.1, 0),
    ("teacher_batch_size", 0, 1), ("teacher_epochs", 0, 1), ("teacher_lr", 0, 1e-9), ("teacher_lr", 1.001, 1),
    ("embedding_size", 7, 8), ("hidden_size", 7, 8), ("num_hidden_layers", 0, 1), ("num_attention_heads", 0, 1),
    ("intermediate_size", 7, 8), ("dropout", -0.1, 0), ("dropout", 1, 0.99), ("hidden_weight", -0.1, 0),
    ("attention_weight", -0.1, 0), ("relation_heads", 0, 1), ("hard_label_weight", -0.1, 0),
    ("temperature", 0, 0.01), ("student_distil_batch_size", 0, 1),
    ("student_ft_batch_size", 0, 1), ("distil_chunk_size", 0, 1), ("holdout_ratio", 0, 0.001),
    ("holdout_ratio", 0.9, 0.89), ("distil_epochs", 0, 1), ("ft_epochs", 0, 1), ("patience", 0, 1),
    ("distil_lr", 0, 1e-9), ("distil_lr", 1.001, 1), ("logit_lr", 0, 1e-9), ("logit_lr", 1.001, 1),
    ("ft_lr", 0, 1e-9), ("ft_lr", 1.001, 1), ("warmup_ratio", -0.1, 0), ("warmup_ratio", 1, 0.99),
    ("weight_decay", -0.1, 0), ("max_grad_norm", 0, 0.01), ("targets_cache_gb", -0.1, 0),
    ("keep_checkpoints", 0, 1), ("keep_checkpoints", 10, 9), ("disk_budget_gb", 0, 0.1),
]


def test_every_params_file_loads_with_the_values_it_gives(root):
    paths = sorted((root / "params").rglob("*.yaml"))
    assert len(paths) >= 3
    for path in paths:
        given, params = yaml.safe_load(path.read_text(encoding="utf-8")), load_params(path)
        assert list(given) == ["experiment"], path
        for name, value in given["experiment"].items():
            found = getattr(params, name)
            if isinstance(value, str) and isinstance(found, str) and os.path.isabs(found):
                assert found == str(root / value), (path, name)
            else:
                assert found == (float(value) if isinstance(found, float) else value), (path, name)


@pytest.mark.parametrize("name, text, value", [
    ("teacher_lr", "3e-5", 3e-5), ("do_NER", "true", True), ("distil_attention", "true", True),
    ("distil_attention", "false", False), ("seq_len", "128", 128), ("hidden_weight", 2, 2.0),
    ("layer_map", "[[1, 2], [3,6]]", [[1, 2], [3, 6]]), ("layer_map", "last", "last"),
    ("student_stages", "labels", ["labels"]), ("student_stages", "[logits, labels]", ["logits", "labels"]),
    ("layer_map", [(0, 1)], [[0, 1]]), ("layer_weights", "[1, 0.5]", [1.0, 0.5])])
def test_what_yaml_and_papermill_hand_over_as_text_is_read_as_meant(name, text, value):
    found = getattr(load_params({name: text}), name)
    assert found == value and type(found) is type(value)


def test_yaml_reads_3e_5_as_text_and_we_do_not(tmp_path):
    (tmp_path / "x.yaml").write_text("experiment:\n  ft_lr: 3e-5\n", encoding="utf-8")
    assert load_params(tmp_path / "x.yaml").ft_lr == 3e-5


@pytest.mark.parametrize("name, hint", [
    ("hiden_size", "did you mean 'hidden_size'?"), ("teacher_learning", "did you mean 'teacher_"),
    ("do_ner", "did you mean 'do_NER'?"), ("zzz", "see params/README.md")])
def test_an_unknown_name_suggests_the_nearest(name, hint):
    for experiment, overrides in (({name: 1}, {}), ({}, {name: 1})):
        with pytest.raises(ParamsError, match=f"unknown parameter '{name}'.*{re.escape(hint)}"):
            load_params(experiment, overrides)


@pytest.mark.parametrize("name, value, allowed", [
    ("seq_len", "long", "valid integer"), ("seq_len", 8.5, "valid integer"), ("teacher_lr", "fast", "valid number"),
    ("do_NER", "perhaps", "valid boolean"), ("task", 5, "valid string"), ("model_dir", None, "valid string"),
    ("device", "gpu", "'auto', 'cpu', 'cuda'"), ("layer_map", "bottom", "'uniform', 'top' or 'last'.* list"),
    ("layer_map", [[1, 2], [3]], "'last'.*found \\[3\\], but list should have at least 2"),
    ("layer_map", "[[1, 2", "Expecting"), ("layer_weights", 2, "valid list"),
    ("unfreeze", ["layer"], "'module', 'layer' or 'none'"), ("hidden_weight", float("nan"), "greater than")])
def test_a_wrong_type_names_parameter_value_and_what_is_allowed(name, value, allowed):
    with pytest.raises(ParamsError, match=f"^{name}: found {re.escape(repr(value))}, but .*{allowed}"):
        load_params({name: value})


@pytest.mark.parametrize("name, outside, inside", LIMITS)
def test_each_limit_holds_and_is_named(name, outside, inside):
    # so that no combination interferes
    base = {"student_init": "teacher_layers", "distil_attention": True, "transfer_limit": 2}
    assert getattr(load_params(base, {name: inside}), name) == inside
    with pytest.raises(ParamsError, match=f"^{name}: found {outside}, but .*(greater|less) than .*[0-9]") as error:
        load_params(base, {name: outside})
    assert Params.model_fields[name].description in str(error.value)


def test_the_limits_above_are_all_there_are():
    bounded = {name: len(field.metadata) for name, field in Params.model_fields.items() if field.metadata}
    assert bounded == {name: [x[0] for x in LIMITS].count(name) for name, *_ in LIMITS}


@pytest.mark.parametrize("values, parameter, remedy", [
    ({"do_NER": False}, "task", "set do_NER: true, or name a folder"),
    ({"do_pairwise": True}, "do_pairwise", "do_NER .*set do_NER: false to label pairs, or do_pairwise: false"),
    ({"student_stages": []}, "student_stages", "one or more of hidden, logits, labels"),
    ({"student_stages": ["labels", "labels"]}, "student_stages", "names a stage twice"),
    ({"hidden_size": 20, "num_attention_heads": 12}, "hidden_size",
     r"choose num_attention_heads from \[1, 2, 4, 5, 10, 20\]"),
    ({"student_init": "checkpoint"}, "student_init", "name it or set student_init: scratch"),
    ({"student_init": "scratch", "pt_student_checkpoint": "x/y"}, "student_init", "remove one of the two"),
    ({"student_init": "teacher_layers", "pt_student_checkpoint": "x/y"}, "student_init", "remove one of the two"),
    ({"student_init": "teacher_layers", "compress_word_embedding": True}, "compress_word_embedding",
     "set compress_word_embedding: false"),
    ({"copied_layers": [1, 2, 3]}, "copied_layers", "set student_init: teacher_layers, or copied_layers: uniform"),
    ({"student_arch": "bilstm", "student_init": "teacher_layers"}, "student_arch", "set student_arch: transformer"),
    ({"student_arch": "bilstm", "pt_student_checkpoint": "x/y"}, "student_arch", "remove .* pt_student_checkpoint"),
    ({"projection_gelu": True, "hidden_loss": "cka"}, "projection_gelu", "set hidden_loss: mse, or projection_gelu"),
    ({"student_arch": "bilstm", "distil_attention": True}, "distil_attention",
     "set distil_attention: false, or student_arch: transformer"),
    ({"distil": False, "pt_student_checkpoint": "x/y", "baselines": True}, "baselines", "set baselines: false"),
    ({"freeze_word_embedding": True}, "freeze_word_embedding", "set compress_word_embedding: true"),
    ({"hidden_weight": 0}, "hidden_weight", "set hidden_weight: 1, or distil_attention: true"),
    ({"hidden_weight": 0, "distil_attention": True, "attention_weight": 0}, "hidden_weight", "attention_weight: 1"),
    ({"language_temperature": 2}, "transfer_limit", "set it, or transfer_select: random and language_temperature: 1"),
    ({"transfer_select": "uncertain"}, "transfer_limit", "without it all text is used"),
    ({"augment_mentions": 1, "do_NER": False, "task": "x"}, "augment_mentions", "set augment_mentions: 0, or do_NER"),
    ({"opt_policy": "mixed_float16", "device": "cpu"}, "opt_policy", "set opt_policy: mixed_bfloat16 or float32")])
def test_impossible_combinations_name_parameter_and_remedy(values, parameter, remedy):
    with pytest.raises(ParamsError, match=f"^{parameter}: .*{remedy}"):
        load_params(values)


def test_combinations_next_to_the_impossible_ones_are_fine():
    load_params({"opt_policy": "mixed_float16", "device": "cuda"})
    load_params({"student_init": "teacher_layers", "freeze_word_embedding": True})
    load_params({"hidden_weight": 0, "distil_attention": True})
    load_params({"compress_word_embedding": True, "freeze_word_embedding": True})
    load_params({"student_arch": "bilstm", "hidden_size": 20})  # without heads nothing has to be divisible
    assert load_params({"pt_student_checkpoint": "x/y", "hidden_size": 20}).initialisation == "checkpoint"
    assert load_params({}).initialisation == "scratch" and load_params({}).unit == "word"
    assert load_params({"do_NER": False, "task": "x"}).unit == "text"
    assert load_params({"do_NER": False, "do_pairwise": True, "task": "x"}).unit == "pair"
    assert load_params({"student_init": "teacher_layers"}).initialisation == "teacher_layers"
    assert load_params({"student_init": "teacher_layers", "copied_layers": "[1, 3,5]"}).copied_layers == [1, 3, 5]


def test_several_errors_are_told_at_once():
    with pytest.raises(ParamsError, match="seq_len: found 1, .*; patience: found 0, "):
        load_params({"seq_len": 1, "patience": 0})


def test_a_mapping_is_read_with_and_without_its_root_key():
    assert load_params({"experiment": {"seed": 7}}) == load_params({"seed": 7})
    assert load_params({"seed": 7}).seed == 7


def test_overrides_win_and_change_nothing_else():
    changed = {k for k, v in load_params("params/smoke.yaml", {"seed": 7}).model_dump().items()
               if v != getattr(load_params("params/smoke.yaml"), k)}
    assert changed == {"seed"}


@pytest.mark.parametrize("text, message", [
    ("experiment: [1, 2]\n", "expected names and values"), ("", "expected names and values"),
    ("experiment: {a: b: c}\n", "not readable as YAML")])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text, message):
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=f"{re.escape(str(path))}.*{message}"):
        load_params(path)


def test_a_missing_file_lists_those_that_are_there():
    with pytest.raises(ParamsError, match=r"params/none.yaml does not exist.*demo\.yaml"):
        load_params("params/none.yaml")


@pytest.mark.parametrize("cwd", [".", "notebooks", "tests/data"])
def test_relative_paths_start_at_the_repository_wherever_we_are(root, monkeypatch, cwd):
    monkeypatch.chdir(root / cwd)
    params = load_params("params/smoke.yaml", {"transfer_file": "some/text.tsv", "teacher_model_dir": "~/t"})
    assert params.task == str(root / "tests/data/toy") and params.model_dir == str(root / "runs/smoke")
    assert params.transfer_file == str(root / "some/text.tsv")
    assert params.teacher_model_dir == os.path.realpath(os.path.expanduser("~/t"))
    assert load_params({}).model_dir == str(root / "runs/demo")


def test_hub_names_and_keywords_stay_and_folders_do_not(root, tmp_path):
    for name in ("bert-base-multilingual-cased", "sentence-transformers/all-MiniLM-L6-v2", "random"):
        assert load_params({"pt_teacher_checkpoint": name}).pt_teacher_checkpoint == name
    assert load_params({"task": "demo"}).task == "demo"
    found = load_params({"pt_teacher_checkpoint": "./x", "pt_student_checkpoint": "tests/data"})
    assert found.pt_teacher_checkpoint == str(root / "x") and found.pt_student_checkpoint == str(root / "tests/data")
    assert load_params({"model_dir": str(tmp_path)}).model_dir == str(tmp_path)


def test_params_are_frozen():
    params = load_params({})
    with pytest.raises(ValidationError, match="frozen"):
        params.seed = 1
    assert params.seed == 42


def test_every_field_has_a_meaning_of_its_own():
    meanings = [field.description for field in Params.model_fields.values()]
    assert all(len(meaning or "") > 8 for meaning in meanings) and len(set(meanings)) == len(meanings)


def test_the_table_shows_value_and_limits_and_marks_what_was_changed():
    rows = {row["parameter"]: row for row in load_params({"seed": 7, "dropout": 0.2}).table().rows}
    assert list(rows) == list(Params.model_fields)
    assert rows["seed"]["value"] == "7 *" and rows["seq_len"]["value"] == "64"
    assert rows["dropout"]["allowed"] == "number >= 0 < 1" and rows["teacher_lr"]["allowed"] == "number > 0 <= 1"
    assert rows["train_limit"]["allowed"] == "integer >= 1 or null"
    assert rows["layer_map"]["allowed"] == "uniform / top / last or array"
    page = load_params({"seed": 7})._repr_html_()
    assert re.search("<td[^>]*>seed</td><td[^>]*>7 \\*</td>", page)


def test_the_fingerprint_is_stable_and_changes_with_any_value():
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    seen = {fingerprint(x) for x in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, {"a": None}, {}, [])}
    assert len(seen) == 7 and all(re.fullmatch("[0-9a-f]{16}", x) for x in seen)
    one, other = load_params({}), load_params({"ft_lr": 2e-4})
    assert fingerprint(one.model_dump()) == fingerprint(load_params({}).model_dump())
    assert fingerprint(one.model_dump()) != fingerprint(other.model_dump())
    assert fingerprint(one.pick("seed", "seq_len")) == fingerprint(other.pick("seed", "seq_len"))


def as_markdown(rows) -> str:
    head = ["parameter", "default", "allowed", "meaning"]
    lines = [head, ["---"] * 4]
    lines += [[f"`{r['parameter']}`", f"`{r['value']}`", r["allowed"], r["meaning"]] for r in rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def test_the_readme_holds_the_table_of_all_parameters(root):
    path, table = root / "params" / "README.md", as_markdown(Params().table().rows)
    before, _, rest = path.read_text(encoding="utf-8").partition(START)
    found, _, after = rest.partition(END)
    if os.environ.get("XDISTIL_UPDATE") == "1":
        path.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")
        found = f"\n{table}\n"
    assert found.strip("\n") == table, "out of date; run XDISTIL_UPDATE=1 pytest tests/test_params.py"
