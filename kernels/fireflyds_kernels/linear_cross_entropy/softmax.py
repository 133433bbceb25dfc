"""Losses and gradients of a chunk of logits, in plain PyTorch."""

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
