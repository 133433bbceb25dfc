"""Where the documents of a batch begin and end: said once a batch, read by every attention of the model."""

from dataclasses import dataclass
from typing import Any

from fireflyds_kernels import packed_attention
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceBoundaries:
    """`cu_seqlens` int32 `[n + 1]` and the longest document of one batch."""

    cu_seqlens: Tensor
    max_seqlen: int

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`packed_attention` of `[T, H, D]` over these boundaries."""
        return packed_attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen, **options)


@dataclass(slots=True)
class PackedContext:
    """What the modules of one fused model share: the batch of its last forward pass, and whether layers are recomputed.

    Layers that pass their keyword arguments on get their boundaries as one of them, so that gradient checkpointing
    recomputes with the batch's own. Falcon's and BLOOM's do not: they read `batch` here, so with gradient checkpointing
    one batch goes forward and backward before the next.
    """

    batch: SequenceBoundaries | None = None
    recomputing: bool = False

    @property
    def boundaries(self) -> SequenceBoundaries:
        if self.batch is None:
            raise RuntimeError(
                "a fused model is called through its packed forward pass, with cu_seqlens and max_seqlen"
            )
        return self.batch
