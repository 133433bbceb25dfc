"""The table of byte-level BPE: a character for every byte."""

from functools import cache


@cache
def byte_values() -> dict[str, int]:
    """Returns the byte of each character in byte-level BPE (GPT-2's table): printable Latin-1 characters map to
    their own code, the other bytes are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}
