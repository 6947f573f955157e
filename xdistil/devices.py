"""What it runs on: device and precision through accelerate."""

import contextlib
import functools
import timeit

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

POLICIES = {"float32": "no", "mixed_float16": "fp16", "mixed_bfloat16": "bf16"}


@functools.cache
def multiplies_bf16(device_type: str) -> bool:
    """Whether the device has bfloat16 arithmetic that pays. A CPU with the instructions (AVX512_BF16, AMX) is asked to
    multiply: some do so slower than in float32, others ten times faster."""
    if device_type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        if not any(getattr(torch.cpu, name, lambda: False)() for name in checks):
            return False
        full, half = (torch.ones(512, 768, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
        slow, fast = (min(timeit.repeat(lambda x=x: x @ x.T, number=3, repeat=5)) for x in (full, half))
        return slow > 1.2 * fast
    return device_type == "xla" or (device_type == "cuda" and torch.cuda.is_bf16_supported())


def choose_precision(device_type: str, opt_policy: str) -> tuple[str, str]:
    """Accelerate's word for a policy on a device ("no", "fp16", "bf16"), and why; ValueError for float16 off CUDA."""
    native = multiplies_bf16(device_type)
    if opt_policy == "auto":
        return ("bf16" if native else "no"), f"bfloat16 arithmetic {'pays' if native else 'is absent or slower'} here"
    if opt_policy == "mixed_float16" and device_type != "cuda":
        raise ValueError(f"opt_policy: mixed_float16 does not train on {device_type}; set opt_policy: mixed_bfloat16 "
                         "or float32")
    if opt_policy == "mixed_bfloat16" and device_type == "cpu" and not native:
        return "no", "mixed_bfloat16 was asked for, but this CPU has no bfloat16 arithmetic, or a slower one"
    return POLICIES[opt_policy], f"opt_policy {opt_policy}"


def open_accelerator(device: str = "auto", opt_policy: str = "auto", quiet: bool = False):
    """An `accelerate.Accelerator` on the device in the precision of the policy. Raises ValueError naming the parameter
    if the device is absent or cannot do the precision."""
    # one process may run stages of different precision one after another (notebooks, tests)
    AcceleratorState._reset_state(reset_partial_state=True)
    found = PartialState(cpu=device == "cpu").device
    if device not in ("auto", found.type):
        raise ValueError(f"device: {device!r} was asked for, found {found.type!r}; set device: auto")
    precision, reason = choose_precision(found.type, opt_policy)
    if not quiet:
        print(f"[device] {found}, {'float32' if precision == 'no' else precision} ({reason})", flush=True)
    return Accelerator(mixed_precision=precision, cpu=device == "cpu")


def asking(device: torch.device):
    """Inside, nothing is kept for a backward pass: torch's inference mode but on XLA, where training could not touch
    what was made or looked at in it."""
    return torch.no_grad() if device.type == "xla" else torch.inference_mode()


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process so far, in megabytes (1e6 bytes); None on Windows."""
    with contextlib.suppress(ImportError):
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)
