"""Cross entropy of a linear head without materialising the full logits."""

from collections.abc import Sequence
from typing import Any, Literal, overload

from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import Implementation
from fireflyds_kernels.requirements import always, requires_triton


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "none"] = "sum",
    num_labels: int | None = None,
    softcap: float = 0.0,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["both"],
    num_labels: int | None = None,
    softcap: float = 0.0,
) -> tuple[Tensor, Tensor]: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | Sequence[Tensor],
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    token_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["sum", "none", "both"] = "sum",
    num_labels: int | None = None,
    softcap: float = 0.0,
) -> Any:
    """-token_weight · log softmax(hidden weightᵀ + bias)[label], over the rows that have a label.

    Args:
        hidden: `[T, d]`.
        weight: `[V, d]`, or consecutive blocks of its rows, `([V0, d], [V1, d])`: no gradient is computed for a block
            that needs none, so that a head can train its new rows only. Blocks are cast to the number format of
            `hidden`.
        labels: int64 `[T]`; rows with `ignore_index` take neither compute nor memory.
        bias: `[V]` or None.
        token_weights: `[T]`, without gradient, or None for 1 everywhere.
        reduction: `sum` gives a scalar, `none` gives `[T]` with 0 at ignored rows, `both` gives the scalar and, without
            gradient and at no additional cost, the `[T]`. All float32 or wider.
        num_labels: number of rows that have a label, where the host knows it: avoids the only synchronisation with the
            device. On a GPU a wrong number, or a label outside the vocabulary, makes the loss NaN; on the CPU both are
            errors.
        softcap: c > 0 replaces every logit l by c · tanh(l / c) (Gemma 2, arXiv 2408.00118); 0 for none. Not with a
            bias.

    With `sum` the gradients are computed in the forward pass, chunk by chunk, while the chunk's logits are in memory:
    three matrix products as in the plain computation, not four. They are not normalised, and are accumulated over
    chunks in float32. For float16 the logits' gradients are multiplied by a power of two and all later results are
    float32, so that the loss scale, which is applied only in the backward pass, causes neither underflow nor overflow.

    Raises:
        ValueError: shapes that do not match, or an unknown reduction; on the CPU also a label outside the
            vocabulary or a wrong `num_labels`.
        CannotRunError: an implementation was forced that cannot run here.
    """
    blocks = [weight] if isinstance(weight, Tensor) else list(weight)
    _check_shapes(hidden, blocks, labels, bias, token_weights, reduction)
    if softcap < 0 or (softcap and bias is not None):
        raise ValueError(f"linear_cross_entropy: softcap={softcap} must be at least 0, and 0 where there is a bias")
    run = dispatch.select("linear_cross_entropy", hidden)
    return run(hidden, blocks, labels, bias, token_weights, ignore_index, reduction, num_labels, softcap)


def _check_shapes(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, weights: Tensor | None, reduction: str
) -> None:
    shapes = [[*block.shape] for block in blocks]
    if (
        hidden.dim() != 2
        or labels.shape != hidden.shape[:1]
        or any(block.dim() != 2 or block.shape[1] != hidden.shape[1] for block in blocks)
    ):
        raise ValueError(
            f"linear_cross_entropy: hidden [T, d], weight [V, d], labels [T] expected, got {[*hidden.shape]}, "
            f"{shapes}, {[*labels.shape]}"
        )
    rows = sum(block.shape[0] for block in blocks)
    if bias is not None and bias.shape != (rows,):
        raise ValueError(f"linear_cross_entropy: bias [V] expected with V={rows}, got {[*bias.shape]}")
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(
            f"linear_cross_entropy: token_weights [T] expected with T={labels.shape[0]}, got {[*weights.shape]}"
        )
    if reduction not in ("sum", "none", "both"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r} is none of 'sum', 'none', 'both'")


_PACKAGE = "fireflyds_kernels.linear_cross_entropy"
dispatch.Kernel(
    "linear_cross_entropy",
    Implementation("triton", f"{_PACKAGE}.chunked", "with_triton", requires_triton(60)),
    Implementation("chunked", f"{_PACKAGE}.chunked", "plain", always),
    Implementation("reference", f"{_PACKAGE}.reference", "linear_cross_entropy", always),
)
