"""Which windows go together: batches of one length, in so few shapes that their kernels are prepared only once."""

import numpy as np

POOL = 128  # batches that are shuffled and sorted by length together
N_TOTALS = 3  # of rows x width
BUCKETS = np.array([*range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64),
                    512, 768, 1024, 2048, 4096, 8192])

Shapes = tuple[np.ndarray, np.ndarray]  # widths (sub-words), ascending, and the rows that go with each


def shapes_for(accelerator) -> str:
    """What `grid` should make of lengths on this device."""
    kinds = {("xla", accelerator.mixed_precision): "fixed", ("cpu", "bf16"): "few"}
    return kinds.get((accelerator.device.type, accelerator.mixed_precision), "exact")


def grid(lengths: np.ndarray, batch_size: int, kind: str = "exact") -> Shapes:
    """The shapes of batches of these windows: `batch_size` windows of average length, more short ones, fewer long.

    "exact": each length is a width. "few": a bfloat16 matrix product on a CPU takes longer to prepare (some 10 ms and
    MB for each number of tokens) than to run, so rows x width is one of N_TOTALS numbers near `batch_size` times the
    mean length, and widths are divisors of these; which numbers, is chosen to pad least. "fixed", where every shape is
    compiled: widths are BUCKETS, whatever the lengths.
    """
    slots, longest = batch_size * lengths.mean(), int(lengths.max())
    if kind != "few" or batch_size == 1:
        widths = BUCKETS if kind == "fixed" else np.unique(lengths)
        return widths, np.maximum(1, slots // widths).astype(int)
    width, count = np.arange(1, longest + 1), np.bincount(lengths, minlength=longest + 1)[1:]
    rows = (width == longest) * max(1, int(slots) // longest)  # by width; 0: no batch has it
    totals = np.arange(max(1, int(0.95 * slots)), int(1.1 * slots) + 1)[:, None]
    divides = totals % width == 0
    for _ in range(N_TOTALS):
        allowed = np.where(divides | (rows > 0), width, longest)
        needed = np.minimum.accumulate(allowed[:, ::-1], axis=1)[:, ::-1]  # by each length
        best = (needed @ count).argmin()
        rows = np.where(divides[best] & (rows == 0), totals[best] // width, rows)
    return width[rows > 0], rows[rows > 0]


def batches(lengths: np.ndarray, shapes: Shapes, seed: int | None = None) -> list[tuple[np.ndarray, int]]:
    """Batches as (indices of windows, width): windows are shuffled, sorted by length within large pools, and cut into
    `shapes`. Without a seed: one pool, longest first, for evaluation."""
    widths, rows = shapes
    place, rng, packed = np.searchsorted(widths, lengths), np.random.default_rng(seed), []
    order = np.arange(len(lengths)) if seed is None else rng.permutation(len(lengths))
    size = len(order) if seed is None else int(POOL * rows[place].mean()) or 1
    rest = order[:0]
    for start in range(0, len(order), size):
        pool = np.concatenate([rest, order[start : start + size]])
        pool, last = pool[np.argsort(-lengths[pool], kind="stable")], start + size >= len(order)
        while len(pool) and (last or len(pool) >= rows[place[pool[0]]]):  # what is left over goes to the next pool
            shape = place[pool[0]]  # of the longest
            packed.append((pool[: rows[shape]], int(widths[shape])))
            pool = pool[rows[shape] :]
        rest = pool
    return packed if seed is None else [packed[i] for i in rng.permutation(len(packed))]
