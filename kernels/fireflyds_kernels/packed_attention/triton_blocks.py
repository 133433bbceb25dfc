"""What the forward and the backward kernel share: finding documents, loading blocks, masking scores."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def document(boundaries, steps, n, positions):
    """First and one past the last token of the documents that hold `positions`."""
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
    # The interpreter's bfloat16 products are wrong.
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(base, rows, stride, tokens, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr):
    """`[len(rows), BLOCK_D]`, zero beyond the last token and the last dimension."""
    columns = tl.arange(0, BLOCK_D)
    places = base + rows[:, None].to(tl.int64) * stride + columns[None]
    if WHOLE and D == BLOCK_D:
        return tl.load(places)
    return tl.load(places, mask=(rows < tokens)[:, None] & (columns < D)[None], other=0.0)


@triton.jit
def store_rows(base, rows, stride, tokens, values, D: tl.constexpr, BLOCK_D: tl.constexpr):
    columns = tl.arange(0, BLOCK_D)
    places = base + rows[:, None].to(tl.int64) * stride + columns[None]
    tl.store(places, values.to(base.dtype.element_ty), mask=(rows < tokens)[:, None] & (columns < D)[None])


@triton.jit
def visible(rows, columns, first, last, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which (row, column) pairs see each other; `first` and `last` bound the document, along either axis."""
    seen = (columns >= first) & (columns < last) if CAUSAL == 0 else (columns >= first) & (columns <= rows)
    if WINDOW:
        seen &= rows - columns < window
        if CAUSAL == 0:
            seen &= columns - rows < window
    return seen


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
    """The columns a block of rows sees: `[low, clear)` partly, `[clear, edge)` wholly, `[edge, high)` partly."""
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
    some = all_high - clear >= BLOCK_N
    edge = tl.where(some, clear + (all_high - clear) // BLOCK_N * BLOCK_N, low)
    clear = tl.where(some, clear, low)
    return first, last, low, clear, edge, high
