"""FlashAttention with document boundaries: the flash-attn packages, and FlashAttention-2 inside torch.

Windows: their `(left, right)` excludes the row's own token, `window` includes it.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fireflyds_kernels.packed_attention.heads import for_every_head


def _window_size(causal: bool, window: int | None) -> tuple[int, int]:
    left = -1 if window is None else window - 1
    return (left, 0 if causal else left)


def flash_attn_3(
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
    """FlashAttention-3 (Hopper), of the package `flash_attn_interface`."""
    from flash_attn_interface import flash_attn_varlen_func

    out = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        softmax_scale=scale,
        causal=causal,
        window_size=_package_window(causal, window),
    )
    return out[0] if isinstance(out, tuple) else out


def flash_attn_2(
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
    """FlashAttention-2, of the package `flash_attn`."""
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size=_package_window(causal, window),
        alibi_slopes=slopes,
    )
    return out


def _package_window(causal: bool, window: int | None) -> tuple[int, int]:
    # These packages take `causal` in addition to the window, and (-1, -1) for no window.
    return (-1, -1) if window is None else _window_size(causal, window)


@functools.cache
def _varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def varlen_has_window() -> bool:
    """True where `varlen_attn` supports a window; torch 2.10 has `is_causal` instead."""
    return "window_size" in _varlen()[1]


def torch_varlen(
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
    """`torch.nn.attention.varlen.varlen_attn`, whose arguments differ in torch 2.10, 2.11 and from 2.12 on."""
    function, parameters = _varlen()
    options: dict[str, Any] = {}
    if "window_size" in parameters:
        options["window_size"] = _window_size(causal, window)
    else:
        options["is_causal"] = causal
    if "scale" in parameters:
        options["scale"] = scale
    else:
        # Without the parameter, scores are scaled by 1/√D.
        factor = scale * q.shape[2] ** 0.5
        q = q if math.isclose(factor, 1.0) else q * factor
    if "enable_gqa" not in parameters:
        k, v = for_every_head(q, k, v)
    elif q.shape[1] != k.shape[1]:
        options["enable_gqa"] = True
    out: Tensor = function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
    return out
