"""Rotary position embedding of queries and keys, from one table of angles per step."""

from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import Implementation
from fireflyds_kernels.requirements import always, requires_triton


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`x · cos + rotate_half(x) · sin` on the first R dimensions of every head (arXiv 2104.09864).

    Args:
        q: `[T, H, D]`; k: `[T, Hk, D]`.
        cos, sin: `[T, R]`, without gradient, R ≤ D even, the second half equal to the first, as transformers makes
            them. Positions that restart in every document and scaled frequencies (NTK, YaRN) are part of this table,
            which is computed once per step.

    Returns:
        The rotated q and k; dimensions from R on are unchanged.

    Raises:
        ValueError: shapes or types that do not match.
    """
    if q.dim() != 3 or k.dim() != 3 or q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2] or q.dtype != k.dtype:
        raise ValueError(
            f"rope: q [T, H, D] and k [T, Hk, D] of one type expected, got {q.dtype} {[*q.shape]}, {k.dtype} "
            f"{[*k.shape]}"
        )
    if (
        cos.dim() != 2
        or cos.shape != sin.shape
        or cos.shape[0] != q.shape[0]
        or cos.shape[1] > q.shape[2]
        or cos.shape[1] % 2
    ):
        raise ValueError(
            f"rope: cos and sin [T, R] expected with T={q.shape[0]} and an even R of at most D={q.shape[2]}, got "
            f"{[*cos.shape]}, {[*sin.shape]}"
        )
    run = dispatch.select("rope", q)
    rotated: tuple[Tensor, Tensor] = run(q, k, cos, sin)
    return rotated


dispatch.Kernel(
    "rope",
    Implementation("triton", "fireflyds_kernels.rope.triton", "rope", requires_triton(60)),
    Implementation("reference", "fireflyds_kernels.rope.reference", "rope", always),
)
