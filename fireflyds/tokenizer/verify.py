"""Verification of an expanded tokenizer on real text, before the output directory is committed."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fireflyds.tokenizer.auto_tokenizer import HARD_LINES, load_auto_tokenizer
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.pretokenizer import has_marks
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.vocabulary_merge import MergePlan, unreachable
from fireflyds.types import Encoder

# Stride over the base's tokens whose texts are tested, so that old text is covered with any corpus.
_TOKEN_STRIDE = 7


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """The result of one check: the property, the number of cases, and the cases that failed.

    `of_auto_tokenizer`: the check compares with `AutoTokenizer`, which may differ for known reasons.
    """

    rule: str
    tried: int
    failures: list[str]
    of_auto_tokenizer: bool = False

    @property
    def passed(self) -> bool:
        """True where no case failed."""
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        """Returns the property and the numbers of tried and failed cases, as in `report.json`."""
        return {"rule": self.rule, "tried": self.tried, "failed": len(self.failures)}


def verify_expansion(
    base: Base, plan: MergePlan, scripts: Scripts, folder: Path, lines: Iterable[str], *, marks: bool = False
) -> list[VerificationResult]:
    """Runs all checks on the tokenizer in `folder`, with `lines`, HARD_LINES and texts of the base's tokens.

    `marks`: words include combining marks now, so that text with marks may get other ids.

    Lines that contain the text of an added token are excluded, as `AutoTokenizer` encodes it as that token.
    """
    old, new = base.original_encoder(), load_encoder(folder)
    auto = load_auto_tokenizer(folder)
    base_texts = (text for index in range(0, base.num_tokens, _TOKEN_STRIDE) if (text := old.token(index)))
    texts = [
        line for line in (*HARD_LINES, *base_texts, *lines) if line and not any(token in line for token in auto.tokens)
    ]
    encoded = [new.encode(line) for line in texts]
    dead_pieces = unreachable(base, plan, new)
    unchanged = [
        (line, ids == old.encode(line))
        for line, ids in zip(texts, encoded, strict=True)
        if not (scripts.has(line) or (marks and has_marks(line)))
    ]
    round_trips = [(line, _round_trips(line, ids, old, new)) for line, ids in zip(texts, encoded, strict=True)]
    agreements = [(line, ids == auto.encode(line)) for line, ids in zip(texts, encoded, strict=True)]
    return [
        VerificationResult("every new piece is reached", len(plan.steps), dead_pieces),
        _check(f"text without new characters{' and marks' if marks else ''} keeps its ids", unchanged),
        _check("decoding gives the text back", round_trips),
        replace(_check("AutoTokenizer gives the same ids", agreements), of_auto_tokenizer=True),
    ]


def _check(rule: str, outcomes: list[tuple[str, bool]]) -> VerificationResult:
    return VerificationResult(rule, len(outcomes), [line for line, passed in outcomes if not passed])


def _round_trips(line: str, ids: list[int], old: Encoder, new: Encoder) -> bool:
    """True where decoding returns the text, or the same as the base's decoding of it (U+2581 decodes to a space)."""
    decoded = new.decode(ids)
    return decoded == line or decoded == old.decode(old.encode(line))
