"""What an expansion promises, checked on real text before anything is handed over."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.merge import MergePlan, unreachable
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.types import Encoder

# What breaks tokenizers: white space of all kinds, code, digits, rare planes, marks, joined emoji.
HARD_LINES = (
    "def f(x):\n    return  x ** 2  # 注释\n\n\n\tif a:\n\t\tb = 1\r\n",
    "  two  leading, three   inside, and trailing  ",
    "\n\n \n\t\u00a0\u2003\u3000。",
    "1234567890 0.0001 2017年10月1日，１２３ＡＢＣ",
    "<tag attr='值'>文本</tag> {\"键\": [1, 2.5e-3]}",
    "𠀀𠮷𪚥 龘靐齉 㐀㐁 豈更車",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é ñ ﷽ שלום привет こんにちは 안녕",
    "“引号”—破折号…《书名》「引文」（括号）、～",
)
# Every so manyth token of the base is a line to try, so that there is old text whatever the corpus.
_EVERY_TOKEN = 7


@dataclass(frozen=True, slots=True)
class VerificationResult:
    """One promise: on how many things it was tried, and those on which it failed."""

    promise: str
    tried: int
    failures: list[str]
    of_auto_tokenizer: bool = False

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {"promise": self.promise, "tried": self.tried, "failed": len(self.failures)}


def verify_expansion(
    base: Base, plan: MergePlan, scripts: Scripts, folder: Path, lines: Iterable[str]
) -> list[VerificationResult]:
    """Try every promise on the tokenizer in `folder`, with the lines and with HARD_LINES.

    Lines that spell an added token are left out: `AutoTokenizer` takes them for the token.
    """
    old, new = base.encoder([]), load_encoder(folder)
    auto = _auto_encode(folder)
    own = (text for index in range(0, base.num_tokens, _EVERY_TOKEN) if (text := old.token(index)))
    tried = [line for line in (*HARD_LINES, *own, *lines) if line and not any(token in line for token in auto.tokens)]
    encoded = [new.encode(line) for line in tried]
    dead = unreachable(base, plan, new)
    kept = [(line, ids == old.encode(line)) for line, ids in zip(tried, encoded, strict=True) if not scripts.has(line)]
    given_back = [(line, _comes_back(line, ids, old, new)) for line, ids in zip(tried, encoded, strict=True)]
    agree = [(line, ids == auto.encode(line)) for line, ids in zip(tried, encoded, strict=True)]
    return [
        VerificationResult("every new piece is reached", len(plan.steps), dead),
        _check("text without new characters keeps its ids", kept),
        _check("decoding gives the text back", given_back),
        replace(_check("AutoTokenizer gives the same ids", agree), of_auto_tokenizer=True),
    ]


def _check(promise: str, outcomes: list[tuple[str, bool]]) -> VerificationResult:
    return VerificationResult(promise, len(outcomes), [line for line, passed in outcomes if not passed])


def _comes_back(line: str, ids: list[int], old: Encoder, new: Encoder) -> bool:
    """The text itself, or what the base gives back for it (U+2581 comes back as a space)."""
    back = new.decode(ids)
    return back == line or back == old.decode(old.encode(line))


@dataclass(frozen=True, slots=True)
class _Auto:
    encode: Callable[[str], list[int]]
    tokens: tuple[str, ...]


def _auto_encode(folder: Path) -> _Auto:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return _Auto(
        lambda text: list(tokenizer.encode(text, add_special_tokens=False)), tuple(tokenizer.get_added_vocab())
    )
