"""Attention over the documents of a packed row, without attention between documents."""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from fireflyds_kernels import dispatch
from fireflyds_kernels.dispatch import Implementation
from fireflyds_kernels.requirements import HALF, HALF_OR_SINGLE, DispatchKey, always, requires, requires_triton


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
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q kᵀ − slope · |i − j| + mask) v, where token i attends to tokens j of the same document.

    Args:
        q: `[T, H, D]`.
        k: `[T, Hk, D]`; Hk divides H (grouped-query attention).
        v: `[T, Hk, Dv]`; Dv may differ from D (multi-head latent attention).
        cu_seqlens: int32 `[n + 1]` on the same device, document boundaries from 0 to T.
        max_seqlen: length of the longest document, known on the host.
        causal: token i attends to j ≤ i only.
        scale: 1/√D when None.
        window: |i − j| < window, as `sliding_window` of Mistral and Qwen; None for whole documents.
        alibi_slopes: float32 `[H]` (arXiv 2108.12409), without gradient; None for no position bias.
        softcap: c > 0 replaces every scaled score s by c · tanh(s / c), before bias and mask (Gemma 2); 0 for none.
        sinks: `[H]`, a score of one more column whose value is zero (gpt-oss); None for none.

    Returns:
        `[T, H, Dv]`.

    The host does not wait for the device, except on a GPU where only `bucketed` or `plain` supports the options: they
    read the boundaries, `bucketed` once a batch.

    Raises:
        ValueError: shapes that do not match; on the CPU also boundaries that do not match them.
        CannotRunError: an implementation was forced that cannot run here.
    """
    _check_shapes(q, k, v, cu_seqlens, window, alibi_slopes)
    scale = q.shape[2] ** -0.5 if scale is None else scale
    value_dim, widest = v.shape[2], max(q.shape[2], v.shape[2])
    # Columns of zeros change no score, and those of the output are dropped.
    q, k, v = (x if x.shape[2] == widest else pad(x, (0, widest - x.shape[2])) for x in (q, k, v))
    run = dispatch.select(
        "packed_attention",
        q,
        head_dim=q.shape[2],
        window=window is not None,
        alibi=alibi_slopes is not None,
        softcap=bool(softcap),
        sinks=sinks is not None,
    )
    extras = {"softcap": softcap, "sinks": sinks} if softcap or sinks is not None else {}
    result: Tensor = run(q, k, v, cu_seqlens, max_seqlen, causal, scale, window, alibi_slopes, **extras)
    return result if value_dim == widest else result[..., :value_dim]


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int | None, slopes: Tensor | None
) -> None:
    three_dimensional = q.dim() == k.dim() == v.dim() == 3
    if not three_dimensional or k.shape[:2] != v.shape[:2] or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        raise ValueError(
            f"packed_attention: q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] expected, got {[*q.shape]}, {[*k.shape]}, "
            f"{[*v.shape]}"
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
            f"packed_attention: alibi_slopes must be float32 [H] with H={q.shape[1]}, got {slopes.dtype} "
            f"{[*slopes.shape]}"
        )


_VARLEN = "flash_attn_varlen_func"


def _flash_attn_3(key: DispatchKey) -> str | None:
    if key.alibi:
        return "FlashAttention-3 has no ALiBi"
    if key.capability and key.capability // 10 != 9:
        return "FlashAttention-3 is for Hopper (sm_90)"
    if key.head_dim % 8:
        return f"head_dim {key.head_dim} is no multiple of 8"
    return _head_dim_limit(key) or requires(dtypes=HALF, package="flash_attn_interface", function=_VARLEN)(key)


def _flash_attn_2(key: DispatchKey) -> str | None:
    return _head_dim_limit(key) or requires(capability=80, dtypes=HALF, package="flash_attn", function=_VARLEN)(key)


def _head_dim_limit(key: DispatchKey) -> str | None:
    return f"head_dim {key.head_dim} is over 256" if key.head_dim > 256 else None


def _torch_varlen(key: DispatchKey) -> str | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return "this torch has no torch.nn.attention.varlen (2.10 is the first)"
    if key.alibi:
        return "varlen_attn has no ALiBi"
    if key.head_dim % 8:
        return f"head_dim {key.head_dim} is no multiple of 8"
    if key.window:
        from fireflyds_kernels.packed_attention import flash

        if not flash.varlen_has_window():
            return "varlen_attn has no window before torch 2.11"
    return _head_dim_limit(key) or requires(capability=80, dtypes=HALF)(key)


def _triton(key: DispatchKey) -> str | None:
    if key.dtype is torch.float32 and key.head_dim > 128 and key.device == "cuda":
        return "float32 blocks of head_dim over 128 do not fit shared memory"
    # Below sm_80 Triton's matrix products do not use tensor cores: an order of magnitude slower.
    return _head_dim_limit(key) or requires_triton(80)(key)


def _efficient(key: DispatchKey) -> str | None:
    if key.window or key.alibi:
        return "supports neither a window nor ALiBi"
    if key.head_dim % 8:
        return f"head_dim {key.head_dim} is no multiple of 8"
    if key.dtype is torch.bfloat16 and 0 < key.capability < 80:
        return "bfloat16 needs sm_80 or newer"
    if not hasattr(torch.ops.aten, "_efficient_attention_forward"):
        return "this torch has no aten::_efficient_attention_forward"
    return requires(capability=50, dtypes=HALF_OR_SINGLE)(key)


def _without_extras(rule: Callable[[DispatchKey], str | None]) -> Callable[[DispatchKey], str | None]:
    """The rule of an implementation without soft-capped scores and sinks."""
    return lambda key: "has neither softcap nor sinks" if key.softcap or key.sinks else rule(key)


_PACKAGE = "fireflyds_kernels.packed_attention"
dispatch.Kernel(
    "packed_attention",
    Implementation("flash_attn_3", f"{_PACKAGE}.flash", "flash_attn_3", _without_extras(_flash_attn_3)),
    Implementation("flash_attn", f"{_PACKAGE}.flash", "flash_attn_2", _without_extras(_flash_attn_2)),
    Implementation("torch_varlen", f"{_PACKAGE}.flash", "torch_varlen", _without_extras(_torch_varlen)),
    Implementation("triton", f"{_PACKAGE}.triton", "packed_attention", _without_extras(_triton)),
    Implementation("efficient", f"{_PACKAGE}.efficient", "packed_attention", _without_extras(_efficient)),
    Implementation(
        "bucketed",
        f"{_PACKAGE}.bucketed",
        "packed_attention",
        _without_extras(lambda key: "runs on GPUs only" if key.device == "cpu" else None),
    ),
    Implementation(
        "reference",
        f"{_PACKAGE}.reference",
        "packed_attention",
        _without_extras(lambda key: "runs on the CPU only" if key.device != "cpu" else None),
    ),
    Implementation("plain", f"{_PACKAGE}.plain", "packed_attention", always),
)
