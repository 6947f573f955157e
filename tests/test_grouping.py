"""Batches: every window once, few shapes, little padding, an order that follows from the seed."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xdistil.data import encode, read_text
from xdistil.grouping import BUCKETS, N_TOTALS, batches, grid, shapes_for
from xdistil.models import load_tokenizer

LENGTHS = np.random.default_rng(1).integers(3, 65, 5000)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("size", [1, 8, 32, 9000])
@pytest.mark.parametrize("kind", ["exact", "few"])
def test_batches_hold_every_window_once_in_about_as_many_slots(seed, size, kind):
    packed = batches(LENGTHS, grid(LENGTHS, size, kind), seed)
    assert sorted(np.concatenate([rows for rows, _ in packed])) == list(range(len(LENGTHS)))
    assert all(LENGTHS[rows].max() <= width for rows, width in packed)
    slots = np.array([len(rows) * width for rows, width in packed])
    assert slots.max() <= max(1.1 * size * LENGTHS.mean(), LENGTHS.max())
    if size == 32:
        assert slots.sum() < 1.05 * LENGTHS.sum()  # hardly any padding
        assert abs(len(LENGTHS) / len(packed) - size) < 0.1 * size  # as many windows in a step as asked for


@pytest.mark.parametrize("seed", [None, 3])
def test_the_number_of_slots_is_one_of_few(seed):
    packed = batches(LENGTHS, grid(LENGTHS, 32, "few"), seed)
    totals = {len(rows) * width for rows, width in packed}
    assert len(totals) <= N_TOTALS + 2  # the longest windows and what is left over at the end have their own


def test_exact_shapes_hardly_pad_and_few_do_where_kernels_are_prepared():
    packed = batches(LENGTHS, grid(LENGTHS, 32), 3)
    assert sum(len(rows) * width for rows, width in packed) < 1.01 * LENGTHS.sum()
    machines = {("cpu", "no"): "exact", ("cuda", "bf16"): "exact", ("cpu", "bf16"): "few", ("xla", "bf16"): "fixed"}
    for (device, precision), kind in machines.items():
        assert shapes_for(SimpleNamespace(device=torch.device(device), mixed_precision=precision)) == kind


def test_fixed_shapes_do_not_depend_on_the_text():
    widths, rows = grid(LENGTHS, 8, "fixed")
    assert widths is BUCKETS and (np.diff(widths) > 0).all() and rows.min() == 1
    assert rows[widths == 16] == 8 * LENGTHS.mean() // 16
    used = {width for _, width in batches(LENGTHS, (widths, rows), 3)}
    assert used == {8, 16, 24, 32, 40, 48, 56, 64}


def test_the_longest_window_has_a_width_even_where_the_average_is_short():
    widths, rows = grid(np.array([5, 500, 5, 5]), 1)
    assert widths[-1] == 500 and rows[-1] == 1


def test_batches_follow_the_seed():
    one, same, other = ([rows.tolist() for rows, _ in batches(LENGTHS, grid(LENGTHS, 8), seed)] for seed in (3, 3, 4))
    assert one == same != other


def test_batches_without_a_seed_start_with_the_longest():
    order = LENGTHS[np.concatenate([rows for rows, _ in batches(LENGTHS, grid(LENGTHS, 8))])]
    assert (np.diff(order) <= 0).all() and order[0] == 64


@pytest.mark.data
def test_real_text_is_padded_by_less_than_a_twentieth(shared):
    text = read_text(shared / "data/multi_ner/transfer.tsv", 6000)
    lengths = encode(text, load_tokenizer(shared / "weights/me5-small-q4-73k"), 128).lengths
    packed = batches(lengths, grid(lengths, 32, "few"), 0)
    assert sum(len(rows) * width for rows, width in packed) < lengths.sum() / 0.95
