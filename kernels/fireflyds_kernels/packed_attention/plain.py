"""Attention document by document in plain PyTorch, with soft-capped scores and sinks: any device, any option.

For what no fused implementation has. The host reads the boundaries in every call; scores are `[H, 256, columns]`.
"""

from itertools import pairwise

import torch
from torch import Tensor

from fireflyds_kernels.packed_attention.bias import bias, span
from fireflyds_kernels.packed_attention.heads import for_every_head

# Rows of a document whose scores are in memory at a time.
_ROWS = 256


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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention output `[T, H, D]` for q `[T, H, D]`, k and v `[T, Hk, D]`, cu_seqlens `[n + 1]`, sinks `[H]`."""
    k, v = for_every_head(q, k, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    outputs = []
    for first, last in pairwise(cu_seqlens.tolist()):
        keys, values = k[first:last].transpose(0, 1), v[first:last].transpose(0, 1)
        for start in range(0, last - first, _ROWS):
            end = min(start + _ROWS, last - first)
            low, high = span(start, end, last - first, causal, window)
            scores = (q[first + start : first + end].transpose(0, 1) @ keys[:, low:high].mT).to(wide) * scale
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            rows, columns = (torch.arange(*ends, device=q.device) for ends in ((start, end), (low, high)))
            scores = scores + bias(rows, columns, causal, window, slopes, wide)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(wide)[:, None, None].expand(-1, end - start, 1)], dim=2)
            weights = torch.softmax(scores, dim=2)[..., : high - low].to(v.dtype)
            outputs.append((weights @ values[:, low:high]).transpose(0, 1))
    return torch.cat(outputs) if outputs else torch.empty_like(q)
