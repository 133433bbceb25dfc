"""Number formats: selection of the training precision, and detection of formats that the CPU emulates in software."""

import time
from typing import Any

import torch

from fireflyds.config import HardwareConfig, Precision
from fireflyds.errors import UserError

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


def has_bf16(capability: int) -> bool:
    """True where a CUDA device of this compute capability (80 for sm_80) has bf16 arithmetic.

    `torch.cuda.is_bf16_supported` is also true for the emulation on older devices.
    """
    return capability >= 80


def local_capability() -> int:
    """The compute capability of the current GPU, 80 for sm_80; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def is_emulated(dtype: torch.dtype) -> bool:
    """True where there is no GPU and the CPU computes `dtype` in software: the same values, many times slower."""
    if dtype not in (torch.bfloat16, torch.float16) or torch.cuda.is_available():
        return False
    name = "bf16" if dtype is torch.bfloat16 else "fp16"
    return not getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")()


def resolve_precision(config: HardwareConfig, key: str = "hardware.precision") -> Precision:
    """Returns the training precision. `auto`: bf16 on a GPU that supports it, fp16 on other GPUs, fp32 on a CPU.

    Args:
        key: the verb's key of the precision, for the error.

    Raises:
        UserError: bf16 on a GPU that does not support it.
    """
    if not torch.cuda.is_available():
        return Precision.fp32 if config.precision is Precision.auto else config.precision
    supported = has_bf16(local_capability())
    if config.precision is Precision.auto:
        return Precision.bf16 if supported else Precision.fp16
    if config.precision is Precision.bf16 and not supported:
        raise UserError(
            f"{torch.cuda.get_device_name()} has no bf16",
            key=key,
            value="bf16",
            remedy=f"Use {key}=fp16",
        )
    return config.precision


def emulation_notes(precision: Precision) -> list[str]:
    """Returns one note for the log where this CPU emulates `precision`, with the measured slowdown against fp32."""
    dtype = DTYPES[precision]
    if not is_emulated(dtype):
        return []
    ratio = _matmul_seconds(dtype) / _matmul_seconds(torch.float32)
    return [
        f"note: hardware.precision={precision.name}: this CPU has no {precision.name} arithmetic and emulates it; a "
        f"matrix product takes {ratio:.0f} times as long as in fp32 here. hardware.precision=fp32 is faster"
    ]


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Returns the shortest time in seconds of three products of two `[256, 256]` matrices."""
    matrix = torch.ones(256, 256, dtype=dtype)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(matrix, matrix)
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def inference_dtype(hf_config: Any) -> torch.dtype | str:
    """Returns the dtype for loading an inference model: `auto` (its own), or another one where its own is emulated:
    float32 on a CPU, float16 in the place of bf16 on a GPU."""
    own = getattr(hf_config, "dtype", None) or torch.float32
    if own is torch.bfloat16 and torch.cuda.is_available():
        return "auto" if has_bf16(local_capability()) else torch.float16
    return torch.float32 if is_emulated(own) else "auto"
