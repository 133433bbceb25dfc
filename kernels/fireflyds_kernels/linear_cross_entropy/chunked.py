"""The loss in chunks of labelled rows: exact gradients, the logits of one chunk at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels.linear_cross_entropy import softmax
from fireflyds_kernels.linear_cross_entropy.gradients import Gradients, result_type, wide

# Maximum bytes of logits in memory: of a batch that is one chunk, and of a chunk of a larger batch. Accumulating a
# head's gradient over several chunks takes additional time and memory.
WHOLE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 29}
CHUNK_BYTES = {"cpu": 3 << 25, "cuda": 1 << 28}
# glibc reuses freed allocations of less than 32 MiB; larger ones are mapped again, and their page faults take a tenth
# of the time of a small head. Chunks this small are faster as long as the sum over them, d columns wide, takes less.
KEPT_BYTES = 31 << 20


def plain(*arguments: Any) -> Any:
    """The loss with softmax in PyTorch, on any device."""
    return _run(False, *arguments)


def with_triton(*arguments: Any) -> Any:
    """The loss with softmax in the Triton kernel."""
    return _run(True, *arguments)


def _run(
    fused: bool,
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
    if reduction == "none":
        losses: Tensor = _row_losses(hidden, blocks, labels, bias, ignore_index, num_labels, fused, softcap)[0]
        return losses if token_weights is None else losses * token_weights.to(losses.dtype)
    grad_enabled = torch.is_grad_enabled()
    needs_grad = [grad_enabled and x is not None and x.requires_grad for x in (hidden, bias, *blocks)]
    both = reduction == "both"
    outputs = _loss_sum(
        hidden, blocks, labels, bias, token_weights, ignore_index, num_labels, needs_grad, fused, both, softcap
    )
    if not both:
        return outputs[0]
    losses = outputs[1].detach()
    return outputs[0], losses if token_weights is None else losses * token_weights.detach().to(losses.dtype)


def _labelled_rows(
    labels: Tensor, ignore_index: int, num_labels: int | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Indices and labels of the labelled rows; on a GPU also a bool scalar, True if `num_labels` or a label is wrong.

    The checks do not wait for a GPU: there a wrong count or a label outside the vocabulary makes the loss NaN.
    """
    mask = labels != ignore_index
    if num_labels is None:
        rows, invalid = mask.nonzero()[:, 0], None
    else:
        rows = torch.nonzero_static(mask, size=num_labels, fill_value=0)[:, 0]
        invalid = mask.sum() != num_labels
    targets = labels[rows]
    out_of_range = ((targets < 0) | (targets >= vocab_size)).any()
    if labels.device.type == "cpu":
        if invalid is not None and invalid:
            raise ValueError(f"linear_cross_entropy: num_labels={num_labels}, but {int(mask.sum())} rows have a label")
        if out_of_range:
            raise ValueError(
                f"linear_cross_entropy: labels from {int(targets.min())} to {int(targets.max())} for V={vocab_size}; "
                f"rows without a label have {ignore_index}"
            )
        return rows, targets, None
    return rows, targets.clamp(0, vocab_size - 1), out_of_range if invalid is None else out_of_range | invalid


def _chunks(rows: int, vocab_size: int, like: Tensor) -> Iterator[slice]:
    """Slices of rows, as few and as even as the memory for logits allows."""
    device = like.device.type if like.device.type in CHUNK_BYTES else "cpu"
    total_bytes = rows * vocab_size * like.itemsize
    num_chunks = 1 if total_bytes <= WHOLE_BYTES[device] else -(-total_bytes // CHUNK_BYTES[device])
    if device == "cpu" and 2 * like.shape[1] * vocab_size * like.itemsize <= KEPT_BYTES:
        num_chunks = -(-total_bytes // KEPT_BYTES)
    step = max(16, -(-rows // max(num_chunks, 1)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _logits(hidden: Tensor, blocks: list[Tensor]) -> Tensor:
    """`[c, V]` in hidden's type."""
    if len(blocks) == 1:
        return hidden @ blocks[0].T
    logits, start = hidden.new_empty(len(hidden), sum(map(len, blocks))), 0
    for block in blocks:
        logits[:, start : start + len(block)] = hidden @ block.T
        start += len(block)
    return logits


@torch.library.custom_op("fireflyds::linear_cross_entropy_sum", mutates_args=())
def _loss_sum(
    hidden: Tensor,
    blocks: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Tensor | None,
    ignore_index: int,
    num_labels: int | None,
    needs_grad: list[bool],
    fused: bool,
    with_losses: bool,
    softcap: float,
) -> list[Tensor]:
    """The loss, the unweighted losses `[T]` (empty unless `with_losses`), then the gradients of hidden, bias and every
    block (empty where none is needed)."""
    vocab_size = sum(map(len, blocks))
    rows, targets, invalid = _labelled_rows(labels, ignore_index, num_labels, vocab_size)
    scale = None if token_weights is None else token_weights[rows].to(wide(hidden.dtype))
    largest = None
    if scale is not None and hidden.dtype is torch.float16 and len(rows):
        # Weights as large as a loss scale would overflow the logits' gradients; they are applied in float32 at the end.
        largest = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale / largest
    cast_blocks = [block.to(hidden.dtype) for block in blocks]
    chunks = list(_chunks(len(rows), vocab_size, hidden))
    gradients = Gradients(hidden, bias, blocks, needs_grad, len(chunks))
    softmax_losses, total = softmax.function_for(fused, softcap), hidden.new_zeros((), dtype=wide(hidden.dtype))
    row_losses = total.new_zeros(len(labels) if with_losses else 0)
    for chunk in chunks:
        chunk_hidden, chunk_scale = hidden[rows[chunk]], None if scale is None else scale[chunk]
        logits = _logits(chunk_hidden, cast_blocks)
        losses = softmax_losses(logits, targets[chunk], bias, chunk_scale, gradients.lift, any(needs_grad))
        total += losses.sum() if chunk_scale is None else losses @ chunk_scale
        if with_losses:
            row_losses[rows[chunk]] = losses
        if any(needs_grad):
            gradients.add(rows[chunk], chunk_hidden, cast_blocks, logits)
        del logits
    results = gradients.finish()
    if largest is not None:
        total, results = total * largest, [gradient.mul_(largest) for gradient in results]
    if invalid is not None:
        total, row_losses = (x.masked_fill(invalid, float("nan")) for x in (total, row_losses))
    return [total, row_losses, *results]


def _empty_gradients(hidden: Tensor, bias: Tensor | None, blocks: list[Tensor], needs_grad: list[bool]) -> list[Tensor]:
    """Uninitialised gradients, for fake tensors."""
    dtypes = [result_type(hidden.dtype, hidden.dtype if x is None else x.dtype) for x in (hidden, bias, *blocks)]
    return [
        hidden.new_empty(x.shape if needed and x is not None else (0,), dtype=dtype)
        for x, needed, dtype in zip((hidden, bias, *blocks), needs_grad, dtypes, strict=True)
    ]


@_loss_sum.register_fake
def _(
    hidden: Tensor,
    blocks: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    token_weights: Any,
    ignore_index: int,
    num_labels: Any,
    needs_grad: list[bool],
    fused: bool,
    with_losses: bool,
    softcap: float,
) -> list[Tensor]:
    total = hidden.new_empty((), dtype=wide(hidden.dtype))
    row_losses = total.new_empty(labels.shape[0] if with_losses else 0)
    return [total, row_losses, *_empty_gradients(hidden, bias, blocks, needs_grad)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, blocks, _, bias, *_, needs_grad, _, _, _ = inputs
    ctx.save_for_backward(*output[2:])
    ctx.gradient_mask = needs_grad
    ctx.types = [hidden.dtype, hidden.dtype if bias is None else bias.dtype, *(block.dtype for block in blocks)]


def _scaled(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if scale.is_cuda and gradient.dtype != scale.dtype:
        # A 0-d tensor on the GPU would be rounded to the gradient's type first; a 1-d tensor of one element is not.
        return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))
    return (gradient * scale).to(dtype)


def _gradients(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    gradients = [
        _scaled(gradient, upstream[0], dtype) if needed else None
        for gradient, needed, dtype in zip(ctx.saved_tensors, ctx.gradient_mask, ctx.types, strict=True)
    ]
    hidden, bias, *blocks = gradients
    return hidden, blocks, None, bias, *[None] * 7


_loss_sum.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("fireflyds::linear_cross_entropy_each", mutates_args=())
def _row_losses(
    hidden: Tensor,
    blocks: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    num_labels: int | None,
    fused: bool,
    softcap: float,
) -> list[Tensor]:
    """The losses `[T]`. No logits are saved: the upstream gradient differs from row to row."""
    vocab_size = sum(map(len, blocks))
    rows, targets, invalid = _labelled_rows(labels, ignore_index, num_labels, vocab_size)
    cast_blocks = [block.to(hidden.dtype) for block in blocks]
    losses = hidden.new_zeros(len(labels), dtype=wide(hidden.dtype))
    for chunk in _chunks(len(rows), vocab_size, hidden):
        logits = _logits(hidden[rows[chunk]], cast_blocks)
        losses[rows[chunk]] = softmax.function_for(fused, softcap)(logits, targets[chunk], bias, None, 1.0, False)
    return [losses if invalid is None else losses.masked_fill(invalid, float("nan"))]


@_row_losses.register_fake
def _(hidden: Tensor, blocks: Any, labels: Tensor, *_: Any) -> list[Tensor]:
    return [hidden.new_empty(labels.shape[0], dtype=wide(hidden.dtype))]


@torch.library.custom_op("fireflyds::linear_cross_entropy_each_backward", mutates_args=())
def _row_losses_backward(
    upstream: Tensor,
    hidden: Tensor,
    blocks: list[Tensor],
    labels: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    num_labels: int | None,
    needs_grad: list[bool],
    fused: bool,
    softcap: float,
) -> list[Tensor]:
    """The gradients of the sum whose token weights are the upstream gradients of the rows."""
    outputs: list[Tensor] = _loss_sum(
        hidden, blocks, labels, bias, upstream, ignore_index, num_labels, needs_grad, fused, False, softcap
    )
    return outputs[2:]


@_row_losses_backward.register_fake
def _(
    upstream: Any,
    hidden: Tensor,
    blocks: list[Tensor],
    labels: Any,
    bias: Tensor | None,
    ignore_index: int,
    num_labels: Any,
    needs_grad: list[bool],
    fused: bool,
    softcap: float,
) -> list[Tensor]:
    return _empty_gradients(hidden, bias, blocks, needs_grad)


def _save_row_losses(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, blocks, labels, bias, *options = inputs
    ctx.save_for_backward(hidden, labels, bias, *blocks)
    ctx.saved_options = options


def _gradients_row_losses(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    hidden, labels, bias, *blocks = ctx.saved_tensors
    ignore_index, num_labels, fused, softcap = ctx.saved_options
    needs_grad = [x is not None and x.requires_grad for x in (hidden, bias, *blocks)]
    gradients = _row_losses_backward(
        upstream[0], hidden, blocks, labels, bias, ignore_index, num_labels, needs_grad, fused, softcap
    )
    leaves = [hidden, hidden if bias is None else bias, *blocks]
    results = [
        gradient.to(x.dtype) if needed else None
        for gradient, x, needed in zip(gradients, leaves, needs_grad, strict=True)
    ]
    return results[0], results[2:], None, results[1], *[None] * 4


_row_losses.register_autograd(_gradients_row_losses, setup_context=_save_row_losses)
