"""What the teacher says of a chunk: whichever way it is computed, kept or read back, it is the same."""

import numpy as np
import pytest
import torch

from xdistil.data import collate
from xdistil.models import run_model
from xdistil.targets import DTYPES, Targets, TargetSpec, TargetStore

SPEC = TargetSpec(hidden=(0, 4), attention=(3, 4))
WINDOWS = np.array([3, 17, 4, 44, 0, 21, 9, 30, 5, 12])
HALF = {"rtol": 2e-3, "atol": 2e-3}  # float16 keeps 11 bits


@pytest.fixture
def open_store(teacher, examples, accelerator, tmp_path):
    """A function to a store over `tmp_path/targets` that counts the teacher's batches in `store.calls`."""
    def opener(spec=SPEC, budget=1e9, batch_size=4, folder="targets"):
        store = TargetStore(teacher, spec, examples, 0, accelerator, batch_size, budget, tmp_path / folder)
        store.calls = 0

        def count(*_):
            store.calls += 1
        teacher.register_forward_pre_hook(count)
        return store
    return opener


def by_window(store, name="a", windows=WINDOWS, size=4, seed=None):
    """Every target of every window, without its padding, by kind; windows are known by their ids."""
    found = {}
    for batch in store.batches(name, windows, size, seed):
        for i, n in enumerate(batch["attention_mask"].sum(1).tolist()):
            key = tuple(batch["input_ids"][i, :n].tolist())
            found[key] = {kind: batch[f"teacher_{kind}"][i, ..., :n, :n] if kind == "attention"
                          else batch[f"teacher_{kind}"][i, :n] for kind in DTYPES if f"teacher_{kind}" in batch}
    return found


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].keys() == other[key].keys()
        for kind in one[key]:
            torch.testing.assert_close(one[key][kind].float(), other[key][kind].float(), **tolerance)


def test_targets_are_what_the_teacher_says_of_each_window_alone(open_store, teacher, examples):
    found = by_window(open_store())
    assert len(found) == len(WINDOWS)
    for window in WINDOWS:
        batch = collate(examples, [window], 0, multiple=1)
        with torch.inference_mode():
            logits, states, maps = run_model(teacher, batch, True, True)
        kept = found[tuple(batch["input_ids"][0].tolist())]
        torch.testing.assert_close(kept["logits"], logits[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(kept["hidden"].float(), torch.stack([states[0][0], states[4][0]], 1), **HALF)
        torch.testing.assert_close(kept["attention"].float(), torch.stack([maps[2][0], maps[3][0]]), **HALF)


def test_chunks_joined_equal_the_whole(open_store):
    store = open_store()
    whole, parts = by_window(store, "whole"), {}
    for i in range(0, len(WINDOWS), 3):
        parts |= by_window(store, f"part-{i}", WINDOWS[i:i + 3])
    assert_same(whole, parts, **HALF)


def test_kept_and_live_targets_are_the_same(open_store):
    kept, live = open_store(), open_store(budget=0)
    one, other = by_window(kept, seed=5), by_window(live, seed=5)
    assert_same(one, other, **HALF)
    for key in one:
        torch.testing.assert_close(one[key]["logits"], other[key]["logits"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0, 1e9])
def test_batches_are_in_the_order_of_the_seed_with_the_fields_of_collate(open_store, examples, budget):
    store = open_store(budget=budget)
    first, again, other = ([b["input_ids"].tolist() for b in store.batches("a", WINDOWS, 3, seed)]
                           for seed in (1, 1, 2))
    assert first == again != other
    batch = next(store.batches("a", WINDOWS, 3))
    width = batch["input_ids"].shape[1]
    n = len(batch["input_ids"])
    assert {name: tuple(x.shape) for name, x in batch.items()} == {
        **dict.fromkeys(("input_ids", "attention_mask", "labels", "words"), (n, width)),
        "teacher_hidden": (n, width, 2, 48), "teacher_attention": (n, 2, 4, width, width),
        "teacher_logits": (n, width, 7)}
    assert examples.lengths[WINDOWS].max() == batch["attention_mask"].sum(1).max()


def test_padding_is_zero(open_store):
    for batch in open_store().batches("a", WINDOWS, 10, 1):
        pad = batch["attention_mask"] == 0
        assert pad.any()
        assert (batch["teacher_hidden"][pad] == 0).all() and (batch["teacher_logits"][pad] == 0).all()
        maps = batch["teacher_attention"]
        assert (maps.movedim(3, 1)[pad] == 0).all() and (maps.movedim(4, 1)[pad] == 0).all()


@pytest.mark.parametrize("spec", [SPEC, TargetSpec(), TargetSpec(hidden=(4,)), TargetSpec(attention=(1,))])
def test_bytes_are_counted_to_the_byte(open_store, examples, spec, tmp_path):
    store = open_store(spec)
    store.chunk("a", WINDOWS)
    paths = sorted((tmp_path / "targets").iterdir())
    on_disk = sum(path.stat().st_size - np.load(path, mmap_mode="r").offset for path in paths)
    lengths = examples.lengths[WINDOWS].astype(int)
    by_hand = lengths.sum() * (2 * 48 * len(spec.hidden) + 4 * 7) + (lengths**2).sum() * 2 * 4 * len(spec.attention)
    assert on_disk == spec.n_bytes(lengths, store.config) == by_hand
    kinds = ["attention"] * bool(spec.attention) + ["hidden"] * bool(spec.hidden) + ["logits"]
    assert [path.name for path in paths] == [f"{kind}-a.npy" for kind in kinds]


def test_the_budget_is_spent_chunk_by_chunk_and_not_overdrawn(open_store, examples, tmp_path):
    lengths, whole = examples.lengths, open_store()
    first, second = WINDOWS[:5], WINDOWS[5:]
    need = [SPEC.n_bytes(lengths[x], whole.config) for x in (first, second)]
    store = open_store(budget=sum(need) - 1)
    assert store.chunk("a", first) is not None and store.chunk("b", second) is None
    assert {p.name.split("-")[1] for p in (tmp_path / "targets").iterdir()} == {"a.npy"}
    assert open_store(budget=sum(need), folder="exact").chunk("a", first) is not None
    assert open_store(budget=need[0] - 1, folder="less").chunk("a", first) is None


def test_nothing_is_kept_without_a_budget(open_store, tmp_path):
    store = open_store(budget=0)
    by_window(store)
    one = store.calls
    by_window(store)
    assert store.calls == 2 * one > 0 and not list(tmp_path.rglob("*.npy"))


def test_files_survive_and_the_teacher_is_not_asked_again(open_store):
    store = open_store()
    before = by_window(store)
    asked = store.calls
    assert asked >= 3
    by_window(store, seed=1), by_window(store, seed=2)
    assert store.calls == asked
    again = open_store()  # as after an interruption
    assert_same(before, by_window(again), rtol=0, atol=0)
    assert again.calls == 0


def test_partial_files_do_not_count(open_store, tmp_path):
    folder = tmp_path / "targets"
    folder.mkdir()
    (folder / "hidden-a.partial").write_bytes(b"half")
    store = open_store()
    before = by_window(store)
    assert store.calls > 0
    (folder / "attention-a.npy").unlink()  # one kind of three is missing
    again = open_store()
    assert_same(before, by_window(again), rtol=0, atol=0)
    assert again.calls > 0 and not list(folder.glob("*.partial"))


def test_dropped_kinds_are_gone_and_come_back_when_asked(open_store, tmp_path):
    store = open_store()
    before = by_window(store)
    (tmp_path / "targets" / "hidden-b.partial").write_bytes(b"half")
    store.drop("hidden", "attention")
    assert [p.name for p in (tmp_path / "targets").iterdir()] == ["logits-a.npy"]
    logits = open_store(TargetSpec())  # what the next stage needs is still there
    assert {key: x["logits"].tolist() for key, x in by_window(logits).items()} == {
        key: x["logits"].tolist() for key, x in before.items()}
    assert logits.calls == 0
    assert_same(before, by_window(open_store()), rtol=0, atol=0)


def test_values_beyond_float16_are_clamped_and_logits_are_not():
    lengths = np.array([2])
    arrays = {"hidden": np.zeros((2, 1, 2), np.float16), "logits": np.zeros((2, 1), np.float32)}
    targets = Targets(lengths, arrays)
    targets.put(np.array([0]), {"hidden": torch.tensor([[[[1e6, -1e6]], [[1.5, -0.25]], [[9.0, 9.0]]]]),
                                "logits": torch.tensor([[[1e6], [-1e6], [9.0]]])})
    assert arrays["hidden"].tolist() == [[[65504, -65504]], [[1.5, -0.25]]]
    assert arrays["logits"].tolist() == [[1e6], [-1e6]]
    assert targets.padded(np.array([0]), 3, 1)["teacher_logits"].tolist() == [[[1e6], [-1e6], [0]]]
