"""One pass over the rows forward, one backward; each program sums the weight's gradient over its share of the rows."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fireflyds_kernels.dispatch import on_its_device, processors


@triton.jit
def forward_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, scale_ptr, d, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):
    """Normalised rows of `[n, d]`, 1/RMS of each row `[n]`, and with RESIDUAL the sum `[n, d]`. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    x = tl.load(x_ptr + row * d + columns, mask=inside, other=0.0)
    # Sums and products are computed in float32 and then rounded: bitwise equal to the narrow type, also interpreted.
    wide = x.to(tl.float32)
    if RESIDUAL:
        wide += tl.load(residual_ptr + row * d + columns, mask=inside, other=0.0).to(tl.float32)
        total = wide.to(x.dtype)
        tl.store(total_ptr + row * d + columns, total, mask=inside)
        wide = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 0) / d + eps)
    tl.store(scale_ptr + row, scale)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(out_ptr + row * d + columns, (normed * weight.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, beside_ptr, total_ptr, weight_ptr, scale_ptr, dx_ptr, dweight_ptr, rows, d, share,
    BESIDE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With n = s · scale and g = grad · weight: dx = scale · (g − n · mean(g · n)), plus grad of s (`beside`)."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < d
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    first = program.to(tl.int64) * share
    for index in range(0, tl.minimum(share, rows - program * share)):
        row = first + index
        offsets = row * d + columns
        x = tl.load(total_ptr + offsets, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = x.to(tl.float32) * scale
        if WEIGHT:
            dweight += grad * normed.to(x.dtype).to(tl.float32)
        weighted = grad * weight
        dx = scale * (weighted - normed * (tl.sum(weighted * normed, 0) / d))
        if BESIDE:
            dx += tl.load(beside_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(x.dtype), mask=inside)
    if WEIGHT:
        tl.store(dweight_ptr + program.to(tl.int64) * d + columns, dweight, mask=inside)


def launch(d: int) -> dict[str, Any]:
    """Block size and number of warps for rows of d elements."""
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), "enable_fp_fusion": True}


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """`[..., d]` for x and residual `[..., d]`, weight `[d]`; with a residual also x + residual, `[..., d]`."""
    if residual is None:
        out: Tensor = _plain(x, weight, eps)[0]
        return out
    out, total, _ = _residual(x, residual, weight, eps)
    return out, total


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, has_residual = x.contiguous(), residual is not None
    residual = residual.contiguous() if residual is not None else x
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype))
    total = torch.empty_like(x) if has_residual else x
    scale = x.new_empty(x.shape[:-1], dtype=torch.float32)
    d = x.shape[-1]
    if scale.numel():
        forward_kernel[(scale.numel(),)](
            x, residual, weight, out, total, scale, d, eps, RESIDUAL=has_residual, **launch(d)
        )
    return out, total, scale


@torch.library.custom_op("fireflyds::rms_norm", mutates_args=())
@on_its_device
def _plain(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, _, scale = _launch_forward(x, None, weight, eps)
    return out, scale


@torch.library.custom_op("fireflyds::rms_norm_residual", mutates_args=())
@on_its_device
def _residual(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, weight, eps)


def _empty_outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, dtype=torch.promote_types(x.dtype, weight.dtype), memory_format=torch.contiguous_format)
    return out, x.new_empty(x.shape[:-1], dtype=torch.float32)


@_plain.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _empty_outputs(x, weight)


@_residual.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    out, scale = _empty_outputs(x, weight)
    return out, torch.empty_like(x, memory_format=torch.contiguous_format), scale


@torch.library.custom_op("fireflyds::rms_norm_backward", mutates_args=())
@on_its_device
def _backward(
    grad: Tensor, sum_grad: Tensor | None, total: Tensor, weight: Tensor, scale: Tensor, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    grad, total = grad.contiguous(), total.contiguous()
    sum_grad = None if sum_grad is None else sum_grad.contiguous()
    d, rows = total.shape[-1], scale.numel()
    programs = max(1, min(rows, 4 * processors(total.device)))
    rows_per_program = triton.cdiv(rows, programs)
    dx = torch.empty_like(total)
    # A program without rows still writes zeros.
    dweight = torch.empty(programs if needs_dweight else 0, d, dtype=torch.float32, device=total.device)
    backward_kernel[(programs,)](
        grad, total if sum_grad is None else sum_grad, total, weight, scale, dx, dweight, rows, d, rows_per_program,
        BESIDE=sum_grad is not None, WEIGHT=needs_dweight, **launch(d),
    )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


@_backward.register_fake
def _(grad: Tensor, sum_grad: Any, total: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(total, memory_format=torch.contiguous_format), torch.empty_like(weight)


def _save_plain(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.set_materialize_grads(False)


def _save_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[1], inputs[2], output[2])
    ctx.set_materialize_grads(False)


def _gradients_plain(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    total, weight, scale = ctx.saved_tensors
    dx, dweight = _backward(grad, None, total, weight, scale, ctx.needs_input_grad[1])
    return dx, dweight if ctx.needs_input_grad[1] else None, None


def _gradients_residual(ctx: Any, grad: Tensor | None, sum_grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    total, weight, scale = ctx.saved_tensors
    if grad is None:
        return sum_grad, sum_grad, None, None
    dx, dweight = _backward(grad, sum_grad, total, weight, scale, ctx.needs_input_grad[2])
    return dx, dx, dweight if ctx.needs_input_grad[2] else None, None


_plain.register_autograd(_gradients_plain, setup_context=_save_plain)
_residual.register_autograd(_gradients_residual, setup_context=_save_residual)
