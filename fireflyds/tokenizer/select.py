"""How many new pieces, and which: by what each saves on real text."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from fireflyds.config import VocabSizeRule
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.merge import MergePlan
from fireflyds.types import Encoder

_POINTS = 12


@dataclass(frozen=True, slots=True)
class Point:
    """A vocabulary of `rows` new rows on held-out text. `alp` is the average log probability of a line in nats."""

    rows: int
    tokens: int
    alp: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def count_tokens(encoder: Encoder, texts: Iterable[str]) -> np.ndarray:
    """Uses of every id, int64 `[vocab_size]`."""
    counts = np.zeros(encoder.vocab_size, np.int64)
    for text in texts:
        np.add.at(counts, encoder.encode(text), 1)
    return counts


def shares(encoder: Encoder, texts: Iterable[str]) -> np.ndarray:
    """The share of every id in the tokens of the texts, float64 `[vocab_size]`."""
    counts = count_tokens(encoder, texts)
    return counts / max(1, counts.sum())


def savings(base: Base, plan: MergePlan, texts: Iterable[str]) -> dict[str, int]:
    """Tokens that each step saves on the texts, by piece.

    A merge saves one token each time it is made: where its piece is a token in the end, and where it is a part of
    one. So what a piece saves is never more than what its parts save, and the best `n` steps need no others.
    """
    counts = count_tokens(base.encoder(plan.steps), texts)
    made = {step.piece: int(counts[index]) for index, step in enumerate(plan.steps, base.num_tokens)}
    for step in reversed(plan.steps):
        for part in step.parts or ():
            if part in made:
                made[part] += made[step.piece]
    # A character that SentencePiece did not know took as many tokens as it has bytes.
    each = {step.piece: 1 if step.parts else max(1, len(base.old_ids(step.piece)) - 1) for step in plan.steps}
    return {piece: made[piece] * each[piece] for piece in made}


def by_saving(plan: MergePlan, saved: dict[str, int]) -> list[str]:
    """The plan's pieces, the most useful first; of equals the one that stands first."""
    return sorted((step.piece for step in plan.steps), key=lambda piece: -saved[piece])


def curve(base: Base, plan: MergePlan, order: Sequence[str], texts: Sequence[str]) -> list[Point]:
    """Vocabularies of growing size, made of the best pieces, on the texts."""
    sizes = sorted({round(len(order) * part / _POINTS) for part in range(_POINTS + 1)})
    points = []
    for rows in sizes:
        best = set(order[:rows])
        counts = count_tokens(base.encoder([step for step in plan.steps if step.piece in best]), texts)
        points.append(Point(rows, int(counts.sum()), average_log_probability(counts, len(texts))))
    return points


def average_log_probability(counts: np.ndarray, num_texts: int) -> float:
    """ALP: the mean over texts of the sum of their tokens' log unigram probabilities (arXiv 2109.07306, eq. 1)."""
    used = counts[counts > 0].astype(np.float64)
    return float((used * np.log(used / used.sum())).sum() / max(num_texts, 1))


def knee(points: Sequence[Point], by: VocabSizeRule) -> Point:
    """The point farthest above the straight line between the curve's ends (Satopaa et al. 2011, "Kneedle")."""
    gains = [point.alp if by is VocabSizeRule.alp else -float(point.tokens) for point in points]
    width, height = points[-1].rows - points[0].rows, gains[-1] - gains[0]
    if width == 0 or math.isclose(height, 0):
        return points[-1]
    above = [
        (gain - gains[0]) / height - (point.rows - points[0].rows) / width
        for point, gain in zip(points, gains, strict=True)
    ]
    return points[int(np.argmax(above))]
