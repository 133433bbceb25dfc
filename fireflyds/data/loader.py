"""This rank's packed batches, by arithmetic on the step number alone."""

from dataclasses import dataclass

import numpy as np
import torch

from fireflyds.data.mix import RowSequence
from fireflyds.data.store import TokenStore
from fireflyds.types import IGNORE_INDEX, PackedBatch


@dataclass(frozen=True, slots=True)
class PackedLoader:
    """Micro-batches of one rank.

    Optimizer step s takes rows `[s * global_batch_size, (s + 1) * global_batch_size)` of the sequence; they are
    dealt to ranks and micro-batches in order, so all world sizes see the same rows in the same step.
    """

    store: TokenStore
    rows: RowSequence
    micro_batch_size: int
    global_batch_size: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step(self, number: int) -> list[PackedBatch]:
        """The micro-batches of step `number`, counted from 0."""
        batches = []
        for micro in range(self.accumulation):
            at = (micro * self.world_size + self.rank) * self.micro_batch_size + number * self.global_batch_size
            pieces = [piece for row in range(at, at + self.micro_batch_size) for piece in self.rows.row(row)]
            batches.append(collate(self.store, pieces))
        return batches


def collate(store: TokenStore, pieces: list[tuple[int, int, int]]) -> PackedBatch:
    """Lay `(document, start, length)` pieces end to end."""
    ids, labels, positions = [], [], []
    for document, start, length in pieces:
        tokens = store.ids(document, start, length)
        targets = np.full(length, IGNORE_INDEX)
        for first, end in store.spans_of(document):
            # Position t predicts token t + 1, so a learned token at the piece's start has no position to predict it.
            low, high = max(first - start, 1), min(end - start, length)
            targets[low - 1 : max(high - 1, low - 1)] = tokens[low:high] if high > low else []
        ids.append(tokens)
        labels.append(targets)
        positions.append(np.arange(length))
    lengths = [length for _, _, length in pieces]
    flat_labels = np.concatenate(labels)
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids))[None],
        labels=torch.from_numpy(flat_labels)[None],
        position_ids=torch.from_numpy(np.concatenate(positions))[None],
        cu_seqlens=torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32)),
        max_seqlen=max(lengths),
        domains=torch.from_numpy(store.domain_ids[[document for document, _, _ in pieces]].astype(np.int64)),
        num_learned=int((flat_labels != IGNORE_INDEX).sum()),
    )
