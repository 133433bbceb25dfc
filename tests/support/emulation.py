"""Emulates a CPU without bf16 and fp16 arithmetic."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_half_precision() -> Iterator[None]:
    """Within the context oneDNN reports the support of a CPU with only AVX2. Numerical results do not change."""
    with contextlib.ExitStack() as stack:
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            original = getattr(torch.ops.mkldnn, name)
            setattr(torch.ops.mkldnn, name, lambda: False)
            stack.callback(setattr, torch.ops.mkldnn, name, original)
        yield
