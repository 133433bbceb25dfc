"""Cross entropy of a linear head without the logits ever existing whole."""

from typing import Literal

import torch
from torch import Tensor

from fireflyds_kernels.linear_cross_entropy import reference


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
) -> Tensor:
    """-log softmax(hidden weightᵀ + bias)[label], over the rows that have a label.

    Args:
        hidden: `[T, d]`.
        weight: `[V, d]`; `bias`: `[V]` or None.
        labels: int64 `[T]`; rows with `ignore_index` cost nothing, in compute or memory.
        reduction: `sum` gives a scalar, `none` gives `[T]` with 0 at ignored rows. Both float32.

    Raises:
        ValueError: shapes that do not fit together, or an unknown reduction.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or labels.shape != hidden.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: hidden [T, d], weight [V, d], labels [T] expected, got {[*hidden.shape]}, {[*weight.shape]}, {[*labels.shape]}"
        )
    if reduction not in ("sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r} is neither 'sum' nor 'none'")
    rows = (labels != ignore_index).nonzero().squeeze(1)
    losses = reference.token_losses(hidden[rows], weight, labels[rows], bias)
    if reduction == "sum":
        return losses.sum()
    return torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_put((rows,), losses)
