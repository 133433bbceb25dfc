"""The definition, in chunks of rows: each chunk's logits live only while its loss or gradient is computed."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

# Rows whose logits exist at once; at V = 55,296 in float32 this is 113 MB.
CHUNK = 512


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    """`[n]` float32 losses of the n labelled rows."""
    chunks = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
    if len(labels) <= CHUNK:
        return torch.cat([_chunk(h, weight, y, bias) for h, y in chunks])
    return torch.cat([checkpoint(_chunk, h, weight, y, bias, use_reentrant=False) for h, y in chunks])  # type: ignore[misc]


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
    return cross_entropy(linear(hidden, weight, bias).float(), labels, reduction="none")
