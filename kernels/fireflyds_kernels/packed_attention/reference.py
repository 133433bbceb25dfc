"""Reference implementation, used on the CPU: scaled dot-product attention, one document at a time.

Forward and backward pass iterate over the documents explicitly: autograd would allocate a full-size gradient for the
slice of each document (1.6 times slower).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels.packed_attention.bias import bias, span

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Rows of a document processed at a time where there is a bias.
_ROWS = 256


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """Attention output `[T, H, D]` for q `[T, H, D]`, k and v `[T, Hk, D]`, cu_seqlens `[n + 1]`."""
    out: Tensor = _forward(q, k, v, cu_seqlens, max_seqlen, causal, scale, window, slopes)[0]
    return out


def _boundaries(cu_seqlens: Tensor, tokens: int, max_seqlen: int) -> list[int]:
    bounds: list[int] = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths) < 0 or max(lengths) > max_seqlen:
        raise ValueError(
            f"packed_attention: documents of {sum(lengths)} tokens (shortest {min(lengths)}, longest {max(lengths)}), "
            f"the first at {bounds[0]}, for T={tokens}, max_seqlen={max_seqlen}"
        )
    return bounds


def _blocks(
    bounds: list[int], causal: bool, window: int | None, slopes: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, bool, Tensor | None]]:
    """Blocks (rows, columns, causal mask or not, bias or None) that together contain every visible pair of tokens
    once."""
    shape, mask, wide = None, None, torch.promote_types(dtype, torch.float32)
    for start, end in pairwise(bounds):
        length = end - start
        if length and slopes is None and (window is None or length <= window):
            yield slice(start, end), slice(start, end), causal, None
            continue
        for row in range(0, length, _ROWS):
            last = min(row + _ROWS, length)
            low, high = span(row, last, length, causal, window)
            if shape != (last - row, row - low, high - low):
                shape = (last - row, row - low, high - low)
                mask = bias(torch.arange(row, last), torch.arange(low, high), causal, window, slopes, wide)[None]
            yield slice(start + row, start + last), slice(start + low, start + high), False, mask


def _heads_first(x: Tensor, rows: slice) -> Tensor:
    return x[rows].transpose(0, 1)[None]


@torch.library.custom_op("fireflyds::packed_attention_reference", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`[T, H, D]` and the log-sum-exp of every row's scores, `[H, T]`."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    bounds = _boundaries(cu_seqlens, q.shape[0], max_seqlen)
    for rows, columns, masked, mask in _blocks(bounds, causal, window, slopes, q.dtype):
        block_out, norm = _attend(
            _heads_first(q, rows),
            _heads_first(k, columns),
            _heads_first(v, columns),
            0.0,
            masked,
            attn_mask=mask,
            scale=scale,
        )
        out[rows], lse[:, rows] = block_out[0].transpose(0, 1), norm[0]
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1], q.shape[0], dtype=wide)


@torch.library.custom_op("fireflyds::packed_attention_reference_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    # Blocks of one document share columns.
    shared = window is not None or slopes is not None
    if shared:
        dk.zero_()
        dv.zero_()
    bounds = _boundaries(cu_seqlens, q.shape[0], max_seqlen)
    for rows, columns, masked, mask in _blocks(bounds, causal, window, slopes, q.dtype):
        gradients = _attend_backward(
            _heads_first(grad, rows),
            _heads_first(q, rows),
            _heads_first(k, columns),
            _heads_first(v, columns),
            _heads_first(out, rows),
            lse[None, :, rows],
            0.0,
            masked,
            attn_mask=mask,
            scale=scale,
        )
        dq_block, dk_block, dv_block = (x[0].transpose(0, 1) for x in gradients)
        dq[rows] = dq_block
        if shared:
            dk[columns] += dk_block
            dv[columns] += dv_block
        else:
            dk[columns], dv[columns] = dk_block, dv_block
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, max_seqlen, causal, scale, window, slopes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, slopes)
    ctx.options = (max_seqlen, causal, scale, window)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, slopes = ctx.saved_tensors
    return (*_backward(grad, *tensors, *ctx.options, slopes), *[None] * 6)


_forward.register_autograd(_gradients, setup_context=_save)
