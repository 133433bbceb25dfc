"""Lay documents into rows of at most `seq_len` tokens: best fit decreasing, seeded, independent of the world size."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fireflyds.data.store.store import TokenStore

# Documents are packed window by window. A window is the same set of documents in every epoch, so every epoch has the
# same number of rows; which documents of a length go where, and the order of the rows, change.
WINDOW = 1 << 20
# A cut may be this share of a row earlier than the row's end, to fall on the end of a sentence.
_SLACK = 0.25


@dataclass(frozen=True, slots=True)
class DocumentSlices:
    """Tokens `[starts[i], starts[i] + lengths[i])` of the documents `documents[i]`: int32 `[n]` arrays.

    Of a whole domain also how many dialogues lost their last turns, and how many had no whole learned turn within
    `seq_len` and are left out.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    num_truncated: int = 0
    num_dropped: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, indices: np.ndarray) -> "DocumentSlices":
        return DocumentSlices(self.documents[indices], self.starts[indices], self.lengths[indices])

    def as_tuples(self) -> list[tuple[int, int, int]]:
        """`(document, start, length)` of each slice, for people and for hashes."""
        return list(zip(self.documents.tolist(), self.starts.tolist(), self.lengths.tolist(), strict=True))

    @staticmethod
    def concatenate(rows: Sequence["DocumentSlices"]) -> "DocumentSlices":
        return DocumentSlices(
            documents=np.concatenate([row.documents for row in rows]),
            starts=np.concatenate([row.starts for row in rows]),
            lengths=np.concatenate([row.lengths for row in rows]),
        )


def split_documents(store: TokenStore, documents: np.ndarray, seq_len: int) -> DocumentSlices:
    """Cut documents to at most `seq_len` tokens.

    Plain documents become several pieces, cut at the end of a sentence where there is one near; a piece starts with
    the last token of the one before, so that every token is still somebody's target. Dialogues end after the last
    learned turn that fits.
    """
    lengths = store.lengths[documents]
    short = lengths <= seq_len
    long, plain = documents[~short], store.is_document(documents[~short])
    parts: list[tuple[np.ndarray, ...]] = [(documents[short], np.zeros(int(short.sum()), np.int32), lengths[short])]
    truncated = dropped = 0
    ends_sentence = np.zeros(1 + int(store.sentence_ends.max(initial=0)), bool)
    ends_sentence[store.sentence_ends] = True
    for document, length in zip(long[plain].tolist(), lengths[~short][plain].tolist(), strict=True):
        starts = np.asarray(_split_points(store.ids(document, 0, length), ends_sentence, seq_len), np.int64)
        # The next piece begins one token before this one ends.
        ends = np.append(starts[1:] + 1, length)
        parts.append((np.full(len(starts), document), starts, ends - starts))
    for document in long[~plain].tolist():
        spans = store.spans_of(document)
        fitting = spans[spans[:, 1] <= seq_len, 1]
        if len(fitting) == 0:
            dropped += 1
            continue
        truncated += 1
        parts.append((np.array([document]), np.array([0]), fitting[-1:]))
    joined = [np.concatenate([part[column] for part in parts]).astype(np.int32) for column in range(3)]
    return DocumentSlices(joined[0], joined[1], joined[2], truncated, dropped)


def _split_points(ids: np.ndarray, ends_sentence: np.ndarray, seq_len: int) -> list[int]:
    """The first tokens of a document's pieces."""
    starts = [0]
    while len(ids) - starts[-1] > seq_len:
        at = starts[-1] + seq_len
        near = ids[max(starts[-1] + 2, at - int(_SLACK * seq_len)) : at]
        sentence = np.flatnonzero(ends_sentence[np.minimum(near, len(ends_sentence) - 1)] & (near < len(ends_sentence)))
        end = at - (len(near) - 1 - int(sentence[-1])) if len(sentence) else at
        starts.append(end - 1)
    return starts


@dataclass(frozen=True, slots=True)
class RowPlan:
    """Rows of pieces: row i holds `order[row_offsets[i]:row_offsets[i + 1]]`."""

    order: np.ndarray
    row_offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.order[self.row_offsets[index] : self.row_offsets[index + 1]]


def plan_rows(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> RowPlan:
    """Assign pieces of the given lengths (each at most `seq_len`) to rows, every piece exactly once.

    The number of rows does not depend on `epoch`.
    """
    rng = np.random.default_rng((seed, epoch))
    # Which documents share a window is drawn once for all epochs.
    windows = np.random.default_rng(seed).permutation(np.arange(len(lengths), dtype=np.int32))
    rows, sizes, count = [], [], 0
    for start in range(0, len(windows), WINDOW):
        window = windows[start : start + WINDOW]
        if epoch:
            window = rng.permutation(window)
        row_of, num_rows = best_fit(lengths[window], seq_len)
        order = _order(row_of)
        rows.append(window[order])
        sizes.append(np.bincount(row_of, minlength=num_rows))
        count += num_rows
    if not count:
        return RowPlan(np.zeros(0, np.int32), np.zeros(1, np.int64))
    order, size = np.concatenate(rows), np.concatenate(sizes)
    starts = np.cumsum(size) - size
    shuffled = rng.permutation(count)
    offsets = np.concatenate([[0], np.cumsum(size[shuffled])]).astype(np.int64)
    # Position within the shuffled order -> position within the packed one.
    at = np.arange(len(order)) - np.repeat(offsets[:-1] - starts[shuffled], size[shuffled])
    return RowPlan(order[at], offsets)


def _order(values: np.ndarray) -> np.ndarray:
    """A stable argsort of non-negative integers below 2^32: two passes of NumPy's radix sort, which takes 16 bits."""
    order: np.ndarray = np.argsort((values & 0xFFFF).astype(np.uint16), kind="stable")
    if len(values) and values.max() > 0xFFFF:
        order = order[np.argsort((values >> 16).astype(np.uint16)[order], kind="stable")]
    return order


def best_fit(lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, int]:
    """The row of every piece under best fit decreasing, int32 `[p]`, and the number of rows.

    Pieces of one length and rows with one room are moved together, so the work grows with the number of different
    lengths, not of pieces. A row that takes a piece has the least room that takes the next of the same length, so it
    takes as many as it can before the next row is looked at.
    """
    order = _order(seq_len - lengths)
    row_of = np.empty(len(lengths), np.int32)
    room: dict[int, list[np.ndarray]] = {}  # rows by the room they have left
    rooms = np.zeros(seq_len + 1, bool)
    num_rows = 0
    sizes, firsts = np.unique(-lengths[order], return_index=True)

    def give_back(rows: np.ndarray, left: int) -> None:
        if len(rows) and left:
            room.setdefault(left, []).append(rows)
            rooms[left] = True

    for size, first, end in zip((-sizes).tolist(), firsts.tolist(), [*firsts[1:].tolist(), len(lengths)], strict=True):
        at = first
        while at < end:
            fitting = size + int(np.argmax(rooms[size:]))
            if rooms[fitting]:
                rows = room[fitting].pop()
                rooms[fitting] = bool(room[fitting])
            else:
                fitting = seq_len
                rows = np.arange(num_rows, num_rows + -(-(end - at) // (seq_len // size)), dtype=np.int32)
                num_rows += len(rows)
            each = fitting // size
            full, rest = divmod(min(end - at, len(rows) * each), each)
            row_of[order[at : at + full * each]] = np.repeat(rows[:full], each)
            at += full * each
            give_back(rows[:full], fitting - each * size)
            if rest:
                row_of[order[at : at + rest]] = rows[full]
                at += rest
                give_back(rows[full : full + 1], fitting - rest * size)
            give_back(rows[full + bool(rest) :], fitting)
    return row_of, num_rows
