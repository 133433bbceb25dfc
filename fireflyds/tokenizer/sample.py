"""A bounded, even sample of a corpus of any size, read once as a stream."""

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# A line without a break is cut here: trainers are quadratic in the length of what they cannot split.
_LONGEST_LINE = 1000
_HELD_OUT_EVERY = 20


@dataclass(frozen=True, slots=True)
class CorpusSample:
    """Lines drawn from a corpus. Pieces are learnt from `learn`; `held_out`, a twentieth, measures them."""

    learn: list[str]
    held_out: list[str]
    characters: int
    characters_read: int


def draw_sample(texts: Iterable[str], *, characters: int, seed: int) -> CorpusSample:
    """At most `characters` of the corpus, each line with the same chance; all of it when it is no larger.

    Every line gets a random key and the smallest keys stay, so memory is bounded by `characters` and the corpus's
    size need not be known.
    """
    keys = random.Random(seed)
    kept: list[tuple[float, int, str]] = []
    held = read = 0
    for number, line in enumerate(lines(texts)):
        read += len(line)
        key = -keys.random()
        if held + len(line) > characters and kept and key < kept[0][0]:
            continue
        heapq.heappush(kept, (key, number, line))
        held += len(line)
        while held > characters and len(kept) > 1:
            held -= len(heapq.heappop(kept)[2])
    in_order = [line for _, _, line in sorted(kept, key=lambda item: item[1])]
    held_out = in_order[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    learn = [line for number, line in enumerate(in_order, 1) if number % _HELD_OUT_EVERY]
    return CorpusSample(learn, held_out or learn, held, read)


def lines(texts: Iterable[str]) -> Iterator[str]:
    """The lines of documents, long ones cut."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]
