"""Memory-efficient attention (CUTLASS, inside torch) with document boundaries, for GPUs before sm_80.

`aten::_efficient_attention_forward` takes `[1, T, H, D]` with boundaries and as many key heads as query heads, and
is differentiable; torch's nested tensors use it. It has kernels from sm_50 on, with tensor cores on sm_70.
"""

import torch
from torch import Tensor

from fireflyds_kernels.packed_attention.heads import for_every_head

# The operator's `custom_mask_type`.
_NO_MASK, _CAUSAL_FROM_TOP_LEFT = 0, 1


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """Attention output `[T, H, D]` for q `[T, H, D]`, k and v `[T, Hk, D]`, cu_seqlens `[n + 1]`."""
    k, v = for_every_head(q, k, v)
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        q[None],
        k[None],
        v[None],
        None,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        0.0,
        _CAUSAL_FROM_TOP_LEFT if causal else _NO_MASK,
        torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)),
        scale=scale,
    )[0]
    return out[0]
