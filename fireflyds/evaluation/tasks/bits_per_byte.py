"""Bits per byte of held-out text: -log2 p(text) over its UTF-8 length, comparable across tokenizers."""

import math
from itertools import islice

from fireflyds.config import EvaluateConfig
from fireflyds.data.read.sources import read_texts
from fireflyds.errors import UserError
from fireflyds.evaluation.scorer import EvaluatedModel, token_losses


def evaluate(subject: EvaluatedModel, config: EvaluateConfig) -> dict[str, float]:
    """`{name: bits per byte}` for every entry of `texts`."""
    if not config.texts:
        raise UserError("texts is empty: bits_per_byte needs held-out text, e.g. texts.zh=heldout.jsonl")
    return {name: _bits_per_byte(subject, path, config.limit) for name, path in config.texts.items()}


def _bits_per_byte(subject: EvaluatedModel, path: str, limit: int | None) -> float:
    sequences: list[list[int]] = []
    num_bytes = 0
    for text in islice(read_texts(path), limit):
        num_bytes += len(text.encode())
        ids = subject.prefix + subject.encoder.encode(text)
        # Windows share one token, so that every token is predicted exactly once.
        step = subject.max_length - 1
        sequences += [ids[start : start + step + 1] for start in range(0, max(len(ids) - 1, 1), step)]
    nats = sum(float(losses.sum()) for losses in token_losses(subject, sequences))
    return nats / math.log(2) / num_bytes
