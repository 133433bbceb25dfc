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
    """Slices of documents: int32 arrays `[n]`.

    A slice has `lengths[i]` tokens: the last `contexts[i]` tokens of the prompt of the span `spans[i]` (see
    `TokenStore.prompt`), which carry no loss, and then the document's tokens from `starts[i]`. Without a prompt `spans`
    is -1 and `contexts` is 0.

    For the slices of a whole domain, `num_continued` counts dialogues that are longer than a row and go on in further
    rows, and `num_cut_tokens` the tokens of their prompts that were cut, because an answer needs the room.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    spans: np.ndarray
    contexts: np.ndarray
    num_continued: int = 0
    num_cut_tokens: int = 0

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """The five arrays."""
        return self.documents, self.starts, self.lengths, self.spans, self.contexts

    def take(self, indices: np.ndarray) -> "DocumentSlices":
        """Returns the slices at `indices`, an integer array or a boolean mask."""
        return DocumentSlices.from_columns([column[indices] for column in self.columns])

    def as_tuples(self) -> list[tuple[int, ...]]:
        """Returns `(document, start, length, span, context)` of each slice as Python integers."""
        return list(zip(*(column.tolist() for column in self.columns), strict=True))

    @staticmethod
    def concatenate(rows: Sequence["DocumentSlices"]) -> "DocumentSlices":
        """Returns the slices of all `rows` in order, without their counts of long dialogues."""
        return DocumentSlices.from_columns(
            [np.concatenate(columns) for columns in zip(*(row.columns for row in rows), strict=True)]
        )

    @staticmethod
    def from_columns(
        columns: Sequence[np.ndarray], num_continued: int = 0, num_cut_tokens: int = 0
    ) -> "DocumentSlices":
        """The slices of the five arrays, as `columns` returns them."""
        documents, starts, lengths, spans, contexts = columns
        return DocumentSlices(documents, starts, lengths, spans, contexts, num_continued, num_cut_tokens)


def slice_ids(store: TokenStore, document: int, start: int, length: int, span: int, context: int) -> np.ndarray:
    """The token ids of one slice: uint16 or uint32 `[length]`."""
    ids = store.ids(document, start, length - context)
    return np.concatenate([store.prompt(document, span)[-context:], ids]) if context else ids


def split_documents(store: TokenStore, documents: np.ndarray, seq_len: int) -> DocumentSlices:
    """Splits documents into slices of at most `seq_len` tokens.

    A plain document becomes several slices, split at a sentence end if there is one close to the limit. A slice
    starts with the last token of the slice before it, so that every token but the document's first is a target.
    A dialogue becomes several dialogues, which begin at a turn of the user, with the system message; an answer that is
    longer than a row is split like a document. Every learned token is a target of exactly one slice.
    """
    lengths = store.lengths[documents]
    short = lengths <= seq_len
    long, plain = documents[~short], store.is_document(documents[~short])
    num_short = int(short.sum())
    none, zeros = np.full(num_short, -1, np.int32), np.zeros(num_short, np.int32)
    groups = [np.stack([documents[short].astype(np.int32), zeros, lengths[short], none, zeros], axis=1)]
    ends_sentence = np.zeros(1 + int(store.sentence_ends.max(initial=0)), bool)
    ends_sentence[store.sentence_ends] = True
    cut = 0
    for document, length, is_plain in zip(long.tolist(), lengths[~short].tolist(), plain.tolist(), strict=True):
        ids = store.ids(document, 0, length)
        if is_plain:
            rows = [(start, end - start, -1, 0) for start, end in _pieces(ids, 0, length, ends_sentence, seq_len)]
        else:
            rows, cut_tokens = _split_dialogue(store, document, ids, ends_sentence, seq_len)
            cut += cut_tokens
        groups.append(np.array([(document, *row) for row in rows], np.int32).reshape(-1, 5))
    table = np.concatenate(groups)
    return DocumentSlices.from_columns(list(np.ascontiguousarray(table.T)), int((~plain).sum()), cut)


def _split_dialogue(
    store: TokenStore, document: int, ids: np.ndarray, ends_sentence: np.ndarray, seq_len: int
) -> tuple[list[tuple[int, int, int, int]], int]:
    """Returns `(start, length, span, context)` of the slices of a dialogue, and the number of prompt tokens cut."""
    spans, numbers = store.spans_of(document).tolist(), store.span_indices(document)
    slices: list[tuple[int, int, int, int]] = []
    cut = index = 0
    while index < len(spans):
        first, end = spans[index]
        prompt = store.prompt_length(numbers[index])
        # Without a prompt of its own, a span follows the tokens of the dialogue before it.
        own = 0 if index == 0 else max(0, first - 1)
        start, span, context = (first, numbers[index], prompt) if prompt and index else (own, -1, 0)
        if context + end - start > seq_len:
            room = max(seq_len // 2, seq_len - (end - first))
            if prompt and first - start + context > room:
                start, span, context = first, numbers[index], min(prompt, room)
                cut += prompt - context
            elif first - start > room:
                cut += first - room - start
                start = first - room
            limit = end if context + end - start <= seq_len else _cut_at(ids, start, seq_len - context, ends_sentence)
            slices.append((start, context + limit - start, span, context))
            pieces = _pieces(ids, limit - 1, end, ends_sentence, seq_len) if limit < end else []
            slices += [(start, stop - start, -1, 0) for start, stop in pieces]
            index += 1
            continue
        last = index
        while last + 1 < len(spans) and context + spans[last + 1][1] - start <= seq_len:
            last += 1
        slices.append((start, context + spans[last][1] - start, span, context))
        index = last + 1
    return slices, cut


def _pieces(ids: np.ndarray, start: int, end: int, ends_sentence: np.ndarray, seq_len: int) -> list[tuple[int, int]]:
    """Returns start and end of the slices of the tokens `[start, end)`; each starts with the last token of another."""
    pieces = []
    while end - start > seq_len:
        limit = _cut_at(ids, start, seq_len, ends_sentence)
        pieces.append((start, limit))
        start = limit - 1
    return [*pieces, (start, end)]


def _cut_at(ids: np.ndarray, start: int, size: int, ends_sentence: np.ndarray) -> int:
    """Returns the end of a slice of at most `size` tokens from `start`, behind a sentence if one ends close to that."""
    limit = start + size
    candidates = ids[max(start + 2, limit - int(_SLACK * size)) : limit]
    sentence = np.flatnonzero(
        ends_sentence[np.minimum(candidates, len(ends_sentence) - 1)] & (candidates < len(ends_sentence))
    )
    return limit - (len(candidates) - 1 - int(sentence[-1])) if len(sentence) else limit


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
