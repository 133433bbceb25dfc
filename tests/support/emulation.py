"""A CPU without bf16 and fp16 arithmetic, whatever this one has."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def without_half_precision() -> Iterator[None]:
    """Inside, torch's question to oneDNN is answered as on a CPU with AVX2 alone. Results are not changed by it."""
    with contextlib.ExitStack() as stack:
        for name in ("_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"):
            before = getattr(torch.ops.mkldnn, name)
            setattr(torch.ops.mkldnn, name, lambda: False)
            stack.callback(setattr, torch.ops.mkldnn, name, before)
        yield
