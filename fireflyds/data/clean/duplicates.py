"""Exact and near-duplicates over a whole store, found from hashes that were taken document by document."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from fireflyds.errors import UserError

# 32 bands of 8 rows: a pair of similarity 0.8 shares a band with probability 0.997, one of 0.4 with 0.02.
BANDS, ROWS = 32, 8
NUM_PERM = BANDS * ROWS
_SHINGLE = 5
# Of a band that many documents share, and of the documents that are compared with one at once.
_COMPARED, _COMPARED_AT_ONCE = 8, 4096
_SEED = 42


def text_hash(text: str) -> int:
    """64 bits of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def signature(text: str) -> list[int]:
    """MinHash of the runs of five characters: uint32 `[NUM_PERM]` (Broder 1997)."""
    try:
        import rensa
    except ImportError as error:
        raise UserError("clean.duplicates=near needs rensa: pip install 'fireflyds[clean]'") from error
    made: Any = rensa.RMinHash(num_perm=NUM_PERM, seed=_SEED)
    last = max(1, len(text) - _SHINGLE + 1)
    made.update([text[at : at + _SHINGLE] for at in range(last)])
    digest: list[int] = made.digest()
    return digest


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """Which documents are copies of an earlier one: bool `[n]`."""
    _, first = np.unique(hashes, return_index=True)
    copies = np.ones(len(hashes), bool)
    copies[first] = False
    return copies


def near_duplicates(signatures: np.ndarray, similarity: float) -> np.ndarray:
    """Which documents are similar to an earlier one that stays: bool `[n]`, from signatures uint32 `[n, NUM_PERM]`.

    Documents that share a band of their signature are compared by the share of equal rows, which estimates their
    Jaccard similarity with a standard deviation below 0.03; two of these are allowed for.
    """
    accepted = similarity - 2 * np.sqrt(similarity * (1 - similarity) / NUM_PERM)
    drop = np.zeros(len(signatures), bool)
    # In order of the first, so that whether a document stays is known when others are compared with it.
    for first, others in _candidates(signatures):
        if drop[first]:
            continue
        rest = np.asarray(others)[~drop[others]]
        for start in range(0, len(rest), _COMPARED_AT_ONCE):
            chunk = rest[start : start + _COMPARED_AT_ONCE]
            drop[chunk] = (signatures[chunk] == signatures[first]).mean(1) >= accepted
    return drop


def _candidates(signatures: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Documents in order, each with the later ones that share a band with it.

    Of many documents that share one band, only the first `_COMPARED` are compared with all others. Memory grows with the
    number of documents, not of pairs.
    """
    orders: list[np.ndarray] = []
    firsts, bands, positions, ends = [], [], [], []
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * ROWS)))[:, 0]
        order = np.argsort(keys, kind="stable").astype(np.int32)
        starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1])).astype(np.int32)
        stops = np.append(starts[1:], len(order)).astype(np.int32)
        for place in range(_COMPARED):
            has_later = starts + place + 1 < stops
            positions.append((starts + place)[has_later])
            firsts.append(order[positions[-1]])
            ends.append(stops[has_later])
            bands.append(np.full(len(positions[-1]), band, np.int8))
        orders.append(order)
    first, band_of, position, end = (np.concatenate(column) for column in (firsts, bands, positions, ends))
    by_first = np.argsort(first, kind="stable")
    documents, offsets = np.unique(first[by_first], return_index=True)
    for document, group in zip(documents.tolist(), np.split(by_first, offsets[1:]), strict=True):
        others = [orders[band_of[at]][position[at] + 1 : end[at]] for at in group]
        yield document, np.unique(np.concatenate(others))
