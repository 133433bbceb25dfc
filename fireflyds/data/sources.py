"""A source: files of one or more layouts, read as samples."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from fireflyds import registry
from fireflyds.config import SourceConfig
from fireflyds.data.files import Record, Rejected, find_files, read_records
from fireflyds.data.hub import is_dataset, read_dataset
from fireflyds.errors import UserError
from fireflyds.types import Sample

FORMATS = "fireflyds.data.formats"


def detect(fields: dict[str, Any]) -> ModuleType | None:
    """The first layout, in alphabetical order, whose `matches` accepts the fields of a row."""
    for name in registry.names(FORMATS):
        layout = registry.find(FORMATS, name)
        if layout.matches(fields):
            return layout
    return None


def read_source(source: SourceConfig) -> Iterator[Sample | Rejected]:
    """Every sample of a source, and every row that gives none.

    Raises:
        UserError: no such files, or no such format.
    """
    named = None if source.format == "auto" else registry.find(FORMATS, source.format)
    for records in _record_streams(source):
        layout = named
        for record in records:
            if isinstance(record, Rejected):
                yield record
                continue
            if named is None and (layout is None or not layout.matches(record.fields)):
                layout = detect(record.fields)
            if layout is None:
                keys = ", ".join(map(str, list(record.fields)[:8])) or "none"
                known = ", ".join(registry.names(FORMATS))
                yield Rejected(
                    record.file,
                    record.line,
                    f"no known layout has the fields {keys}; known layouts: {known} (a table names its columns in the first line)",
                )
                continue
            try:
                yield layout.read(record.fields)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                name = layout.__name__.rsplit(".", 1)[-1]
                yield Rejected(record.file, record.line, f"not a valid {name} row: {type(error).__name__}: {error}")


def _record_streams(source: SourceConfig) -> Iterator[Iterator[Record | Rejected]]:
    """The rows of each file, or of a data set."""
    if is_dataset(source.path):
        rows = enumerate(read_dataset(source.path), 1)
        yield (Record(source.path, number, fields) for number, fields in rows)
    else:
        yield from (read_records(file, source.split) for file in find_files(source.path))


def read_texts(path: str) -> Iterator[str]:
    """The documents of a source as plain text, for learning pieces and measuring tokenizers.

    Raises:
        UserError: no file, or no document in any of them.
    """
    count, rejected = 0, []
    for item in read_source(SourceConfig(path=path)):
        if isinstance(item, Rejected):
            rejected.append(item)
        else:
            count += 1
            yield item.text if item.text is not None else "\n".join(message.content for message in item.messages)
    first = f"{rejected[0].file}:{rejected[0].line}: {rejected[0].reason}" if rejected else ""
    if count == 0:
        why = f"{len(rejected)} rows set aside, the first: {first}" if rejected else "it is empty"
        raise UserError(f"{path}: no documents in it ({why}). Give text with at least one non-empty document")
    if rejected:
        print(f"{path}: {len(rejected):,} rows set aside, the first: {first}", file=sys.stderr)
