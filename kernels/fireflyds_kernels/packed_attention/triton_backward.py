"""The backward kernels, without atomics: delta, gradients of keys and values, gradients of queries."""

import triton
import triton.language as tl

from fireflyds_kernels.packed_attention.triton_blocks import (
    column_phases,
    document,
    load_rows,
    product,
    scores,
    store_rows,
    visible,
)


@triton.jit
def delta_kernel(
    out_ptr, grad_ptr, delta_ptr, tokens, grad_stride, grad_head, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Σ_d grad · out of every row (delta), which the softmax's gradient subtracts."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    out = load_rows(out_ptr + head * D, rows, heads * D, tokens, D, BLOCK_D, False).to(tl.float32)
    grad = load_rows(grad_ptr + head * grad_head, rows, grad_stride, tokens, D, BLOCK_D, False).to(tl.float32)
    tl.store(delta_ptr + head * tokens + rows, tl.sum(out * grad, 1), mask=rows < tokens)


# The number of documents differs from batch to batch; no kernel is compiled for it.
@triton.jit(do_not_specialize=["n", "steps"])
def bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, boundaries, slopes, n, steps, tokens, scale,
    window, q_stride, q_head, k_stride, k_head, v_stride, v_head, grad_stride, grad_head, kv_heads,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, summed over the query heads that share them."""
    start = tl.program_id(0) * BLOCK_N
    kv_head = tl.program_id(1).to(tl.int64)
    columns = start + tl.arange(0, BLOCK_N)
    first, last = document(boundaries, steps, n, tl.minimum(columns, tokens - 1))
    low = start if CAUSAL else tl.min(first, 0)
    high = tl.max(last, 0)
    if WINDOW:
        high = tl.minimum(high, tl.minimum(start + BLOCK_N, tokens) + window - 1)
        if CAUSAL == 0:
            low = tl.maximum(low, start - window + 1)
    k = load_rows(k_ptr + kv_head * k_head, columns, k_stride, tokens, D, BLOCK_D, False)
    v = load_rows(v_ptr + kv_head * v_head, columns, v_stride, tokens, D, BLOCK_D, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One loop over heads and blocks, every block masked: nested loops or unmasked phases spill registers.
    blocks = tl.cdiv(high - low, BLOCK_M)
    for step in range(0, blocks * GROUP):
        head = kv_head * GROUP + step // blocks
        rows = low + step % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
        slope = tl.load(slopes + head) if ALIBI else 0.0
        row_offsets = head * tokens + rows
        # Everything below is [columns, rows].
        q = load_rows(q_ptr + head * q_head, rows, q_stride, tokens, D, BLOCK_D, False)
        values = scores(k, tl.trans(q), rows[None], columns[:, None], scale, slope, ALIBI, PRECISION, WIDEN)
        weights = tl.exp2(values - tl.load(lse_ptr + row_offsets, mask=rows < tokens, other=0.0)[None])
        mask = visible(rows[None], columns[:, None], first[:, None], last[:, None], window, CAUSAL, WINDOW)
        mask &= rows[None] < last[:, None]
        if CAUSAL == 0:
            mask &= rows[None] >= first[:, None]
        weights = tl.where(mask, weights, 0.0)
        grad = load_rows(grad_ptr + head * grad_head, rows, grad_stride, tokens, D, BLOCK_D, False)
        dv += product(weights.to(grad.dtype), grad, PRECISION, WIDEN)
        dweights = product(v, tl.trans(grad), PRECISION, WIDEN)
        dweights -= tl.load(delta_ptr + row_offsets, mask=rows < tokens, other=0.0)[None]
        dk += product((weights * dweights).to(q.dtype), q, PRECISION, WIDEN)
    store_rows(dk_ptr + kv_head * D, columns, kv_heads * D, tokens, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr + kv_head * D, columns, kv_heads * D, tokens, dv, D, BLOCK_D)


@triton.jit
def _accumulate_dq(
    dq, q, grad, lse, delta, k_base, v_base, k_stride, v_stride, rows, first, last, low, high, tokens, scale, slope,
    window,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Adds the contribution of columns `[low, high)` to the gradients of a block of queries."""
    for block in range(0, tl.cdiv(high - low, BLOCK_N)):
        columns = low + block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = load_rows(k_base, columns, k_stride, tokens, D, BLOCK_D, not MASKED)
        values = scores(q, tl.trans(k), rows[:, None], columns[None], scale, slope, ALIBI, PRECISION, WIDEN)
        weights = tl.exp2(values - lse[:, None])
        if MASKED:
            mask = visible(rows[:, None], columns[None], first[:, None], last[:, None], window, CAUSAL, WINDOW)
            weights = tl.where(mask, weights, 0.0)
        v = load_rows(v_base, columns, v_stride, tokens, D, BLOCK_D, not MASKED)
        dweights = product(grad, tl.trans(v), PRECISION, WIDEN) - delta[:, None]
        dq += product((weights * dweights).to(k.dtype), k, PRECISION, WIDEN)
    return dq


# The number of documents differs from batch to batch; no kernel is compiled for it.
@triton.jit(do_not_specialize=["n", "steps"])
def bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, boundaries, slopes, n, steps, tokens, scale, window,
    q_stride, q_head, k_stride, k_head, v_stride, v_head, grad_stride, grad_head, heads,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries of one head."""
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    rows = start + tl.arange(0, BLOCK_M)
    first, last, low, clear, edge, high = column_phases(
        boundaries, steps, n, rows, start, tokens, window, CAUSAL, WINDOW, BLOCK_M, BLOCK_N
    )
    slope = tl.load(slopes + head) if ALIBI else 0.0
    q = load_rows(q_ptr + head * q_head, rows, q_stride, tokens, D, BLOCK_D, False)
    grad = load_rows(grad_ptr + head * grad_head, rows, grad_stride, tokens, D, BLOCK_D, False)
    lse = tl.load(lse_ptr + head * tokens + rows, mask=rows < tokens, other=0.0)
    delta = tl.load(delta_ptr + head * tokens + rows, mask=rows < tokens, other=0.0)
    k_base, v_base = k_ptr + head // GROUP * k_head, v_ptr + head // GROUP * v_head
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if WINDOW or CAUSAL == 0:
        dq = _accumulate_dq(
            dq, q, grad, lse, delta, k_base, v_base, k_stride, v_stride, rows, first, last, low, clear, tokens, scale,
            slope, window, True, CAUSAL, WINDOW, ALIBI, D, BLOCK_D, BLOCK_N, PRECISION, WIDEN,
        )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, grad, lse, delta, k_base, v_base, k_stride, v_stride, rows, first, last, clear, edge, tokens, scale,
        slope, window, False, CAUSAL, WINDOW, ALIBI, D, BLOCK_D, BLOCK_N, PRECISION, WIDEN,
    )  # fmt: skip
    dq = _accumulate_dq(
        dq, q, grad, lse, delta, k_base, v_base, k_stride, v_stride, rows, first, last, edge, high, tokens, scale,
        slope, window, True, CAUSAL, WINDOW, ALIBI, D, BLOCK_D, BLOCK_N, PRECISION, WIDEN,
    )  # fmt: skip
    store_rows(dq_ptr + head * D, rows, heads * D, tokens, dq * scale, D, BLOCK_D)
