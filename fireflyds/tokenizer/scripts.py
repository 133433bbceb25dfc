"""The characters an expansion is for: Unicode scripts by name."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from unicodedata import is_normalized

import regex

from fireflyds.errors import UserError

PUNCTUATION = "CJK_Punctuation"
# The blocks "CJK Symbols and Punctuation" and "Halfwidth and Fullwidth Forms". Quotation marks and dashes that English
# uses too (“ ” — …) are not among them: text without the new scripts must keep its ids.
# U+2329 and U+232A are the same brackets as U+3008 and U+3009 to Unicode normalisation.
_PUNCTUATION = "\u2329\u232a\u3000-\u3004\u3006\u3008-\u3020\u302a-\u3037\u303c-\u303f\uff00-\uffef"
# Unicode counts the long-vowel mark as common to both syllabaries.
_EXTRA = {"Hiragana": "\u30fc", "Katakana": "\u30fc"}
# Written without spaces between words; words of all other scripts may begin with one.
_UNSPACED = {"Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"}


class Scripts:
    """A set of scripts. A character of one of them is a *new* character: text without any keeps its ids.

    Args:
        names: Unicode script names (`Han`, `Hangul`, `Cyrillic`, ...), and `CJK_Punctuation`.

    Raises:
        UserError: a name that Unicode does not have.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise UserError(f"scripts=[]: at least one script is needed. Give for example scripts=[Han,{PUNCTUATION}]")
        self.names = tuple(names)
        self._letters = {name: _letters(name) for name in names if name != PUNCTUATION}
        every = "".join(self._letters.values()) + (_PUNCTUATION if PUNCTUATION in names else "")
        self._any = regex.compile(f"[{every}]")
        self._all = regex.compile(f"[{every}]+")
        self._words = regex.compile(self._word_pattern(every))

    def has(self, text: str) -> bool:
        """Whether a new character stands in the text."""
        return self._any.search(text) is not None

    def covers(self, text: str) -> bool:
        """Whether all of the text is new characters."""
        return self._all.fullmatch(text) is not None

    def words(self, text: str) -> list[str]:
        """The stretches that pieces may be cut from: no piece crosses punctuation, a digit or another script.

        A punctuation mark is a stretch of its own. Words of scripts with spaces keep the space before them.
        """
        return list(self._words.findall(text))

    def covers_lead(self, lead: bytes) -> bool:
        """Whether every character whose UTF-8 begins with `lead` is new, so that the bytes never occur without one."""
        return _covers_lead(self, lead)

    def characters(self) -> Iterator[str]:
        """All characters of the scripts; the common ones of Han (GB 2312, level 1 before level 2) first.

        Compatibility forms are left out: normalisation, which some tokenizers begin with, turns them into others.
        """
        listed: list[str] = []
        if "Han" in self._letters:
            cells = ((row, cell) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF))
            listed = [bytes(pair).decode("gb2312", "ignore") for pair in cells]
        first = dict.fromkeys(c for c in listed if c)
        yield from first
        planes = (chr(code) for code in range(0x21, 0x34000) if not 0xD800 <= code < 0xE000)
        usual = regex.compile(r"[^\p{Cn}\p{Mn}\p{Zs}]")
        new = (c for c in planes if self._any.match(c) and c not in first and usual.match(c))
        yield from (c for c in new if is_normalized("NFC", c))

    def _word_pattern(self, every: str) -> str:
        unspaced = "".join(letters for name, letters in self._letters.items() if name in _UNSPACED)
        spaced = "".join(letters for name, letters in self._letters.items() if name not in _UNSPACED)
        patterns = ([f"[{unspaced}]+"] if unspaced else []) + ([f" ?[{spaced}]+"] if spaced else [])
        return "|".join([*patterns, f"[{every}]"])


def _letters(name: str) -> str:
    letters = f"\\p{{Script={name}}}"
    try:
        regex.compile(letters)
    except regex.error as error:
        raise UserError(
            f"scripts: {name!r} is no Unicode script. Give names like Han, Hiragana, Hangul, Cyrillic, Thai or {PUNCTUATION}"
        ) from error
    return letters + _EXTRA.get(name, "")


@cache
def _covers_lead(scripts: Any, lead: bytes) -> bool:
    missing = _length(lead[0]) - len(lead) if lead else 0
    if missing < 1 or any(byte & 0xC0 != 0x80 for byte in lead[1:]):
        return False
    # Below the smallest and above the largest continuation some leads have no characters at all.
    tails = [bytes([first, *[0x80] * (missing - 1)]) for first in range(0x80, 0xC0)]
    found = [(lead + tail).decode("utf-8", "ignore") for tail in tails]
    starts = [ord(text) for text in found if text]
    span = 64 ** (missing - 1)
    return bool(starts) and all(scripts.covers(chr(code)) for start in starts for code in range(start, start + span))


def _length(first: int) -> int:
    """Bytes of a UTF-8 character by its first byte; 0 for what cannot begin one."""
    for length, (low, high) in {1: (0, 0x80), 2: (0xC2, 0xE0), 3: (0xE0, 0xF0), 4: (0xF0, 0xF5)}.items():
        if low <= first < high:
            return length
    return 0
