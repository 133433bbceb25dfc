"""Compression statistics of tokenizers on texts, by domain and language."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache

import regex

from fireflyds.types import Encoder

CONTEXT = 4096
# The language of a text is derived from its scripts; only Japanese combines several.
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
    """Sizes of texts with one tokenizer. `fallback`: number of tokens that are bytes of an incomplete character."""

    documents: int = 0
    characters: int = 0
    num_bytes: int = 0
    tokens: int = 0
    fallback: int = 0

    def add(self, other: "TokenizerStats") -> None:
        """Adds the counts of `other` to these."""
        self.documents += other.documents
        self.characters += other.characters
        self.num_bytes += other.num_bytes
        self.tokens += other.tokens
        self.fallback += other.fallback

    def as_dict(self) -> dict[str, float]:
        """Returns the counts and the ratios derived from them, by name."""
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
    """Statistics of the texts of one domain and language, with two tokenizers."""

    domain: str
    language: str
    before: TokenizerStats
    after: TokenizerStats

    def as_dict(self) -> dict[str, object]:
        """Returns the row as it is written to `report.json`."""
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
        """Returns the statistics of plain text, without BOS and EOS."""
        ids = self.encoder.encode(text)
        fallback = sum(index in self._fragments for index in ids)
        return TokenizerStats(1, len(text), len(text.encode()), len(ids), fallback)


def compare_tokenizers(old: Encoder, new: Encoder, texts: Iterable[tuple[str, str]]) -> list[ComparisonRow]:
    """Compares two tokenizers on `(domain, text)` pairs: one row per domain and language, and one for all texts."""
    meters = TokenizerMeter(old), TokenizerMeter(new)
    rows: dict[tuple[str, str], ComparisonRow] = {}
    total = ComparisonRow("all", "all", TokenizerStats(), TokenizerStats())
    for domain, text in texts:
        key = (domain, language(text))
        row = rows.setdefault(key, ComparisonRow(*key, TokenizerStats(), TokenizerStats()))
        before, after = (meter.measure(text) for meter in meters)
        for comparison in (row, total):
            comparison.before.add(before)
            comparison.after.add(after)
    by_size = sorted(rows.values(), key=lambda row: (row.domain, -row.before.characters))
    return [*by_size, total] if rows else []


def language(text: str) -> str:
    """Returns the language of the script with the most letters in the first 2,000 characters of the text."""
    counts: dict[str, int] = {}
    for name, count in _letters(text[:2000]):
        counts[_LANGUAGES[name]] = counts.get(_LANGUAGES[name], 0) + count
    if counts.get("Japanese", 0) * 10 > counts.get("Chinese", 0) and "Japanese" in counts:
        counts["Japanese"] += counts.pop("Chinese", 0)
    return max(counts, key=lambda name: counts[name]) if counts else "no letters"


def _letters(text: str) -> Sequence[tuple[str, int]]:
    matches = ((name, len(pattern.findall(text))) for name, pattern in _patterns())
    return [(name, count) for name, count in matches if count]


@cache
def _patterns() -> list[tuple[str, "regex.Pattern[str]"]]:
    return [(name, regex.compile(f"\\p{{Script={name}}}")) for name in _LANGUAGES]
