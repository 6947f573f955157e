"""TensorFlow teachers: what TensorFlow computed is computed again, and files that are not whole are refused."""

import copy
import json
import re
import shutil
import struct
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_stages import run_stages, smoke_params

from xdistil import cli, stages, views
from xdistil.models import (
    CheckpointError,
    from_config,
    load_classifier,
    load_config,
    load_tokenizer,
    run_model,
    save_model,
)
from xdistil.provenance import teacher_source
from xdistil.runs import Run
from xdistil.tf_weights import find_checkpoint, masked_crc32c, read_checkpoint
from xdistil.unfreeze import layer_groups

DATA = Path(__file__).parent / "data" / "tf"
LABELS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
         "vocab_size": 30, "max_position_embeddings": 20, "num_labels": 5}
CONFIGS = {
    "bert": transformers.BertConfig(**SMALL), "roberta": transformers.RobertaConfig(**SMALL),
    "xlm-roberta": transformers.XLMRobertaConfig(**SMALL),
    "electra": transformers.ElectraConfig(**SMALL, embedding_size=4),
    "distilbert": transformers.DistilBertConfig(vocab_size=30, dim=8, n_layers=2, n_heads=2, hidden_dim=12,
                                                max_position_embeddings=20, num_labels=5)}
LEFT_OVER = {  # of pre-training, as each family's models for it name it
    "bert": ("bert/tf_bert_for_pre_training/bert/pooler/dense/kernel:0",
             "mlm___cls/tf_bert_for_pre_training/mlm___cls/predictions/transform/dense/kernel:0",
             "nsp___cls/tf_bert_for_pre_training/nsp___cls/seq_relationship/bias:0"),
    "roberta": ("lm_head/tf_roberta_for_masked_lm/lm_head/layer_norm/gamma:0",),
    "xlm-roberta": ("lm_head/tf_xlm_roberta_for_masked_lm/lm_head/bias:0",),
    "electra": ("discriminator_predictions/tf_electra_for_pre_training/discriminator_predictions/dense/kernel:0",
                "generator_lm_head/tf_electra_for_masked_lm/generator_lm_head/bias:0"),
    "distilbert": ("vocab_transform/tf_distil_bert_for_masked_lm/vocab_transform/kernel:0",
                   "vocab_layer_norm/tf_distil_bert_for_masked_lm/vocab_layer_norm/beta:0",
                   "vocab_projector/tf_distil_bert_for_masked_lm/vocab_projector/bias:0")}


def tf_name(name, layer):
    """The name of a torch weight in TensorFlow; `layer` is how that counts."""
    name = re.sub(r"/layer/(\d+)/", layer, name.replace(".", "/"))
    name = re.sub("(LayerNorm|layer_norm)/weight$", r"\1/gamma", re.sub("([Nn]orm)/bias$", r"\1/beta", name))
    return name if name.endswith("_embeddings/weight") else name.replace("/weight", "/kernel")


def write_h5(model, path, left_over=()):
    """A torch model as Hugging Face's TensorFlow models were saved."""
    with h5py.File(path, "w") as file:
        for name, weight in model.state_dict().items():
            name, array = tf_name(name, r"/layer_._\1/"), weight.numpy()
            name = re.sub("(position|token_type)_embeddings/weight$", r"\1_embeddings/embeddings", name)
            array = array.T if name.endswith("/kernel") else array
            file[f"{name.split('/')[0]}/tf_any_model_1/{name}:0"] = array
        for name in left_over:
            file[name] = np.ones(3, np.float32)
        file.create_group("dropout_10")
    model.config.save_pretrained(path.parent)
    return path


def varint(value):
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number, value):
    kind = 2 if isinstance(value, bytes) else 0
    return varint(number << 3 | kind) + (varint(len(value)) + value if kind else varint(value))


def slow_crc(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def block(entries, kind=0):
    """A block of a leveldb table with its trailer; every 16th key is written in full."""
    data, restarts, before = b"", [], b""
    for i, (key, value) in enumerate(entries):
        if i % 16 == 0:
            restarts, before = [*restarts, len(data)], b""
        shared = next((j for j in range(min(len(key), len(before))) if key[j] != before[j]),
                      min(len(key), len(before)))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        before = key
    data += struct.pack(f"<{len(restarts)}II", *restarts, len(restarts)) + bytes([kind])
    return data + struct.pack("<I", slow_crc(data))


def write_bundle(path, tensors, kind=0, dtype=1):
    """A TF1 checkpoint, NAME.index and its data file, with an index of several blocks."""
    entries, data = [(b"", field(1, 1))], b""
    for name, array in sorted(tensors.items()):
        raw = np.ascontiguousarray(array).tobytes()
        shape = b"".join(field(2, field(1, n)) for n in array.shape)
        value = field(1, 19 if array.dtype == np.float16 else dtype) + field(2, shape) + field(4, len(data))
        entries.append((name.encode(), value + field(5, len(raw)) + b"\x35" + struct.pack("<I", slow_crc(raw))))
        data += raw
    table, index = b"", []
    for i in range(0, len(entries), 20):
        made = block(entries[i : i + 20], kind)
        index.append((entries[min(i + 20, len(entries)) - 1][0], varint(len(table)) + varint(len(made) - 5)))
        table += made
    empty, last = block([]), block(index)
    footer = b"".join(map(varint, (len(table), len(empty) - 5, len(table) + len(empty), len(last) - 5)))
    path.write_bytes(table + empty + last + footer.ljust(40, b"\0") + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb")
    path.with_name(f"{path.stem}.data-00000-of-00001").write_bytes(data)
    return path


def bundle_tensors(model, head=True):
    """A torch BERT under the names of the original release."""
    tensors = {}
    for name, weight in model.state_dict().items():
        name = re.sub("_embeddings/weight$", "_embeddings", tf_name(name, r"/layer_\1/"))
        tensors[name] = weight.numpy().T if name.endswith("/kernel") else weight.numpy()
    weight, bias = tensors.pop("classifier/kernel").T, tensors.pop("classifier/bias")
    return tensors | ({"output_weights": weight, "output_bias": bias} if head else {})


@pytest.fixture
def small():
    return from_config(CONFIGS["bert"])


@pytest.fixture
def bundle(small, tmp_path):
    """Writes the small BERT as a TF1 checkpoint, with changes; returns the index."""
    (tmp_path / "bert_config.json").write_text(json.dumps(SMALL | {"type_vocab_size": 2, "directionality": "bidi"}))

    def write(head=True, without=None, extra=None, **options):
        tensors = bundle_tensors(small, head) | (extra or {})
        tensors.pop(without, None)
        return write_bundle(tmp_path / "bert_model.ckpt.index", tensors, **options)

    return write


def same_weights(model, other):
    left, right = model.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    return {name for name in left if torch.equal(left[name], right[name])}


@pytest.mark.parametrize("name", [
    "bert-tf1-ckpt", "distilbert-token-classification-h5", "bert-encoder-h5", "bert-token-classification-h5",
    "electra-token-classification-h5", "roberta-encoder-h5", "roberta-token-classification-h5"])
def test_it_computes_what_tensorflow_computed(name, request):
    folder = DATA / name if (DATA / name).is_dir() else request.getfixturevalue("shared") / "fixtures" / "tf" / name
    model = load_classifier(find_checkpoint(folder), LABELS, "x").eval()
    model.set_attn_implementation("eager")
    expected = {key: torch.from_numpy(value) for key, value in np.load(folder / "expected.npz").items()}
    with torch.inference_mode():
        logits, states, maps = run_model(model, expected, True, True)
    real, close = expected["attention_mask"] > 0, {"rtol": 0, "atol": 1e-5}
    assert 0 < real.sum() < real.numel() and ("logits" in expected) == ("encoder" not in name and "tf1" not in name)
    if "logits" in expected:
        torch.testing.assert_close(logits[real], expected["logits"][real], **close)
    for found, wanted in zip(states, expected["hidden_states"], strict=True):
        torch.testing.assert_close(found[real], wanted[real], **close)
    for found, wanted in zip(maps, expected["attentions"], strict=True):
        torch.testing.assert_close(found.transpose(1, 2)[real], wanted.transpose(1, 2)[real], **close)
    assert model.config.id2label == dict(enumerate(LABELS))


@pytest.mark.parametrize("family", CONFIGS)
def test_each_familys_names_are_known(family, tmp_path):
    model = from_config(CONFIGS[family])
    path = write_h5(model, tmp_path / "tf_model.h5", LEFT_OVER[family])
    assert len(same_weights(load_classifier(path, LABELS, "x"), model)) == len(model.state_dict())


@pytest.mark.parametrize("family", CONFIGS)
def test_classifiers_of_texts_are_read_with_all_of_their_head(family, tmp_path):
    model = from_config(copy.deepcopy(CONFIGS[family]), "text")
    path, n = write_h5(model, tmp_path / "tf_model.h5"), len(model.state_dict())
    assert len(same_weights(load_classifier(path, LABELS, "x", "text"), model)) == n
    head = [model.get_parameter(name) for name in dict(layer_groups(model))["head"]]
    with h5py.File(path, "a") as file:
        for name in ("classifier", "pre_classifier"):
            file.pop(name, None)
    pooled = family == "bert"  # its pooler was trained before, and is part of the encoder's file
    found = same_weights(load_classifier(path, LABELS, "x", "text"), model)
    zero = sum(not p.any() for p in head)  # fresh biases are equal
    assert n - len(head) + 2 * pooled <= len(found) <= n - len(head) + 2 * pooled + zero


def test_a_pooler_missing_beside_its_classifier_is_named(tmp_path):
    path = write_h5(from_config(copy.deepcopy(CONFIGS["bert"])), tmp_path / "tf_model.h5")
    with pytest.raises(CheckpointError, match="2 weights: bert.pooler.dense.bias is missing"):
        load_classifier(path, LABELS, "x", "text")


def test_the_head_is_new_where_there_is_none_or_for_other_labels(small, bundle, tmp_path):
    kept = len(small.state_dict())
    assert len(same_weights(load_classifier(bundle(), LABELS, "x"), small)) == kept
    assert len(same_weights(load_classifier(bundle(head=False), LABELS, "x"), small)) == kept - 2 + 1  # a bias is 0
    for path in (bundle(), write_h5(small, tmp_path / "tf_model.h5")):
        model = load_classifier(path, LABELS[:3], "x")
        assert model.classifier.weight.shape == (3, 8) and model.config.num_labels == 3
        assert torch.equal(model.bert.embeddings.LayerNorm.weight, small.bert.embeddings.LayerNorm.weight)


def test_what_else_lies_in_a_tf1_checkpoint_is_left_out(small, bundle):
    slot = np.ones((8, 8), np.float32)
    extra = {"bert/pooler/dense/kernel": slot, "bert/pooler/dense/bias": slot[0], "global_step": np.array(7.0),
             "bert/encoder/layer_0/output/dense/kernel/adam_m": slot, "cls/predictions/output_bias": slot[0],
             "bert/encoder/layer_0/output/dense/kernel/Adam_1": slot, "cls/seq_relationship/output_weights": slot,
             "beta1_power": slot[0, 0]}
    assert len(same_weights(load_classifier(bundle(extra=extra), LABELS, "x"), small)) == len(small.state_dict())


def test_half_precision_becomes_float32(small, bundle):
    path = bundle(extra={"bert/embeddings/LayerNorm/gamma": np.ones(8, np.float16)})
    assert {x.dtype for x in read_checkpoint(path).values()} == {torch.float32}
    assert len(same_weights(load_classifier(path, LABELS, "x"), small)) == len(small.state_dict())


@pytest.mark.parametrize("n", [4, 5, 8, 6777, 6778, 6784, 13_071, 54_216, 54_221, 54_224, 120_003])
def test_checksums_are_those_of_the_definition(n):
    data = np.random.default_rng(n).integers(0, 256, n, dtype=np.uint8)
    assert masked_crc32c(data) == slow_crc(data.tobytes())
    data[n // 3] ^= 4
    assert masked_crc32c(data) != slow_crc((data ^ (np.arange(n) == n // 3) * np.uint8(4)).tobytes())


def refuse(path, message, error=CheckpointError):
    with pytest.raises(error, match=message) as found:
        load_classifier(path, LABELS, "x")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("n_bytes", [0, 7, 2000, 200_000, 348_000])
def test_a_truncated_h5_file_is_refused(tmp_path, n_bytes):
    folder = shutil.copytree(DATA / "distilbert-token-classification-h5", tmp_path / "cut")
    path = folder / "tf_model.h5"
    path.write_bytes(path.read_bytes()[:n_bytes])
    refuse(path, "^x: .*cut.tf_model.h5: cut off or not a Keras file .*get it again")


@pytest.mark.parametrize("spoil, message", [
    (lambda index, data: data.write_bytes(data.read_bytes()[:99_999]), "00001: cut off before the end of .*get it"),
    (lambda index, data: data.write_bytes(b""), "00001: cut off before the end of bert/embeddings/LayerNorm/beta;"),
    (lambda index, data: data.unlink(), "No such file.*bert_model.ckpt.data-00000-of-00001"),
    (lambda index, data: data.write_bytes(data.read_bytes()[::-1]), "LayerNorm/beta has another checksum than in "),
    (lambda index, data: index.unlink(), "No such file.*bert_model.ckpt.index"),
    (lambda index, data: index.write_bytes(b""), "index: cut off or not the index"),
    (lambda index, data: index.write_bytes(index.read_bytes()[:-20]), "index: (cut off or not the index|corrupt)"),
    (lambda index, data: index.write_bytes(index.read_bytes()[:900]), "index: (cut off or not the index|corrupt)"),
    (lambda index, data: index.write_bytes(b"[" * 5000), "index: (cut off or not the index|corrupt)"),
    (lambda index, data: index.write_bytes(index.read_bytes().replace(b"gamma", b"gamme", 1)), "index: corrupt"),
])
def test_a_tf1_checkpoint_that_is_not_whole_is_refused(tmp_path, spoil, message):
    folder = shutil.copytree(DATA / "bert-tf1-ckpt", tmp_path / "cut")
    spoil(folder / "bert_model.ckpt.index", folder / "bert_model.ckpt.data-00000-of-00001")
    refuse(folder / "bert_model.ckpt.index", f"^x: .*{message}")


def test_every_flipped_byte_of_an_index_is_noticed(bundle):
    path = bundle()
    whole, used = path.read_bytes(), 0
    state = read_checkpoint(path)
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        try:  # the bytes of the empty block and of the footer's end are nobody's
            used += all(torch.equal(tensor, state[name]) for name, tensor in read_checkpoint(path).items())
        except ValueError as error:
            assert "get it again" in str(error)
    assert used < 12


def test_what_is_not_read_says_so(bundle):
    refuse(bundle(kind=1), "^x: .*index: compressed by snappy, which is not read here; save it with")
    refuse(bundle(extra={"bert/x": np.zeros(3, np.int64)}, dtype=9), "is in slices or of another type than float")


def test_weights_that_are_missing_or_unknown_or_of_another_shape_are_listed(small, bundle, tmp_path):
    kernel = "bert/encoder/layer_1/attention/self/query/kernel"
    refuse(bundle(without=kernel), r"^x: .*index does not fit its config in 1 weights: bert\.encoder\.layer\.1"
                                   r"\.attention\.self\.query\.weight is missing; give a whole checkpoint")
    refuse(bundle(without="output_bias"), r"1 weights: classifier\.bias is missing")
    refuse(bundle(extra={"bert/adapter/kernel": np.zeros((2, 3), np.float32)}), r"1 weights: bert\.adapter\.weight is "
                                                                              "unknown")
    refuse(bundle(extra={kernel: np.zeros((8, 6), np.float32)}), r"1 weights: .*query\.weight has shape \[6, 8\], not "
                                                                 r"\[8, 8\]")
    path = write_h5(small, tmp_path / "tf_model.h5", ["qa_outputs/tf_any/qa_outputs/bias:0"])
    refuse(path, r"1 weights: qa_outputs\.bias is unknown")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    refuse(path, r"17 weights: .*layer\.2\..* is missing, ")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert"}))
    refuse(path, "^x: .*is a 'albert' model; of TensorFlow's, only these are read: bert, roberta, ")


def test_h5py_is_asked_for_by_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    refuse(DATA / "distilbert-token-classification-h5" / "tf_model.h5", r"pip install xdistil\[tf\]", ImportError)


def test_a_folder_of_several_checkpoints_is_refused_and_a_file_is_not(tmp_path):
    for name in ("model.ckpt-10.index", "model.ckpt-20.index"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="several .*'model.ckpt-10.index', 'model.ckpt-20.index'.*name one file"):
        find_checkpoint(tmp_path)
    assert find_checkpoint(tmp_path / "model.ckpt-20.index") == tmp_path / "model.ckpt-20.index"
    assert find_checkpoint("nobody/such-model") is None and find_checkpoint(DATA / "README.md") is None


@pytest.mark.parametrize("pieces, settings, same", [
    ("anna Anna ##a", None, False), ("anna ##a", None, True), ("anna [unused1] ##a", None, True),
    ("anna Anna", {"do_lower_case": True}, True), ("anna", {"do_lower_case": False}, False),
    ("anna Anna", {"model_max_length": 20}, False)])
def test_letter_case_is_kept_where_the_vocabulary_has_capitals(bundle, tmp_path, pieces, settings, same):
    path = bundle()
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD] [UNK] [CLS] [SEP] [MASK]".replace(" ", "\n"),
                                                   *pieces.split()]) + "\n", encoding="utf-8")
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(path)
    assert len(tokenizer) == 5 + len(pieces.split()) and tokenizer.pad_token_id == 0
    small, capital = (tokenizer(word)["input_ids"] for word in ("anna", "Anna"))
    assert small[1] == 5 and (small == capital) == same


def test_what_lies_beside_a_checkpoint_is_asked_for(bundle, tmp_path, teacher_folder):
    path = bundle()
    with pytest.raises(CheckpointError, match="^x: the tokenizer of .* has 5 pieces.*needs its own tokenizer.json or"):
        load_tokenizer(path, "x")  # transformers makes one of special tokens out of nothing
    (tmp_path / "bert_config.json").unlink()
    with pytest.raises(CheckpointError, match="^x: cannot load .*needs bert_config.json and vocab.txt beside it"):
        load_config(path, "x")
    folder = shutil.copytree(teacher_folder, tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="^x: the tokenizer of .* has 5 pieces"):
        load_tokenizer(folder, "x")


@pytest.fixture
def tf1_folder(tmp_path, toy):
    """The TF1 checkpoint with a vocabulary of the toy task's letters and words."""
    folder = shutil.copytree(DATA / "bert-tf1-ckpt", tmp_path / "cased_L-3_H-48_A-4")
    words = sorted({word for line in (toy / "train.tsv").read_text(encoding="utf-8").splitlines()
                    for word in line.split("\t")[0].split()})
    letters = sorted({letter for word in words for letter in word})[:60]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + x for x in letters), *words]
    (folder / "vocab.txt").write_text("\n".join(list(dict.fromkeys(pieces))[:200]) + "\n", encoding="utf-8")
    return folder


def test_a_tf1_teacher_is_fine_tuned_and_then_like_any_other(tf1_folder, tmp_path):
    asked = {"pt_teacher_checkpoint": str(tf1_folder), "pt_teacher": "TFBertModel", "teacher_lr": 1e-6,
             "distil_epochs": 1}
    params = smoke_params(tmp_path / "run", tf_model_check=True, **asked)
    stages.check(params, Run(params))
    run = run_stages(params, last="student-init")
    found = load_file(run.dir / "teacher/model.safetensors")
    start = read_checkpoint(find_checkpoint(tf1_folder))
    assert found.keys() - start.keys() == {"classifier.weight", "classifier.bias"}
    assert start.keys() - found.keys() == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert all((found[name] - start[name]).abs().max() < 1e-3 for name in start.keys() & found.keys())  # its rate
    tokenizer = load_tokenizer(run.dir / "teacher")
    assert tokenizer.tokenize("Anna") != tokenizer.tokenize("anna")  # cased, and kept as such
    assert run.stage("teacher").done["tf_model_check"] is True
    shutil.rmtree(tf1_folder)  # no longer needed
    assert run_stages(params, last="hidden").stage("hidden").done


def test_what_tf_model_check_says_must_fit_the_files(tf1_folder, teacher_folder, tmp_path):
    def check(**asked):
        params = smoke_params(tmp_path / "run", **asked)
        stages.check(params, Run(params))

    with pytest.raises(CheckpointError, match="^pt_teacher_checkpoint: .*bert_model.ckpt.index.*tf_model_check: true"):
        check(pt_teacher_checkpoint=str(tf1_folder))
    with pytest.raises(CheckpointError, match="^teacher_model_dir: .*bert_model.ckpt.index.*set tf_model_check: true"):
        check(teacher_model_dir=str(tf1_folder))
    for other in (str(teacher_folder), "nobody/such-model"):
        with pytest.raises(CheckpointError, match=f"^tf_model_check: no tf_model.h5 .*{other}.*tf_model_check: false"):
            check(tf_model_check=True, pt_teacher_checkpoint=other)
    both = shutil.copytree(teacher_folder, tmp_path / "both")
    shutil.copy(DATA / "bert-tf1-ckpt" / "bert_model.ckpt.index", both)
    check(pt_teacher_checkpoint=str(both))  # its safetensors
    params = smoke_params(tmp_path / "run", tf_model_check=True, pt_teacher_checkpoint=str(both))
    assert teacher_source(params, Run(params)) == (str(both / "bert_model.ckpt.index"), "pt_teacher_checkpoint")
    assert not (tmp_path / "run").exists()


def test_a_given_teacher_may_be_a_tensorflow_file(teacher, tokenizer, tmp_path):
    save_model(teacher, tokenizer, tmp_path / "torch")
    tokenizer.save_pretrained(tmp_path / "given")
    write_h5(teacher, tmp_path / "given" / "tf_model.h5")
    before = {p.name: p.read_bytes() for p in (tmp_path / "given").iterdir()}
    params = smoke_params(tmp_path / "run", tf_model_check=True, teacher_model_dir=str(tmp_path / "given"))
    stages.check(params, Run(params))
    run = run_stages(params, last="hidden")
    assert not (run.dir / "teacher/model.safetensors").exists() and "teacher weights" in run.stage("teacher").done
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "given").iterdir()}
    params = smoke_params(tmp_path / "plain", teacher_model_dir=str(tmp_path / "torch"))
    plain = run_stages(params, last="student-init")
    assert views.attention_example(run.params, run)["teacher"].shape[0] == 4
    assert plain.stage("teacher").metrics["dev"] == run.stage("teacher").metrics["dev"]
    left, right = (load_file(r.dir / "student-init/model.safetensors") for r in (plain, run))
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("command", ["check", "run"])
def test_a_file_that_is_cut_off_is_told_before_training(tf1_folder, toy, tmp_path, capsys, command):
    data = next(tf1_folder.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 3])
    flags = {"task": toy, "model_dir": tmp_path / "run", "pt_teacher_checkpoint": tf1_folder, "seq_len": 32,
             "hidden_size": 24, "num_attention_heads": 4, "num_hidden_layers": 2}
    asked = [str(x) for name, value in flags.items() for x in (f"--{name}", value)]
    assert cli.main([command, "--tf_model_check", *asked]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "xdistil: pt_teacher_checkpoint: " in line and "cut off before the end of" in line
    assert not (tmp_path / "run").exists()
