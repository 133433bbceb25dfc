"""Root-mean-square normalisation, with the residual sum in front of it."""

from typing import overload

from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import Implementation, always, requires_triton


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """weight · s / √(mean(s²) + eps) over the last dimension, with s = x, or x + residual (arXiv 1910.07467).

    Args:
        x: `[..., d]`. The mean is taken in float32, and the quotient rounded to x's type before it meets the weight,
            as LLaMA does.
        weight: `[d]`.
        residual: like x.

    Returns:
        The norm, of x's and weight's common type; with a residual also the sum s, for the next residual.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight [d] expected with d={x.shape[-1]}, got {[*weight.shape]}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual {residual.dtype} {[*residual.shape]} is not like x {x.dtype} {[*x.shape]}"
        )
    run = dispatch.select("rms_norm", x, head_dim=x.shape[-1])
    found: Tensor | tuple[Tensor, Tensor] = run(x, weight, eps, residual)
    return found


def _triton(where: dispatch.DispatchKey) -> str | None:
    # One program holds a whole row.
    return "rows over 32,768 do not fit a program" if where.head_dim > 32_768 else requires_triton(60)(where)


dispatch.Kernel(
    "rms_norm",
    Implementation("triton", "fireflyds_kernels.rms_norm.triton", "rms_norm", _triton),
    Implementation("reference", "fireflyds_kernels.rms_norm.reference", "rms_norm", always),
)
