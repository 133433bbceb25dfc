"""Records of raw files, and the decoded lines that they are read from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fireflyds.data.read.encodings import UTF8, is_wide, not_decodable, raw_lines
from fireflyds.data.read.streams import open_bytes


@dataclass(frozen=True, slots=True)
class FilePart:
    """A byte range of a file: the lines that begin in bytes `[start, end)`; `first_line` numbers the first one."""

    file: str
    start: int = 0
    end: int | None = None
    first_line: int = 1
    encoding: str = UTF8
    shard: tuple[int, int] | None = None
    """Of a data set: the number of its part and of all parts."""


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be used. `line` counts from 1; 0 means the whole file."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A row of a file as a dict of fields (plain text: `{"text": ...}`)."""

    file: str
    line: int
    fields: dict[str, Any]


def decoded_lines(part: FilePart) -> Iterator[tuple[int, str] | RejectedRow]:
    """Yields `(line number, text)` of each line of a part, or a `RejectedRow` where it cannot be decoded."""
    encoding = UTF8 if is_wide(part.encoding) else part.encoding
    with open_bytes(part.file) as stream:
        offset = part.start
        if offset:
            stream.seek(offset)
        for number, raw in enumerate(raw_lines(stream, part.encoding), part.first_line):
            if part.end is not None and offset >= part.end:
                break
            offset += len(raw)
            try:
                # A byte order mark is removed; form feeds and other control characters are kept.
                yield number, raw.decode("utf-8-sig" if number == 1 and encoding == UTF8 else encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield RejectedRow(part.file, number, not_decodable(raw, error, encoding))


def make_record(file: str, number: int, row: Any) -> RawRecord | RejectedRow:
    """The record of a row of JSON or of a table: an object, or a string as the text of a document."""
    if isinstance(row, str):
        return RawRecord(file, number, {"text": row})
    if isinstance(row, dict):
        return RawRecord(file, number, row)
    return RejectedRow(file, number, f"a row must be an object or a string, got {type(row).__name__}")
