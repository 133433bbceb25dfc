"""Batches of documents of similar length in torch's attention with an additive bias: any GPU, any option.

For ALiBi or a window on GPUs that FlashAttention and Triton's tensor-core kernels do not support (V100, T4). Documents
are padded to the next of a few lengths, and rows are processed in blocks, so that no bias is larger than
`[H, 512, longest]`. The host reads the boundaries once per batch.
"""

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from fireflyds_kernels.packed_attention.bias import bias, span
from fireflyds_kernels.packed_attention.heads import for_every_head

_ROWS = 512
_bucket_cache: WeakIdKeyDictionary = WeakIdKeyDictionary()


class _Bucket(NamedTuple):
    """n documents padded to `length`: indices of their tokens `[n · length]`, bool `[n, length]`, False at padding."""

    length: int
    indices: Tensor
    inside: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
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
    # With fewer key heads than query heads, torch's memory-efficient kernels do not support a bias.
    k, v = for_every_head(q, k, v)
    buckets, order = _buckets(cu_seqlens)
    outputs = []
    for bucket in buckets:
        queries, keys, values = (
            x.index_select(0, bucket.indices).unflatten(0, (-1, bucket.length)).transpose(1, 2) for x in (q, k, v)
        )
        out = _attend(queries, keys, values, None if causal else bucket.inside, causal, scale, window, slopes)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, order)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inside: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """Attention of n padded documents, `[n, H, length, D]`. Padding follows a document, hidden from causal rows."""
    outputs, length = [], q.shape[2]
    positions = torch.arange(length, device=q.device)
    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        low, high = span(start, end, length, causal, window)
        # Widths in multiples of 16, so that torch need not copy the bias to align it.
        low, high = low // 16 * 16, min(length, -(-high // 16) * 16)
        mask = bias(positions[start:end], positions[low:high], causal, window, slopes, q.dtype)[None]
        if inside is not None:
            mask = mask.masked_fill(~inside[:, None, None, low:high], float("-inf"))
            # The softmax of a padding row without visible columns would be NaN; padding rows are dropped afterwards.
            mask = torch.where(inside[:, None, start:end, None], mask, 0)
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], attn_mask=mask, scale=scale
            )
        )
    return torch.cat(outputs, dim=2)


def _padded(length: int) -> int:
    """Next multiple of an eighth of the length's power of two, at least 16: above 128 at most 1/8 of padding."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _buckets(cu_seqlens: Tensor) -> tuple[list[_Bucket], Tensor]:
    """The buckets, and for every token of the packed row its index in the concatenated tokens of all buckets."""
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    cached = _bucket_cache.get(cu_seqlens)
    if cached is not None and cached[0] == version:
        return cached[1], cached[2]
    documents: dict[int, list[tuple[int, int]]] = defaultdict(list)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            documents[_padded(end - start)].append((start, end))
    device, offset = cu_seqlens.device, 0
    buckets, order = [], torch.zeros(bounds[-1], dtype=torch.long)
    for length, spans in documents.items():
        first, last = torch.tensor(spans).unbind(1)
        indices = first[:, None] + torch.arange(length)
        inside = indices < last[:, None]
        order[indices[inside]] = offset + inside.flatten().nonzero()[:, 0]
        offset += indices.numel()
        buckets.append(_Bucket(length, indices.clamp_(max=bounds[-1] - 1).flatten().to(device), inside.to(device)))
    _bucket_cache[cu_seqlens] = (version, buckets, order.to(device))
    return buckets, _bucket_cache[cu_seqlens][2]
