"""Whatever bytes and parameters come in: what is read is sound, or a documented error says what is wrong."""

import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_stages import TOY, smoke_params

from xdistil import stages
from xdistil.data import DataError, read_labels, read_tagged, read_text
from xdistil.params import Params, ParamsError, load_params
from xdistil.runs import Run
from xdistil.texts import read_texts

LABELS, CLASSES = ["O", "B-PER", "I-PER"], ["bad", "good", "fair"]
few = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
parts = st.sampled_from([b"Ada", b"O", b"B-PER", b"I-PER", b"good", b"1", b" ", b"\t", b"\n", b"\r\n", b"\xff", b"\0",
                         *map(str.encode, "ü\u2028\ufeff\x85\u00b2")])
tsv = st.binary(max_size=60) | st.lists(parts, max_size=25).map(b"".join)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(scalars | st.dates(), max_leaves=5, extend=lambda x: (
    st.lists(x, max_size=3) | st.dictionaries(scalars, x, max_size=2)))
names = st.sampled_from(list(Params.model_fields))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def sound(read, path, *args):
    """What a reader says of a file, or None if it refused it as documented, naming it."""
    try:
        return read(path, *args)
    except DataError as error:
        assert str(error).startswith(str(path)), error
    return None


@few
@given(tsv)
def test_any_bytes_are_tagged_sentences_or_an_error_that_names_the_file(path, content):
    path.write_bytes(content)
    if found := sound(read_tagged, path, LABELS):
        assert len(found) and all(map(all, found.words)) and {x for tags in found.tags for x in tags} <= {*LABELS}
        assert list(map(len, found.words)) == list(map(len, found.tags))
        assert not any(tags[0][0] == "I" for tags in found.tags)  # repaired
    if found := sound(read_text, path):
        assert len(found) == len(found.languages) and all(map(all, found.words))


@few
@given(tsv, st.sampled_from(["text", "pair"]), st.sampled_from([CLASSES, ()]))
def test_any_bytes_are_texts_or_pairs_or_an_error(path, content, unit, classes):
    path.write_bytes(content)
    try:
        found = read_texts(path, unit, classes)
    except DataError as error:
        assert str(error).startswith(str(path))
    else:
        assert len(found) == len(found.languages) and all(text.strip() for (text,) in found.words)
        assert not classes or {label for (label,) in found.tags} <= set(classes)
        assert unit == "text" or all("\t" in text for (text,) in found.words)


@few
@given(tsv, st.sampled_from(["word", "text"]))
def test_any_bytes_are_labels_or_an_error(path, content, unit):
    path.write_bytes(content)
    if found := sound(read_labels, path, unit):
        assert len(found) == len(set(found)) > 1 and all(found)


@few
@given(st.dictionaries(names | st.text(max_size=6), values, max_size=4))
def test_any_mapping_is_parameters_or_an_error(mapping):
    try:
        found = load_params(mapping)
    except ParamsError as error:
        assert str(error)
    else:
        assert isinstance(found, Params) and load_params(found.model_dump(exclude_none=True)) == found


@few
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode)
       | st.dictionaries(names, values, max_size=3).map(lambda x: yaml.safe_dump({"experiment": x}).encode()))
def test_any_params_file_is_parameters_or_an_error(path, content):
    path.write_bytes(content)
    try:
        assert isinstance(load_params(path), Params)
    except ParamsError as error:
        assert str(error)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/apply:os.system",
                                 "!!python/object/new:os.mkdir"])
def test_a_params_file_executes_nothing(tmp_path, tag):
    path, trace = tmp_path / "params.yaml", tmp_path / "trace"
    path.write_text(f"experiment:\n  task: {tag} ['{trace}']\n", encoding="utf-8")
    with pytest.raises(ParamsError, match="not readable as YAML: could not determine a constructor"):
        load_params(path)
    assert not trace.exists()


some = st.fixed_dictionaries({}, optional={
    "seq_len": st.sampled_from([8, 32, 600]), "hidden_size": st.sampled_from([8, 24, 64]),
    "num_hidden_layers": st.sampled_from([1, 2, 9]), "num_attention_heads": st.sampled_from([1, 3, 4]),
    "layer_map": st.sampled_from(["top", "last", [[1, 9]]]), "attention_loss": st.sampled_from(["kl", "relation"]),
    "unfreeze": st.sampled_from(["none", "layer"]), "transfer_limit": st.sampled_from([2, 10]),
    "do_NER": st.booleans(), "distil": st.booleans(), "baselines": st.booleans(),
    "student_stages": st.sampled_from([["labels"], ["hidden"], ["logits", "labels"]])})


@settings(few, max_examples=25)
@given(some, st.sampled_from(["train", "dev", "labels", "transfer", None]), tsv)
def test_whatever_is_wrong_no_part_of_a_run_is_written(overrides, name, content):
    with tempfile.TemporaryDirectory() as folder:
        task, run = Path(folder, "task"), Path(folder, "run")
        shutil.copytree(TOY, task)
        if name:
            (task / f"{name}.tsv").write_bytes(content)
        try:
            params = smoke_params(run, task=str(task), **overrides)
            stages.check(params, Run(params))
        except ValueError as error:
            assert str(error) and type(error) is not ValueError, error
        assert not run.exists()
