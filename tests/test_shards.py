"""Transfer text in files of all kinds: streamed, tokenised once, and whatever is done with it as with one file."""

import gzip
import importlib
import json
import re
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_stages import ROOT, TOY, finished_smoke_run, smoke_params

from xdistil import data, shards, sources, stages, texts, training, views
from xdistil.data import Sentences, read_lines
from xdistil.inputs import Inputs
from xdistil.params import load_params
from xdistil.provenance import depends
from xdistil.runs import Run
from xdistil.sources import DataError, files_of

LINES = [(line, ("en", "tr")[i % 3 > 1]) for i, line in enumerate(
    (TOY / "transfer.tsv").read_text(encoding="utf-8").splitlines())]


def write(path, rows):
    """Rows (text, language) as a file of the kind that its name says."""
    content = "".join(f"{text}\t{language}\n" for text, language in rows).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content))
    elif path.suffix == ".zst":
        with pytest.importorskip("pyarrow").output_stream(str(path), compression="zstd") as file:
            file.write(content)
    elif path.suffix == ".parquet":
        parquet, (text, language) = pytest.importorskip("pyarrow.parquet"), zip(*rows, strict=True)
        table = importlib.import_module("pyarrow").table({"n": range(len(rows)), "language": language, "text": text})
        parquet.write_table(table, path, row_group_size=20)
    else:
        path.write_bytes(content)
    return path


@pytest.fixture(params=[("a.tsv", "b.txt.gz", "c.parquet"), ("a.txt", "b.tsv.gz", "c.txt")], ids=["all", "plain"])
def folder(request, tmp_path):
    """The toy transfer text in three shards, with and without those that need a package."""
    (path := tmp_path / "text").mkdir()
    for name, (a, b) in zip(request.param, ((0, 30), (30, 50), (50, 84)), strict=True):
        write(path / name, LINES[a:b])
    (path / "notes.md").write_text("no transfer text\n")
    return path


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    return finished_smoke_run(tmp_path_factory)


@pytest.fixture
def half_done(smoke, tmp_path):
    """Run folders with a finished teacher and student, nothing distilled yet."""
    def copy(name):
        for stage in ("teacher", "student-init"):
            shutil.copytree(smoke / stage, tmp_path / name / stage)
        return tmp_path / name
    return copy


def same(found, wanted):
    for name in ("input_ids", "labels", "words", "offsets", "sentences", "token_type_ids"):
        one, other = (None if (array := getattr(x, name)) is None else array[:] for x in (found, wanted))
        assert np.array_equal(one, other), name
    assert (found.teacher is None) == (wanted.teacher is None)
    if found.teacher:
        same(found.teacher, wanted.teacher)


@pytest.mark.parametrize("name", ["a.txt", "a.tsv.gz", "a.zst", "a.parquet"])
def test_every_kind_of_file_gives_the_same_lines(tmp_path, name):
    path = write(tmp_path / name, LINES)
    assert list(read_lines(path)) == [(i, "\t".join(line)) for i, line in enumerate(LINES, 1)]
    assert data.read_text(path, 20, 3).words == data.read_text(TOY / "transfer.tsv", 20, 3).words


@pytest.mark.parametrize("name", ["a.tsv.gz", "a.zst", "a.parquet"])
def test_what_is_damaged_or_cut_short_is_named(tmp_path, name):
    path = write(tmp_path / name, LINES)
    whole = path.read_bytes()
    for content in (whole[:-20], b"no such thing" * 9):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}:\\d+: not readable .*cut short"):
            list(read_lines(path))


def test_lines_are_counted_and_bad_ones_named_within_a_compressed_file(tmp_path):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress("\ufeffone\r\ntwo\n".encode() + b"\xff\n"))
    assert next(read_lines(path)) == (1, "one")
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:3: invalid UTF-8 at byte 1"):
        list(read_lines(path))


def test_a_folder_and_a_glob_are_their_files_in_order(folder, tmp_path):
    names = [path.name for path in files_of(folder)]
    assert names == sorted(names) and len(names) == 3 and "notes.md" not in names
    assert files_of(folder / "[ab]*") == files_of(folder)[:2] and files_of(folder / names[0]) == [folder / names[0]]
    odd = write(tmp_path / "a[1].txt", LINES)
    assert files_of(odd) == [odd]  # a name that looks like a pattern
    for nothing in (folder / "*.csv", tmp_path / "none*"):
        with pytest.raises(DataError, match=f"{re.escape(str(nothing))}: no file there; expected .*parquet"):
            files_of(nothing)
    with pytest.raises(DataError, match="gone.txt: no such file"):
        sources.facts_of(tmp_path / "gone.txt")


def test_a_parquet_file_has_one_text_column_and_cells_are_lines(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"said": ["a\tb\nc ", None, "d"], "n": [1, 2, 3]}), path)
    assert [line for _, line in read_lines(path)] == ["a b c", "", "d"]
    parquet.write_table(pa.table({"said": ["a"], "title": ["b"]}), path)
    with pytest.raises(DataError, match=r"a.parquet: no text column 'text', it has \{'said': 'string', 'title'"):
        list(read_lines(path))


def test_a_missing_package_is_named_with_the_extra(tmp_path, monkeypatch):
    for package in ("pyarrow", "pyarrow.parquet", "datasets"):
        monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / "a.zst").touch(), (tmp_path / "a.parquet").touch()
    for source, package, extra in ((tmp_path / "a.zst", "pyarrow", "parquet"), (tmp_path / "a.parquet", "pyarrow",
                                   "parquet"), ("hub:owner/name", "datasets", "hub")):
        with pytest.raises(DataError, match=rf"{source}: .*needs {package}; pip install xdistil\[{extra}\]"):
            list(read_lines(source))


class Rows(list):
    """What `datasets` gives: columns of a slice, types of the columns."""

    features = {"text": SimpleNamespace(dtype="string"), "language": SimpleNamespace(dtype="string")}

    def __getitem__(self, part):
        return dict(zip(self.features, map(list, zip(*list(self)[part], strict=True)), strict=True))


def test_a_data_set_of_the_hub_is_asked_for_by_its_name(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("not on the hub")
        return Rows(LINES)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for name in ("hub:owner/name", "hub:name", "hub:owner/name/vi:test[:10%]", "hub:owner/name:dev:text"):
        assert load_params({"transfer_file": name}).transfer_file == name
        assert [line for _, line in read_lines(files_of(name)[0])] == ["\t".join(line) for line in LINES]
        assert not shards.is_small(name) and sources.facts_of(name) == [{"file": name}]
    assert asked == [("owner/name", None, "train"), ("name", None, "train"), ("owner/name", "vi", "test[:10%]"),
                     ("owner/name", None, "dev")]
    with pytest.raises(DataError, match="hub:owner/name:dev:body: no text column 'body'"):
        list(read_lines("hub:owner/name:dev:body"))
    with pytest.raises(DataError, match="hub:nobody/nothing: FileNotFoundError: not on the hub; expected hub:NAME"):
        list(read_lines("hub:nobody/nothing"))


@pytest.mark.parametrize("values", [{}, {"transfer_limit": 20}, {"transfer_train": True}, {
    "transfer_limit": 20, "transfer_train": True}, {"transfer_limit": 20, "language_temperature": 3},
    {"augment_mentions": 0.2}])
def test_shards_hold_what_one_file_would(folder, tmp_path, values):
    first, last = files_of(folder)[0], folder / "z.txt"
    write(last, [*LINES[5:9], ("", "en"), *[(row.split("\t")[0], "en") for row in (
        TOY / "train.tsv").read_text(encoding="utf-8").splitlines()[:3]]])  # some stand twice, some in train.tsv
    one = tmp_path / "one.tsv"
    one.write_text("".join(f"{line}\n" for file in files_of(folder) for _, line in read_lines(file)), encoding="utf-8")
    (a, wanted), (b, found) = (Inputs(params, Run(params)).read("transfer") for params in (
        smoke_params(tmp_path / "run", transfer_file=str(path), **values) for path in (one, folder)))
    same(found, wanted)
    assert list(b.words) == a.words and len(b) == len(a) and not shards.is_small(first.parent)
    streamed = not {"language_temperature", "augment_mentions"} & set(values)
    assert isinstance(found, shards.Shards) == streamed == (tmp_path / "run/transfer").exists()


@pytest.mark.parametrize("unit", ["word", "text", "pair"])
def test_units_and_the_teachers_own_tokenizer(tmp_path, tokenizer, unit):
    texts_of = {"word": "a b", "text": "a b", "pair": "a b\tc d"}
    path, teachers = tmp_path / "a.txt", tokenizer
    path.write_text("".join(f"{texts_of[unit]} {'x' * i}\n\n" for i in range(40)))
    if unit == "word":
        teachers = type(tokenizer).from_pretrained(tokenizer.name_or_path)
        teachers.add_tokens(["xxxx"])
    rows = [words for _, line in read_lines(path) if (words := texts.units_of(line, unit, "here"))]
    wanted, n_cut = texts.encode(Sentences(rows), unit, tokenizer, 16, (), teachers)
    found, also = shards.encode(shards.Text(path, unit), tmp_path, unit, tokenizer, 16, teachers)
    same(found, wanted)
    assert also == n_cut and (n_cut > 0) == (unit != "word") and bool(found.teacher) == (unit == "word")
    for indices in ([0, 3], np.array([7])):
        one, other = (data.collate(x, indices, 0) for x in (found, wanted))
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_tokenising_goes_on_after_the_last_part_and_what_is_damaged_is_made_again(folder, tmp_path, tokenizer,
                                                                                  monkeypatch, capsys):
    def encode():
        return shards.encode(shards.Text(folder, "word"), tmp_path / "kept", "word", tokenizer, 16)[0]

    wanted = data.encode(data.read_text(folder), tokenizer, 16)
    monkeypatch.setattr(shards, "PER_PART", 20)
    asked, ask = [], texts.encode

    def counting(sentences, *how):
        asked.append(len(sentences))
        return ask(sentences, *how)

    def killed(sentences, *how):
        if len(asked) == 2:
            raise KeyboardInterrupt
        return counting(sentences, *how)

    monkeypatch.setattr(texts, "encode", killed)
    with pytest.raises(KeyboardInterrupt):
        encode()
    (kept,) = (tmp_path / "kept").iterdir()
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["sentences"] == 40 and "sha256" not in manifest
    with open(kept / "words.bin", "ab") as file:  # of a third part, whose place in the manifest is missing
        file.write(b"\0" * 99)
    monkeypatch.setattr(texts, "encode", counting)
    same(encode(), wanted)
    assert asked == [20, 20, 20, 20, 4]
    same(encode(), wanted)
    assert len(asked) == 5
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["sentences"] == 84 and manifest["windows"] == len(wanted)
    assert [fact["file"] for fact in manifest["files"]] == [file.name for file in files_of(folder)]
    shutil.copytree(kept, tmp_path / "before")
    for name in ("input_ids.bin", "manifest.json", "words.bin"):
        if name == "input_ids.bin":  # a flipped bit
            (kept / name).write_bytes(b"\1" + (kept / name).read_bytes()[1:])
        elif name == "words.bin":
            (kept / name).unlink()
        else:  # unfinished, and files that are shorter than it says
            manifest["bytes"]["offsets"] += 800
            (kept / name).write_text(json.dumps({k: v for k, v in manifest.items() if k != "sha256"}))
        asked.clear(), capsys.readouterr()
        same(encode(), wanted)
        assert "do not match manifest.json and are made again" in capsys.readouterr().out and len(asked) == 5
        for file in (tmp_path / "before").iterdir():
            assert (kept / file.name).read_bytes() == file.read_bytes()


def test_processes_share_the_work_and_a_bad_line_ends_it(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(shards, "PER_PART", 10)
    path = write(tmp_path / "a.gz", LINES)
    found, _ = shards.encode(shards.Text(path, "word"), tmp_path / "kept", "word", tokenizer, 16, n_jobs=2)
    same(found, data.encode(data.read_text(path), tokenizer, 16))
    path.write_bytes(gzip.compress(b"good line\n" * 70 + b"\xff\n" + b"good line\n" * 70))
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:71: invalid UTF-8"):
        shards.encode(shards.Text(path, "word"), tmp_path / "kept", "word", tokenizer, 16, n_jobs=2)


def test_processes_end_with_a_parent_that_is_killed():
    worker = "import os, time; from xdistil import shards; shards._begin((), os.getppid()); print(1, flush=True); {}"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker.format('time.sleep(300)')!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout.readline() == "1\n"
        process.kill()
        started = time.monotonic()
        assert process.stdout.read() == "" and time.monotonic() - started < 60  # ends as the worker does


def test_a_file_that_changes_while_it_is_read_is_an_error(folder, tmp_path, tokenizer, monkeypatch):
    ask = texts.encode

    def meanwhile(*asked):
        write(folder / "a.txt", LINES)
        return ask(*asked)

    monkeypatch.setattr(texts, "encode", meanwhile)
    with pytest.raises(DataError, match="text: changed while it was read"):
        shards.encode(shards.Text(folder, "word"), tmp_path / "kept", "word", tokenizer, 16)
    assert not list((tmp_path / "kept").iterdir())


def test_what_the_shards_follow_from_names_their_folder(folder, tmp_path, tokenizer):
    def made(text, *how):
        shards.encode(text, tmp_path / "kept", *how)
        return len(list((tmp_path / "kept").iterdir()))

    assert made(shards.Text(folder, "word"), "word", tokenizer, 16) == 1
    tokenizer(["long " * 99], truncation=True, max_length=9)  # leaves its mark on the tokenizer, not on words
    assert made(shards.Text(folder, "word"), "word", tokenizer, 16) == 1
    other = type(tokenizer).from_pretrained(tokenizer.name_or_path)
    other.add_tokens(["gördü"])
    for n, (text, *how) in enumerate([
            (shards.Text(folder, "word"), "word", tokenizer, 17), (shards.Text(folder, "word"), "word", other, 16),
            (shards.Text(folder, "word", 9), "word", tokenizer, 16),
            (shards.Text(folder, "word", 9, 1), "word", tokenizer, 16),
            (shards.Text(folder, "word", extra=[["new"]]), "word", tokenizer, 16)], 2):
        assert made(text, *how) == n
    write(folder / "d.txt", LINES[:2])
    assert made(shards.Text(folder, "word"), "word", tokenizer, 16) == 7


def test_no_text_is_an_error(tmp_path, tokenizer):
    for name in ("a.txt", "b.gz"):
        write(tmp_path / name, [])
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}: no sentence in this file"):
        list(shards.Text(tmp_path, "word"))


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident pages in /proc")
def test_what_was_read_is_not_kept(tmp_path):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    n = 16_000_000
    for name, array in {"input_ids": np.arange(n, dtype=np.int32), "words": np.ones(n, np.int32), "offsets": np.arange(
            0, n + 1, 16), "sentences": np.arange(n // 16, dtype=np.int32)}.items():
        array.tofile(tmp_path / f"{name}.bin")
    del array
    found = shards._mapped(tmp_path, {"bytes": {}, "sha256": {}})
    order = np.random.default_rng(0).permutation(len(found))
    data.collate(found, order[:500], 0)
    before = resident()
    for start in range(0, 40_000, 500):
        batch = data.collate(found, order[start : start + 500], 0)
        assert torch.equal(batch["input_ids"][:, 3], 16 * batch["windows"] + 3)
    assert resident() - before < 30e6  # of 128 MB of ids and words; 12 MB of offsets are mapped


def test_a_flat_array_is_read_like_one_in_memory(tmp_path):
    array, rng = np.arange(100, 200, dtype=np.int32), np.random.default_rng(0)
    array.tofile(tmp_path / "a.bin")
    found = shards.Flat(tmp_path / "a.bin", np.int32)
    assert len(found) == 100
    for places in (slice(None), slice(7, 30), slice(90, 300), slice(5, 5), np.sort(rng.integers(0, 100, 30)),
                   rng.integers(0, 100, 30), np.array([99])):
        assert np.array_equal(found[places], array[places]) and found[places].dtype == array.dtype


def test_leaks_name_file_and_line_and_stages_follow_from_every_shard(folder, tmp_path, smoke):
    dev = [row.split("\t")[0] for row in (TOY / "dev.tsv").read_text(encoding="utf-8").splitlines()]
    params = smoke_params(tmp_path / "run", transfer_file=str(folder))
    inputs = Inputs(params, Run(params))
    assert inputs.leaks("dev", "transfer") == []
    before = depends(params, Run(params), "hidden")
    write(folder / "z.txt", [("new", "en"), (dev[3].upper(), "en")])
    (text,) = inputs.leaks("dev", "transfer")
    assert f"1 of {len(dev)} of dev stand in {folder / 'z.txt'} too, first in line 2" in text
    now = depends(params, Run(params), "hidden")
    assert {name for name in now if now[name] != before[name]} == {"transfer file"}
    files, _, overlap = views.describe(params, Run(params))
    assert files.rows[3]["sentences"] == 86 and overlap.rows[0]["sentences"] == 1


def test_a_stage_over_shards_is_interrupted_within_a_pass_and_goes_on_at_the_same_sentence(folder, half_done,
                                                                                         monkeypatch):
    saved, results = training.save_checkpoint, {}

    def save(path, at, *others):
        saved(path, at, *others)
        if (at.epoch, at.chunk) == (1, 2):
            raise KeyboardInterrupt

    for name in ("unbroken", "broken"):
        seen = []

        def collate(examples, indices, *others, seen=seen):
            seen.append(np.asarray(indices).tolist())
            return data.collate(examples, indices, *others)

        params = smoke_params(half_done(name), transfer_file=str(folder), distil_chunk_size=20, distil_epochs=2,
                              targets_cache="none")
        with monkeypatch.context() as patch:
            patch.setattr("xdistil.wordwise.collate", collate)
            if name == "broken":
                with monkeypatch.context() as early, pytest.raises(KeyboardInterrupt):
                    early.setattr(training, "save_checkpoint", save)
                    stages.distil_hidden(params, Run(params))
                seen.append("broken")
            stages.distil_hidden(params, Run(params))
        results[name] = seen
        assert len(list((Run(params).dir / "transfer").iterdir())) == 1
    broken = results["broken"]
    at = broken.index("broken")
    assert broken[:at] == results["unbroken"][:at]  # what came before
    rest = broken[at + 1 :]
    assert rest == results["unbroken"][-len(rest) :] and len(rest) < len(results["unbroken"]) // 2
    folders = [Run(params).dir.parent / name / "hidden" for name in ("broken", "unbroken")]
    for file in ("model.safetensors", "projections.safetensors", "history.jsonl"):
        assert len({(path / file).read_bytes() for path in folders}) == 1
