"""Explicit forward and backward pass: bitsandbytes' kernel dequantises W, the adapter's output is added in place."""

from typing import Any

import torch
from torch import Tensor


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
    import bitsandbytes  # noqa: F401  (its operators)

    state = base.quant_state
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    block_sizes = [state.blocksize, state.state2.blocksize if state.nested else 0]
    rows = x.reshape(-1, x.shape[-1])
    out = _forward(
        rows, base.data, state.absmax, nested, block_sizes, state.quant_type, len(lora_b), lora_a, lora_b,
        # Dropout's factor 1 / (1 - p) is part of the scaling: no pass over x of its own.
        scaling / (1 - dropout), bias, None if keep_mask is None else keep_mask.reshape(rows.shape), keep_weight,
    )[0]  # fmt: skip
    return out.reshape(*x.shape[:-1], len(lora_b))


def _unpack(
    packed: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    block_sizes: list[int],
    kind: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Dequantises W to `dtype`; with double quantisation, its scales first."""
    if nested:
        scales, code, offset = nested
        absmax = (
            torch.ops.bitsandbytes.dequantize_blockwise(absmax, scales, code, block_sizes[1], torch.float32) + offset
        )
    weight: Tensor = torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block_sizes[0], kind, shape, dtype)
    return weight


@torch.library.custom_op("fireflyds::qlora_linear", mutates_args=())
def _forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    block_sizes: list[int],
    kind: str,
    out_features: int,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    keep_mask: Tensor | None,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output `[T, out]`, the adapter's hidden values x Aᵀ (without dropout's factor) `[T, r]`, and W (empty unless
    `keep_weight`)."""
    weight = _unpack(packed, absmax, nested, block_sizes, kind, [out_features, x.shape[1]], x.dtype)
    out = x @ weight.T if bias is None else torch.addmm(bias.to(x.dtype), x, weight.T)
    inner = _dropped(x, keep_mask) @ lora_a.to(x.dtype).T
    out.addmm_(inner, lora_b.to(x.dtype).T, alpha=scaling)
    return out, inner, weight if keep_weight else x.new_empty(0)


def _dropped(x: Tensor, keep_mask: Tensor | None) -> Tensor:
    return x if keep_mask is None else x * keep_mask


@_forward.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: Any,
    block_sizes: Any,
    kind: str,
    out_features: int,
    lora_a: Tensor,
    lora_b: Any,
    scaling: float,
    bias: Any,
    keep_mask: Any,
    keep_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    weight = x.new_empty(out_features, x.shape[1]) if keep_weight else x.new_empty(0)
    return x.new_empty(x.shape[0], out_features), x.new_empty(x.shape[0], lora_a.shape[0]), weight


@torch.library.custom_op("fireflyds::qlora_linear_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    inner: Tensor,
    weight: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested: list[Tensor],
    block_sizes: list[int],
    kind: str,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    keep_mask: Tensor | None,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    outer = (grad @ b).mul_(scaling)
    dx = x.new_empty(0)
    if needs_dx:
        if not weight.numel():
            weight = _unpack(packed, absmax, nested, block_sizes, kind, [grad.shape[1], x.shape[1]], x.dtype)
        dx = grad @ weight
        if keep_mask is None:
            dx.addmm_(outer, a)
        else:
            dx += (outer @ a).mul_(keep_mask)
    da = outer.T @ _dropped(x, keep_mask)
    db = (grad.T @ inner).mul_(scaling)
    return dx, da.to(lora_a.dtype), db.to(lora_b.dtype)


@_backward.register_fake
def _(
    grad: Any,
    x: Tensor,
    inner: Any,
    weight: Any,
    packed: Any,
    absmax: Any,
    nested: Any,
    block_sizes: Any,
    kind: str,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    keep_mask: Any,
    needs_dx: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x) if needs_dx else x.new_empty(0), torch.empty_like(lora_a), torch.empty_like(lora_b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, packed, absmax, nested, block_sizes, kind, _, lora_a, lora_b, scaling, bias, keep_mask, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], packed, absmax, lora_a, lora_b, bias, keep_mask, *nested)
    ctx.options = (block_sizes, kind, scaling)
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    x, inner, weight, packed, absmax, lora_a, lora_b, bias, keep_mask, *nested = ctx.saved_tensors
    block_sizes, kind, scaling = ctx.options
    needs_dx = ctx.needs_input_grad[0]
    dx, da, db = _backward(
        grad, x, inner, weight, packed, absmax, nested, block_sizes, kind, lora_a, lora_b, scaling, keep_mask, needs_dx,
    )  # fmt: skip
    dbias = grad.sum(0).to(bias.dtype) if bias is not None and ctx.needs_input_grad[10] else None
    empty = [None] * len(nested)
    return dx if needs_dx else None, None, None, empty, None, None, None, da, db, None, dbias, None, None


_forward.register_autograd(_gradients, setup_context=_save)
