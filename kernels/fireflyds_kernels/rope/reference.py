"""Reference implementation in plain PyTorch."""

import torch
from torch import Tensor


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated q `[T, H, D]` and k `[T, Hk, D]`, for cos and sin `[T, R]`."""
    return _rotate(q, cos[:, None], sin[:, None]), _rotate(k, cos[:, None], sin[:, None])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated, unrotated = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, dim=-1)
    rotated = (rotated * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)
    return torch.cat((rotated, unrotated), -1) if unrotated.shape[-1] else rotated
