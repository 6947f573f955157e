"""The benchmark: each measure in a process of its own, results as JSON and Markdown.

python tests/benchmarks/run.py [--quick] [--only NAME] [--out FILE] [--threads N]
"""

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
SHARED = ROOT.parent / "shared"  # real text and a real tokenizer, where they are there
LABELS = ["O", *(f"{prefix}-{kind}" for kind in ("PER", "ORG", "LOC") for prefix in "BI")]
TRAINING = ("stage1-big32", "stage1-big128", "stage1-small32", "stage1-small128", "logits-small32")


def training(name: str, quick: bool) -> dict:
    """Everyone's passes in turn over the same sentences: seconds per sentence. A peer's unit is one block; ours needs
    many, to group lengths as it would in a real chunk. The first round warms up and is left out."""
    import numpy as np
    from benchmarks import ours, peers, work

    stage, setting = name.split("-")
    setting = work.SETTINGS[setting]
    block = (32 if quick else 64) * (4 if setting.name.startswith("small") else 1)
    given = work.make_models(setting, stage)
    everyone = [*peers.all_peers(setting, stage, given, ours.precisions()), *ours.all_ours(setting, stage, given)]
    found, stored = {}, None
    for number in range(1 + (1 if quick else 3)):
        sentences = setting.sentences((8 if number else 2) * block, block, seed=number)
        for one in everyone:
            mine = sentences if isinstance(one, ours.Ours) else sentences[:block]
            for part, seconds in one.unit(mine).items():
                found.setdefault((one.name, one.precision, part), []).append(seconds / len(mine))
            stored = getattr(one, "stored", stored)
    lengths, clock, rows = setting.lengths(block), (0 if work.torch.get_num_threads() == 1 else 1), []
    for (who, precision, part), rounds in found.items():
        seconds = np.array(rounds[1:])
        flops = 0 if "head only" in who else setting.flops(stage, part, lengths) / block  # per sentence
        rows.append({"setting": setting.name, "stage": stage, "name": who, "precision": precision, "part": part,
                     "cpu": seconds[:, 0].tolist(), "wall": seconds[:, 1].tolist(), "flops": flops,
                     "seconds": float(np.median(seconds[:, clock])), "tokens": float(lengths.mean()),
                     "best": float(seconds[:, clock].min()), "worst": float(seconds[:, clock].max()),
                     "rounds": len(seconds)})
    sizes = {"ours": stored / len(sentences), "padded": setting.padded_bytes()} if stage == "stage1" else None
    return {"training": rows, "stored": {setting.name: sizes} if sizes else {}}


def limits(_quick: bool) -> dict:
    """Peaks of matrix products, and the machine's facts."""
    from benchmarks import ours, work

    types = {"fp32": work.torch.float32, "bf16": work.torch.bfloat16}
    return {"limits": {name: work.matmul_peak(types[name]) for name in ours.precisions()},
            "machine": work.machine_facts()}


def memory(who: str, quick: bool) -> dict:
    """Peak memory of stage 1 of the big models at 128 tokens: a chunk of ours, two epochs; a unit of the loop."""
    from benchmarks import ours, peers, work

    setting, precision = work.SETTINGS["big128"], ours.precisions()[-1]
    n = (512 if quick else 10_000) if who == "ours" else 64
    with work.watch_memory() as found:
        given = work.make_models(setting, "stage1")
        (ours.Ours if who == "ours" else peers.Loop)(setting, "stage1", precision, given).unit(
            setting.sentences(n, n, 1))
    return {"memory": {who: found | {"sentences": n}}} if found else {"skipped": {f"memory-{who}": "needs /proc"}}


def text(n: int, seed: int = 0, task: str = "multi_ner") -> list[tuple[list[str], list[str]]]:
    """Sentences and tags: a task's training text, or made-up words with the frequencies of a natural language."""
    path, rng = SHARED / "data" / task / "train.tsv", random.Random(seed)
    if path.is_file():
        rows = [line.rstrip("\n").split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
        return [(row[0].split(" "), row[1].split(" ")) for row in rng.sample(rows, min(n, len(rows)))]
    from benchmarks import work

    tags = [label for label in LABELS if label[0] != "I"]
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(40_000)]
    weights, rows = [1 / (rank + 1) for rank in range(len(words))], []
    for _ in range(n):
        chosen = rng.choices(words, weights, k=rng.choice(work.WORDS))
        rows.append((chosen, rng.choices(tags, (90, 4, 3, 3), k=len(chosen))))
    return rows


def tokenizer(sentences: list[list[str]]):
    """A real multilingual tokenizer, or one trained on the spot; and its name."""
    import transformers

    path = SHARED / "weights/me5-small-q4-73k"
    if path.is_dir():
        return transformers.AutoTokenizer.from_pretrained(path), path.name
    import tokenizers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    own = tokenizers.Tokenizer(tokenizers.models.Unigram())
    own.pre_tokenizer, own.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    own.train_from_iterator(sentences, tokenizers.trainers.UnigramTrainer(
        vocab_size=8000, special_tokens=special, unk_token="<unk>", show_progress=False), len(sentences))
    own.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "cls_token": "<s>",
             "sep_token": "</s>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, **names), "trained here"


def tsv(task: str, quick: bool) -> dict:
    """CPU seconds from a labelled file to ids and labels."""
    import tempfile

    from benchmarks import ours, peers, work

    rows = text(5000 if quick else 30_000, task=task)
    labels = sorted({tag for _, tags in rows for tag in tags})
    (tok, name), seconds = tokenizer([" ".join(words) for words, _ in rows]), {"ours": [], "peer": []}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.tsv"
        path.write_text("".join(f"{' '.join(w)}\t{' '.join(t)}\n" for w, t in rows), encoding="utf-8")
        for _ in range(2 if quick else 4):
            for who, module in (("ours", ours), ("peer", peers)):
                start = work.now()[0]
                found = module.encode(path, tok, 128, labels)
                seconds[who].append(work.now()[0] - start)
                del found
    real = task if (SHARED / "data" / task / "train.tsv").is_file() else "made-up text"
    medians = {who: statistics.median(times[1:]) for who, times in seconds.items()}
    return {"other": {f"tsv-{task}": medians | {"sentences": len(rows), "text": real, "tokenizer": name}}}


def compress(who: str, quick: bool) -> dict:
    """CPU seconds and memory to bring 119,547 x 768 word embeddings to a width of 384."""
    import torch
    from benchmarks import ours, work

    torch.manual_seed(0)
    matrix = torch.randn(119_547, 768) * torch.arange(1, 769) ** -0.5
    matrix = matrix @ torch.linalg.qr(torch.randn(768, 768))[0]
    rows = torch.zeros(119_547 if who == "ours" else 0, 384)  # a student has them already

    def reduce():
        if who == "ours":
            return ours.compress(matrix, rows)
        from sklearn.decomposition import PCA

        return PCA(384).fit_transform(matrix.numpy())

    seconds = []
    with work.watch_memory() as found:
        for _ in range(2 if quick else 4):
            start = work.now()[0]
            reduce()
            seconds.append(work.now()[0] - start)
    beyond = found["peak"] - found["before"] if found else None
    return {"other": {"compress": {who: statistics.median(seconds[1:]), f"{who}_mb": beyond}}}


def inference(quick: bool) -> dict:
    """Median CPU milliseconds of one sentence through the big student: ours and the pipeline in turn."""
    import copy
    import tempfile

    import transformers
    from benchmarks import ours, work

    rows = [words for words, _ in text(40 if quick else 200, seed=1)]
    tok, _ = tokenizer([" ".join(words) for words, _ in text(2000)])
    model = work.make_model(work.BIG[1], work.SETTINGS["big128"], "sdpa").eval()
    model.config.id2label = dict(enumerate(LABELS))
    pipeline = transformers.pipeline("token-classification", model=model, tokenizer=tok, device="cpu",
                                     aggregation_strategy="simple")
    with tempfile.TemporaryDirectory() as folder:
        onnx = ours.Predictor(ours.onnx_int8(copy.deepcopy(model), folder), tok, 128, LABELS)
    predictor = ours.Predictor(copy.deepcopy(model), tok, 128, LABELS)
    times = {"ours": [], "ours_model": [], "peer": [], "onnx": []}
    for words in [rows[0], *rows]:
        marks = [work.now()[0]]
        examples = predictor.prepare(words)
        marks.append(work.now()[0])
        predictor.run(examples, words)
        marks.append(work.now()[0])
        pipeline(" ".join(words))
        marks.append(work.now()[0])
        onnx.run(onnx.prepare(words), words)
        marks.append(work.now()[0])
        for who, a, b in (("ours", 0, 2), ("ours_model", 1, 2), ("peer", 2, 3), ("onnx", 3, 4)):
            times[who].append(1000 * (marks[b] - marks[a]))
    return {"other": {"inference": {who: statistics.median(values[1:]) for who, values in times.items()}}}


def passes(_quick: bool) -> dict:
    """How often a run asks the teacher about the transfer set."""
    from benchmarks import ours

    return {"other": {"teacher_passes": ours.teacher_passes(ROOT)}}


def whole(_quick: bool) -> dict:
    """Stages 1 to 3 of the demo, on part of its sentences, with every trick on and off."""
    from benchmarks import whole_run

    from xdistil.params import load_params

    part = {"train_limit": 600, "transfer_limit": 1200, "teacher_epochs": 2}
    return {"other": {"whole": whole_run.tricks(load_params("params/demo.yaml", part).model_dump(exclude_none=True))}}


MEASURES = {"limits": limits, **{name: lambda quick, name=name: training(name, quick) for name in TRAINING},
            **{f"memory-{who}": lambda quick, who=who: memory(who, quick) for who in ("ours", "loop")},
            **{f"compress-{who}": lambda quick, who=who: compress(who, quick) for who in ("ours", "peer")},
            **{f"tsv-{task}": lambda quick, task=task: tsv(task, quick) for task in ("multi_ner", "en_wikineural")},
            "inference": inference, "passes": passes, "whole": whole}


def merge(into: dict, new: dict) -> None:
    """Nested dicts joined, lists appended."""
    for key, value in new.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        elif isinstance(value, list) and key == "training":
            into.setdefault(key, []).extend(value)
        else:
            into[key] = value


def child(name: str, quick: bool, threads: int) -> dict:
    """A measure in a process of its own; what it printed is shown if it fails."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "XDISTIL_HEADLESS": "1",
                                "PYTHONPATH": os.pathsep.join(filter(None, paths)), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, __file__, "--child", name, *["--quick"] * quick]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line in {line for line in done.stderr.splitlines() if line.startswith("no rows of ")}:
        print(line, flush=True)
    if done.returncode:
        return {"skipped": {name: (done.stderr.strip().splitlines() or ["it was killed"])[-1]}}
    return json.loads(done.stdout.splitlines()[-1])


def finish(results: dict) -> None:
    """Rates, and seconds as a multiple of the limit in the same precision."""
    for row in results.get("training", []):
        peak, seconds = results["limits"].get(row["precision"]), row["seconds"]
        limit = row["flops"] / peak if peak else 0
        row |= {"sentences_per_second": 1 / seconds, "tokens_per_second": row["tokens"] / seconds,
                "limit": seconds / limit if limit else None, "limit_of": row["precision"]}


def main() -> None:
    """Run the measures one after another and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under ten minutes on two cores")
    parser.add_argument("--only", metavar="NAME", help="measures whose name holds this, the rest of FILE stays; of "
                        + ", ".join(MEASURES))
    parser.add_argument("--out", type=Path, default=ROOT / "tests/benchmarks/results/latest.json")
    parser.add_argument("--threads", type=int, default=1, help="more than 1: wall seconds instead of CPU seconds")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        with contextlib.redirect_stdout(sys.stderr):
            found = MEASURES[asked.child](asked.quick)
        return print(json.dumps(found))
    from benchmarks import table

    names = [name for name in MEASURES if name == "limits" or (asked.only or "") in name]
    results = {"threads": asked.threads, "quick": asked.quick}
    if asked.only and asked.out.is_file():  # the rest of that file stays
        results, names = json.loads(asked.out.read_text(encoding="utf-8")), names[1:]
        results["training"] = [row for row in results.get("training", [])
                               if f"{row['stage']}-{row['setting']}" not in names]
        for name in names:
            results.get("skipped", {}).pop(name, None)
    if asked.quick and not asked.only:
        for left_out in ("stage1-small128", "whole"):
            names.remove(left_out)
            merge(results, {"skipped": {left_out: "left out by --quick"}})
    for name in names:
        start = time.monotonic()
        found = child(name, asked.quick, asked.threads)
        merge(results, found)
        print(f"{name}: {time.monotonic() - start:.0f} s{' FAILED' * (name in found.get('skipped', ()))}", flush=True)
    finish(results)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    asked.out.with_suffix(".md").write_text(table.write(results), encoding="utf-8")
    print(f"wrote {asked.out} and {asked.out.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
