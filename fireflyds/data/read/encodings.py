"""Text encodings: decoding of lines, and which encoding bytes that are not UTF-8 are likely to have."""

import codecs
import io
from collections.abc import Iterator
from typing import IO

UTF8 = "utf-8"
# Characters that stand in nearly every Chinese text of some length, in both scripts.
_COMMON = frozenset(
    "的一是不了在人有我他这這個个們们中来來上大为為和国國地到以说說时時要就出会會可也你对對生能而子那得于於着下自之年，。、"
)
_CANDIDATES = ("gb18030", "big5")


def raw_lines(stream: IO[bytes], encoding: str) -> Iterator[bytes]:
    """Yields the lines with their line ends; those of UTF-16 and UTF-32 as UTF-8, as their line ends are not one byte.

    Raises:
        UnicodeDecodeError: UTF-16 or UTF-32 is damaged.
    """
    if not is_wide(encoding):
        yield from stream
        return
    for line in io.TextIOWrapper(stream, encoding, newline="\n"):
        yield line.encode()


def is_wide(encoding: str) -> bool:
    """True for UTF-16 and UTF-32."""
    return codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))


def likely_encoding(data: bytes) -> str:
    """The encoding in which bytes that are not UTF-8 read as Chinese, or UTF-16 by its mark; empty where none does."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    scores = {}
    for encoding in _CANDIDATES:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        wide = [character for character in text if ord(character) > 0x7F]
        scores[encoding] = sum(character in _COMMON for character in wide) / max(1, len(wide))
    best = max(scores, key=lambda encoding: scores[encoding], default="")
    return best if best and scores[best] > 0.05 else ""


def not_decodable(data: bytes, error: UnicodeDecodeError, encoding: str) -> str:
    """The reason why a line is rejected, with the encoding to give instead where one is likely."""
    found = f"not {encoding.upper()}: byte 0x{data[error.start]:02x} at column {error.start + 1}"
    likely = likely_encoding(data) if encoding == UTF8 else ""
    if likely:
        return f"{found}; it reads as Chinese in {likely}: give data.sources=[{{path: ..., encoding: {likely}}}]"
    return f"{found}; convert the file to UTF-8, or give data.sources=[{{path: ..., encoding: ...}}]"
