"""What is worked on: shapes, sentences, models, floating-point operations; the machine, its limits and clocks."""

import os
import platform
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

BATCH, LEARNING_RATE, CLIP, DROPOUT, N_LABELS = 32, 1e-4, 1.0, 0.1, 7
# Words per sentence of multi_ner's transfer text at 64 evenly spaced quantiles: its lengths without the file.
WORDS = (2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 9, 10, 10, 10, 11, 11, 12, 12, 12, 13, 13, 14, 14, 15, 16, 16, 17,
         17, 18, 18, 18, 19, 19, 20, 20, 21, 22, 22, 23, 24, 25, 26, 26, 27, 28, 30, 31, 32, 33, 35, 37, 38, 41, 44,
         46, 51, 56, 64, 73, 96)


@dataclass(frozen=True)
class Encoder:
    """The sizes of a BERT."""

    layers: int
    hidden: int
    heads: int
    inner: int

    def flops(self, lengths: np.ndarray) -> float:
        """Multiplications and additions of one forward pass over real tokens: linear layers and attention."""
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.inner
        squares = (lengths.astype(float) ** 2).sum()
        return self.layers * (2.0 * weights * lengths.sum() + 4.0 * self.hidden * squares)


@dataclass(frozen=True)
class Setting:
    """A teacher, a student, how many ids both know, and the longest sentence."""

    name: str
    teacher: Encoder
    student: Encoder
    vocab: int
    seq_len: int

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Hidden states (student, teacher) that are compared, counted from the top; 0 = embeddings."""
        return [(s, s + self.teacher.layers - self.student.layers) for s in range(self.student.layers + 1)]

    def lengths(self, n: int) -> np.ndarray:
        """Tokens of n sentences: the same quantiles for every n, so that units of any size compare."""
        middles = [(np.arange(k) + 0.5) / k for k in (n, len(WORDS))]
        return np.minimum(np.interp(*middles, WORDS).round().astype(int) + 2, self.seq_len)

    def sentences(self, n: int, block: int, seed: int) -> list[np.ndarray]:
        """Random ids of n sentences, in blocks that hold the same lengths in another order."""
        rng = np.random.default_rng(seed)
        order = np.concatenate([rng.permutation(self.lengths(block)) for _ in range(n // block)])
        return [rng.integers(5, self.vocab, length) for length in order]

    def flops(self, stage: str, part: str, lengths: np.ndarray) -> float:
        """Of a pass over sentences of these lengths; a backward pass costs two forward ones."""
        project = 2.0 * self.student.hidden * self.teacher.hidden * len(self.pairs) * lengths.sum()
        learn = 3 * (self.student.flops(lengths) + (project if stage == "stage1" else 0))
        return learn + (self.teacher.flops(lengths) if part == "first" else 0)

    def padded_bytes(self) -> int:
        """Of one sentence's stage-1 targets in float32, padded to `seq_len`."""
        hidden = len(self.pairs) * self.teacher.hidden * self.seq_len
        return 4 * (hidden + self.student.layers * self.teacher.heads * self.seq_len**2)


BIG, SMALL = (Encoder(12, 768, 12, 3072), Encoder(6, 384, 12, 1536)), (Encoder(6, 384, 12, 1536),
                                                                       Encoder(3, 192, 12, 768))
SETTINGS = {f"{name}{seq_len}": Setting(f"{name}{seq_len}", *pair, vocab, seq_len)
            for name, pair, vocab in (("big", BIG, 119_547), ("small", SMALL, 30_000)) for seq_len in (32, 128)}


def make_model(encoder: Encoder, setting: Setting, attention: str, dropout: tuple[float, float] = (0.0, 0.0)):
    """A token classifier with random weights; `dropout` of hidden states and of attention maps."""
    config = transformers.BertConfig(
        vocab_size=setting.vocab, hidden_size=encoder.hidden, num_hidden_layers=encoder.layers,
        num_attention_heads=encoder.heads, intermediate_size=encoder.inner, num_labels=N_LABELS,
        hidden_dropout_prob=dropout[0], attention_probs_dropout_prob=dropout[1], pad_token_id=0)
    return transformers.AutoModelForTokenClassification.from_config(config, attn_implementation=attention)


def make_models(setting: Setting, stage: str, dropout: float = DROPOUT, seed: int = 0):
    """Teacher, student (word embeddings frozen) and the projections of its hidden states by layer."""
    torch.manual_seed(seed)
    attention = "eager" if stage == "stage1" else "sdpa"  # only eager attention returns maps
    teacher = make_model(setting.teacher, setting, attention).eval().requires_grad_(False)
    student = make_model(setting.student, setting, attention, (dropout, 0.0 if stage == "stage1" else dropout))
    student.get_input_embeddings().weight.requires_grad_(False)
    sizes = setting.student.hidden, setting.teacher.hidden
    return teacher, student, nn.ModuleDict({str(s): nn.Linear(*sizes) for s, _ in setting.pairs})


def now() -> np.ndarray:
    """CPU seconds of this process, and seconds of the clock on the wall."""
    return np.array([time.process_time(), time.perf_counter()])


def matmul_peak(dtype: torch.dtype, trials: int = 12) -> float:
    """Operations per second of the largest linear layers: the best of some trials. CPU seconds with one thread."""
    clock, best = (0 if torch.get_num_threads() == 1 else 1), 0.0
    with torch.inference_mode():
        for rows, width, out in ((640, 768, 3072), (2048, 768, 3072), (2048, 3072, 768)):
            x, w = torch.randn(rows, width).to(dtype), torch.randn(out, width).to(dtype)
            for _ in range(trials):
                start = now()
                for _ in range(5):
                    nn.functional.linear(x, w)
                best = max(best, 10.0 * rows * width * out / (now() - start)[clock])
    return best


def machine_facts() -> dict:
    """What the figures depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    field = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    field = {name.strip(): value.strip() for name, value in field.items()}
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "processor": field.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in wanted if flag in field.get("flags", "").split()],
        "ONEDNN_MAX_CPU_ISA": os.environ.get("ONEDNN_MAX_CPU_ISA", "not set"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _resident(name: str) -> float:
    """A line of this process's status file in MB: VmHWM (the peak), VmRSS, RssAnon (without mapped files)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith(name)) / 1024


@contextmanager
def watch_memory():
    """Fills a dict with the peak of resident memory in MB: `peak`, `anonymous` (without mapped files, which the
    system may drop at any time; sampled) and `before`. Empty where there is no /proc."""
    found, done = {}, threading.Event()
    if not Path("/proc/self/status").is_file():
        yield found
        return

    def sample():
        while not done.wait(0.02):
            found["anonymous"] = max(found["anonymous"], _resident("RssAnon"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    found |= {"before": _resident("VmRSS"), "anonymous": _resident("RssAnon")}
    watcher = threading.Thread(target=sample, daemon=True)
    watcher.start()
    yield found
    done.set()
    watcher.join()
    found["peak"] = _resident("VmHWM")
