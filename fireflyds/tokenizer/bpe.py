"""Byte-pair encoding of single pieces, for planning merges: the parts that a piece is split into.

Texts are encoded by the tokenizer libraries; those have no fast way to add or remove single merges, which planning does
about 20,000 times.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One new row: a piece in the base's spelling, and the two parts that merge into it.

    `parts` is None for a single character in SentencePiece, which needs no merge.
    """

    piece: str
    parts: Pair | None


class Bpe:
    """Merges over single-character symbols: the pair of the smallest rank is merged first, the leftmost in a tie.

    Args:
        ranks: the rank of each merge, by merged text (`by_text`, as in SentencePiece, which merges any two parts that
            form a piece) or by the pair of parts (as in the merge list of a `tokenizer.json`).
        by_text: the keys of `ranks` are merged texts, not pairs.
    """

    def __init__(self, ranks: dict[Any, float], *, by_text: bool) -> None:
        self._ranks = ranks
        self._by_text = by_text
        # Pieces of several spaces have ranks above 1e8 in LLaMA; new merges need not rank after them.
        self._last = max((rank for rank in ranks.values() if rank < 1e8), default=0.0)
        self._pushed: list[Any] = []

    def split(self, piece: str) -> list[str]:
        """Returns the parts that the piece alone, without adjacent text, is encoded as."""
        parts = list(piece)
        while len(parts) > 1:
            ranked = [(self._rank(pair), index) for index, pair in enumerate(pairwise(parts))]
            rank, index = min(ranked)
            if rank == float("inf"):
                break
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        return parts

    def push(self, pair: Pair) -> None:
        """Adds a merge with the lowest priority. Earlier merges apply first, so that their pieces stay reachable."""
        key = self._key(pair)
        self._last += 1
        self._ranks[key] = self._last
        self._pushed.append(key)

    def pop(self, count: int) -> None:
        """Removes the last `count` pushed merges."""
        for _ in range(count):
            del self._ranks[self._pushed.pop()]

    def _rank(self, pair: Pair) -> float:
        return self._ranks.get(self._key(pair), float("inf"))

    def _key(self, pair: Pair) -> Any:
        return pair[0] + pair[1] if self._by_text else pair
