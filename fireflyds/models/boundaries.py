"""Where the documents of the batch at hand begin and end: set once a batch, read by every attention of the model."""

from dataclasses import dataclass
from typing import Any

from fireflyds_kernels import packed_attention
from torch import Tensor


@dataclass(slots=True)
class Boundaries:
    """`cu_seqlens` int32 `[n + 1]` and the longest document; `recomputing` says that gradient checkpointing is on."""

    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    recomputing: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`packed_attention` of `[T, H, D]` over these boundaries."""
        if self.cu_seqlens is None:
            raise RuntimeError(
                "a fused model is called through its packed forward pass, with cu_seqlens and max_seqlen"
            )
        return packed_attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen, **options)
