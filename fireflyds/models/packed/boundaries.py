"""Document boundaries of a packed batch: set once per batch, read by every attention layer of the model."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from fireflyds_kernels import packed_attention
from torch import Tensor

from fireflyds.models.packed.routing import Routing


@dataclass(frozen=True, slots=True)
class SequenceBoundaries:
    """Boundaries of the n documents of one batch.

    `cu_seqlens`: int32 `[n + 1]`, cumulative lengths from 0 to T. `max_seqlen`: tokens of the longest document.
    """

    cu_seqlens: Tensor
    max_seqlen: int

    def in_chunks(self, size: int) -> "SequenceBoundaries":
        """These boundaries and every `size` tokens of a document another one. The host reads the boundaries."""
        bounds = [first for a, b in pairwise(self.cu_seqlens.tolist()) for first in range(a, b, size)]
        cu_seqlens = torch.tensor([*bounds, int(self.cu_seqlens[-1])], dtype=torch.int32, device=self.cu_seqlens.device)
        return SequenceBoundaries(cu_seqlens, min(size, self.max_seqlen))

    def positions(self, tokens: int) -> Tensor:
        """The position of every token in its document, int32 `[tokens]`."""
        index = torch.arange(tokens, dtype=torch.int32, device=self.cu_seqlens.device)
        return index - self.cu_seqlens[torch.searchsorted(self.cu_seqlens, index, right=True) - 1]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """`packed_attention` of `[T, H, D]` over these boundaries."""
        return packed_attention(q, k, v, self.cu_seqlens, max_seqlen=self.max_seqlen, **options)


@dataclass(slots=True)
class PackedContext:
    """State shared by the modules of one fused model.

    `batch`: boundaries of the last forward pass. `recomputing`: True where gradient checkpointing is enabled.
    `packed`: False where every document runs by itself. `routing`: the choices of its routers; None for a model without
    experts.

    Layers that forward keyword arguments receive the boundaries as one of them, so that gradient checkpointing
    recomputes with the boundaries of the same batch. Layers of Falcon and BLOOM do not; they read `batch` here, so with
    gradient checkpointing the backward pass of a batch must run before the forward pass of the next.
    """

    batch: SequenceBoundaries | None = None
    recomputing: bool = False
    packed: bool = True
    routing: Routing | None = None

    @property
    def boundaries(self) -> SequenceBoundaries:
        """Boundaries of the current batch.

        Raises:
            RuntimeError: the model was not called through its packed forward pass.
        """
        if self.batch is None:
            raise RuntimeError(
                "a fused model must be called through its packed forward pass, with cu_seqlens and max_seqlen"
            )
        return self.batch
