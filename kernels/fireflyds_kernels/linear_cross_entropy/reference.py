"""Reference implementation: full logits in float32 or float64."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, softcap: float = 0.0
) -> Tensor:
    """`[n]` losses of n labelled rows, in float32 or float64."""
    logits = linear(hidden, weight)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits if bias is None else logits + bias, labels, reduction="none")


def linear_cross_entropy(
    hidden: Tensor,
    blocks: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    reduction: str,
    num_labels: int | None,
    softcap: float,
) -> Any:
    """Loss of hidden `[T, d]` with weight blocks `[Vi, d]` and labels `[T]`: a scalar, `[T]` losses, or both."""
    weight = torch.cat([block.to(hidden.dtype) for block in blocks]) if len(blocks) > 1 else blocks[0].to(hidden.dtype)
    labelled = labels != ignore_index
    losses = token_losses(hidden, weight, labels.where(labelled, 0), bias, softcap).where(labelled, 0)
    if token_weights is not None:
        losses = losses * token_weights
    if reduction == "both":
        return losses.sum(), losses.detach()
    return losses.sum() if reduction == "sum" else losses
