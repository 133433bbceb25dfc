"""Uniform sampling of corpus lines in one streaming pass, with bounded memory."""

import heapq
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# Maximum line length in characters; longer lines are split, as trainer time is quadratic in the length of a line.
_LONGEST_LINE = 1000
# One of this many lines is held out.
_HELD_OUT_EVERY = 20


@dataclass(frozen=True, slots=True)
class CorpusSample:
    """Lines sampled from a corpus: `learn` for learning pieces, `held_out` (one line of twenty) for measuring them.

    `characters` is the total length of the sample, `characters_read` that of the corpus.
    """

    learn: list[str]
    held_out: list[str]
    characters: int
    characters_read: int


def draw_sample(texts: Iterable[str], *, characters: int, seed: int) -> CorpusSample:
    """Samples at most `characters` of the corpus, with equal probability for each line; all of it where it is smaller.

    Each line gets a random key, and the lines with the smallest keys are kept. Memory is bounded by `characters`, and
    the size of the corpus need not be known in advance.
    """
    generator = random.Random(seed)
    heap: list[tuple[float, int, str]] = []
    num_sampled = num_read = 0
    for number, line in enumerate(lines(texts)):
        num_read += len(line)
        key = -generator.random()
        if num_sampled + len(line) > characters and heap and key < heap[0][0]:
            continue
        heapq.heappush(heap, (key, number, line))
        num_sampled += len(line)
        while num_sampled > characters and len(heap) > 1:
            num_sampled -= len(heapq.heappop(heap)[2])
    sampled = [line for _, _, line in sorted(heap, key=lambda item: item[1])]
    held_out = sampled[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
    learn = [line for number, line in enumerate(sampled, 1) if number % _HELD_OUT_EVERY]
    return CorpusSample(learn, held_out or learn, num_sampled, num_read)


def lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields the lines of documents; lines longer than `_LONGEST_LINE` characters are split."""
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]
