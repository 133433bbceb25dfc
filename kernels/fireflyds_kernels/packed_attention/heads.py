"""Grouped-query attention for kernels that want as many key heads as query heads."""

from torch import Tensor


def for_every_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values `[T, Hk, D]` repeated to q's H heads; as they are where they are as many."""
    repeats = q.shape[1] // k.shape[1]
    return (k, v) if repeats == 1 else (k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1))
