"""What happens to a chunk of logits between the matrix products, in plain PyTorch."""

import torch
from torch import Tensor

# Rows of a chunk that are taken together on the CPU: at V = 55,296 their float32 copy stays in its cache.
_ROWS = 16


def losses_and_slopes(
    logits: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor | None, lift: float, slopes: bool
) -> Tensor:
    """`-log softmax(logits + bias)[label]` of every row, `[c]` in float32 or wider.

    With `slopes` the logits are overwritten by lift · scale · (softmax − one-hot), the gradient of Σ scale · loss
    times `lift`. Without, they are used up.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(len(labels), dtype=wide)
    step = _ROWS if logits.device.type == "cpu" else len(labels)
    for start in range(0, len(labels), max(step, 1)):
        rows = slice(start, start + step)
        part = logits[rows].to(wide)
        if bias is not None:
            part = part.add_(bias)
        targets = labels[rows, None]
        highest = part.amax(1, keepdim=True)
        target = part.gather(1, targets)
        norm = part.sub_(highest).exp_().sum(1, keepdim=True)
        losses[rows] = (norm.log() + highest - target)[:, 0]
        if slopes:
            weight = torch.full_like(norm, lift) if scale is None else lift * scale[rows, None].to(wide)
            part.mul_(weight / norm).scatter_add_(1, targets, -weight)
            if part.dtype is not logits.dtype:
                logits[rows] = part
    return losses


def row_norms(logits: Tensor, bias: Tensor | None) -> Tensor:
    """log Σ exp of every row, `[c]`."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if bias is None else wide + bias).logsumexp(1)
