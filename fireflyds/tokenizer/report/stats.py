"""How well tokenizers fit texts, by domain and language."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import regex

from fireflyds.types import Encoder

CONTEXT = 4096
# A text's language is told from its script; Japanese alone mixes several.
_LANGUAGES = {
    "Hiragana": "Japanese",
    "Katakana": "Japanese",
    "Hangul": "Korean",
    "Han": "Chinese",
    "Latin": "Latin script",
    "Cyrillic": "Cyrillic script",
    "Arabic": "Arabic script",
    "Devanagari": "Devanagari script",
    "Thai": "Thai",
    "Greek": "Greek",
    "Hebrew": "Hebrew",
}


@dataclass(slots=True)
class TokenizerStats:
    """Sizes of texts under one tokenizer. `fallback` counts tokens that are bytes and no whole characters."""

    documents: int = 0
    characters: int = 0
    num_bytes: int = 0
    tokens: int = 0
    fallback: int = 0

    def add(self, other: "TokenizerStats") -> None:
        self.documents += other.documents
        self.characters += other.characters
        self.num_bytes += other.num_bytes
        self.tokens += other.tokens
        self.fallback += other.fallback

    def as_dict(self) -> dict[str, float]:
        tokens = max(self.tokens, 1)
        return asdict(self) | {
            "tokens_per_character": self.tokens / max(self.characters, 1),
            "characters_per_token": self.characters / tokens,
            "bytes_per_token": self.num_bytes / tokens,
            "byte_fallback_rate": self.fallback / tokens,
            "characters_in_context": CONTEXT * self.characters / tokens,
        }


@dataclass(slots=True)
class ComparisonRow:
    """Texts of one domain in one language, under two tokenizers."""

    domain: str
    language: str
    before: TokenizerStats
    after: TokenizerStats

    def as_dict(self) -> dict[str, object]:
        return {
            "domain": self.domain,
            "language": self.language,
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
        }


class TokenizerMeter:
    """Measures texts with one tokenizer."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._fragments = encoder.fragments()

    def measure(self, text: str) -> TokenizerStats:
        """Of plain text, without BOS and EOS."""
        ids = self.encoder.encode(text)
        fallback = sum(index in self._fragments for index in ids)
        return TokenizerStats(1, len(text), len(text.encode()), len(ids), fallback)


def compare_tokenizers(old: Encoder, new: Encoder, texts: Iterable[tuple[str, str]]) -> list[ComparisonRow]:
    """Two tokenizers on `(domain, text)` pairs: a row for each domain and language, and one for everything."""
    scales = TokenizerMeter(old), TokenizerMeter(new)
    rows: dict[tuple[str, str], ComparisonRow] = {}
    total = ComparisonRow("all", "all", TokenizerStats(), TokenizerStats())
    for domain, text in texts:
        key = (domain, language(text))
        row = rows.setdefault(key, ComparisonRow(*key, TokenizerStats(), TokenizerStats()))
        before, after = (scale.measure(text) for scale in scales)
        for each in (row, total):
            each.before.add(before)
            each.after.add(after)
    by_size = sorted(rows.values(), key=lambda row: (row.domain, -row.before.characters))
    return [*by_size, total] if rows else []


def language(text: str) -> str:
    """The language whose script most letters of the text's first 2,000 characters belong to."""
    counts: dict[str, int] = {}
    for name, count in _letters(text[:2000]):
        counts[_LANGUAGES[name]] = counts.get(_LANGUAGES[name], 0) + count
    if counts.get("Japanese", 0) * 10 > counts.get("Chinese", 0) and "Japanese" in counts:
        counts["Japanese"] += counts.pop("Chinese", 0)
    return max(counts, key=lambda name: counts[name]) if counts else "no letters"


def _letters(text: str) -> Sequence[tuple[str, int]]:
    found = ((name, len(pattern.findall(text))) for name, pattern in _patterns())
    return [(name, count) for name, count in found if count]


@cache
def _patterns() -> list[tuple[str, "regex.Pattern[str]"]]:
    return [(name, regex.compile(f"\\p{{Script={name}}}")) for name in _LANGUAGES]
