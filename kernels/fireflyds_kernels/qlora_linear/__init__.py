"""A linear layer on a 4-bit weight, with its adapter."""

from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import DispatchKey, Implementation, always


def qlora_linear(
    x: Tensor,
    base: Any,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout: float = 0.0,
    keep_weight: bool = False,
) -> Tensor:
    """x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ, with W the frozen 4-bit weight (QLoRA, arXiv 2305.14314).

    Args:
        x: `[..., in]`. Everything is computed in its number format; there is no float32 copy of it.
        base: bitsandbytes' `Params4bit` of an `[out, in]` weight.
        lora_a: `[r, in]`; lora_b: `[out, r]`, of any number format, which their gradients keep.
        bias: `[out]` or None.
        dropout: of x on its way to the adapter.
        keep_weight: keep the unpacked W for the backward pass. Inside gradient checkpointing that spares unpacking it
            once more (the recomputation's is reused) and holds one layer's weights; elsewhere it would hold them all.

    Returns:
        `[..., out]` of x's number format.

    Raises:
        ValueError: shapes that do not fit together, or a weight that is not a quantised 4-bit one.
    """
    state = getattr(base, "quant_state", None)
    if state is None:
        raise ValueError("qlora_linear: base is no quantised 4-bit weight; move the layer to its device first")
    wide, deep = state.shape
    if x.shape[-1] != deep or lora_a.shape != (len(lora_a), deep) or lora_b.shape != (wide, len(lora_a)):
        raise ValueError(
            f"qlora_linear: x [..., {deep}], lora_a [r, {deep}] and lora_b [{wide}, r] expected, got {[*x.shape]}, "
            f"{[*lora_a.shape]}, {[*lora_b.shape]}"
        )
    if bias is not None and bias.shape != (wide,):
        raise ValueError(f"qlora_linear: bias [{wide}] expected, got {[*bias.shape]}")
    kept = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout) if dropout else None
    run = dispatch.select("qlora_linear", x)
    found: Tensor = run(x, base, lora_a, lora_b, scaling, bias, kept, dropout, keep_weight)
    return found


def _needs_bitsandbytes(where: DispatchKey) -> str | None:
    return None if dispatch.installed("bitsandbytes") else "the package bitsandbytes is not installed"


dispatch.Kernel(
    "qlora_linear",
    Implementation("fused", "fireflyds_kernels.qlora_linear.fused", "qlora_linear", _needs_bitsandbytes),
    Implementation("reference", "fireflyds_kernels.qlora_linear.reference", "qlora_linear", always),
)
