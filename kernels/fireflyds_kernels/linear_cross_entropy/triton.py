"""Losses and gradients of a chunk of logits, one program per row: logits are read twice and written once, in their own
type."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fireflyds_kernels.dispatch import on_its_device

BLOCK = 4096


@triton.jit
def dlogits_kernel(
    logits_ptr, labels_ptr, bias_ptr, scale_ptr, losses_ptr, stride, vocab_size, lift,
    BIAS: tl.constexpr, SCALE: tl.constexpr, DLOGITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses `[n]` of logits `[n, V]`; with DLOGITS overwrites the logits with their gradients. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * stride
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)
    # Every lane has its own maximum and sum; they are combined once, at the end of the row.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        inside = start + columns < vocab_size
        logits = tl.load(base + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if BIAS:
            logits += tl.load(bias_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        higher = tl.maximum(top, logits)
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        norm = norm * tl.exp(top - finite) + tl.exp(logits - finite)
        top = higher
    highest = tl.max(top, 0)
    total = tl.sum(norm * tl.exp(top - highest), 0)
    target = tl.load(base + label).to(tl.float32)
    if BIAS:
        target += tl.load(bias_ptr + label).to(tl.float32)
    tl.store(losses_ptr + row, tl.log(total) + highest - target)
    if DLOGITS:
        weight = lift
        if SCALE:
            weight = lift * tl.load(scale_ptr + row).to(tl.float32)
        # All threads must have read the target above before one overwrites it.
        tl.debug_barrier()
        for start in range(0, vocab_size, BLOCK):
            inside = start + columns < vocab_size
            logits = tl.load(base + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if BIAS:
                logits += tl.load(bias_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            dlogits = tl.exp(logits - highest) / total - tl.where(start + columns == label, 1.0, 0.0)
            tl.store(base + start + columns, (dlogits * weight).to(logits_ptr.dtype.element_ty), mask=inside)


LAUNCH: dict[str, Any] = {"BLOCK": BLOCK, "num_warps": 8, "enable_fp_fusion": True}


@on_its_device
def losses_and_dlogits(
    logits: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor | None, lift: float, dlogits: bool
) -> Tensor:
    """As `softmax.losses_and_dlogits`, in one launch."""
    losses = logits.new_empty(len(labels), dtype=torch.float32)
    if len(labels):
        dlogits_kernel[(len(labels),)](
            logits, labels, losses if bias is None else bias, losses if scale is None else scale, losses,
            logits.stride(0), logits.shape[1], lift,
            BIAS=bias is not None, SCALE=scale is not None, DLOGITS=dlogits, **LAUNCH,
        )  # fmt: skip
    return losses
