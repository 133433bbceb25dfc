"""Documents of like length side by side, through torch's own attention with an additive bias: any GPU, any option.

For GPUs that FlashAttention and Triton's tensor-core kernels leave out (V100, T4) when ALiBi or a window is asked
for. Documents are padded to the next of a few lengths, rows are taken a block at a time, so no bias is larger than
`[H, 512, longest]`. The boundaries are read by the host once per batch.
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
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


class _Bucket(NamedTuple):
    """Documents padded to `length`: their tokens' places `[n · length]`, and which of them are the documents' own."""

    length: int
    places: Tensor
    inside: Tensor


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None, slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    # With fewer key heads torch's memory-efficient kernels do not run beside a bias.
    k, v = for_every_head(q, k, v)
    buckets, back = _buckets(cu_seqlens)
    found = []
    for bucket in buckets:
        queries, keys, values = (
            x.index_select(0, bucket.places).unflatten(0, (-1, bucket.length)).transpose(1, 2) for x in (q, k, v)
        )
        out = _attend(queries, keys, values, None if causal else bucket.inside, causal, scale, window, slopes)
        found.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(found).index_select(0, back)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, inside: Tensor | None, causal: bool, scale: float, window: int | None,
    slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[n, H, length, D]` of n documents. Padding lies behind a document, where a causal row never looks."""
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
            # Rows of padding may see nothing at all, which is no number; they are left out afterwards.
            mask = torch.where(inside[:, None, start:end, None], mask, 0)
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], attn_mask=mask, scale=scale
            )
        )
    return torch.cat(outputs, dim=2)


def _padded(length: int) -> int:
    """The next multiple of an eighth of the length's power of two, 16 at least: at most an eighth of padding above 128."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _buckets(cu_seqlens: Tensor) -> tuple[list[_Bucket], Tensor]:
    """The buckets, and where among all their tokens, laid end to end, each token of the row is."""
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    kept = _read.get(cu_seqlens)
    if kept is not None and kept[0] == version:
        return kept[1], kept[2]
    documents: dict[int, list[tuple[int, int]]] = defaultdict(list)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            documents[_padded(end - start)].append((start, end))
    device, at = cu_seqlens.device, 0
    buckets, back = [], torch.zeros(bounds[-1], dtype=torch.long)
    for length, spans in documents.items():
        first, last = torch.tensor(spans).unbind(1)
        places = first[:, None] + torch.arange(length)
        inside = places < last[:, None]
        back[places[inside]] = at + inside.flatten().nonzero()[:, 0]
        at += places.numel()
        buckets.append(_Bucket(length, places.clamp_(max=bounds[-1] - 1).flatten().to(device), inside.to(device)))
    _read[cu_seqlens] = (version, buckets, back.to(device))
    return buckets, _read[cu_seqlens][2]
