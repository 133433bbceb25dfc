"""Functions of the forward and the backward kernels: document lookup, loads and stores of blocks, masks, scores."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def document(boundaries, steps, n, positions):
    """Start and (exclusive) end of the documents that contain `positions`."""
    low = positions * 0
    high = low + n
    for _ in range(steps):
        middle = (low + high) // 2
        at_or_after = tl.load(boundaries + middle) <= positions
        low = tl.where(at_or_after, middle, low)
        high = tl.where(at_or_after, high, middle)
    return tl.load(boundaries + low), tl.load(boundaries + low + 1)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Matrix product `[m, k]` x `[k, n]` in float32."""
    # The interpreter's bfloat16 products are wrong.
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(base, rows, stride, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """`[len(rows), BLOCK_D]`, zero beyond the last token and the last dimension."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None]
    if WHOLE and D == BLOCK_D:
        return tl.load(pointers)
    return tl.load(pointers, mask=(rows < tokens)[:, None] & (columns < D)[None], other=0.0)


@triton.jit
def store_rows(base, rows, stride, tokens, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores `[len(rows), BLOCK_D]` values in the type of `base`, up to the last token and the last dimension."""
    columns = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None].to(tl.int64) * stride + columns[None]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < D)[None])


@triton.jit
def visible(rows, columns, first, last, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """True where a row attends to a column; `first` and `last` bound the document, along either axis."""
    mask = (columns >= first) & (columns < last) if CAUSAL == 0 else (columns >= first) & (columns <= rows)
    if WINDOW:
        mask &= rows - columns < window
        if CAUSAL == 0:
            mask &= columns - rows < window
    return mask


@triton.jit
def scores(q, k, rows, columns, scale, slope, ALIBI: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """Scores times log2 e, `[rows, columns]`; `q` `[rows, D]`, `k` `[D, columns]`."""
    values = product(q, k, PRECISION, WIDEN) * (scale * LOG2E)
    if ALIBI:
        values -= slope * LOG2E * tl.abs(rows - columns).to(tl.float32)
    return values


@triton.jit
def column_phases(
    boundaries, steps, n, rows, start, tokens, window,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The columns that a block of rows attends to: `[low, clear)` and `[edge, high)` need a mask, `[clear, edge)` does
    not."""
    first, last = document(boundaries, steps, n, tl.minimum(rows, tokens - 1))
    end = tl.minimum(start + BLOCK_M, tokens)
    low = tl.min(first, 0)
    all_low = tl.max(first, 0)
    if CAUSAL:
        high = end
        all_high = start
    else:
        high = tl.max(last, 0)
        all_high = tl.min(last, 0)
    if WINDOW:
        low = tl.maximum(low, start - window + 1)
        all_low = tl.maximum(all_low, end - window)
        if CAUSAL == 0:
            high = tl.minimum(high, end + window - 1)
            all_high = tl.minimum(all_high, start + window)
    # Whole blocks only between `clear` and `edge`.
    clear = low + (all_low - low + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    has_full_blocks = all_high - clear >= BLOCK_N
    edge = tl.where(has_full_blocks, clear + (all_high - clear) // BLOCK_N * BLOCK_N, low)
    clear = tl.where(has_full_blocks, clear, low)
    return first, last, low, clear, edge, high
