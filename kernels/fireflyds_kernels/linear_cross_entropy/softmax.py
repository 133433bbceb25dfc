"""Losses and gradients of a chunk of logits, in plain PyTorch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

# Rows of a chunk processed at a time on the CPU: at V = 55,296 their float32 copy fits into its cache.
_ROWS = 16


def losses_and_dlogits(
    logits: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor | None, lift: float, dlogits: bool
) -> Tensor:
    """`-log softmax(logits + bias)[label]` of every row, `[c]` in float32 or wider.

    With `dlogits` the logits are overwritten by lift · scale · (softmax − one-hot), the gradient of Σ scale · loss
    times `lift`. Without, their content is undefined afterwards.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(len(labels), dtype=wide)
    step = min(_ROWS, len(labels)) if logits.device.type == "cpu" else len(labels)
    # One buffer for all blocks of rows: page faults of new allocations take longer than the softmax itself.
    buffer = logits if logits.dtype is wide else logits.new_empty(step, logits.shape[1], dtype=wide)
    for start in range(0, len(labels), max(step, 1)):
        rows, targets = slice(start, start + step), labels[start : start + step, None]
        block = buffer[rows] if buffer is logits else buffer[: len(targets)].copy_(logits[rows])
        if bias is not None:
            block.add_(bias)
        highest, argmax = block.max(1, keepdim=True)
        target = block.gather(1, targets)
        torch.softmax(block, 1, out=block)
        # log Σ exp, from the largest probability: that of the label may be 0 in float32.
        losses[rows] = (highest - block.gather(1, argmax).log_() - target)[:, 0]
        if dlogits:
            block.scatter_add_(1, targets, torch.full_like(target, -1))
            if scale is not None or lift != 1:
                block.mul_(lift if scale is None else lift * scale[rows, None].to(wide))
            if buffer is not logits:
                logits[rows] = block
    return losses


def with_softcap(
    function: Any,
    softcap: float,
    logits: Tensor,
    labels: Tensor,
    bias: None,
    scale: Tensor | None,
    lift: float,
    dlogits: bool,
) -> Tensor:
    """As `losses_and_dlogits`, computed by `function`, of c · tanh(logits / c) with c = `softcap`."""
    squashed = torch.tanh(logits / softcap)
    torch.mul(squashed, softcap, out=logits)
    losses: Tensor = function(logits, labels, bias, scale, lift, dlogits)
    if dlogits:
        logits.addcmul_(logits, squashed.square_(), value=-1)  # the derivative is 1 − tanh²(logits / c)
    return losses


def function_for(fused: bool, softcap: float) -> Any:
    """`losses_and_dlogits` here or, `fused`, in Triton; with a soft cap around it where `softcap` is not 0."""
    function: Any = losses_and_dlogits
    if fused:
        from fireflyds_kernels.linear_cross_entropy import triton

        function = triton.losses_and_dlogits
    return partial(with_softcap, function, softcap) if softcap else function
