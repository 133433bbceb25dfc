"""Bits per byte of held-out text: -log2 p(text) over its UTF-8 length, comparable across tokenizers."""

import math
from itertools import islice

from fireflyds.config import BitsPerByteConfig
from fireflyds.data.read.sources import read_texts
from fireflyds.errors import UserError
from fireflyds.evaluation.scorer import EvaluatedModel, token_losses
from fireflyds.evaluation.tasks import EvaluationTask


def evaluate(model: EvaluatedModel, options: BitsPerByteConfig, limit: int | None) -> dict[str, float]:
    """`{name: bits per byte}` for every entry of `texts`."""
    if not options.texts:
        raise UserError(
            "is empty; the task needs held-out text",
            key="bits_per_byte.texts",
            remedy="Give some, e.g. bits_per_byte.texts.zh=heldout.jsonl",
        )
    return {name: _bits_per_byte(model, path, limit) for name, path in options.texts.items()}


def _bits_per_byte(model: EvaluatedModel, path: str, limit: int | None) -> float:
    sequences: list[list[int]] = []
    num_bytes = 0
    bytes_of = model.encoder.token_bytes()
    for text in islice(read_texts(path), limit):
        ids = model.prefix + model.encoder.encode(text)
        # Without BOS the first token is not predicted, so that its bytes do not count, as in validation.
        num_bytes += len(text.encode()) if model.prefix else int(bytes_of[ids[1:]].sum())
        # Windows share one token, so that every token is predicted exactly once.
        step = model.max_length - 1
        sequences += [ids[start : start + step + 1] for start in range(0, max(len(ids) - 1, 1), step)]
    nats = sum(float(losses.sum()) for losses in token_losses(model, sequences))
    if not num_bytes:
        raise UserError("has no text to predict", key="bits_per_byte.texts", value=path, remedy="Give longer texts")
    return nats / math.log(2) / num_bytes


TASK = EvaluationTask(
    protocol="bits_per_byte_windows",
    source="windows of the model's length that share one token",
    evaluate=evaluate,
)
