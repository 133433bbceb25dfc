"""Kernels for packed sequences. Each has its formula in `__init__.py` and its definition in `reference.py`."""

from fireflyds_kernels.linear_cross_entropy import linear_cross_entropy
from fireflyds_kernels.packed_attention import packed_attention

__all__ = ["linear_cross_entropy", "packed_attention"]
