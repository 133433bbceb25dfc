"""Lay documents into rows of at most `seq_len` tokens: best fit decreasing, seeded, independent of the world size."""

import bisect
from dataclasses import dataclass

import numpy as np

from fireflyds.data.store import TokenStore

# Documents are shuffled, and packed window by window, so that rows mix lengths but stay random.
WINDOW = 8192


@dataclass(frozen=True, slots=True)
class Pieces:
    """Stretches of documents, each at most `seq_len` tokens: int64 `[p]` arrays.

    `truncated` dialogues lost their last turns; `dropped` had no whole learned turn within `seq_len`.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    truncated: int
    dropped: int


def cut(store: TokenStore, documents: np.ndarray, seq_len: int) -> Pieces:
    """Cut documents to at most `seq_len` tokens.

    Plain documents become several pieces; a piece starts with the last token of the one before, so that every
    token is still somebody's target. Dialogues end after the last learned turn that fits.
    """
    lengths = store.lengths[documents]
    short = lengths <= seq_len
    parts = [(documents[short], np.zeros(int(short.sum()), np.int64), lengths[short])]
    truncated = dropped = 0
    for document, length in zip(documents[~short], lengths[~short], strict=True):
        spans = store.spans_of(document)
        if len(spans) == 1 and spans[0, 0] == 0:
            starts = np.arange(0, length - 1, seq_len - 1)
            ends = np.minimum(starts + seq_len, length)
            parts.append((np.full(len(starts), document), starts, ends - starts))
            continue
        ends = spans[spans[:, 1] <= seq_len, 1]
        if len(ends) == 0:
            dropped += 1
            continue
        truncated += 1
        parts.append((np.array([document]), np.array([0]), ends[-1:]))
    joined = [np.concatenate([part[column] for part in parts]).astype(np.int64) for column in range(3)]
    return Pieces(joined[0], joined[1], joined[2], truncated, dropped)


@dataclass(frozen=True, slots=True)
class Plan:
    """Rows of pieces: row i holds `order[row_offsets[i]:row_offsets[i + 1]]`; `row_tokens` int64 `[rows]`."""

    order: np.ndarray
    row_offsets: np.ndarray
    row_tokens: np.ndarray

    def __len__(self) -> int:
        return len(self.row_tokens)

    def row(self, index: int) -> np.ndarray:
        return self.order[self.row_offsets[index] : self.row_offsets[index + 1]]


def plan(lengths: np.ndarray, seq_len: int, seed: int, epoch: int) -> Plan:
    """Assign pieces of the given lengths (each at most `seq_len`) to rows, every piece exactly once."""
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(lengths))
    rows: list[list[int]] = []
    for start in range(0, len(shuffled), WINDOW):
        rows += _best_fit(shuffled[start : start + WINDOW], lengths, seq_len)
    rows = [rows[index] for index in rng.permutation(len(rows))]
    order = np.array([piece for row in rows for piece in row], np.int64)
    offsets = np.cumsum([0, *map(len, rows)])
    tokens = np.add.reduceat(lengths[order], offsets[:-1]) if rows else np.zeros(0, np.int64)
    return Plan(order, offsets, tokens)


def _best_fit(pieces: np.ndarray, lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Longest first, each into the fullest row that still takes it."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for piece in pieces[np.argsort(-lengths[pieces], kind="stable")].tolist():
        length = int(lengths[piece])
        at = bisect.bisect_left(free, (length, -1))
        if at == len(free):
            room, row = seq_len, len(rows)
            rows.append([])
        else:
            room, row = free.pop(at)
        rows[row].append(piece)
        if room > length:
            bisect.insort(free, (room - length, row))
    return rows
