"""Raw files to records. What cannot be read is set aside with file, line and reason; nothing stops for it."""

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.config import TextSplit
from fireflyds.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
csv.field_size_limit(1 << 30)


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that could not be used. `line` counts from 1; 0 is the file as a whole."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it stands in a file: a dict of fields (plain text is `{"text": ...}`)."""

    file: str
    line: int
    fields: dict[str, Any]


def find_files(path: str) -> list[Path]:
    """The files a source names: one file, all known files below a folder, or a glob.

    Raises:
        UserError: there are none, or a file has an ending that is not known.
    """
    place = Path(path)
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    else:
        files = sorted(Path(name) for name in glob.glob(path, recursive=True) if Path(name).is_file())
    if not files:
        raise UserError(
            f"{path}: no such file, folder or glob, or nothing in it ends in {' '.join(SUFFIXES)}. Check the path"
        )
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"{file}: ending {file.suffix!r} is not known. Known: {' '.join(SUFFIXES)}")
    return files


def read_records(file: Path, split: TextSplit = TextSplit.line) -> Iterator[Record | Rejected]:
    """All rows of one file, in order."""
    reader: Callable[[Path], Iterator[Record | Rejected]] = {
        ".txt": lambda path: _text(path, split),
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _table,
        ".tsv": _table,
        ".parquet": _parquet,
    }[file.suffix.lower()]
    return reader(file)


def _decoded_lines(file: Path) -> Iterator[tuple[int, str] | Rejected]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            try:
                # A byte order mark is no text; form feeds and the like stay as they are.
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                reason = (
                    f"not UTF-8: byte 0x{raw[error.start]:02x} at column {error.start + 1}; convert the file to UTF-8"
                )
                yield Rejected(str(file), number, reason)


def _text(file: Path, split: TextSplit) -> Iterator[Record | Rejected]:
    held: list[str] = []
    start = 1
    for item in _decoded_lines(file):
        if isinstance(item, Rejected):
            yield item
            continue
        number, line = item
        ends = split is TextSplit.line or (split is TextSplit.paragraph and not line.strip())
        if not held:
            start = number
        if line.strip() or (split is TextSplit.file and held):
            held.append(line)
        if ends and held:
            yield Record(str(file), start, {"text": "\n".join(held)})
            held = []
    if held:
        yield Record(str(file), start, {"text": "\n".join(held)})


def _json_lines(file: Path) -> Iterator[Record | Rejected]:
    for item in _decoded_lines(file):
        if isinstance(item, Rejected):
            yield item
        elif item[1].strip():
            number, line = item
            try:
                yield _record(file, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield Rejected(str(file), number, f"not JSON: {error}")


def _json(file: Path) -> Iterator[Record | Rejected]:
    try:
        content = json.loads(file.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        yield Rejected(str(file), 0, f"not UTF-8 at byte {error.start}; convert the file to UTF-8")
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # JSON lines under another ending
            yield from _json_lines(file)
        else:
            yield Rejected(str(file), error.lineno, f"not JSON: {error}")
    except RecursionError as error:
        yield Rejected(str(file), 0, f"not JSON: {error}")
    else:
        rows = content if isinstance(content, list) else [content]
        for number, row in enumerate(rows, 1):
            yield _record(file, number, row)


def _table(file: Path) -> Iterator[Record | Rejected]:
    good: list[int] = []

    def lines() -> Iterator[str]:
        for item in _decoded_lines(file):
            if isinstance(item, Rejected):
                bad.append(item)
            else:
                good.append(item[0])
                yield item[1] + "\n"

    bad: list[Rejected] = []
    reader = csv.DictReader(lines(), delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
    try:
        for row in reader:
            fields = {key: value for key, value in row.items() if key and value}
            yield Record(str(file), good[-1], fields)
    except csv.Error as error:
        yield Rejected(str(file), good[-1] if good else 1, f"not a table: {error}")
    yield from bad


def _parquet(file: Path) -> Iterator[Record | Rejected]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield _record(file, number, row)
    except (pyarrow.ArrowException, OSError) as error:
        yield Rejected(str(file), number + 1, f"not Parquet: {str(error).splitlines()[0]}")


def _record(file: Path, number: int, row: Any) -> Record | Rejected:
    if isinstance(row, str):
        return Record(str(file), number, {"text": row})
    if isinstance(row, dict):
        return Record(str(file), number, row)
    return Rejected(str(file), number, f"a row must be an object or a string, got {type(row).__name__}")
