"""Reads raw files as records. Unreadable rows become `RejectedRow` with file, line and reason; reading continues."""

import glob
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fireflyds.config import TextSplit
from fireflyds.data.read.encodings import UTF8, not_decodable
from fireflyds.data.read.json_arrays import ArrayRows, holds_array, holds_lines
from fireflyds.data.read.records import FilePart, RawRecord, RejectedRow, decoded_lines, make_record
from fireflyds.data.read.streams import PACKED, kind, open_bytes
from fireflyds.data.read.tables import read_arrow, read_parquet, read_text_table
from fireflyds.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
# What to do with files of other endings.
_REMEDIES = {
    **dict.fromkeys((".tar", ".zip", ".7z", ".rar", ".tgz"), "Unpack the archive, and give the folder"),
    **dict.fromkeys((".xz", ".bz2", ".lz4"), "Unpack the file, or pack it with gzip or zstd"),
    ".vocab": "Give text; a list of pieces is pieces= of launch/expand.py",
}
_HELD_OUT = re.compile(r"(^|[._-])(test|dev|val|valid|validation|eval)([._-]|$)", re.IGNORECASE)


def find_files(path: str) -> list[Path]:
    """Returns the files of a source path: one file, all supported files below a folder, or the matches of a glob.

    Raises:
        UserError: there are none, or a file has an unsupported ending.
    """
    location = Path(path)
    if location.is_file():
        files = [location]
    elif location.is_dir():
        files = [file for file in folder_files(location) if kind(file) in SUFFIXES]
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
            known = f"Known: {' '.join(SUFFIXES)}, each also with {' '.join(PACKED)}"
            raise UserError(f"ending {kind(file)!r} is not known", key=file, remedy=_REMEDIES.get(kind(file), known))
    return files


def folder_files(folder: Path) -> list[Path]:
    """All files below a folder, sorted, without those that are hidden or lie in a hidden folder (`._a.txt`, `.git`)."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def describe_folder(folder: Path) -> list[str]:
    """What to know of a folder before it is read: files of unknown endings, and files of test or validation splits."""
    files, lines = folder_files(folder), []
    unknown = [file for file in files if kind(file) not in SUFFIXES]
    held_out = [file for file in files if kind(file) in SUFFIXES and _HELD_OUT.search(file.name)]
    hidden = sum(file.is_file() for file in folder.rglob("*")) - len(files)
    if unknown:
        lines.append(f"not read, as their endings are not known: {_listed(unknown, folder)}")
    if hidden:
        lines.append(f"not read: {hidden:,} hidden files")
    if held_out:
        lines.append(f"read too, though named like a test or validation split: {_listed(held_out, folder)}")
    return [f"{folder}: {line}" for line in lines]


def _listed(files: list[Path], folder: Path) -> str:
    names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
    return names + (f" and {len(files) - 5:,} more" if len(files) > 5 else "")


def read_records(file: Path | FilePart, split: TextSplit = TextSplit.line) -> Iterator[RawRecord | RejectedRow]:
    """Yields all rows of a file, or of a part of it, in order."""
    part = file if isinstance(file, FilePart) else FilePart(str(file))
    reader: Callable[[FilePart], Iterator[RawRecord | RejectedRow]] = {
        ".txt": lambda part: _text(part, split),
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": read_text_table,
        ".tsv": read_text_table,
        ".parquet": read_parquet,
        ".arrow": read_arrow,
    }[kind(Path(part.file))]
    return _reject_unreadable(part, reader(part))


def _reject_unreadable(part: FilePart, rows: Iterator[RawRecord | RejectedRow]) -> Iterator[RawRecord | RejectedRow]:
    """Yields the rows; a truncated, corrupted or unreadable file gives one `RejectedRow` with line 0."""
    import zstandard

    try:
        yield from rows
    except (EOFError, OSError, UnicodeError, zlib.error, zstandard.ZstdError) as error:
        yield RejectedRow(part.file, 0, f"cannot be read to its end: {error}")


def _text(part: FilePart, split: TextSplit) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    if split is TextSplit.line:
        for item in decoded_lines(part):
            if isinstance(item, RejectedRow):
                yield item
            elif item[1] and not item[1].isspace():
                yield RawRecord(file, item[0], {"text": item[1]})
        return
    lines: list[str] = []
    start, is_whole = 1, True
    for item in decoded_lines(part):
        if isinstance(item, RejectedRow):
            is_whole = False
            yield item
            continue
        number, line = item
        paragraph_ends = split is TextSplit.paragraph and not line.strip()
        if not lines:
            start = number
        if line.strip() or (split is TextSplit.file and lines):
            lines.append(line)
        if paragraph_ends and lines:
            yield _document(file, start, lines, is_whole)
            lines = []
        is_whole = is_whole or not lines
    if lines:
        yield _document(file, start, lines, is_whole)


def _document(file: str, start: int, lines: list[str], is_whole: bool) -> RawRecord | RejectedRow:
    if is_whole:
        return RawRecord(file, start, {"text": "\n".join(lines)})
    return RejectedRow(file, start, "a line of the document cannot be decoded")


def _json_lines(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    for item in decoded_lines(part):
        if isinstance(item, RejectedRow):
            yield item
        elif item[1].strip():
            number, line = item
            try:
                yield make_record(file, number, json.loads(line))
            except (ValueError, RecursionError) as error:
                yield RejectedRow(file, number, f"not JSON: {error}")


def _json(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    file = part.file
    try:
        if part.start or holds_array(file, part.encoding):
            yield from _json_array(part)
        elif holds_lines(file, part.encoding):
            yield from _json_lines(part)
        else:
            yield from _json_object(part)
    except UnicodeDecodeError as error:
        yield RejectedRow(file, 0, not_decodable(error.object, error, part.encoding))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # objects one after another
            yield from _json_lines(part)
        else:
            # Nothing of the file is read, so it counts with all its bytes.
            yield RejectedRow(file, 0, f"cannot be read to its end: not JSON: {error}")
    except (ValueError, RecursionError) as error:
        yield RejectedRow(file, 0, f"cannot be read to its end: {error}")


def _json_array(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    with open_bytes(part.file) as stream:
        rows = ArrayRows(stream, part.encoding, part.start, part.end)
        for number, row in enumerate(rows, part.first_line):
            yield make_record(part.file, number, row)


def _json_object(part: FilePart) -> Iterator[RawRecord | RejectedRow]:
    """Yields the one row of a file, or those under its key `data`, such as in {"version": 1, "data": [...]}."""
    file = part.file
    with open_bytes(file) as stream:
        content = json.loads(stream.read().decode("utf-8-sig" if part.encoding == UTF8 else part.encoding))
    rows = [content]
    if isinstance(content, dict) and _holds_rows(content.get("data")):
        others = [key for key, value in content.items() if key != "data" and _holds_rows(value)]
        if others:
            reason = f"beside data, {', '.join(others)} hold rows too; save each as a file of its own"
            yield RejectedRow(file, 0, reason)
            return
        rows = content["data"]
    for number, row in enumerate(rows, 1):
        yield make_record(file, number, row)


def _holds_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
