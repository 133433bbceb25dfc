"""Causal attention over documents laid end to end, none of which sees another."""

import torch
from torch import Tensor

from fireflyds_kernels.packed_attention import reference


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ + mask) v, the mask letting token i see token j of the same document (j ≤ i if causal).

    Args:
        q: `[T, H, D]`.
        k, v: `[T, Hk, D]`; Hk divides H (grouped-query attention).
        cu_seqlens: int32 `[n + 1]`, document boundaries from 0 to T.
        max_seqlen: length of the longest document.
        scale: 1/√D when None.

    Returns:
        `[T, H, D]`.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if q.dim() != 3 or k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"packed_attention: q [T, H, D], k and v [T, Hk, D] expected, got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"packed_attention: cu_seqlens must be int32 [n + 1], got {cu_seqlens.dtype} {[*cu_seqlens.shape]}"
        )
    return reference.packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, causal=causal, scale=scale)
