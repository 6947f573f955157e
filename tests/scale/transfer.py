"""A transfer set of any size: tokenise it and read one pass at constant memory, killed on the way and gone on with.

    python tests/scale/transfer.py --lines 200000 --processes 2 --kill --folder /tmp/scale

Writes so many generated lines into 8 files (.txt, .gz and, with pyarrow, .parquet), tokenises them and reads every
training window once, in the batches that training would see. Prints lines per second and the peak resident memory of
each process. With --kill both are killed (SIGKILL) halfway and started again; then all must be there, right, once."""

import argparse
import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from xdistil import data, grouping, models, shards, texts

N_FILES, CHUNK, BATCH = 8, 10_000, 32
ROOT = Path(__file__).resolve().parents[2]


def lines(start: int, stop: int, words: np.ndarray):
    """Lines start..stop of the text, the same whenever they are asked for: 4 to 36 words, the frequent ones often."""
    for block in range(start // 1000, -(-stop // 1000)):
        rng = np.random.default_rng(block)
        sizes = rng.integers(4, 37, 1000)
        picked = words[(len(words) * rng.random(sizes.sum()) ** 4).astype(int)]
        for i, some in enumerate(np.split(picked, np.cumsum(sizes)[:-1]), 1000 * block):
            if start <= i < stop:
                yield f"{' '.join(some)} {i}"


def write(asked, words) -> None:
    """The files, unless they are there."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        parquet = None
    for k in range(N_FILES):
        kind = (".txt", ".gz", ".parquet" if parquet else ".tsv")[k % 3]
        path, rows = asked.text / f"{k}{kind}", range(asked.lines * k // N_FILES, asked.lines * (k + 1) // N_FILES)
        if path.exists():
            continue
        if kind == ".parquet":
            with parquet.ParquetWriter(path, pyarrow.schema({"text": pyarrow.string()})) as file:
                for start in rows[::50_000]:
                    some = list(lines(start, min(start + 50_000, rows.stop), words))
                    file.write_table(pyarrow.table({"text": some}))
        else:
            with (gzip.open(path, "wt", 1) if kind == ".gz" else open(path, "w", encoding="utf-8")) as file:
                file.writelines(f"{line}\n" for line in lines(rows.start, rows.stop, words))


def watch_children(peaks: dict) -> None:
    """Note the peak resident memory (MB) of each process that this one started, as long as it lives."""
    while True:
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                try:
                    status = Path(f"/proc/{child}/status").read_text()
                except OSError:
                    continue
                peaks[child] = max(peaks.get(child, 0), int(status.partition("VmHWM:")[2].split()[0] or 0) / 1024
                                   if "VmHWM" in status else 0)
        time.sleep(0.5)


def opened(asked, n_jobs: int):
    """The shards, made if they are not there."""
    tokenizer = models.load_tokenizer(asked.tokenizer)
    return tokenizer, shards.encode(shards.Text(asked.text, "word"), asked.folder / "kept", "word", tokenizer, 64,
                                    n_jobs=n_jobs)[0]


def tokenise(asked) -> dict:
    """Phase 1."""
    threading.Thread(target=watch_children, args=(peaks := {},), daemon=True).start()
    before = done(asked)
    start = time.perf_counter()
    opened(asked, asked.processes)
    seconds = time.perf_counter() - start
    return {"lines": asked.lines - before, "seconds": seconds, "children": sorted(peaks.values())}


def read(asked) -> dict:
    """Phase 2: one pass, from where position.json says; notes there and in rows.bin what was read."""
    tokenizer, examples = opened(asked, 1)
    log, path = asked.folder / "rows.bin", asked.folder / "position.json"
    at = json.loads(path.read_text()) if path.exists() else {"chunk": 0, "batch": 0, "rows": 0}
    _, chunks = data.split_transfer(len(examples), CHUNK, 0.05, 42)
    shapes, n, start = grouping.grid(examples.lengths, BATCH), 0, time.perf_counter()
    with open(log, "r+b" if at["rows"] else "wb") as file:
        file.truncate(8 * at["rows"])
        file.seek(8 * at["rows"])
        for number in range(at["chunk"], len(chunks)):
            grouped = grouping.batches(examples.lengths[chunks[number]], shapes, 42 + 104729 * number)
            for i, (rows, width) in enumerate(grouped):
                if number == at["chunk"] and i < at["batch"]:
                    continue
                batch = data.collate(examples, chunks[number][rows], tokenizer.pad_token_id, width)
                file.write(batch["windows"].numpy().tobytes())
                n += len(rows)
                if i % 100 == 99:
                    file.flush()
                    position = {"chunk": number, "batch": i + 1, "rows": at["rows"] + n}
                    path.with_suffix(".new").write_text(json.dumps(position))
                    os.replace(path.with_suffix(".new"), path)
    return {"lines": n, "seconds": time.perf_counter() - start, "children": [], "of": sum(map(len, chunks))}


def check(asked, words) -> None:
    """Every training window was read once; the ids of some lines, and of those around the kill, are the line's own."""
    tokenizer, examples = opened(asked, 1)
    rows = np.fromfile(asked.folder / "rows.bin", np.int64)
    held_out, _ = data.split_transfer(len(examples), CHUNK, 0.05, 42)
    counts = np.bincount(np.concatenate([rows, held_out]), minlength=len(examples))
    assert (counts == 1).all(), f"{(counts != 1).sum()} windows were read {np.unique(counts)} times"
    assert examples.sentences[-1] == asked.lines - 1 and (np.diff(examples.sentences) >= 0).all()
    places, starts = np.random.default_rng(1).integers(0, asked.lines, 200), np.asarray(examples.sentences)
    near = [x for x in asked.killed_at for x in range(x - 300, x + 300)]
    for i in {*places.tolist(), *near}:
        if 0 <= i < asked.lines:
            wanted, _ = texts.encode(data.Sentences([next(lines(i, i + 1, words)).split()]), "word", tokenizer, 64)
            first, last = np.searchsorted(starts, [i, i + 1])
            found = examples.input_ids[examples.offsets[first] : examples.offsets[last]]
            assert np.array_equal(found, wanted.input_ids), f"line {i}: {found} instead of {wanted.input_ids}"
    print(f"every one of {len(examples):,} windows was read once; {len({*places.tolist(), *near}):,} lines, "
          f"{len(near):,} of them around the kill, have their own ids")


def done(asked) -> int:
    """Lines that are tokenised so far."""
    found = [json.loads(path.read_text())["sentences"] for path in (asked.folder / "kept").glob("*/manifest.json")]
    return sum(found)


def phase(name: str, asked, enough=None) -> None:
    """Run a phase as a process of its own; kill it as soon as it has `enough`."""
    process = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--phase", name], stdout=subprocess.PIPE,
                               text=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH')}"})
    while enough and process.poll() is None:
        time.sleep(0.05)
        if enough():
            os.kill(process.pid, signal.SIGKILL)
            process.wait()  # and not for its output: processes that it leaves behind hold that open for a while
            process.stdout.close()
            print(f"{name}: killed", flush=True)
            return
    found = json.loads(process.communicate()[0].splitlines()[-1])
    print(f"{name}: {found['lines']:,} lines in {found['seconds']:.1f} s, {found['lines'] / found['seconds']:,.0f} a "
          f"second; peak MB: {found['own']:.0f}, of its processes {[round(x) for x in found['children']]}", flush=True)


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lines", type=int, default=200_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--tokenizer", default=str(ROOT / "tests/data/tiny-teacher"))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--phase", choices=["tokenise", "read"])
    asked = parser.parse_args()
    asked.text = asked.folder / f"text-{asked.lines}"
    asked.text.mkdir(parents=True, exist_ok=True)
    asked.killed_at = []
    if asked.phase:
        found = {"tokenise": tokenise, "read": read}[asked.phase](asked)
        print(json.dumps(found | {"own": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
        return
    pieces = models.load_tokenizer(asked.tokenizer).get_vocab()
    words = np.array(sorted({x.strip("▁#Ġ") for x in pieces if x.strip("▁#Ġ").isalpha()}))
    start = time.perf_counter()
    write(asked, words)
    print(f"{asked.lines:,} lines, {sum(x.stat().st_size for x in asked.text.iterdir()) / 1e6:,.0f} MB in "
          f"{sorted(x.name for x in asked.text.iterdir())}: {time.perf_counter() - start:.1f} s", flush=True)
    if asked.kill:
        phase("tokenise", asked, lambda: done(asked) > asked.lines // 2)
        asked.killed_at.append(done(asked))
    phase("tokenise", asked)
    if asked.kill:
        position = asked.folder / "position.json"
        phase("read", asked, lambda: position.exists() and json.loads(position.read_text())["rows"] > asked.lines / 2)
    phase("read", asked)
    check(asked, words)


if __name__ == "__main__":
    main()
