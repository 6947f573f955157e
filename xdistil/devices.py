"""What it runs on: device and precision through accelerate, and seeds."""

from __future__ import annotations

import os

import torch

POLICIES = {"float32": "no", "mixed_float16": "fp16", "mixed_bfloat16": "bf16"}


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 instructions (AVX512_BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def choose_precision(device_type: str, opt_policy: str) -> tuple[str, str]:
    """Accelerate's mixed-precision word for a policy on a device, and why.

    Returns: ("no" | "fp16" | "bf16", reason). Raises ValueError for what cannot train.
    """
    native = {"cuda": lambda: torch.cuda.is_bf16_supported(), "cpu": cpu_multiplies_bf16,
              "xla": lambda: True}.get(device_type, lambda: False)()
    if opt_policy == "auto":
        reason = f"{device_type} {'multiplies' if native else 'does not multiply'} bfloat16 natively"
        return ("bf16" if native else "no"), reason
    if opt_policy == "mixed_float16" and device_type != "cuda":
        raise ValueError(
            f"opt_policy: mixed_float16 does not train on {device_type}; "
            "set opt_policy: mixed_bfloat16 or float32"
        )
    if opt_policy == "mixed_bfloat16" and device_type == "cpu" and not native:
        return "no", "this CPU only emulates bfloat16, many times slower: float32 is used"
    return POLICIES[opt_policy], f"opt_policy {opt_policy}"


def open_accelerator(device: str = "auto", opt_policy: str = "auto", quiet: bool = False):
    """An `accelerate.Accelerator` on the device, in the precision of the policy.

    Raises ValueError naming the parameter if the device is absent or cannot do the precision.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    # one process may run stages with different precisions one after another (tests, notebooks)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    state = PartialState(cpu=device == "cpu")
    if device not in ("auto", state.device.type):
        raise ValueError(
            f"device: {device!r} was asked for, found {state.device.type!r}; set device: auto"
        )
    precision, reason = choose_precision(state.device.type, opt_policy)
    if not quiet:
        print(f"[device] {state.device}, {'float32' if precision == 'no' else precision} ({reason})")
    return Accelerator(mixed_precision=precision, cpu=device == "cpu")


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and random."""
    from accelerate.utils import set_seed

    set_seed(seed)


def peak_memory_mb() -> float:
    """Peak resident memory of this process so far, in megabytes (1e6 bytes)."""
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
