"""A linear layer on a 4-bit weight, with its adapter."""

from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels import dispatch, requirements
from fireflyds_kernels.dispatch import Implementation
from fireflyds_kernels.requirements import DispatchKey, always


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
    """`x Wᵀ + bias + scaling · dropout(x) Aᵀ Bᵀ`, with W the frozen 4-bit weight (QLoRA, arXiv 2305.14314).

    Args:
        x: `[..., in]`. Everything is computed in its number format; there is no float32 copy of it.
        base: bitsandbytes' `Params4bit` of an `[out, in]` weight.
        lora_a: `[r, in]`; lora_b: `[out, r]`, of any number format; their gradients have the same.
        bias: `[out]` or None.
        dropout: dropout probability on the adapter's input x.
        keep_weight: save the dequantised W for the backward pass. With gradient checkpointing this avoids a second
            dequantisation (W of the recomputation is reused) and holds the weights of one layer at a time; without it,
            those of all layers.

    Returns:
        `[..., out]` of x's number format.

    Raises:
        ValueError: shapes that do not match, or a weight that is not a quantised 4-bit one.
    """
    state = getattr(base, "quant_state", None)
    if state is None:
        raise ValueError("qlora_linear: base is no quantised 4-bit weight; move the layer to its device first")
    out_features, in_features = state.shape
    if (
        x.shape[-1] != in_features
        or lora_a.shape != (len(lora_a), in_features)
        or lora_b.shape != (out_features, len(lora_a))
    ):
        raise ValueError(
            f"qlora_linear: x [..., {in_features}], lora_a [r, {in_features}] and lora_b [{out_features}, r] expected, "
            f"got {[*x.shape]}, {[*lora_a.shape]}, {[*lora_b.shape]}"
        )
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"qlora_linear: bias [{out_features}] expected, got {[*bias.shape]}")
    keep_mask = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout) if dropout else None
    run = dispatch.select("qlora_linear", x)
    result: Tensor = run(x, base, lora_a, lora_b, scaling, bias, keep_mask, dropout, keep_weight)
    return result


def _needs_bitsandbytes(key: DispatchKey) -> str | None:
    return requirements.import_problem("bitsandbytes", "functional")


dispatch.Kernel(
    "qlora_linear",
    Implementation("fused", "fireflyds_kernels.qlora_linear.fused", "qlora_linear", _needs_bitsandbytes),
    Implementation("reference", "fireflyds_kernels.qlora_linear.reference", "qlora_linear", always),
)
