"""The definition: whole logits in float32 or better."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None) -> Tensor:
    """`[n]` losses of n labelled rows, in float32 or float64."""
    logits = linear(hidden, weight, bias)
    return cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")
