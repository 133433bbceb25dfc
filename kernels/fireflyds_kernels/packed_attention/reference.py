"""The definition: scaled dot-product attention, one document at a time."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *, max_seqlen: int, causal: bool, scale: float | None
) -> Tensor:
    lengths = cu_seqlens.diff().tolist()
    if sum(lengths) != q.shape[0] or max(lengths) > max_seqlen:
        raise ValueError(
            f"packed_attention: documents of {sum(lengths)} tokens (longest {max(lengths)}) for T={q.shape[0]}, max_seqlen={max_seqlen}"
        )
    # torch.split and one cat: a slice per document would each make a full-size gradient in the backward pass.
    documents = zip(*(x.transpose(0, 1).split(lengths, dim=1) for x in (q, k, v)), strict=True)
    grouped = q.shape[1] != k.shape[1]
    outputs = [
        scaled_dot_product_attention(qi[None], ki[None], vi[None], is_causal=causal, scale=scale, enable_gqa=grouped)[0]
        for qi, ki, vi in documents
    ]
    return torch.cat(outputs, dim=1).transpose(0, 1)
