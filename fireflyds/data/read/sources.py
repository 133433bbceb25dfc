"""Reads a source, i.e. files in one or more layouts, as samples."""

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
    """A sample with the name of its layout, its file and its line."""

    sample: Sample
    layout: str
    file: str
    line: int


def detect_format(fields: dict[str, Any]) -> ModuleType | None:
    """Returns the first layout, in alphabetical order, whose `matches` accepts the fields of a row, or None."""
    for name in registry.names(FORMATS):
        layout = registry.load(FORMATS, name)
        if layout.matches(fields):
            return layout
    return None


def read_source(source: SourceConfig) -> Iterator[Sample | RejectedRow]:
    """Yields every sample of a source, and a `RejectedRow` for every row without one.

    Raises:
        UserError: no such files, or no such format.
    """
    for part in source_parts(source):
        yield from (item if isinstance(item, RejectedRow) else item.sample for item in read_part(source, part))


def source_parts(source: SourceConfig) -> list[FilePart]:
    """Returns the files of a source, each as one part; a data set is one part."""
    if is_dataset(source.path):
        return [FilePart(source.path)]
    return [FilePart(str(file)) for file in find_files(source.path)]


def read_part(source: SourceConfig, part: FilePart) -> Iterator[LocatedSample | RejectedRow]:
    """Yields the samples of a part, and a `RejectedRow` for every row without one."""
    layout = configured = (
        None if source.format == "auto" else registry.find(FORMATS, source.format, "data.sources.format")
    )
    for record in _records(source, part):
        if isinstance(record, RejectedRow):
            yield record
            continue
        if configured is None and (layout is None or not layout.matches(record.fields)):
            layout = detect_format(record.fields)
        if layout is None:
            fields = ", ".join(map(str, list(record.fields)[:8])) or "none"
            layouts = ", ".join(registry.names(FORMATS))
            yield RejectedRow(
                record.file,
                record.line,
                f"no known layout has the fields {fields}; known layouts: {layouts} (a table must have its column "
                "names in the first line)",
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
    """Yields the documents of a source as plain text, for training vocabularies and for evaluation.

    Raises:
        UserError: no file, or no document in any file.
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
        detail = f"{len(rejected)} rows were rejected, the first: {first}" if rejected else "it is empty"
        raise UserError(
            f"no documents in it ({detail})", key=path, remedy="Give text with at least one non-empty document"
        )
    if rejected:
        print(f"{path}: {len(rejected):,} rows were rejected, the first: {first}", file=sys.stderr)


def _check_text(sample: Sample) -> None:
    """Raises `TypeError` where a text is not a string, `ValueError` where it contains an unpaired surrogate."""
    for text in (sample.text,) if sample.text is not None else (message.content for message in sample.messages):
        if not isinstance(text, str):
            raise TypeError(f"a text is expected, got {type(text).__name__}")
        if not text.isascii():
            text.encode()
