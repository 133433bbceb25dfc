"""Queries and keys in one launch, one program per token; the gradient is rotated by the negative angles."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fireflyds_kernels.dispatch import on_its_device


@triton.jit
def _rotate(
    x_ptr, out_ptr, stride, head_stride, cos, sin, sign,
    HEADS: tl.constexpr, ALL_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, ALL_HEADS)[:, None].to(tl.int64)
    pairs = tl.arange(0, HALF)[None]
    inside = (heads < HEADS) & (pairs < R // 2)
    source = x_ptr + token * stride + heads * head_stride + pairs
    target = out_ptr + token * (HEADS * D) + heads * D + pairs
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + R // 2, mask=inside, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(target, (first * cos - second * sin * sign).to(dtype), mask=inside)
    tl.store(target + R // 2, (second * cos + first * sin * sign).to(dtype), mask=inside)
    if R < D:
        columns = R + tl.arange(0, REST)[None]
        inside = (heads < HEADS) & (columns < D)
        values = tl.load(x_ptr + token * stride + heads * head_stride + columns, mask=inside, other=0.0)
        tl.store(out_ptr + token * (HEADS * D) + heads * D + columns, values, mask=inside)


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, q_stride, q_head, k_stride, k_head, cos_stride, sin_stride,
    sign, H: tl.constexpr, ALL_H: tl.constexpr, HK: tl.constexpr, ALL_HK: tl.constexpr, D: tl.constexpr,
    R: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Rotates all heads of one token of q `[T, H, D]` and k `[T, HK, D]`; sign = -1 gives the gradients."""
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, HALF)[None]
    cos = tl.load(cos_ptr + token * cos_stride + pairs, mask=pairs < R // 2, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_stride + pairs, mask=pairs < R // 2, other=0.0).to(tl.float32)
    _rotate(q_ptr, q_out_ptr, q_stride, q_head, cos, sin, sign, H, ALL_H, D, R, HALF, REST)
    _rotate(k_ptr, k_out_ptr, k_stride, k_head, cos, sin, sign, HK, ALL_HK, D, R, HALF, REST)


def constants(q_heads: int, kv_heads: int, head_dim: int, turned: int) -> dict[str, Any]:
    """Compile-time constants of the kernel."""
    return {
        "H": q_heads,
        "ALL_H": triton.next_power_of_2(q_heads),
        "HK": kv_heads,
        "ALL_HK": triton.next_power_of_2(kv_heads),
        "D": head_dim,
        "R": turned,
        "HALF": triton.next_power_of_2(turned // 2),
        "REST": triton.next_power_of_2(max(1, head_dim - turned)),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q `[T, H, D]` and k `[T, Hk, D]`, for cos and sin `[T, R]`."""
    rotated: tuple[Tensor, Tensor] = _rotated(q, k, cos, sin, 1.0)
    return rotated


@torch.library.custom_op("fireflyds::rope", mutates_args=())
@on_its_device
def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    outputs = (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        torch.empty_like(k, memory_format=torch.contiguous_format),
    )
    if len(q):
        rope_kernel[(len(q),)](
            q, k, cos, sin, *outputs, q.stride(0), q.stride(1), k.stride(0), k.stride(1), cos.stride(0), sin.stride(0),
            sign, **constants(q.shape[1], k.shape[1], q.shape[2], cos.shape[1]),
        )  # fmt: skip
    return outputs


@_rotated.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.sign = inputs[4]


def _gradients(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return (*_rotated(dq, dk, *ctx.saved_tensors, -ctx.sign), None, None, None)


_rotated.register_autograd(_gradients, setup_context=_save)
