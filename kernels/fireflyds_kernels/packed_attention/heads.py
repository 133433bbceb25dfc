"""Grouped-query attention for kernels that need as many key heads as query heads."""

from torch import Tensor


def for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[T, Hk, D]` repeated to the H heads of q; unchanged where Hk is H."""
    repeats = q.shape[1] // k.shape[1]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1))
