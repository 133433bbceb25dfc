"""Reference implementation: dequantise, multiply, add the adapter."""

from typing import Any

from torch import Tensor
from torch.nn.functional import linear


def qlora_linear(
    x: Tensor,
    base: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    keep_mask: Tensor | None,
    dropout: float,
    keep_weight: bool,
) -> Tensor:
    """`[..., out]` for x and keep_mask (of dropout) `[..., in]`, lora_a `[r, in]`, lora_b `[out, r]`, bias `[out]`."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(base.data, base.quant_state).to(x.dtype)
    dropped = x if keep_mask is None else x * keep_mask / (1 - dropout)
    adapter = linear(linear(dropped, lora_a.to(x.dtype)), lora_b.to(x.dtype))
    return linear(x, weight, None if bias is None else bias.to(x.dtype)) + scaling * adapter
