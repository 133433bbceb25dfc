"""Reads tables as records: comma- and tab-separated text, Parquet and Arrow."""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from fireflyds.data.read.fields import NAMES
from fireflyds.data.read.records import FilePart, RawRecord, RejectedRow, decoded_lines, make_record
from fireflyds.data.read.streams import kind, open_bytes

csv.field_size_limit(1 << 30)


def read_text_table(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    """Yields the rows of a .csv or .tsv file by the names of its columns."""
    row_lines: list[tuple[int, str]] = []
    rejected: list[RejectedRow] = []

    def lines() -> Iterator[str]:
        for item in decoded_lines(part):
            if isinstance(item, RejectedRow):
                rejected.append(item)
            else:
                row_lines.append(item)
                yield item[1] + "\n"

    # A tab-separated table has no quoting: a quotation mark in it is text.
    is_tsv = kind(Path(part.file)) == ".tsv"
    dialect = csv.excel_tab if is_tsv else csv.excel
    reader = csv.reader(lines(), dialect, quoting=csv.QUOTE_NONE if is_tsv else csv.QUOTE_MINIMAL)
    columns: list[str] = []
    while True:
        row_lines.clear()
        num_rejected = len(rejected)
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield RejectedRow(part.file, row_lines[0][0] if row_lines else 1, f"not a table row: {error}")
            continue
        if row is None:
            break
        if fault := _fault(row_lines, is_tsv, len(rejected) > num_rejected):
            # Every line counts: with a quotation mark that is not closed each would be a row.
            yield from (RejectedRow(part.file, number, fault) for number, _ in row_lines)
            continue
        if not columns:
            # A column without a name, such as the index that pandas writes, is counted like any other.
            columns = [cell.strip() * _is_header(row) or f"column_{index}" for index, cell in enumerate(row, 1)]
            if _is_header(row):
                continue
        if len(row) > len(columns):
            reason = f"{len(row)} cells for {len(columns)} columns; quote cells that hold the separator"
            yield RejectedRow(part.file, row_lines[-1][0], reason)
            continue
        fields = {key: value for key, value in zip(columns, row, strict=False) if value}
        if fields:
            yield RawRecord(part.file, row_lines[-1][0], fields)
    yield from rejected


def _fault(row_lines: list[tuple[int, str]], is_tsv: bool, is_incomplete: bool) -> str:
    """Why the lines are no row: one of them cannot be decoded, or a quotation mark opens a cell that is not closed."""
    if is_incomplete and len(row_lines) > 1:
        return "another line of the row cannot be decoded"
    if is_tsv or (len(row_lines) == 1 and row_lines[0][1].count('"') % 2 == 0):
        return ""
    try:
        if len(list(csv.reader((line + "\n" for _, line in row_lines), strict=True))) == 1:
            return ""
    except csv.Error:
        pass
    return f"a quotation mark in line {row_lines[0][0]} opens a cell that is not closed"


def _is_header(row: list[str]) -> bool:
    """True where the first row is a header: distinct single words. Otherwise the table begins with data."""
    return len(set(row)) == len(row) and all(
        cell.strip() in NAMES or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,40}", cell) for cell in row if cell
    )


def read_parquet(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    """Yields the rows of a .parquet file."""
    import pyarrow.parquet

    with open_bytes(part.file) as stream:
        yield from _batches(part, "Parquet", lambda: pyarrow.parquet.ParquetFile(stream).iter_batches())


def read_arrow(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    """Yields the rows of an .arrow file, in the stream or the file format."""
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
                yield make_record(part.file, number, row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = f"cannot be read to its end: not {name} after row {number}: {str(error).splitlines()[0]}"
        yield RejectedRow(part.file, 0, reason)
