"""The forward kernel: FlashAttention-2's online softmax over the columns that a block of rows attends to."""

import triton
import triton.language as tl

from fireflyds_kernels.packed_attention.triton_blocks import (
    column_phases,
    load_rows,
    product,
    scores,
    store_rows,
    visible,
)


@triton.jit
def _attend(
    acc, top, norm, q, k_base, v_base, k_stride, v_stride, rows, first, last, low, high, tokens, scale, slope, window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Online softmax over the columns `[low, high)`.

    Blocks are counted from 0: with a start value that is loaded from memory, Triton loses the alignment information,
    and with it 16-byte loads and their pipelining.
    """
    for block in range(0, tl.cdiv(high - low, BLOCK_N)):
        columns = low + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, columns, k_stride, tokens, D, BLOCK_D, not MASKED)
        values = scores(q, tl.trans(k), rows[:, None], columns[None], scale, slope, ALIBI, PRECISION, WIDEN)
        if MASKED:
            mask = visible(rows[:, None], columns[None], first[:, None], last[:, None], window, CAUSAL, WINDOW)
            values = tl.where(mask, values, float("-inf"))
            new_top = tl.maximum(top, tl.max(values, 1))
            # A row without visible columns so far: −∞ minus −∞ is NaN.
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            new_top = tl.maximum(top, tl.max(values, 1))
            finite = new_top
        weights = tl.exp2(values - finite[:, None])
        rescale = tl.exp2(top - finite)
        norm = norm * rescale + tl.sum(weights, 1)
        v = load_rows(v_base, columns, v_stride, tokens, D, BLOCK_D, not MASKED)
        acc = acc * rescale[:, None] + product(weights.to(v.dtype), v, PRECISION, WIDEN)
        top = new_top
    return acc, top, norm


# The number of documents differs from batch to batch; no kernel is compiled for it.
@triton.jit(do_not_specialize=["n", "steps"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, boundaries, slopes, n, steps, tokens, scale, window,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, heads,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head: output `[T, H, D]`, and log2 of the softmax's denominator `[H, T]` (`lse_ptr`)."""
    # The last rows of a long document attend to the most columns: they start first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_M)
    first, last, low, clear, edge, high = column_phases(
        boundaries, steps, n, rows, start, tokens, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    slope = tl.load(slopes + head) if ALIBI else 0.0
    q = load_rows(q_ptr + head * q_head, rows, q_stride, tokens, D, BLOCK_D, False)
    k_base, v_base = k_ptr + head // GROUP * k_head, v_ptr + head // GROUP * v_head
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    if WINDOW or CAUSAL == 0:
        acc, top, norm = _attend(
            acc, top, norm, q, k_base, v_base, k_stride, v_stride, rows, first, last, low, clear, tokens, scale, slope,
            window, True, CAUSAL, WINDOW, ALIBI, D, BLOCK_D, BLOCK_N, PRECISION, WIDEN,
        )  # fmt: skip
    acc, top, norm = _attend(
        acc, top, norm, q, k_base, v_base, k_stride, v_stride, rows, first, last, clear, edge, tokens, scale, slope,
        window, False, CAUSAL, WINDOW, ALIBI, D, BLOCK_D, BLOCK_N, PRECISION, WIDEN,
    )  # fmt: skip
    acc, top, norm = _attend(
        acc, top, norm, q, k_base, v_base, k_stride, v_stride, rows, first, last, edge, high, tokens, scale, slope,
        window, True, CAUSAL, WINDOW, ALIBI, D, BLOCK_D, BLOCK_N, PRECISION, WIDEN,
    )  # fmt: skip
    store_rows(out_ptr + head * D, rows, heads * D, tokens, acc / norm[:, None], D, BLOCK_D)
    tl.store(lse_ptr + head * tokens + rows, top + tl.log2(norm), mask=rows < tokens)
