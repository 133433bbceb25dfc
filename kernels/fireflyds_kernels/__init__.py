"""Kernels for packed sequences. Each has its formula in `__init__.py` and its definition in `reference.py`."""

from fireflyds_kernels.dispatch import CannotRunError, describe, force
from fireflyds_kernels.linear_cross_entropy import linear_cross_entropy
from fireflyds_kernels.packed_attention import packed_attention
from fireflyds_kernels.qlora_linear import qlora_linear
from fireflyds_kernels.rms_norm import rms_norm
from fireflyds_kernels.rope import rope
from fireflyds_kernels.swiglu import swiglu

__all__ = [
    "CannotRunError",
    "describe",
    "force",
    "linear_cross_entropy",
    "packed_attention",
    "qlora_linear",
    "rms_norm",
    "rope",
    "swiglu",
]
