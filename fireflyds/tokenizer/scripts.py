"""Sets of Unicode scripts, which define the characters that an expansion adds pieces for."""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from unicodedata import category, is_normalized

import regex

from fireflyds.errors import UserError

PUNCTUATION = "CJK_Punctuation"
# The blocks "CJK Symbols and Punctuation" and "Halfwidth and Fullwidth Forms". Quotation marks and dashes that English
# uses too (“ ” — …) are excluded, as text without the new scripts must keep its ids.
# U+2329 and U+232A are canonically equivalent to the brackets U+3008 and U+3009.
_PUNCTUATION = "\u2329\u232a\u3000-\u3004\u3006\u3008-\u3020\u302a-\u3037\u303c-\u303f\uff00-\uffef"
# Characters of the property Common or Inherited in the blocks of these scripts: the long-vowel mark and the voiced
# sound marks of kana, the baht sign, the danda and the accents of Devanagari.
_EXTRA = {
    "Hiragana": "\u30fc\u309b\u309c",
    "Katakana": "\u30fc\u30a0\u30fb",
    "Thai": "\u0e3f",
    "Devanagari": "\u0953\u0954\u0964\u0965",
}
# Scripts without spaces between words; in all others, a word may begin with a space.
_UNSPACED = {"Han", "Hiragana", "Katakana", "Bopomofo", "Yi", "Thai", "Lao", "Khmer", "Myanmar", "Tibetan"}


class Scripts:
    """A set of scripts. Their characters are the *new* characters; text without new characters keeps its ids.

    Args:
        names: Unicode script names (`Han`, `Hangul`, `Cyrillic`, ...), and `CJK_Punctuation`.

    Raises:
        UserError: `names` is empty or has a name that is not a Unicode script.
    """

    def __init__(self, names: Sequence[str]) -> None:
        if not names:
            raise UserError(
                "at least one script is needed",
                key="scripts",
                value="[]",
                remedy=f"Give for example scripts=[Han,{PUNCTUATION}]",
            )
        self.names = tuple(names)
        self._letters = {name: _letters(name) for name in names if name != PUNCTUATION}
        character_class = "".join(self._letters.values()) + (_PUNCTUATION if PUNCTUATION in names else "")
        self._any = regex.compile(f"[{character_class}]")
        self._all = regex.compile(f"[{character_class}]+")
        self._words = regex.compile(self._word_pattern(character_class))

    def has(self, text: str) -> bool:
        """True where the text has a new character."""
        return self._any.search(text) is not None

    def covers(self, text: str) -> bool:
        """True where the text is not empty and all its characters are new."""
        return self._all.fullmatch(text) is not None

    def words(self, text: str) -> list[str]:
        """Returns the runs of new characters; no piece extends across punctuation, a digit or another script.

        Each punctuation mark is a separate run. Words of scripts with spaces include the space before them.
        """
        return list(self._words.findall(text))

    def covers_lead(self, lead: bytes) -> bool:
        """True where every character whose UTF-8 begins with `lead` is new, so that other text has no such bytes."""
        return _covers_lead(self, lead)

    def characters(self) -> Iterator[str]:
        """Yields all characters of the scripts, beginning with the common Han characters (GB 2312, level 1, then 2).

        Compatibility forms are excluded, as the NFC normalisation of some tokenizers replaces them.
        """
        gb2312: list[str] = []
        if "Han" in self._letters:
            cells = ((row, cell) for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF))
            gb2312 = [bytes(pair).decode("gb2312", "ignore") for pair in cells]
        common = dict.fromkeys(c for c in gb2312 if c)
        yield from common
        code_points = (chr(code) for code in range(0x21, 0x34000) if not 0xD800 <= code < 0xE000)
        printable = regex.compile(r"[^\p{Cn}\p{Mn}\p{Zs}]")
        new = (c for c in code_points if self._any.match(c) and c not in common and printable.match(c))
        yield from (c for c in new if is_normalized("NFC", c))

    def _word_pattern(self, character_class: str) -> str:
        unspaced = "".join(letters for name, letters in self._letters.items() if name in _UNSPACED)
        spaced = "".join(letters for name, letters in self._letters.items() if name not in _UNSPACED)
        patterns = ([f"[{unspaced}]+"] if unspaced else []) + ([f" ?[{spaced}]+"] if spaced else [])
        return "|".join([*patterns, f"[{character_class}]"])


def _letters(name: str) -> str:
    letters = f"\\p{{Script={name}}}"
    try:
        regex.compile(letters)
    except regex.error as error:
        raise UserError(
            f"{name!r} is no Unicode script",
            key="scripts",
            remedy=f"Give names like Han, Hiragana, Hangul, Cyrillic, Thai or {PUNCTUATION}",
        ) from error
    return letters + _EXTRA.get(name, "") + _inherited_marks(name)


@cache
def _inherited_marks(name: str) -> str:
    """Combining marks that several scripts use, such as the vowel marks of Arabic: their own script is Inherited."""
    mark = regex.compile(rf"(?=\p{{M}})(?=\p{{Script=Inherited}})\p{{Script_Extensions={name}}}")
    return "".join(chr(code) for code in range(0x300, 0x20000) if not 0xD800 <= code < 0xE000 and mark.match(chr(code)))


@cache
def _covers_lead(scripts: Any, lead: bytes) -> bool:
    num_missing = _utf8_length(lead[0]) - len(lead) if lead else 0
    if num_missing < 1 or any(byte & 0xC0 != 0x80 for byte in lead[1:]):
        return False
    # Some continuation bytes are invalid after some leads (overlong forms, surrogates, beyond U+10FFFF).
    tails = [bytes([first, *[0x80] * (num_missing - 1)]) for first in range(0x80, 0xC0)]
    candidates = [(lead + tail).decode("utf-8", "ignore") for tail in tails]
    starts = [ord(text) for text in candidates if text]
    span = 64 ** (num_missing - 1)
    codes = (chr(code) for start in starts for code in range(start, start + span))
    # No text has unassigned characters.
    return bool(starts) and all(scripts.covers(code) or category(code) == "Cn" for code in codes)


def _utf8_length(first: int) -> int:
    """Returns the number of bytes of a UTF-8 character by its first byte; 0 where the byte cannot begin a character."""
    for length, (low, high) in {1: (0, 0x80), 2: (0xC2, 0xE0), 3: (0xE0, 0xF0), 4: (0xF0, 0xF5)}.items():
        if low <= first < high:
            return length
    return 0
