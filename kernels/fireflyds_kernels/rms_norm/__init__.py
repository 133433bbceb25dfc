"""Root-mean-square normalisation, with an optional residual sum before it."""

from typing import overload

from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import Implementation
from fireflyds_kernels.requirements import DispatchKey, always, requires_triton


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """`weight · s / √(mean(s²) + eps)` over the last dimension, with s = x, or x + residual (arXiv 1910.07467).

    Args:
        x: `[..., d]`. The mean is taken in float32, and the quotient is rounded to x's type before the multiplication
            with the weight, as in LLaMA.
        weight: `[d]`.
        residual: `[..., d]` of x's type, or None.

    Returns:
        The normalised s, of x's and weight's promoted type; with a residual also the sum s, for the next residual.

    Raises:
        ValueError: shapes or types that do not match.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight [d] expected with d={x.shape[-1]}, got {[*weight.shape]}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm: residual {residual.dtype} {[*residual.shape]} is not like x {x.dtype} {[*x.shape]}"
        )
    run = dispatch.select("rms_norm", x, head_dim=x.shape[-1])
    result: Tensor | tuple[Tensor, Tensor] = run(x, weight, eps, residual)
    return result


def _triton(key: DispatchKey) -> str | None:
    # One program processes a whole row.
    return (
        "rows of more than 32,768 elements do not fit in one program"
        if key.head_dim > 32_768
        else requires_triton(60)(key)
    )


dispatch.Kernel(
    "rms_norm",
    Implementation("triton", "fireflyds_kernels.rms_norm.triton", "rms_norm", _triton),
    Implementation("reference", "fireflyds_kernels.rms_norm.reference", "rms_norm", always),
)
