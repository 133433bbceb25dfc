"""Reference implementation in plain PyTorch."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """`[..., d]` for x and residual `[..., d]`, weight `[d]`; with a residual also x + residual, `[..., d]`."""
    total = x if residual is None else x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    normed = weight * (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)
    return normed if residual is None else (normed, total)
