"""Reads raw files as records. Unreadable rows become `RejectedRow` with file, line and reason; reading continues."""

import csv
import glob
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fireflyds.config import TextSplit
from fireflyds.data.read.fields import NAMES
from fireflyds.data.read.streams import PACKED, open_bytes
from fireflyds.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
csv.field_size_limit(1 << 30)


@dataclass(frozen=True, slots=True)
class FilePart:
    """A byte range of a file: the lines that begin in bytes `[start, end)`; `first_line` numbers the first one."""

    file: str
    start: int = 0
    end: int | None = None
    first_line: int = 1


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


def find_files(path: str) -> list[Path]:
    """Returns the files of a source path: one file, all supported files below a folder, or the matches of a glob.

    Raises:
        UserError: there are none, or a file has an unsupported ending.
    """
    location = Path(path)
    if location.is_file():
        files = [location]
    elif location.is_dir():
        files = sorted(file for file in location.rglob("*") if kind(file) in SUFFIXES and file.is_file())
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(
            f"no such file, folder or glob, or nothing in it ends in {' '.join(SUFFIXES)}",
            key=path,
            remedy="Check the path",
        )
    for file in files:
        if kind(file) not in SUFFIXES:
            raise UserError(
                f"ending {file.suffix!r} is not known",
                key=file,
                remedy=f"Known: {' '.join(SUFFIXES)}, each also with {' '.join(PACKED)}",
            )
    return files


def kind(file: Path) -> str:
    """Returns the suffix that determines the file format: `.jsonl` for `a.jsonl.gz`."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in PACKED else suffix


def read_records(file: Path | FilePart, split: TextSplit = TextSplit.line) -> Iterator[RawRecord | RejectedRow]:
    """Yields all rows of a file, or of a part of it, in order."""
    part = file if isinstance(file, FilePart) else FilePart(str(file))
    reader: Callable[[FilePart], Iterator[RawRecord | RejectedRow]] = {
        ".txt": lambda part: _text(part, split),
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _table,
        ".tsv": _table,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }[kind(Path(part.file))]
    return _reject_unreadable(part, reader(part))


def _reject_unreadable(part: FilePart, rows: Iterator[RawRecord | RejectedRow]) -> Iterator[RawRecord | RejectedRow]:
    """Yields the rows; a truncated, corrupted or unreadable file gives one `RejectedRow` with line 0."""
    import zstandard

    try:
        yield from rows
    except (EOFError, OSError, zlib.error, zstandard.ZstdError) as error:
        yield RejectedRow(part.file, 0, f"cannot be read to its end: {error}")


def _decoded_lines(part: FilePart) -> Iterator[tuple[int, str] | RejectedRow]:
    """Yields `(line number, text)` of each line of a part, or a `RejectedRow` where it is not UTF-8."""
    with open_bytes(part.file) as stream:
        offset = part.start
        if offset:
            stream.seek(offset)
        for number, raw in enumerate(stream, part.first_line):
            if part.end is not None and offset >= part.end:
                break
            offset += len(raw)
            try:
                # A byte order mark is removed; form feeds and other control characters are kept.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                reason = (
                    f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}; convert the file to UTF-8"
                )
                yield RejectedRow(part.file, number, reason)


def _text(part: FilePart, split: TextSplit) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    if split is TextSplit.line:
        for item in _decoded_lines(part):
            if isinstance(item, RejectedRow):
                yield item
            elif item[1] and not item[1].isspace():
                yield RawRecord(file, item[0], {"text": item[1]})
        return
    lines: list[str] = []
    start = 1
    for item in _decoded_lines(part):
        if isinstance(item, RejectedRow):
            yield item
            continue
        number, line = item
        paragraph_ends = split is TextSplit.paragraph and not line.strip()
        if not lines:
            start = number
        if line.strip() or (split is TextSplit.file and lines):
            lines.append(line)
        if paragraph_ends and lines:
            yield RawRecord(file, start, {"text": "\n".join(lines)})
            lines = []
    if lines:
        yield RawRecord(file, start, {"text": "\n".join(lines)})


def _json_lines(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    for item in _decoded_lines(part):
        if isinstance(item, RejectedRow):
            yield item
        elif item[1].strip():
            number, line = item
            try:
                yield _record(file, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield RejectedRow(file, number, f"not JSON: {error}")


def _json(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    try:
        with open_bytes(file) as stream:
            content = json.loads(stream.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield RejectedRow(file, 0, f"not UTF-8 at byte {error.start}; convert the file to UTF-8")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON Lines with the suffix .json
            yield from _json_lines(part)
        else:
            yield RejectedRow(file, error.lineno, f"not JSON: {error}")
    except RecursionError as error:
        yield RejectedRow(file, 0, f"not JSON: {error}")
    else:
        if isinstance(content, dict) and _holds_rows(content.get("data")):  # such as {"version": 1, "data": [...]}
            content = content["data"]
        rows = content if isinstance(content, list) else [content]
        for number, row in enumerate(rows, 1):
            yield _record(file, number, row)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _table(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    line_numbers: list[int] = []

    def lines() -> Iterator[str]:
        for item in _decoded_lines(part):
            if isinstance(item, RejectedRow):
                rejected.append(item)
            else:
                line_numbers.append(item[0])
                yield item[1] + "\n"

    rejected: list[RejectedRow] = []
    # A tab-separated table has no quoting: a quotation mark in it is text.
    is_tsv = kind(Path(file)) == ".tsv"
    reader = csv.reader(
        lines(), delimiter="\t" if is_tsv else ",", quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL
    )
    columns: list[str] = []
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield RejectedRow(file, line_numbers[-1] if line_numbers else 1, f"not a table row: {error}")
            continue
        if row is None:
            break
        if not columns:
            if _is_header(row):
                columns = [cell.strip() for cell in row]
                continue
            columns = [f"column_{number}" for number in range(1, len(row) + 1)]
        if len(row) > len(columns):
            reason = f"{len(row)} cells for {len(columns)} columns; quote cells that hold the separator"
            yield RejectedRow(file, line_numbers[-1], reason)
            continue
        fields = {key: value for key, value in zip(columns, row, strict=False) if key and value}
        if fields:
            yield RawRecord(file, line_numbers[-1], fields)
    yield from rejected


def _is_header(row: list[str]) -> bool:
    """True where the first row is a header: distinct single words. Otherwise the table begins with data."""
    return len(set(row)) == len(row) and all(
        cell.strip() in NAMES or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,40}", cell) for cell in row if cell
    )


def _parquet(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    import pyarrow.parquet

    with open_bytes(part.file) as stream:
        yield from _batches(part, "Parquet", lambda: pyarrow.parquet.ParquetFile(stream).iter_batches())


def _arrow(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    import pyarrow

    def batches(stream: IO[bytes]) -> Iterator[Any]:
        try:  # stream format, as written by `datasets`; other programs write the file format (random access)
            yield from pyarrow.ipc.open_stream(stream)
        except pyarrow.ArrowInvalid:
            stream.seek(0)
            file = pyarrow.ipc.open_file(stream)
            yield from (file.get_batch(number) for number in range(file.num_record_batches))

    with open_bytes(part.file) as stream:
        yield from _batches(part, "Arrow", lambda: batches(stream))


def _batches(part: FilePart, name: str, open_batches: Callable[[], Iterator[Any]]) -> Iterator[RawRecord | RejectedRow]:
    import pyarrow

    number = 0
    try:
        for batch in open_batches():
            for row in batch.to_pylist():
                number += 1
                yield _record(part.file, number, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield RejectedRow(part.file, number + 1, f"not {name}: {str(error).splitlines()[0]}")


def _record(file: str, number: int, row: Any) -> RawRecord | RejectedRow:
    if isinstance(row, str):
        return RawRecord(file, number, {"text": row})
    if isinstance(row, dict):
        return RawRecord(file, number, row)
    return RejectedRow(file, number, f"a row must be an object or a string, got {type(row).__name__}")
