"""Packs documents into rows of at most `seq_len` tokens: best fit decreasing, seeded, independent of the world size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fireflyds.data.store.store import TokenStore

# Slices are packed in windows of this many. A window is the same set of slices in every epoch, so every epoch has the
# same number of rows; the assignment of equally long slices to rows and the order of the rows change.
WINDOW = 1 << 20
# A document may be split earlier than after `seq_len` tokens, by up to this share of `seq_len`, at a sentence end.
_SLACK = 0.25


@dataclass(frozen=True, slots=True)
class DocumentSlices:
    """Tokens `[starts[i], starts[i] + lengths[i])` of the documents `documents[i]`: int32 arrays `[n]`.

    For the slices of a whole domain, `num_truncated` counts dialogues without their last turns, and `num_dropped`
    those that are left out, because they have no complete learned turn within `seq_len` tokens.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_truncated: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, indices: np.ndarray) -> "DocumentSlices":
        """Returns the slices at `indices`, an integer array or a boolean mask."""
        return DocumentSlices(self.documents[indices], self.starts[indices], self.lengths[indices])

    def as_tuples(self) -> list[tuple[int, int, int]]:
        """Returns `(document, start, length)` of each slice as Python integers."""
        return list(zip(self.documents.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True))

    @staticmethod
    def concatenate(rows: Sequence["DocumentSlices"]) -> "DocumentSlices":
        """Returns the slices of all `rows` in order, without their counts of truncated and dropped dialogues."""
        return DocumentSlices(
            documents=np.concatenate([row.documents for row in rows]),
            starts=np.concatenate([row.starts for row in rows]),
            lengths=np.concatenate([row.lengths for row in rows]),
        )


def split_documents(store: TokenStore, documents: np.ndarray, seq_len: int) -> DocumentSlices:
    """Splits documents into slices of at most `seq_len` tokens.

    A plain document becomes several slices, split at a sentence end if there is one close to the limit. A slice
    starts with the last token of the slice before it, so that every token but the document's first is a target.
    A dialogue is truncated after its last learned turn that fits.
    """
    lengths = store.lengths[documents]
    short = lengths <= seq_len
    long, plain = documents[~short], store.is_document(documents[~short])
    groups: list[tuple[np.ndarray, ...]] = [(documents[short], np.zeros(int(short.sum()), np.int32), lengths[short])]
    truncated = dropped = 0
    ends_sentence = np.zeros(1 + int(store.sentence_ends.max(initial=0)), bool)
    ends_sentence[store.sentence_ends] = True
    for document, length in zip(long[plain].tolist(), lengths[~short][plain].tolist(), strict=True):
        starts = np.asarray(_split_points(store.ids(document, 0, length), ends_sentence, seq_len), np.int64)
        # The next slice starts with the last token of this one.
        ends = np.append(starts[1:] + 1, length)
        groups.append((np.full(len(starts), document), starts, ends - starts))
    for document in long[~plain].tolist():
        spans = store.spans_of(document)
        fitting = spans[spans[:, 1] <= seq_len, 1]
        if len(fitting) == 0:
            dropped += 1
            continue
        truncated += 1
        groups.append((np.array([document]), np.array([0]), fitting[-1:]))
    arrays = [np.concatenate([group[column] for group in groups]).astype(np.int32) for column in range(3)]
    return DocumentSlices(arrays[0], arrays[1], arrays[2], truncated, dropped)


def _split_points(ids: np.ndarray, ends_sentence: np.ndarray, seq_len: int) -> list[int]:
    """Returns the first token index of each slice of a document."""
    starts = [0]
    while len(ids) - starts[-1] > seq_len:
        limit = starts[-1] + seq_len
        candidates = ids[max(starts[-1] + 2, limit - int(_SLACK * seq_len)) : limit]
        sentence = np.flatnonzero(
            ends_sentence[np.minimum(candidates, len(ends_sentence) - 1)] & (candidates < len(ends_sentence))
        )
        end = limit - (len(candidates) - 1 - int(sentence[-1])) if len(sentence) else limit
        starts.append(end - 1)
    return starts


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Assignment of slices to rows: row i consists of the slices `order[row_offsets[i]:row_offsets[i + 1]]`."""

    order: np.ndarray
    row_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> np.ndarray:
        """Returns the indices of the slices in row `index`: int32 `[k]`."""
        return self.order[self.row_offsets[index] : self.row_offsets[index + 1]]


def plan_rows(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> RowPlan:
    """Assigns slices of the given lengths (each at most `seq_len`) to rows, every slice exactly once.

    The number of rows does not depend on `epoch`.
    """
    rng = np.random.default_rng((seed, epoch))
    # The windows depend on the seed only and are the same in all epochs.
    windows = np.random.default_rng(seed).permutation(np.arange(len(lengths), dtype=np.int32))
    rows, sizes, count = [], [], 0
    for start in range(0, len(windows), WINDOW):
        window = windows[start : start + WINDOW]
        if epoch:
            window = rng.permutation(window)
        row_of, num_rows = best_fit(lengths[window], seq_len)
        order = _stable_argsort(row_of)
        rows.append(window[order])
        sizes.append(np.bincount(row_of, minlength=num_rows))
        count += num_rows
    if not count:
        return RowPlan(np.zeros(0, np.int32), np.zeros(1, np.int64))
    order, size = np.concatenate(rows), np.concatenate(sizes)
    starts = np.cumsum(size) - size
    shuffled = rng.permutation(count)
    offsets = np.concatenate([[0], np.cumsum(size[shuffled])]).astype(np.int64)
    # Position in the shuffled order -> position in the packed order.
    positions = np.arange(len(order)) - np.repeat(offsets[:-1] - starts[shuffled], size[shuffled])
    return RowPlan(order[positions], offsets)


def _stable_argsort(values: np.ndarray) -> np.ndarray:
    """Stable argsort of non-negative integers below 2^32: two passes of NumPy's radix sort, which is a 16-bit sort."""
    order: np.ndarray = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    if len(values) and values.max() > 0xFFFF:
        order = order[np.argsort((values >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """Returns the row of every slice under best fit decreasing, int32 `[slices]`, and the number of rows.

    Slices of equal length and rows of equal capacity (free tokens) are processed together, so the run time grows with
    the number of different lengths, not of slices. The row that a slice fits best is also the best fit for the next
    slice of the same length, so a row takes as many of them as fit before the next row is considered.
    """
    order = _stable_argsort(seq_len - lengths)
    row_of = np.empty(len(lengths), np.int32)
    rows_by_capacity: dict[int, list[np.ndarray]] = {}  # free tokens: rows with that capacity
    has_rows = np.zeros(seq_len + 1, bool)
    num_rows = 0
    sizes, firsts = np.unique(-lengths[order], return_index=True)

    def add_rows(rows: np.ndarray, remaining: int) -> None:
        if len(rows) and remaining:
            rows_by_capacity.setdefault(remaining, []).append(rows)
            has_rows[remaining] = True

    for size, first, end in zip((-sizes).tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(lengths)], strict=True):
        position = first
        while position < end:
            capacity = size + int(np.argmax(has_rows[size:]))
            if has_rows[capacity]:
                rows = rows_by_capacity[capacity].pop()
                has_rows[capacity] = bool(rows_by_capacity[capacity])
            else:
                capacity = seq_len
                rows = np.arange(num_rows, num_rows + -(-(end - position) // (seq_len // size)), dtype=np.int32)
                num_rows += len(rows)
            per_row = capacity // size
            num_full, remainder = divmod(min(end - position, len(rows) * per_row), per_row)
            row_of[order[position : position + num_full * per_row]] = np.repeat(rows[:num_full], per_row)
            position += num_full * per_row
            add_rows(rows[:num_full], capacity - per_row * size)
            if remainder:
                row_of[order[position : position + remainder]] = rows[num_full]
                position += remainder
                add_rows(rows[num_full : num_full + 1], capacity - remainder * size)
            add_rows(rows[num_full + bool(remainder) :], capacity)
    return row_of, num_rows
