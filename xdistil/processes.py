"""Several processes that run one stage together, under torchrun: each computes its part of every batch, the first
writes. A plain process is the first of one, and then all of this does nothing."""

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ALONE = []  # not empty: this process works while the others wait, see `alone`
PATIENCE = datetime.timedelta(days=1)  # for the others, who may have a teacher to wait for


def rank() -> int:
    """The number of this process, from 0."""
    return 0 if ALONE else int(os.environ.get("RANK", 0))


def size() -> int:
    """How many processes there are."""
    return 1 if ALONE else int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def alone():
    """Inside, this process is the first of one."""
    ALONE.append(True)
    try:
        yield
    finally:
        ALONE.pop()


@contextlib.contextmanager
def joined(on_cpu: bool):
    """Joins the processes that torchrun started, if it did; all but the first are silent."""
    if size() == 1:
        yield
        return
    import torch

    backend = "gloo" if on_cpu or not torch.cuda.is_available() else "cpu:gloo,cuda:nccl"
    torch.distributed.init_process_group(backend, timeout=PATIENCE)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if rank() == 0 else nowhere):
        yield
    torch.distributed.destroy_process_group()


def own_part(rows: np.ndarray) -> tuple[np.ndarray, bool]:
    """Every n-th of a batch's rows, which are sorted by length, for this one of n processes. Where there are fewer
    rows than processes some get the first row, and False: it counts for nothing."""
    own = rows[rank() :: size()]
    return (own, True) if len(own) else (rows[:1], False)


def mean(values):
    """The mean over processes of a tensor."""
    if size() == 1:
        return values
    import torch

    torch.distributed.all_reduce(values := values.detach().clone().float())
    return values / size()


def sharing(shared_out):
    """`losses.shared_out` over these processes, where there are several."""
    return shared_out(mean) if size() > 1 else contextlib.nullcontext()


def agree(call):
    """What the first process gets from `call`, or its error, in all of them; as JSON, as nothing is unpickled."""
    if size() == 1:
        return call()
    import torch

    value, error = None, None
    if rank() == 0:
        try:
            value = call()
        except Exception as found:
            error = found
    said = json.dumps([value, error and f"{type(error).__name__}: {error}"], default=str).encode()
    n = torch.tensor(len(said))
    torch.distributed.broadcast(n, 0)
    letters = torch.frombuffer(bytearray(said if rank() == 0 else int(n)), dtype=torch.uint8)
    torch.distributed.broadcast(letters, 0)
    other, why = json.loads(letters.numpy().tobytes())
    if why:
        raise error or RuntimeError(why)
    return value if rank() == 0 else other


def gather(rows: np.ndarray) -> list[np.ndarray]:
    """The arrays [N, ...] of all processes, by rank, in each of them; N may differ."""
    if size() == 1:
        return [rows]
    import torch

    lengths = [torch.tensor(0) for _ in range(size())]
    torch.distributed.all_gather(lengths, torch.tensor(len(rows)))
    most = int(max(lengths))
    mine = torch.from_numpy(np.concatenate([rows, np.zeros((most - len(rows), *rows.shape[1:]), rows.dtype)]))
    found = [torch.empty_like(mine) for _ in range(size())]
    torch.distributed.all_gather(found, mine)
    return [part[: int(n)].numpy() for part, n in zip(found, lengths, strict=True)]


def wait() -> None:
    """Go on when all are here."""
    agree(lambda: None)


def side_by_side(module, device):
    """A module whose backward pass leaves the mean gradients of all processes, and starts with equal weights: torch's
    DistributedDataParallel."""
    if size() == 1:
        return module
    from torch.nn.parallel import DistributedDataParallel

    # static: the same parameters get gradients in every batch, not always all of them
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None, static_graph=True)


def launch(params: dict, n: int, stage: str) -> None:
    """Run one stage in n processes of this host, what the first one prints being printed here. An interrupt goes on
    to them. Raises RuntimeError with what they say if they fail."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // n))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "params.json")  # which is YAML too
        path.write_text(json.dumps(params), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "-m",
                   "xdistil.stages", str(path), stage]
        said, interrupted = [], False
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1,
                              env=os.environ | {"OMP_NUM_THREADS": threads, "LOGLEVEL": "CRITICAL"},
                              start_new_session=True) as child:
            while child.poll() is None:
                try:
                    for line in child.stdout:
                        said.append(line)
                        if not _is_noise(said):
                            print(line, end="", flush=True)
                    child.wait()
                except KeyboardInterrupt:
                    interrupted = True
                    child.send_signal(signal.SIGTERM)
    if interrupted:
        raise KeyboardInterrupt(f"[{stage}] stopped; the same call goes on from its last checkpoint")
    if child.returncode:
        why = [line.removeprefix("xdistil: ").strip() for line in said if line.startswith("xdistil: ")]
        raise RuntimeError(why[0] if why else "".join(said[-20:]))


def _is_noise(said: list[str]) -> bool:
    """Whether the last line is the launcher's own account of a failure that was told before it."""
    return any(line.startswith("xdistil: ") for line in said) or "torch/distributed/" in said[-1]
