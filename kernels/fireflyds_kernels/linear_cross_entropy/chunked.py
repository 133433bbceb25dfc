"""The loss in chunks of labelled rows: exact gradients, the logits of one chunk at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels.linear_cross_entropy import softmax
from fireflyds_kernels.linear_cross_entropy.gradients import Gradients, result_type, wide

# Bytes of logits that exist at once: of a batch that is one chunk, and of a chunk of a larger batch. A head's gradient
# over several chunks costs a sum of its own, in time and memory.
WHOLE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 29}
CHUNK_BYTES = {"cpu": 3 << 25, "cuda": 1 << 28}
# glibc keeps smaller pieces of memory than 32 MiB when they are freed; larger ones come back as new pages, whose faults
# cost a tenth of a small head. Chunks so small pay off while the sum over them, d columns wide, stays the smaller part.
KEPT_BYTES = 31 << 20


def plain(*arguments: Any) -> Any:
    """Softmax by PyTorch, on any device."""
    return _run(False, *arguments)


def with_triton(*arguments: Any) -> Any:
    """Softmax by our kernel."""
    return _run(True, *arguments)


def _run(
    fused: bool, hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, token_weights: Tensor | None,
    ignore_index: int, reduction: str, num_labels: int | None,
) -> Any:  # fmt: skip
    if reduction == "none":
        losses: Tensor = _each(hidden, blocks, labels, bias, ignore_index, num_labels, fused)[0]
        return losses if token_weights is None else losses * token_weights.to(losses.dtype)
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in (hidden, bias, *blocks)]
    both = reduction == "both"
    found = _summed(hidden, blocks, labels, bias, token_weights, ignore_index, num_labels, wanted, fused, both)
    if not both:
        return found[0]
    losses = found[1].detach()
    return found[0], losses if token_weights is None else losses * token_weights.detach().to(losses.dtype)


def _labelled(
    labels: Tensor, ignore_index: int, num_labels: int | None, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Places and labels of the rows that have one, and on a GPU whether the caller's word on either is wrong.

    A GPU is not waited for: there a wrong count or a label outside the vocabulary makes the loss NaN.
    """
    mask = labels != ignore_index
    if num_labels is None:
        rows, wrong = mask.nonzero()[:, 0], None
    else:
        rows = torch.nonzero_static(mask, size=num_labels, fill_value=0)[:, 0]
        wrong = mask.sum() != num_labels
    targets = labels[rows]
    outside = ((targets < 0) | (targets >= vocab_size)).any()
    if labels.device.type == "cpu":
        if wrong is not None and wrong:
            raise ValueError(f"linear_cross_entropy: num_labels={num_labels}, but {int(mask.sum())} rows have a label")
        if outside:
            raise ValueError(
                f"linear_cross_entropy: labels from {int(targets.min())} to {int(targets.max())} for V={vocab_size}; "
                f"rows without a label have {ignore_index}"
            )
        return rows, targets, None
    return rows, targets.clamp(0, vocab_size - 1), outside if wrong is None else outside | wrong


def _chunks(rows: int, vocab_size: int, like: Tensor) -> Iterator[slice]:
    """As few and as even stretches of rows as the memory for logits allows."""
    device = like.device.type if like.device.type in CHUNK_BYTES else "cpu"
    total = rows * vocab_size * like.itemsize
    chunks = 1 if total <= WHOLE_BYTES[device] else -(-total // CHUNK_BYTES[device])
    if device == "cpu" and 2 * like.shape[1] * vocab_size * like.itemsize <= KEPT_BYTES:
        chunks = -(-total // KEPT_BYTES)
    step = max(16, -(-rows // max(chunks, 1)))
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


def _softmax(fused: bool) -> Any:
    if fused:
        from fireflyds_kernels.linear_cross_entropy import triton

        return triton.losses_and_dlogits
    return softmax.losses_and_dlogits


@torch.library.custom_op("fireflyds::linear_cross_entropy_sum", mutates_args=())
def _summed(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, token_weights: Tensor | None,
    ignore_index: int, num_labels: int | None, wanted: list[bool], fused: bool, each: bool,
) -> list[Tensor]:  # fmt: skip
    """The loss, the unweighted losses `[T]` (empty unless `each`), then the gradients of hidden, bias and every block, each
    empty when not wanted."""
    vocab_size = sum(map(len, blocks))
    rows, targets, wrong = _labelled(labels, ignore_index, num_labels, vocab_size)
    scale = None if token_weights is None else token_weights[rows].to(wide(hidden.dtype))
    largest = None
    if scale is not None and hidden.dtype is torch.float16 and len(rows):
        # Weights as large as a loss scale would overflow the slopes; they come back in float32.
        largest = scale.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
        scale = scale / largest
    near = [block.to(hidden.dtype) for block in blocks]
    pieces = list(_chunks(len(rows), vocab_size, hidden))
    gradients = Gradients(hidden, bias, blocks, wanted, len(pieces))
    run, total = _softmax(fused), hidden.new_zeros((), dtype=wide(hidden.dtype))
    kept = total.new_zeros(len(labels) if each else 0)
    for piece in pieces:
        compact, mine = hidden[rows[piece]], None if scale is None else scale[piece]
        logits = _logits(compact, near)
        losses = run(logits, targets[piece], bias, mine, gradients.lift, any(wanted))
        total += losses.sum() if mine is None else losses @ mine
        if each:
            kept[rows[piece]] = losses
        if any(wanted):
            gradients.add(rows[piece], compact, near, logits)
        del logits
    found = gradients.finish()
    if largest is not None:
        total, found = total * largest, [gradient.mul_(largest) for gradient in found]
    if wrong is not None:
        total, kept = (x.masked_fill(wrong, float("nan")) for x in (total, kept))
    return [total, kept, *found]


def _like(hidden: Tensor, bias: Tensor | None, blocks: list[Tensor], wanted: list[bool]) -> list[Tensor]:
    """Fake gradients."""
    kinds = [result_type(hidden.dtype, hidden.dtype if x is None else x.dtype) for x in (hidden, bias, *blocks)]
    return [
        hidden.new_empty(x.shape if want and x is not None else (0,), dtype=kind)
        for x, want, kind in zip((hidden, bias, *blocks), wanted, kinds, strict=True)
    ]


@_summed.register_fake
def _(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, token_weights: Any,
    ignore_index: int, num_labels: Any, wanted: list[bool], fused: bool, each: bool,
) -> list[Tensor]:  # fmt: skip
    total = hidden.new_empty((), dtype=wide(hidden.dtype))
    kept = total.new_empty(labels.shape[0] if each else 0)
    return [total, kept, *_like(hidden, bias, blocks, wanted)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, blocks, _, bias, *_, wanted, _, _ = inputs
    ctx.save_for_backward(*output[2:])
    ctx.wanted = wanted
    ctx.types = [hidden.dtype, hidden.dtype if bias is None else bias.dtype, *(block.dtype for block in blocks)]


def _times(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if scale.is_cuda and gradient.dtype != scale.dtype:
        # A number on the GPU would be rounded to the gradient's type first; a tensor of one element is not.
        return torch.mul(gradient, scale.reshape(1), out=torch.empty_like(gradient, dtype=dtype))
    return (gradient * scale).to(dtype)


def _gradients(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    found = [
        _times(g, upstream[0], dtype) if want else None
        for g, want, dtype in zip(ctx.saved_tensors, ctx.wanted, ctx.types, strict=True)
    ]
    hidden, bias, *blocks = found
    return hidden, blocks, None, bias, *[None] * 6


_summed.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("fireflyds::linear_cross_entropy_each", mutates_args=())
def _each(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, ignore_index: int,
    num_labels: int | None, fused: bool,
) -> list[Tensor]:  # fmt: skip
    """The losses `[T]`. Nothing of the logits is kept: what comes from above differs from row to row."""
    vocab_size = sum(map(len, blocks))
    rows, targets, wrong = _labelled(labels, ignore_index, num_labels, vocab_size)
    near = [block.to(hidden.dtype) for block in blocks]
    losses = hidden.new_zeros(len(labels), dtype=wide(hidden.dtype))
    for piece in _chunks(len(rows), vocab_size, hidden):
        logits = _logits(hidden[rows[piece]], near)
        losses[rows[piece]] = _softmax(fused)(logits, targets[piece], bias, None, 1.0, False)
    return [losses if wrong is None else losses.masked_fill(wrong, float("nan"))]


@_each.register_fake
def _(hidden: Tensor, blocks: Any, labels: Tensor, *_: Any) -> list[Tensor]:
    return [hidden.new_empty(labels.shape[0], dtype=wide(hidden.dtype))]


@torch.library.custom_op("fireflyds::linear_cross_entropy_each_backward", mutates_args=())
def _each_backward(
    upstream: Tensor, hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, ignore_index: int,
    num_labels: int | None, wanted: list[bool], fused: bool,
) -> list[Tensor]:  # fmt: skip
    """Each row's upstream is its token weight in the sum."""
    found: list[Tensor] = _summed(
        hidden, blocks, labels, bias, upstream, ignore_index, num_labels, wanted, fused, False
    )
    return found[2:]


@_each_backward.register_fake
def _(
    upstream: Any, hidden: Tensor, blocks: list[Tensor], labels: Any, bias: Tensor | None, ignore_index: int,
    num_labels: Any, wanted: list[bool], fused: bool,
) -> list[Tensor]:  # fmt: skip
    return _like(hidden, bias, blocks, wanted)


def _save_each(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, blocks, labels, bias, *rest = inputs
    ctx.save_for_backward(hidden, labels, bias, *blocks)
    ctx.rest = rest


def _gradients_each(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    hidden, labels, bias, *blocks = ctx.saved_tensors
    ignore_index, num_labels, fused = ctx.rest
    wanted = [x is not None and x.requires_grad for x in (hidden, bias, *blocks)]
    found = _each_backward(upstream[0], hidden, blocks, labels, bias, ignore_index, num_labels, wanted, fused)
    own = [hidden, hidden if bias is None else bias, *blocks]
    kept = [g.to(x.dtype) if want else None for g, x, want in zip(found, own, wanted, strict=True)]
    return kept[0], kept[2:], None, kept[1], None, None, None


_each.register_autograd(_gradients_each, setup_context=_save_each)
