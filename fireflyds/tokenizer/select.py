"""Selection of new pieces and of their number, by the tokens that each piece saves on text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fireflyds.config import VocabSizeRule
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.vocabulary_merge import MergePlan
from fireflyds.types import Encoder

# Number of intervals of the curve of vocabulary sizes.
_POINTS = 12


@dataclass(frozen=True, slots=True)
class Point:
    """Held-out text with a vocabulary of `rows` new rows; `alp`: average log probability of a line, in nats."""

    rows: int
    tokens: int
    alp: float

    def as_dict(self) -> dict[str, float]:
        """Returns the values by name, as in `report.json`."""
        return asdict(self)


def count_tokens(encoder: Encoder, texts: Iterable[str]) -> np.ndarray:
    """Returns the number of occurrences of every id, int64 `[vocab_size]`."""
    counts = np.zeros(encoder.vocab_size, np.int64)
    for text in texts:
        np.add.at(counts, encoder.encode(text), 1)
    return counts


def shares(encoder: Encoder, texts: Iterable[str]) -> np.ndarray:
    """Returns the relative frequency of every id in the texts, float64 `[vocab_size]`."""
    counts = count_tokens(encoder, texts)
    return counts / max(1, counts.sum())


def savings(base: Base, plan: MergePlan, texts: Iterable[str]) -> dict[str, int]:
    """Returns the number of tokens that each step saves on the texts, by piece.

    A merge saves one token each time it is applied: where its piece is a final token, and where it is part of one.
    So a piece never saves more than its parts, and the best `n` steps do not depend on any others.
    """
    counts = count_tokens(base.encoder(plan.steps), texts)
    uses = {step.piece: int(counts[index]) for index, step in enumerate(plan.steps, base.num_tokens)}
    for step in reversed(plan.steps):
        for part in step.parts or ():
            if part in uses:
                uses[part] += uses[step.piece]
    # A character without a SentencePiece piece is encoded as one token per byte.
    tokens_per_use = {step.piece: 1 if step.parts else max(1, len(base.old_ids(step.piece)) - 1) for step in plan.steps}
    return {piece: uses[piece] * tokens_per_use[piece] for piece in uses}


def by_saving(plan: MergePlan, saved: dict[str, int]) -> list[str]:
    """Returns the pieces of the plan by descending saving; ties are in the order of the plan."""
    return sorted((step.piece for step in plan.steps), key=lambda piece: -saved[piece])


def curve(base: Base, plan: MergePlan, order: Sequence[str], texts: Sequence[str]) -> list[Point]:
    """Measures vocabularies of increasing size, each of the first pieces of `order`, on the texts."""
    sizes = sorted({round(len(order) * interval / _POINTS) for interval in range(_POINTS + 1)})
    points = []
    for rows in sizes:
        best = set(order[:rows])
        counts = count_tokens(base.encoder([step for step in plan.steps if step.piece in best]), texts)
        points.append(Point(rows, int(counts.sum()), average_log_probability(counts, len(texts))))
    return points


def average_log_probability(counts: np.ndarray, num_texts: int) -> float:
    """Mean over texts of the sum of their tokens' log unigram probabilities (ALP; arXiv 2109.07306, eq. 1)."""
    used = counts[counts > 0].astype(np.float64)
    return float((used * np.log(used / used.sum())).sum() / max(num_texts, 1))


def knee(points: Sequence[Point], by: VocabSizeRule) -> Point:
    """Returns the point farthest above the line between the ends of the curve (Satopaa et al. 2011, "Kneedle")."""
    gains = [point.alp if by is VocabSizeRule.alp else -float(point.tokens) for point in points]
    width, height = points[-1].rows - points[0].rows, gains[-1] - gains[0]
    if width == 0 or math.isclose(height, 0):
        return points[-1]
    distances = [
        (gain - gains[0]) / height - (point.rows - points[0].rows) / width
        for point, gain in zip(points, gains, strict=True)
    ]
    return points[int(np.argmax(distances))]
