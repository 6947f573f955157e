"""What it runs on: device and precision through accelerate."""

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

POLICIES = {"float32": "no", "mixed_float16": "fp16", "mixed_bfloat16": "bf16"}


def multiplies_bf16(device_type: str) -> bool:
    """Whether the device has bfloat16 arithmetic (on a CPU: AVX512_BF16 or AMX)."""
    if device_type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in checks)
    return device_type == "xla" or (device_type == "cuda" and torch.cuda.is_bf16_supported())


def choose_precision(device_type: str, opt_policy: str) -> tuple[str, str]:
    """Accelerate's word for a policy on a device ("no", "fp16", "bf16"), and why; ValueError for float16 off CUDA."""
    native = multiplies_bf16(device_type)
    if opt_policy == "auto":
        return ("bf16" if native else "no"), f"{'has' if native else 'has no'} bfloat16 arithmetic"
    if opt_policy == "mixed_float16" and device_type != "cuda":
        raise ValueError(f"opt_policy: mixed_float16 does not train on {device_type}; set opt_policy: mixed_bfloat16 "
                         "or float32")
    if opt_policy == "mixed_bfloat16" and device_type == "cpu" and not native:
        return "no", "mixed_bfloat16 was asked for, but this CPU only emulates it, many times slower"
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
