"""What the teacher says of a chunk: whichever way it is computed, kept or read back, it is the same."""

import numpy as np
import pytest
import torch

from xdistil import losses, targets
from xdistil.data import collate
from xdistil.grouping import batches, grid
from xdistil.models import from_config, keep_qkv, run_model
from xdistil.targets import DTYPES, Targets, TargetSpec, TargetStore

SPEC = TargetSpec(hidden=(0, 4), attention=(3, 4))
WINDOWS = np.array([3, 17, 4, 44, 0, 21, 9, 30, 5, 12])
HALF = {"rtol": 8e-3, "atol": 1e-4}  # bfloat16 keeps 8 bits


@pytest.fixture
def open_store(teacher, examples, accelerator, tmp_path):
    """A function to a store over `tmp_path/targets` that counts the teacher's batches in `store.calls`."""
    def opener(spec=SPEC, budget=1e9, mode="disk", folder="targets", n_passes=2):
        store = TargetStore(lambda: teacher, teacher.config, spec, examples, 0, accelerator, folder=tmp_path / folder,
                            mode=mode, budget_bytes=budget, n_passes=n_passes)
        store.calls = 0

        def count(*_):
            store.calls += 1
        teacher.register_forward_pre_hook(count)
        return store
    return opener


def files(folder, pattern="*.bin"):
    return sorted(path.name for path in folder.glob(pattern))


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
        batch = collate(examples, [window], 0)
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


@pytest.mark.parametrize("mode", ["disk", "memory", "auto", "none"])
def test_the_first_pass_and_every_later_one_read_the_same_numbers_whatever_the_cache(open_store, mode):
    wanted, store = by_window(open_store(mode="none", folder="other"), seed=5), open_store(mode=mode)
    exact = {"rtol": 0, "atol": 0}  # what is rounded for the disk is rounded for the first pass as well
    assert_same(wanted, by_window(store, seed=5), **exact)
    assert_same(wanted, by_window(store, seed=5), **exact)


@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_the_teacher_is_asked_once_for_each_window(open_store, mode):
    store = open_store(mode=mode)
    for seed in (1, 2, None):
        by_window(store, seed=seed)
    assert store.asked == len(WINDOWS)


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
        **dict.fromkeys(("input_ids", "attention_mask", "labels", "words"), (n, width)), "windows": (n,),
        "teacher_hidden": (n, width, 2, 48), "teacher_attention": (n, 2, 4, width, width),
        "teacher_logits": (n, width, 7)}
    assert examples.lengths[WINDOWS].max() == batch["attention_mask"].sum(1).max()


def test_padding_is_finite(open_store):
    store = open_store()
    for _ in range(2):
        for batch in store.batches("a", WINDOWS, 10, 1):
            assert (batch["attention_mask"] == 0).any()
            assert all(batch[f"teacher_{kind}"].isfinite().all() for kind in ("hidden", "attention", "logits"))


@pytest.mark.parametrize("spec", [SPEC, TargetSpec(), TargetSpec(hidden=(4,)), TargetSpec(attention=(1,))])
def test_bytes_are_counted_to_the_byte(open_store, examples, spec, tmp_path):
    store, lengths = open_store(spec), examples.lengths[WINDOWS].astype(int)
    by_window(store)
    on_disk = sum(path.stat().st_size for path in (tmp_path / "targets").glob("*.bin"))
    by_hand = lengths.sum() * (2 * 48 * len(spec.hidden) + 4 * 7) + (lengths**2).sum() * 2 * 4 * len(spec.attention)
    assert on_disk == spec.n_bytes(lengths, store.config) == by_hand
    kinds = ["attention"] * bool(spec.attention) + ["hidden"] * bool(spec.hidden) + ["logits"]
    assert files(tmp_path / "targets") == [f"{kind}-a.bin" for kind in kinds]


def test_the_budget_is_spent_chunk_by_chunk_and_not_overdrawn(open_store, examples, tmp_path):
    first, second = WINDOWS[:5], WINDOWS[5:]
    need = [SPEC.n_bytes(examples.lengths[x], open_store().config) for x in (first, second)]
    store = open_store(budget=sum(need) - 1)
    for _ in range(2):
        by_window(store, "a", first), by_window(store, "b", second)
    assert files(tmp_path / "targets") == ["attention-a.bin", "hidden-a.bin", "logits-a.bin", "logits-b.bin"]
    assert store.asked == len(first) + 2 * len(second)
    open_store(budget=need[0], folder="exact").batches("a", first, 4)
    by_window(open_store(budget=need[0], folder="exact"), "a", first)
    assert len(files(tmp_path / "exact")) == 3
    by_window(open_store(budget=need[0] - 1, folder="less"), "a", first)
    assert files(tmp_path / "less") == ["logits-a.bin"]


def test_nothing_is_kept_where_nothing_is_to_be_kept(open_store, tmp_path):
    store = open_store(mode="none")
    by_window(store), by_window(store)
    assert store.asked == 2 * len(WINDOWS) and not (tmp_path / "targets").exists()
    store = open_store(mode="memory")
    by_window(store), by_window(store)
    assert store.asked == len(WINDOWS) and not (tmp_path / "targets").exists()
    store = open_store(mode="auto", n_passes=1)  # nobody reads hidden states and attention again
    by_window(store)
    assert files(tmp_path / "targets") == ["logits-a.bin"]


@pytest.mark.parametrize("slow, names", [("teacher", 3), ("reading", 1)])
def test_auto_keeps_all_kinds_if_reading_is_faster_than_the_teacher(open_store, tmp_path, monkeypatch, slow, names):
    class Clock:
        now, step = 0.0, {"ask": 0.0, "padded": 0.0} | {{"teacher": "ask", "reading": "padded"}[slow]: 1.0}

        def perf_counter(self):
            return self.now

    clock = Clock()
    for owner, name in ((TargetStore, "ask"), (Targets, "padded")):
        method = getattr(owner, name)

        def timed(self, *args, do=method, name=name):
            clock.now += clock.step[name]
            return do(self, *args)
        monkeypatch.setattr(owner, name, timed)
    monkeypatch.setattr(targets, "time", clock)
    store = open_store(mode="auto")
    by_window(store, "a", WINDOWS[:5]), by_window(store, "b", WINDOWS[5:])
    assert len(files(tmp_path / "targets", "*-b.bin")) == names
    again = open_store(mode="auto")  # as after an interruption: the verdict stands
    assert again.keep_all == (names == 3) and not again.undecided


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


def test_an_interrupted_chunk_is_done_again(open_store, tmp_path):
    store = open_store()
    for _ in zip(range(2), store.batches("a", WINDOWS, 4), strict=False):
        pass  # and then the process is killed
    assert files(tmp_path / "targets", "*") == ["attention-a.bin", "hidden-a.bin", "logits-a.bin"]
    again = open_store()
    before = by_window(again)
    assert again.asked == len(WINDOWS)
    (tmp_path / "targets" / "attention-a.bin").unlink()  # one kind of three is missing
    again = open_store()
    assert_same(before, by_window(again), rtol=0, atol=0)
    assert again.asked == len(WINDOWS)


@pytest.mark.parametrize("harm", [lambda old: old[:40] + bytes([old[40] ^ 1]) + old[41:], lambda old: old[:-8]])
def test_damaged_files_are_made_again(open_store, tmp_path, capsys, harm):
    before, path = by_window(open_store()), tmp_path / "targets" / "hidden-a.bin"
    path.write_bytes(harm(path.read_bytes()))
    again = open_store()
    assert_same(before, by_window(again), rtol=0, atol=0)
    assert again.asked == len(WINDOWS) and "checksums" in capsys.readouterr().out


def test_files_of_other_layers_are_not_taken_for_these(open_store, capsys):
    by_window(open_store(TargetSpec(hidden=(1, 2))))  # and then the stage is interrupted, and its layer map changed
    kept, live = open_store(TargetSpec(hidden=(3, 4))), open_store(TargetSpec(hidden=(3, 4)), mode="none")
    assert_same(by_window(live), by_window(kept), rtol=0, atol=0)
    assert kept.asked == len(WINDOWS) and "made again" in capsys.readouterr().out


def test_grouped_batches_sum_to_the_loss_of_one_wide_batch(teacher, examples):
    other = from_config(teacher.config).eval()
    other.set_attn_implementation("eager")

    def sums(groups):
        total = torch.zeros(3, dtype=torch.double)
        for rows, width in groups:
            batch = collate(examples, rows, 0, width)
            with torch.inference_mode():
                one, two = (run_model(model, batch, True, True) for model in (teacher, other))
            mask, n = batch["attention_mask"], examples.lengths[rows].astype(int)
            total += torch.tensor([float(losses.hidden_mse(two[1][2], one[1][2], mask)) * n.sum(),
                                   float(losses.attention_mse(two[2][2], one[2][2], mask)) * (n**2).sum(),
                                   float(losses.logit_mse(two[0], one[0], mask)) * n.sum()], dtype=torch.double)
        return total

    grouped = batches(examples.lengths, grid(examples.lengths, 8), 1)
    assert len(grouped) > 5
    torch.testing.assert_close(sums(grouped), sums([(np.arange(len(examples)), None)]), rtol=1e-5, atol=0)


def test_dropped_kinds_are_gone_and_come_back_when_asked(open_store, tmp_path):
    store = open_store()
    before = by_window(store)
    store.drop("hidden", "attention")
    assert files(tmp_path / "targets") == ["logits-a.bin"]
    logits = open_store(TargetSpec())  # what the next stage needs is still there
    assert {key: x["logits"].tolist() for key, x in by_window(logits).items()} == {
        key: x["logits"].tolist() for key, x in before.items()}
    assert logits.calls == 0
    assert_same(before, by_window(open_store()), rtol=0, atol=0)


def test_values_keep_the_range_of_float32():
    arrays = {"hidden": torch.zeros(2, 1, 2, dtype=torch.bfloat16), "logits": torch.zeros(2, 1)}
    found = Targets(np.array([2]), arrays)
    found.put(np.array([0]), {"hidden": torch.tensor([[[[1e6, -1e6]], [[1.5, -0.25]], [[9.0, 9.0]]]]).bfloat16(),
                              "logits": torch.tensor([[[1e6], [-1e6], [9.0]]])})
    assert arrays["hidden"].float().tolist() == [[[999424, -999424]], [[1.5, -0.25]]]
    assert found.padded(np.array([0]), 2)["logits"].tolist() == [[[1e6], [-1e6]]]


@pytest.mark.parametrize("mode", ["disk", "memory", "none"])
def test_queries_keys_and_values_are_kept_as_they_were_computed(open_store, teacher, examples, tmp_path, mode):
    spec = TargetSpec(qkv=(2, 4))
    store, lengths = open_store(spec, mode=mode), examples.lengths[WINDOWS].astype(int)
    first, again = by_window(store, seed=5), by_window(store, seed=1)
    assert_same(first, again, **(HALF if mode == "none" else {"rtol": 0, "atol": 0}))
    if mode == "disk":
        assert files(tmp_path / "targets") == ["logits-a.bin", "qkv-a.bin"] and store.asked == len(WINDOWS)
        assert_same(first, by_window(open_store(spec)), rtol=0, atol=0)
        size = (tmp_path / "targets/qkv-a.bin").stat().st_size
        assert size == lengths.sum() * 2 * 3 * 48 * 2
        assert spec.n_bytes(lengths, store.config) == size + lengths.sum() * 4 * 7
        store.drop("qkv")
        assert files(tmp_path / "targets") == ["logits-a.bin"]
    for window in WINDOWS[:3]:
        batch = collate(examples, [window], 0)
        with torch.inference_mode(), keep_qkv(teacher, (2, 4)) as qkv:
            run_model(teacher, batch)
        kept = first[tuple(batch["input_ids"][0].tolist())]["qkv"]
        torch.testing.assert_close(kept.float(), torch.stack([qkv[2][0], qkv[4][0]], 1), **HALF)
