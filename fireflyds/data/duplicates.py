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
    for first, second in sorted(set(_candidates(signatures))):
        # In order of the first, so that whether a document stays is known when others are held against it.
        if not drop[first] and not drop[second]:
            drop[second] = (signatures[first] == signatures[second]).mean() >= accepted
    return drop


def _candidates(signatures: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pairs (earlier, later) that share a band. Of a band with many, the first is held against all others."""
    for band in range(BANDS):
        rows = np.ascontiguousarray(signatures[:, band * ROWS : (band + 1) * ROWS])
        keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * ROWS)))[:, 0]
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        start = 0
        for at in range(1, len(order) + 1):
            if at == len(order) or not same[at - 1]:
                group = order[start:at].tolist()
                for place, first in enumerate(group[:8]):
                    yield from ((first, second) for second in group[place + 1 :])
                start = at
