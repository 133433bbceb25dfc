"""Loads the packed batches of one rank; a batch depends only on the step number."""

import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fireflyds.data.pack.mixture import PackedRowSampler
from fireflyds.data.pack.packing import DocumentSlices, slice_ids
from fireflyds.data.store.store import TokenStore
from fireflyds.types import IGNORE_INDEX, PackedBatch, next_token_labels

# Optimizer steps prefetched while the device computes.
_PREFETCHED_STEPS = 2


@dataclass(frozen=True, slots=True)
class PackedLoader:
    """Micro-batches of one rank.

    Optimizer step s takes rows `[s * global_batch_size, (s + 1) * global_batch_size)` of the sequence. They are
    assigned to micro-batches and ranks in order, so every world size uses the same rows in the same step.
    """

    store: TokenStore
    rows: PackedRowSampler
    micro_batch_size: int
    global_batch_size: int
    rank: int
    world_size: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per rank and optimizer step (gradient accumulation steps)."""
        return self.global_batch_size // (self.micro_batch_size * self.world_size)

    def step(self, number: int) -> list[PackedBatch]:
        """Returns the micro-batches of optimizer step `number`, counted from 0."""
        batches = [collate(self.store, self._slices(number, micro)) for micro in range(self.accumulation)]
        return [batch.pin() for batch in batches] if torch.cuda.is_available() else batches

    def _slices(self, number: int, micro: int) -> DocumentSlices:
        first = (micro * self.world_size + self.rank) * self.micro_batch_size + number * self.global_batch_size
        return DocumentSlices.concatenate([self.rows.row(row) for row in range(first, first + self.micro_batch_size)])

    def documents(self, number: int, micro: int) -> str:
        """Describes the documents of a micro-batch of step `number`: indices in the store and token ranges."""
        slices = self._slices(number, micro).as_tuples()
        listed = ", ".join(
            f"{document} [{start}:{start + length - context}]" for document, start, length, _, context in slices[:8]
        )
        suffix = f" and {len(slices) - 8} more" if len(slices) > 8 else ""
        return f"documents {listed}{suffix} of {self.store.path}"

    def require(self, steps: int) -> None:
        """Raises `UserError` if the data end before `steps` optimizer steps."""
        self.rows.require(steps * self.global_batch_size)

    def steps(self, first: int, end: int) -> Iterator[list[PackedBatch]]:
        """Yields the micro-batches of steps `[first, end)`, prefetched by a thread."""
        ready: queue.Queue[list[PackedBatch] | BaseException | None] = queue.Queue(_PREFETCHED_STEPS)
        stopped = threading.Event()

        def put(item: list[PackedBatch] | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def produce() -> None:
            try:
                for number in range(first, end):
                    if stopped.is_set():
                        return
                    put(self.step(number))
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=produce, name="loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


def collate(store: TokenStore, slices: DocumentSlices) -> PackedBatch:
    """Concatenates document slices to a packed batch; labels outside the learned spans are `IGNORE_INDEX`."""
    documents, starts, lengths = slices.documents, slices.starts, slices.lengths.astype(np.int64)
    ends = np.cumsum(lengths)
    ids = np.concatenate([slice_ids(store, *location) for location in slices.as_tuples()]).astype(np.int64)
    labels = next_token_labels(ids, ends)
    for index in np.flatnonzero(~store.is_document(documents)).tolist():
        start, length = int(starts[index]), int(lengths[index])
        # Position in the slice = position in the document + shift.
        shift = int(slices.contexts[index]) - start
        learned = np.zeros(length, bool)
        for first, end in store.spans_of(int(documents[index])).tolist():
            begin = max(max(first, start) + shift, 1) - 1
            learned[begin : max(min(end + shift, length) - 1, 0)] = True
        labels[ends[index] - length : ends[index]][~learned] = IGNORE_INDEX
    return PackedBatch.from_flat(ids, labels, lengths, store.domain_ids[documents])
