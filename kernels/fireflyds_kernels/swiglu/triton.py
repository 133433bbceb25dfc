"""One pass forward, one backward. The backward pass recomputes silu: only gate and up are saved."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fireflyds_kernels.dispatch import on_its_device

BLOCK = 1024


@triton.jit
def forward_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """silu(gate) · up of BLOCK of `count` contiguous elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    # silu is rounded to the narrow type before the product with up, as in the reference.
    silu = (wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (silu * up).to(gate.dtype), mask=inside)


@triton.jit
def backward_kernel(grad_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, count, BLOCK: tl.constexpr):
    """Gradients of gate and up of BLOCK of `count` contiguous elements."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dtype = dgate_ptr.dtype.element_ty
    tl.store(dgate_ptr + offsets, (grad * up * sigmoid * (1 + gate * (1 - sigmoid))).to(dtype), mask=inside)
    tl.store(dup_ptr + offsets, (grad * gate * sigmoid).to(dtype), mask=inside)


LAUNCH = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": True}


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up; gate, up and the result have one shape `[..., d]`."""
    out: Tensor = _forward(gate, up)
    return out


@torch.library.custom_op("fireflyds::swiglu", mutates_args=())
@on_its_device
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        forward_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), **LAUNCH)
    return out


@torch.library.custom_op("fireflyds::swiglu_backward", mutates_args=())
@on_its_device
def _backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    if gate.numel():
        backward_kernel[(triton.cdiv(gate.numel(), BLOCK),)](grad, gate, up, dgate, dup, gate.numel(), **LAUNCH)
    return dgate, dup


@_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))  # type: ignore[return-value]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor] = _backward(grad, *ctx.saved_tensors)
    return gradients


_forward.register_autograd(_gradients, setup_context=_save)
