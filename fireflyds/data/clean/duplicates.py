"""Exact and near-duplicates over a whole store, detected by hashes of the single documents."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.errors import UserError

# 32 bands of 8 rows: a pair of similarity 0.8 shares a band with probability 0.997, one of 0.4 with 0.02.
BANDS, ROWS = 32, 8
NUM_PERM = BANDS * ROWS
_SHINGLE = 5
# Documents per shared band that are compared with all later ones; documents compared with one in a single operation.
_MAX_COMPARED, _COMPARED_CHUNK = 8, 4096
_SEED = 42


def text_hash(text: str) -> int:
    """Returns a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def signature(text: str) -> list[int]:
    """Returns the MinHash of all runs of five characters: `NUM_PERM` uint32 values (Broder 1997)."""
    try:
        import rensa
    except ImportError as error:
        raise UserError(
            "needs rensa", key="clean.duplicates", value="near", remedy="Install it with pip install 'fireflyds[clean]'"
        ) from error
    minhash: Any = rensa.RMinHash(num_perm=NUM_PERM, seed=_SEED)
    last = max(1, len(text) - _SHINGLE + 1)
    minhash.update([text[start : start + _SHINGLE] for start in range(last)])
    digest: list[int] = minhash.digest()
    return digest


def exact_duplicates(hashes: np.ndarray) -> np.ndarray:
    """True where a document is a copy of an earlier one: bool `[n]`."""
    _, first = np.unique(hashes, return_index=True)
    copies = np.ones(len(hashes), bool)
    copies[first] = False
    return copies


def banded(parts: Iterable[np.ndarray], count: int, file: Path | None = None) -> np.ndarray:
    """Returns the signatures `[n, NUM_PERM]` of `parts` by band: uint32 `[BANDS, count, ROWS]`.

    `file`: the array lies there and is mapped, so that the memory does not grow with the number of documents.
    """
    shape = (BANDS, count, ROWS)
    if file is None or not count:
        result: np.ndarray = np.empty(shape, np.uint32)
    else:
        result = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint32, shape=shape)
    start = 0
    for part in parts:
        result[:, start : start + len(part)] = part.reshape(len(part), BANDS, ROWS).transpose(1, 0, 2)
        start += len(part)
    return result


def near_duplicates(bands: np.ndarray, similarity: float) -> np.ndarray:
    """True where a document is similar to an earlier, kept one: bool `[n]`, from `banded` signatures.

    Documents that share a band of their signature are compared by the share of equal rows, which estimates their
    Jaccard similarity with a standard deviation below 0.03; the threshold is `similarity` minus two of these.
    """
    threshold = similarity - 2 * np.sqrt(similarity * (1 - similarity) / NUM_PERM)
    drop = np.zeros(bands.shape[1], bool)
    # In document order, so that it is decided whether a document is kept before others are compared with it.
    for first, others in _candidates(bands):
        if drop[first]:
            continue
        remaining = np.asarray(others)[~drop[others]]
        for start in range(0, len(remaining), _COMPARED_CHUNK):
            chunk = remaining[start : start + _COMPARED_CHUNK]
            drop[chunk] = (bands[:, chunk] == bands[:, first][:, None]).mean((0, 2)) >= threshold
    return drop


def _candidates(bands: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields documents in order, each with the later documents that share a band with it: int32 `[candidates]`.

    Of the documents that share a band, only the first `_MAX_COMPARED` are compared with all others. Memory grows with
    the number of documents, not of pairs.
    """
    orders: list[np.ndarray] = []
    firsts, band_numbers, positions, ends = [], [], [], []
    for band in range(BANDS):
        rows = np.ascontiguousarray(bands[band])
        keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * ROWS)))[:, 0]
        order = np.argsort(keys, kind="stable").astype(np.int32)
        starts = np.flatnonzero(np.append(True, keys[order][1:] != keys[order][:-1])).astype(np.int32)
        stops = np.append(starts[1:], len(order)).astype(np.int32)
        for offset in range(_MAX_COMPARED):
            has_later = starts + offset + 1 < stops
            positions.append((starts + offset)[has_later])
            firsts.append(order[positions[-1]])
            ends.append(stops[has_later])
            band_numbers.append(np.full(len(positions[-1]), band, np.int8))
        orders.append(order)
    first, band_of, position, end = (np.concatenate(column) for column in (firsts, band_numbers, positions, ends))
    by_first = np.argsort(first, kind="stable")
    documents, offsets = np.unique(first[by_first], return_index=True)
    for document, group in zip(documents.tolist(), np.split(by_first, offsets[1:]), strict=True):
        others = [orders[band_of[index]][position[index] + 1 : end[index]] for index in group]
        yield document, np.unique(np.concatenate(others))
