"""Byte-pair encoding of single pieces, for planning a merge: which parts a piece falls into, step by step.

Texts are encoded by the real libraries; this exists because they cannot add a merge and try again 20,000 times.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One new row: a piece in the base's own spelling, and the two parts that merge into it.

    A character that SentencePiece knows from then on is no merge and has no parts.
    """

    piece: str
    parts: Pair | None


class Bpe:
    """Merges over single-character symbols; the pair of the smallest rank goes first, the leftmost of equals.

    Args:
        ranks: rank by merged text (`by_text`: SentencePiece merges whatever two parts make up a piece), or by the
            pair of parts (the merge list of a `tokenizer.json`).
    """

    def __init__(self, ranks: dict[Any, float], *, by_text: bool) -> None:
        self._ranks = ranks
        self._by_text = by_text
        # Runs of spaces rank beyond everything in LLaMA; new merges need not go behind them.
        self._last = max((rank for rank in ranks.values() if rank < 1e8), default=0.0)
        self._pushed: list[Any] = []

    def split(self, piece: str) -> list[str]:
        """The parts into which the piece is encoded when nothing stands beside it."""
        parts = list(piece)
        while len(parts) > 1:
            ranked = [(self._rank(pair), index) for index, pair in enumerate(pairwise(parts))]
            rank, index = min(ranked)
            if rank == float("inf"):
                break
            parts[index : index + 2] = [parts[index] + parts[index + 1]]
        return parts

    def push(self, pair: Pair) -> None:
        """Add a merge behind all others. Merges that stood before it go before it, so nothing they reach is lost."""
        key = self._key(pair)
        self._last += 1
        self._ranks[key] = self._last
        self._pushed.append(key)

    def pop(self, count: int) -> None:
        """Take back the last `count` merges."""
        for _ in range(count):
            del self._ranks[self._pushed.pop()]

    def _rank(self, pair: Pair) -> float:
        return self._ranks.get(self._key(pair), float("inf"))

    def _key(self, pair: Pair) -> Any:
        return pair[0] + pair[1] if self._by_text else pair
