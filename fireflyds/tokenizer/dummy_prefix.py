"""The space that a tokenizer puts before text (the dummy prefix), and how text that continues other text avoids it."""

from collections.abc import Callable
from dataclasses import dataclass

# Characters that few vocabularies contain, so that they are encoded as bytes.
_LEADS = ("\n", "\x01", "\x7f", "\U000e0001")


@dataclass(frozen=True, slots=True)
class Lead:
    """Text put before text that continues other text, so that the dummy prefix stands before `text` instead. It ends
    in a byte token, which merges with nothing that follows; `ids` are its tokens."""

    text: str
    ids: tuple[int, ...]


def lead_of(encode: Callable[[str], list[int]], is_byte: Callable[[int], bool]) -> Lead:
    """Returns the lead of a tokenizer; a newline may be a piece of its own, so that several are tried."""
    for text in _LEADS:
        ids = encode(text)
        if ids and is_byte(ids[-1]):
            return Lead(text, tuple(ids))
    return Lead(_LEADS[0], tuple(encode(_LEADS[0])))
