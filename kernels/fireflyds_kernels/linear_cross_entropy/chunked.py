"""The loss in chunks of labelled rows: exact gradients, the logits of one chunk at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels.linear_cross_entropy import softmax
from fireflyds_kernels.linear_cross_entropy.gradients import Gradients, wide

# Bytes of logits that exist at once: of a batch that is one chunk, and of a chunk of a larger batch. A head's gradient
# over several chunks costs a sum of its own, in time and memory.
WHOLE_BYTES = {"cpu": 1 << 28, "cuda": 1 << 29}
CHUNK_BYTES = {"cpu": 3 << 25, "cuda": 1 << 28}


def plain(*arguments: Any) -> Tensor:
    """Softmax by PyTorch, on any device."""
    return _run(False, *arguments)


def with_triton(*arguments: Any) -> Tensor:
    """Softmax by our kernel."""
    return _run(True, *arguments)


def _run(
    fused: bool, hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, token_weights: Tensor | None,
    ignore_index: int, reduction: str, num_labels: int | None,
) -> Tensor:  # fmt: skip
    if reduction == "none":
        losses: Tensor = _each(hidden, blocks, labels, bias, ignore_index, num_labels, fused)[0]
        return losses if token_weights is None else losses * token_weights.to(losses.dtype)
    grad = torch.is_grad_enabled()
    wanted = [grad and x is not None and x.requires_grad for x in (hidden, bias, *blocks)]
    found = _summed(hidden, blocks, labels, bias, token_weights, ignore_index, num_labels, wanted, fused)
    total: Tensor = found[0]
    return total


def _labelled(labels: Tensor, ignore_index: int, num_labels: int | None) -> Tensor:
    mask = labels != ignore_index
    if num_labels is None:
        return mask.nonzero()[:, 0]
    return torch.nonzero_static(mask, size=num_labels)[:, 0]


def _chunks(rows: int, vocab_size: int, like: Tensor) -> Iterator[slice]:
    """As few and as even stretches of rows as the memory for logits allows."""
    device = like.device.type if like.device.type in CHUNK_BYTES else "cpu"
    total = rows * vocab_size * like.itemsize
    chunks = 1 if total <= WHOLE_BYTES[device] else -(-total // CHUNK_BYTES[device])
    step = max(16, -(-rows // chunks))
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

        return triton.losses_and_slopes
    return softmax.losses_and_slopes


@torch.library.custom_op("fireflyds::linear_cross_entropy_sum", mutates_args=())
def _summed(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, token_weights: Tensor | None,
    ignore_index: int, num_labels: int | None, wanted: list[bool], fused: bool,
) -> list[Tensor]:  # fmt: skip
    """The loss, then the gradients of hidden, bias and every block, each empty when not wanted."""
    rows = _labelled(labels, ignore_index, num_labels)
    scale = None if token_weights is None else token_weights[rows]
    near = [block.to(hidden.dtype) for block in blocks]
    pieces = list(_chunks(len(rows), sum(map(len, blocks)), hidden))
    gradients = Gradients(hidden, bias, blocks, wanted, len(pieces))
    run, total = _softmax(fused), hidden.new_zeros((), dtype=wide(hidden.dtype))
    for piece in pieces:
        compact, mine = hidden[rows[piece]], None if scale is None else scale[piece]
        logits = _logits(compact, near)
        losses = run(logits, labels[rows[piece]], bias, mine, gradients.lift, any(wanted))
        total += losses.sum() if mine is None else losses @ mine.to(losses.dtype)
        if any(wanted):
            gradients.add(rows[piece], compact, near, logits)
        del logits
    return [total, *gradients.finish()]


@_summed.register_fake
def _(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, token_weights: Any,
    ignore_index: int, num_labels: Any, wanted: list[bool], fused: bool,
) -> list[Tensor]:  # fmt: skip
    tensors = [hidden, bias, *blocks]
    found = [x.new_empty(x.shape if want and x is not None else (0,)) if x is not None else hidden.new_empty(0)
             for x, want in zip(tensors, wanted, strict=True)]  # fmt: skip
    return [hidden.new_empty((), dtype=wide(hidden.dtype)), *found]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.wanted = inputs[7]


def _gradients(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    found = [
        (g * upstream[0]).to(g.dtype) if want else None for g, want in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    ]
    hidden, bias, *blocks = found
    return hidden, blocks, None, bias, *[None] * 5


_summed.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("fireflyds::linear_cross_entropy_each", mutates_args=())
def _each(
    hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, ignore_index: int,
    num_labels: int | None, fused: bool,
) -> list[Tensor]:  # fmt: skip
    """The losses `[T]`. Nothing of the logits is kept: what comes from above differs from row to row."""
    rows = _labelled(labels, ignore_index, num_labels)
    near = [block.to(hidden.dtype) for block in blocks]
    losses = hidden.new_zeros(len(labels), dtype=wide(hidden.dtype))
    for piece in _chunks(len(rows), sum(map(len, blocks)), hidden):
        logits = _logits(hidden[rows[piece]], near)
        losses[rows[piece]] = _softmax(fused)(logits, labels[rows[piece]], bias, None, 1.0, False)
    return [losses]


@_each.register_fake
def _(hidden: Tensor, blocks: Any, labels: Tensor, *_: Any) -> list[Tensor]:
    return [hidden.new_empty(labels.shape[0], dtype=wide(hidden.dtype))]


@torch.library.custom_op("fireflyds::linear_cross_entropy_each_backward", mutates_args=())
def _each_backward(
    upstream: Tensor, hidden: Tensor, blocks: list[Tensor], labels: Tensor, bias: Tensor | None, ignore_index: int,
    num_labels: int | None, wanted: list[bool], fused: bool,
) -> list[Tensor]:  # fmt: skip
    """Each row's upstream is its token weight in the sum."""
    found: list[Tensor] = _summed(hidden, blocks, labels, bias, upstream, ignore_index, num_labels, wanted, fused)[1:]
    return found


@_each_backward.register_fake
def _(
    upstream: Any, hidden: Tensor, blocks: list[Tensor], labels: Any, bias: Tensor | None, ignore_index: int,
    num_labels: Any, wanted: list[bool], fused: bool,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape if want else (0,)) if x is not None else hidden.new_empty(0)
            for x, want in zip([hidden, bias, *blocks], wanted, strict=True)]  # fmt: skip


def _save_each(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    hidden, blocks, labels, bias, *rest = inputs
    ctx.save_for_backward(hidden, labels, bias, *blocks)
    ctx.rest = rest


def _gradients_each(ctx: Any, upstream: list[Tensor]) -> tuple[Any, ...]:
    hidden, labels, bias, *blocks = ctx.saved_tensors
    ignore_index, num_labels, fused = ctx.rest
    wanted = [x is not None and x.requires_grad for x in (hidden, bias, *blocks)]
    found = _each_backward(upstream[0], hidden, blocks, labels, bias, ignore_index, num_labels, wanted, fused)
    kept = [x if want else None for x, want in zip(found, wanted, strict=True)]
    return kept[0], kept[2:], None, kept[1], None, None, None


_each.register_autograd(_gradients_each, setup_context=_save_each)
