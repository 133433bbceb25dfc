"""A source: files of one or more layouts, read as samples."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fireflyds import registry
from fireflyds.config import SourceConfig
from fireflyds.data.read.files import FilePart, RawRecord, RejectedRow, find_files, read_records
from fireflyds.data.read.hub import is_dataset, read_dataset
from fireflyds.errors import UserError
from fireflyds.types import Sample

FORMATS = "fireflyds.data.formats"


@dataclass(frozen=True, slots=True)
class LocatedSample:
    """A sample, the name of its layout, and where it stands."""

    sample: Sample
    layout: str
    file: str
    line: int


def detect_format(fields: dict[str, Any]) -> ModuleType | None:
    """The first layout, in alphabetical order, whose `matches` accepts the fields of a row."""
    for name in registry.names(FORMATS):
        layout = registry.find(FORMATS, name)
        if layout.matches(fields):
            return layout
    return None


def read_source(source: SourceConfig) -> Iterator[Sample | RejectedRow]:
    """Every sample of a source, and every row that gives none.

    Raises:
        UserError: no such files, or no such format.
    """
    for part in source_parts(source):
        yield from (item if isinstance(item, RejectedRow) else item.sample for item in read_part(source, part))


def source_parts(source: SourceConfig) -> list[FilePart]:
    """The files of a source, each as one part; a data set is one part."""
    if is_dataset(source.path):
        return [FilePart(source.path)]
    return [FilePart(str(file)) for file in find_files(source.path)]


def read_part(source: SourceConfig, part: FilePart) -> Iterator[LocatedSample | RejectedRow]:
    """The samples of a part, and every row that gives none."""
    layout = named = None if source.format == "auto" else registry.find(FORMATS, source.format)
    for record in _records(source, part):
        if isinstance(record, RejectedRow):
            yield record
            continue
        if named is None and (layout is None or not layout.matches(record.fields)):
            layout = detect_format(record.fields)
        if layout is None:
            keys = ", ".join(map(str, list(record.fields)[:8])) or "none"
            known = ", ".join(registry.names(FORMATS))
            yield RejectedRow(
                record.file,
                record.line,
                f"no known layout has the fields {keys}; known layouts: {known} (a table names its columns in the first line)",
            )
            continue
        name = layout.__name__.rsplit(".", 1)[-1]
        try:
            sample = layout.read(record.fields)
            _check_text(sample)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            yield RejectedRow(record.file, record.line, f"not a valid {name} row: {type(error).__name__}: {error}")
            continue
        yield LocatedSample(sample, name, record.file, record.line)


def _records(source: SourceConfig, part: FilePart) -> Iterable[RawRecord | RejectedRow]:
    if is_dataset(part.file):
        return (RawRecord(part.file, number, fields) for number, fields in enumerate(read_dataset(part.file), 1))
    return read_records(part, source.split)


def read_texts(path: str) -> Iterator[str]:
    """The documents of a source as plain text, for learning pieces and measuring tokenizers.

    Raises:
        UserError: no file, or no document in any of them.
    """
    count, rejected = 0, []
    for item in read_source(SourceConfig(path=path)):
        if isinstance(item, RejectedRow):
            rejected.append(item)
        else:
            text = item.text if item.text is not None else "\n".join(message.content for message in item.messages)
            count += 1
            yield text
    first = f"{rejected[0].file}:{rejected[0].line}: {rejected[0].reason}" if rejected else ""
    if count == 0:
        why = f"{len(rejected)} rows set aside, the first: {first}" if rejected else "it is empty"
        raise UserError(f"{path}: no documents in it ({why}). Give text with at least one non-empty document")
    if rejected:
        print(f"{path}: {len(rejected):,} rows set aside, the first: {first}", file=sys.stderr)


def _check_text(sample: Sample) -> None:
    """Raises `ValueError` or `TypeError` where a text is none, or holds half a surrogate pair."""
    for text in (sample.text,) if sample.text is not None else (message.content for message in sample.messages):
        if not isinstance(text, str):
            raise TypeError(f"a text is expected, got {type(text).__name__}")
        if not text.isascii():
            text.encode()
