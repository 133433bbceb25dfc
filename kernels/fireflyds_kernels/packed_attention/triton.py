"""FlashAttention-2 (arXiv 2307.08691) with document boundaries in Triton, forward and backward, with windows and ALiBi.

The packed row is divided into blocks of tokens, independent of documents; each block finds its documents by binary
search in the boundaries. A thousand short documents therefore need no more programs than one long one, without padding
and without a table built on the host. Gradients of keys and of queries are computed by two kernels without atomics, so
that results are bitwise reproducible.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fireflyds_kernels.dispatch import capability_of, on_its_device
from fireflyds_kernels.packed_attention.triton_backward import bwd_dkdv_kernel, bwd_dq_kernel, delta_kernel
from fireflyds_kernels.packed_attention.triton_forward import forward_kernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Tiles:
    """Rows and columns of a block of scores, number of warps, and number of pipeline stages."""

    rows: int
    columns: int
    warps: int
    stages: int

    def launch(self) -> dict[str, Any]:
        """Compile-time arguments of a kernel launch."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }


# Chosen so that no registers spill (tests/kernels/test_compiled.py). By padded head_dim: for sm_90 with 227 KB of
# shared memory, sm_80 with 163 KB, and sm_86, sm_89, sm_120 with 99 KB.
_LARGE, _MIDDLE, _SMALL = 0, 1, 2
_FORWARD = {
    64: (Tiles(128, 128, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3)),
    128: (Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(128, 32, 8, 3)),
    256: (Tiles(128, 32, 8, 3), Tiles(64, 32, 8, 3), Tiles(64, 32, 8, 2)),
}
_KEYS = {
    64: (Tiles(64, 128, 8, 3), Tiles(32, 128, 8, 3), Tiles(32, 128, 8, 3)),
    128: (Tiles(32, 128, 8, 3), Tiles(32, 64, 8, 3), Tiles(64, 64, 8, 2)),
    256: (Tiles(32, 32, 8, 3), Tiles(32, 32, 8, 3), Tiles(32, 32, 8, 2)),
}
_QUERIES = {
    64: (Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2)),
    128: (Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 3), Tiles(64, 64, 8, 2)),
    256: (Tiles(128, 32, 8, 2), Tiles(32, 32, 8, 3), Tiles(32, 32, 8, 2)),
}
_SINGLE = Tiles(32, 32, 8, 1)


def tiles(what: str, head_dim: int, dtype: torch.dtype, capability: int) -> Tiles:
    """The block sizes of the kernel `what` (`forward`, `keys` or `queries`) for a device of this capability."""
    if dtype is torch.float32 or not capability:
        return _SINGLE
    size = _LARGE if capability in (90, 100, 103) else _MIDDLE if capability in (80, 87) else _SMALL
    table = {"forward": _FORWARD, "keys": _KEYS, "queries": _QUERIES}[what]
    return table[max(64, triton.next_power_of_2(head_dim))][size]


def constants(
    q_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, causal: bool, window: int | None, alibi: bool
) -> dict[str, Any]:
    """Compile-time constants of the kernels, besides the block sizes."""
    return {
        "GROUP": q_heads // kv_heads,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "ALIBI": alibi,
        "D": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "PRECISION": "ieee" if dtype is torch.float32 else "tf32",
        "WIDEN": INTERPRETED and dtype is torch.bfloat16,
    }


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
    out: Tensor = _forward(q, k, v, cu_seqlens, causal, scale, window, slopes)[0]
    return out


def _last_contiguous(x: Tensor) -> Tensor:
    """`x` with a stride of 1 in the last dimension, as the kernels require; they take any other strides."""
    return x if x.stride(2) == 1 else x.contiguous()


def _shared_arguments(
    q: Tensor, k: Tensor, cu_seqlens: Tensor, causal: bool, window: int | None, slopes: Tensor | None
) -> Any:
    """Constants, a function that selects tiles, and the boundary arguments that all kernels share."""
    n = cu_seqlens.shape[0] - 1
    fixed = constants(q.shape[1], k.shape[1], q.shape[2], q.dtype, causal, window, slopes is not None)
    capability = capability_of(q.device)

    def tiles_of(what: str) -> Tiles:
        return tiles(what, q.shape[2], q.dtype, capability)

    # An unused pointer still needs a tensor.
    return fixed, tiles_of, (cu_seqlens, cu_seqlens if slopes is None else slopes, n, n.bit_length(), q.shape[0])


@torch.library.custom_op("fireflyds::packed_attention_triton", mutates_args=())
@on_its_device
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`[T, H, D]`, and the log-sum-exp of every row's scores in base 2, `[H, T]`."""
    q, k, v = map(_last_contiguous, (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
    fixed, tiles_of, shared = _shared_arguments(q, k, cu_seqlens, causal, window, slopes)
    if not len(q):
        return out, lse
    block = tiles_of("forward")
    forward_kernel[(triton.cdiv(q.shape[0], block.rows), q.shape[1])](
        q, k, v, out, lse, *shared, scale, window or 0,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), q.shape[1],
        **fixed, **block.launch(),
    )  # fmt: skip
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("fireflyds::packed_attention_triton_backward", mutates_args=())
@on_its_device
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v = map(_last_contiguous, (grad, q, k, v))
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    delta = torch.empty_like(lse)
    tokens, heads, kv_heads = q.shape[0], q.shape[1], k.shape[1]
    if not tokens:
        return dq, dk, dv
    fixed, tiles_of, shared = _shared_arguments(q, k, cu_seqlens, causal, window, slopes)
    sizes = {"D": fixed["D"], "BLOCK_D": fixed["BLOCK_D"]}
    delta_kernel[(triton.cdiv(tokens, 64), heads)](
        out, grad, delta, tokens, grad.stride(0), grad.stride(1), heads, **sizes, BLOCK_M=64, enable_fp_fusion=True
    )
    strides = [stride for x in (q, k, v, grad) for stride in x.stride()[:2]]
    block = tiles_of("keys")
    bwd_dkdv_kernel[(triton.cdiv(tokens, block.columns), kv_heads)](
        q, k, v, grad, lse, delta, dk, dv, *shared, scale, window or 0, *strides, kv_heads, **fixed, **block.launch()
    )
    block = tiles_of("queries")
    bwd_dq_kernel[(triton.cdiv(tokens, block.rows), heads)](
        q, k, v, grad, lse, delta, dq, *shared, scale, window or 0, *strides, heads, **fixed, **block.launch()
    )
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, causal, scale, window, slopes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, slopes)
    ctx.options = (causal, scale, window)
    # Nothing uses the log-sum-exp outside: zeros in place of its gradient would be written and not read.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    *tensors, slopes = ctx.saved_tensors
    return (*_backward(grad, *tensors, *ctx.options, slopes), *[None] * 5)


_forward.register_autograd(_gradients, setup_context=_save)
