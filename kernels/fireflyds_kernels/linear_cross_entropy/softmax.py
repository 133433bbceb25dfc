"""What happens to a chunk of logits between the matrix products, in plain PyTorch."""

import torch
from torch import Tensor

# Rows of a chunk that are taken together on the CPU: at V = 55,296 their float32 copy stays in its cache.
_ROWS = 16


def losses_and_dlogits(
    logits: Tensor, labels: Tensor, bias: Tensor | None, scale: Tensor | None, lift: float, slopes: bool
) -> Tensor:
    """`-log softmax(logits + bias)[label]` of every row, `[c]` in float32 or wider.

    With `slopes` the logits are overwritten by lift · scale · (softmax − one-hot), the gradient of Σ scale · loss
    times `lift`. Without, they are used up.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses = logits.new_empty(len(labels), dtype=wide)
    step = min(_ROWS, len(labels)) if logits.device.type == "cpu" else len(labels)
    # One piece of memory for all parts: fresh ones cost more in page faults than the softmax itself.
    spare = logits if logits.dtype is wide else logits.new_empty(step, logits.shape[1], dtype=wide)
    for start in range(0, len(labels), max(step, 1)):
        rows, targets = slice(start, start + step), labels[start : start + step, None]
        part = spare[rows] if spare is logits else spare[: len(targets)].copy_(logits[rows])
        if bias is not None:
            part.add_(bias)
        highest, place = part.max(1, keepdim=True)
        target = part.gather(1, targets)
        torch.softmax(part, 1, out=part)
        # log Σ exp, from the largest probability: the label's own may be 0 in float32.
        losses[rows] = (highest - part.gather(1, place).log_() - target)[:, 0]
        if slopes:
            part.scatter_add_(1, targets, torch.full_like(target, -1))
            if scale is not None or lift != 1:
                part.mul_(lift if scale is None else lift * scale[rows, None].to(wide))
            if spare is not logits:
                logits[rows] = part
    return losses
