"""This rank's packed batches, by arithmetic on the step number alone."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fireflyds.data.mix import RowSequence
from fireflyds.data.store import TokenStore
from fireflyds.types import IGNORE_INDEX, PackedBatch

# Steps that are made ready while the device computes.
_AHEAD = 2


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
        return [collate(self.store, self._pieces(number, micro)) for micro in range(self.accumulation)]

    def _pieces(self, number: int, micro: int) -> list[tuple[int, int, int]]:
        at = (micro * self.world_size + self.rank) * self.micro_batch_size + number * self.global_batch_size
        return [piece for row in range(at, at + self.micro_batch_size) for piece in self.rows.row(row)]

    def documents(self, number: int, micro: int) -> str:
        """The documents of a micro-batch of step `number`, for people to find: numbers in the store, and tokens."""
        pieces = self._pieces(number, micro)
        some = ", ".join(f"{document} [{start}:{start + length}]" for document, start, length in pieces[:8])
        more = f" and {len(pieces) - 8} more" if len(pieces) > 8 else ""
        return f"documents {some}{more} of {self.store.path}"

    def require(self, steps: int) -> None:
        """Raises `UserError` when the data end before so many steps of all ranks."""
        self.rows.require(steps * self.global_batch_size)

    def steps(self, first: int, end: int) -> Iterator[list[PackedBatch]]:
        """Steps `first` to `end`, made ready by a thread while the caller works."""
        ready: queue.Queue[list[PackedBatch] | BaseException | None] = queue.Queue(_AHEAD)
        left = threading.Event()

        def put(item: list[PackedBatch] | BaseException | None) -> None:
            while not left.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for number in range(first, end):
                    if left.is_set():
                        return
                    put(self.step(number))
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
            thread.join()


def collate(store: TokenStore, pieces: list[tuple[int, int, int]]) -> PackedBatch:
    """Lay `(document, start, length)` pieces end to end."""
    documents = np.array([document for document, _, _ in pieces])
    lengths = np.array([length for _, _, length in pieces])
    bounds = np.zeros(len(pieces) + 1, np.int64)
    np.cumsum(lengths, out=bounds[1:])
    ids = np.concatenate([store.ids(*piece) for piece in pieces]).astype(np.int64)
    # Position t predicts token t + 1; the last of a piece predicts nothing.
    labels = np.empty_like(ids)
    labels[:-1] = ids[1:]
    labels[bounds[1:] - 1] = IGNORE_INDEX
    for place in np.flatnonzero(~store.is_document(documents)).tolist():
        document, start, length = pieces[place]
        learned = np.zeros(length, bool)
        for first, end in store.spans_of(document).tolist():
            learned[max(first - start, 1) - 1 : max(min(end - start, length) - 1, 0)] = True
        labels[bounds[place] : bounds[place + 1]][~learned] = IGNORE_INDEX
    return PackedBatch(
        input_ids=torch.from_numpy(ids)[None],
        labels=torch.from_numpy(labels)[None],
        position_ids=torch.from_numpy(np.arange(len(ids)) - np.repeat(bounds[:-1], lengths))[None],
        cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
        max_seqlen=int(lengths.max()),
        domains=torch.from_numpy(store.domain_ids[documents].astype(np.int64)),
        num_learned=int(np.count_nonzero(labels != IGNORE_INDEX)),
    )
