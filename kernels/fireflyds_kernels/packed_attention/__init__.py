"""Attention over documents laid end to end, none of which sees another."""

from importlib.util import find_spec

import torch
from torch import Tensor

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import HALF, HALF_OR_SINGLE, DispatchKey, Implementation


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ − slope · |i − j| + mask) v, in which token i sees token j of the same document.

    Args:
        q: `[T, H, D]`.
        k, v: `[T, Hk, D]`; Hk divides H (grouped-query attention).
        cu_seqlens: int32 `[n + 1]` on the same device, document boundaries from 0 to T.
        max_seqlen: length of the longest document, known on the host.
        causal: token i sees j ≤ i only.
        scale: 1/√D when None.
        window: |i − j| < window, as `sliding_window` of Mistral and Qwen; None for whole documents.
        alibi_slopes: float32 `[H]` (arXiv 2108.12409), without gradient; None for no position bias.

    Returns:
        `[T, H, D]`.

    The host never waits for the device, except on a GPU that has nothing but `bucketed` for what is asked (see
    `packed_attention/bucketed.py`): there the boundaries are read once per batch.

    Raises:
        ValueError: shapes that do not fit together; on the CPU also boundaries that do not.
        CannotRunError: an implementation was forced that cannot run here.
    """
    _check(q, k, v, cu_seqlens, window, alibi_slopes)
    run = dispatch.select(
        "packed_attention", q, head_dim=q.shape[2], window=window is not None, alibi=alibi_slopes is not None
    )
    scale = q.shape[2] ** -0.5 if scale is None else scale
    result: Tensor = run(q, k, v, cu_seqlens, max_seqlen, causal, scale, window, alibi_slopes)
    return result


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, slopes: Tensor | None) -> None:
    if q.dim() != 3 or k.shape != v.shape or k.dim() != 3 or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"packed_attention: q [T, H, D], k and v [T, Hk, D] expected, got {[*q.shape]}, {[*k.shape]}, {[*v.shape]}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"packed_attention: q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; one number format expected"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"packed_attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"packed_attention: cu_seqlens must be int32 [n + 1], got {cu_seqlens.dtype} {[*cu_seqlens.shape]}"
        )
    if cu_seqlens.device != q.device:
        raise ValueError(
            f"packed_attention: cu_seqlens is on {cu_seqlens.device}, q on {q.device}; one device expected"
        )
    if window is not None and window < 1:
        raise ValueError(f"packed_attention: window={window} must be at least 1")
    if slopes is not None and (slopes.shape != q.shape[1:2] or slopes.dtype != torch.float32):
        raise ValueError(
            f"packed_attention: alibi_slopes must be float32 [H] with H={q.shape[1]}, got {slopes.dtype} {[*slopes.shape]}"
        )


def _flash_attn_3(where: DispatchKey) -> str | None:
    if where.alibi:
        return "FlashAttention-3 has no ALiBi"
    if where.capability and where.capability // 10 != 9:
        return "FlashAttention-3 is for Hopper (sm_90)"
    if where.head_dim % 8:
        return f"head_dim {where.head_dim} is no multiple of 8"
    return _flash(where) or dispatch.requires(dtypes=HALF, package="flash_attn_interface")(where)


def _flash_attn_2(where: DispatchKey) -> str | None:
    return _flash(where) or dispatch.requires(capability=80, dtypes=HALF, package="flash_attn")(where)


def _flash(where: DispatchKey) -> str | None:
    return f"head_dim {where.head_dim} is over 256" if where.head_dim > 256 else None


def _torch_varlen(where: DispatchKey) -> str | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen (2.10 is the first)"
    if where.alibi:
        return "varlen_attn has no ALiBi"
    if where.head_dim % 8:
        return f"head_dim {where.head_dim} is no multiple of 8"
    if where.window:
        from fireflyds_kernels.packed_attention import flash

        if not flash.varlen_has_window():
            return "varlen_attn has no window before torch 2.11"
    return _flash(where) or dispatch.requires(capability=80, dtypes=HALF)(where)


def _triton(where: DispatchKey) -> str | None:
    if where.dtype is torch.float32 and where.head_dim > 128 and where.device == "cuda":
        return "float32 blocks of head_dim over 128 do not fit shared memory"
    # Below sm_80 Triton multiplies matrices on the plain cores, an order of magnitude slower.
    return _flash(where) or dispatch.requires_triton(80)(where)


def _efficient(where: DispatchKey) -> str | None:
    if where.window or where.alibi:
        return "takes neither a window nor ALiBi beside boundaries"
    if where.head_dim % 8:
        return f"head_dim {where.head_dim} is no multiple of 8"
    if where.dtype is torch.bfloat16 and 0 < where.capability < 80:
        return "bfloat16 needs sm_80 or newer"
    if not hasattr(torch.ops.aten, "_efficient_attention_forward"):
        return "this torch has no aten::_efficient_attention_forward"
    return dispatch.requires(capability=50, dtypes=HALF_OR_SINGLE)(where)


_PLACE = "fireflyds_kernels.packed_attention"
dispatch.Kernel(
    "packed_attention",
    Implementation("flash_attn_3", f"{_PLACE}.flash", "flash_attn_3", _flash_attn_3),
    Implementation("flash_attn", f"{_PLACE}.flash", "flash_attn_2", _flash_attn_2),
    Implementation("torch_varlen", f"{_PLACE}.flash", "torch_varlen", _torch_varlen),
    Implementation("triton", f"{_PLACE}.triton", "packed_attention", _triton),
    Implementation("efficient", f"{_PLACE}.efficient", "packed_attention", _efficient),
    Implementation(
        "bucketed",
        f"{_PLACE}.bucketed",
        "packed_attention",
        lambda where: "is for GPUs" if where.device == "cpu" else None,
    ),
    Implementation(
        "reference",
        f"{_PLACE}.reference",
        "packed_attention",
        lambda where: "runs on the CPU" if where.device != "cpu" else None,
    ),
)
