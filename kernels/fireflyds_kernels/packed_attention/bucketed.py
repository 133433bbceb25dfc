"""Documents of like length side by side, through torch's own attention with an additive bias: any GPU, any option.

For GPUs that FlashAttention and Triton's tensor-core kernels leave out (V100, T4) when ALiBi or a window is asked
for. Documents are padded to the next of a few lengths, rows are taken a block at a time, so no bias is larger than
`[H, 512, longest]`. The boundaries are read by the host once per batch.
"""

from collections import defaultdict
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakIdKeyDictionary

from fireflyds_kernels.packed_attention.bias import bias, span

_ROWS = 512
_read: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, scale: float,
    window: int | None, slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    found, places = [], []
    for padded, index, inside in _buckets(cu_seqlens):
        queries, keys, values = (x[index].transpose(1, 2) for x in (q, k, v))
        out = _attend(queries, keys, values, padded, None if causal else inside, causal, scale, window, slopes)
        found.append(out.transpose(1, 2)[inside])
        places.append(index[inside])
    order = torch.cat(places)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return torch.cat(found)[back]


def _attend(
    q: Tensor, k: Tensor, v: Tensor, length: int, inside: Tensor | None, causal: bool, scale: float,
    window: int | None, slopes: Tensor | None,
) -> Tensor:  # fmt: skip
    """`[n, H, length, D]` of n documents. Padding lies behind a document, where a causal row never looks."""
    outputs = []
    positions = torch.arange(length, device=q.device)
    for start in range(0, length, _ROWS):
        end = min(start + _ROWS, length)
        low, high = span(start, end, length, causal, window)
        mask = bias(positions[start:end], positions[low:high], causal, window, slopes, q.dtype)[None]
        if inside is not None:
            mask = mask.masked_fill(~inside[:, None, None, low:high], float("-inf"))
            # Rows of padding may see nothing at all, which is no number; they are left out afterwards.
            mask = torch.where(inside[:, None, start:end, None], mask, 0)
        shape = (len(q), q.shape[1], end - start, high - low)
        outputs.append(
            scaled_dot_product_attention(
                q[:, :, start:end], k[:, :, low:high], v[:, :, low:high], attn_mask=mask.expand(shape), scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )  # fmt: skip
    return torch.cat(outputs, dim=2)


def _padded(length: int) -> int:
    """The next multiple of an eighth of the length's power of two, 16 at least: at most an eighth of padding above 128."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _buckets(cu_seqlens: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Padded length, token indices `[n, length]` and which of them are the document's, for every bucket."""
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    kept = _read.get(cu_seqlens)
    if kept is not None and kept[0] == version:
        return list(kept[1])
    documents: dict[int, list[tuple[int, int]]] = defaultdict(list)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            documents[_padded(end - start)].append((start, end))
    buckets = []
    for padded, spans in documents.items():
        first, last = torch.tensor(spans).unbind(1)
        index = first[:, None] + torch.arange(padded)
        inside = index < last[:, None]
        device = cu_seqlens.device
        buckets.append((padded, index.clamp_(max=bounds[-1] - 1).to(device), inside.to(device)))
    _read[cu_seqlens] = (version, buckets)
    return buckets
