"""Reads a source, i.e. files in one or more layouts, as samples."""

import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from fireflyds import registry
from fireflyds.config import SourceConfig
from fireflyds.data.formats.text import holds_text_only
from fireflyds.data.read.fields import is_decisive, normalize_keys, unread_keys, without_empty
from fireflyds.data.read.files import find_files, read_records
from fireflyds.data.read.hub import is_dataset, num_shards, read_dataset
from fireflyds.data.read.records import FilePart, RawRecord, RejectedRow
from fireflyds.errors import UserError
from fireflyds.types import Sample

FORMATS = "fireflyds.data.formats"
# Markers of chat templates in text that is already rendered, with the template that writes them.
MARKERS = {
    "<|im_start|>": "chatml",
    "[INST]": "llama2",
    "<|start_header_id|>": "llama3",
    "<start_of_turn>": "gemma",
    "<|user|>": "zephyr",
    "<|User|>": "deepseek",
    "### Instruction:": "alpaca",
}
_MARKER_STARTS = frozenset(marker[0] for marker in MARKERS)


@dataclass(frozen=True, slots=True)
class LocatedSample:
    """A sample with the name of its layout, its file, its line, and the keys of its row that were not read."""

    sample: Sample
    layout: str
    file: str
    line: int
    unread: Sequence[str] = ()
    marker: str = ""
    """A marker of a chat template in its text, which is then already rendered."""


def detect_format(fields: dict[str, Any]) -> ModuleType | None:
    """Returns the first layout, in alphabetical order, whose `matches` accepts the fields of a row, or None."""
    for layout in _layouts():
        if layout.matches(fields):
            return layout
    return None


@functools.cache  # it is asked for every row
def _layouts() -> tuple[ModuleType, ...]:
    return tuple(registry.load(FORMATS, name) for name in registry.names(FORMATS))


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
        count = num_shards(source.path)
        return [FilePart(source.path, shard=(number, count)) for number in range(count)]
    return [FilePart(str(file), encoding=source.encoding) for file in find_files(source.path)]


def read_part(source: SourceConfig, part: FilePart) -> Iterator[LocatedSample | RejectedRow]:
    """Yields the samples of a part, and a `RejectedRow` for every row without one."""
    configured = None if source.format == "auto" else registry.find(FORMATS, source.format, "data.sources.format")
    for record in _records(source, part):
        if isinstance(record, RejectedRow):
            yield record
        elif configured is None and holds_text_only(record.fields):
            yield _read_text(record)
        else:
            yield _read_row(record, configured)


def _read_text(record: RawRecord) -> LocatedSample | RejectedRow:
    """As `_read_row`, for the most frequent row by far: no other layout can match it."""
    sample = Sample(text=record.fields["text"])
    try:
        _check_text(sample)
    except UnicodeEncodeError as error:
        return RejectedRow(record.file, record.line, f"not a valid text row: {error}")
    return LocatedSample(sample, "text", record.file, record.line, [], _template_marker(sample))


def _read_row(record: RawRecord, configured: ModuleType | None) -> LocatedSample | RejectedRow:
    """The sample of a row, which depends on nothing but the row and the configured layout."""

    def rejected(reason: str) -> RejectedRow:
        return RejectedRow(record.file, record.line, _printable(reason))

    try:
        present = normalize_keys(record.fields)
    except ValueError as error:
        return rejected(str(error))
    fields = without_empty(present)
    layout = configured or detect_format(fields)
    if layout is None or not layout.matches(fields):  # its own message says which field must not be empty
        fields, layout = present, configured or detect_format(present)
    if layout is None:
        keys = ", ".join(map(str, list(fields)[:8])) or "none"
        return rejected(
            f"no known layout has the fields {keys}; known layouts: {', '.join(registry.names(FORMATS))} (a table must "
            "have its column names in the first line)"
        )
    name = layout.__name__.rsplit(".", 1)[-1]
    try:
        sample = layout.read(fields)
        _check_text(sample)
        unread = unread_keys(fields, layout.reads(fields))
    except KeyError as error:
        return rejected(f"not a valid {name} row: the key {error} is missing")
    except (TypeError, ValueError, AttributeError) as error:
        return rejected(f"not a valid {name} row: {error}")
    passes_over: frozenset[str] = getattr(layout, "PASSES_OVER", frozenset())
    if lost := [key for key in unread if is_decisive(key) and key not in passes_over]:
        return rejected(
            f"the layout {name} does not read {', '.join(lost)}; put its text into the turns, or remove the key"
        )
    unread = [_printable(key) for key in unread]
    return LocatedSample(sample, name, record.file, record.line, unread, _template_marker(sample))


def _printable(text: str) -> str:
    """The text with unpaired surrogates escaped: JSON may hold them, and no file or terminal takes them."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _records(source: SourceConfig, part: FilePart) -> Iterable[RawRecord | RejectedRow]:
    if is_dataset(part.file):
        number, count = part.shard or (0, 1)
        name = part.file if count == 1 else f"{part.file} (part {number + 1} of {count})"
        rows = read_dataset(part.file, number, count)
        return (RawRecord(name, line, fields) for line, fields in enumerate(rows, 1))
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


def size_of(path: str) -> int:
    """Returns the number of bytes of a source's text; 0 where it is not known beforehand, as in packed files."""
    files = [] if is_dataset(path) else find_files(path)
    plain = all(file.suffix in (".txt", ".jsonl", ".json", ".csv", ".tsv") for file in files)
    return sum(file.stat().st_size for file in files) if plain else 0


def _texts(sample: Sample) -> Iterable[str]:
    if sample.text is not None:
        return (sample.text,)
    return (text for message in sample.messages for text in (message.reasoning, message.content))


def _template_marker(sample: Sample) -> str:
    text = sample.text if sample.text is not None else "\0".join(message.content for message in sample.messages)
    if not any(character in text for character in _MARKER_STARTS):  # much faster than a search for every marker
        return ""
    return next((marker for marker in MARKERS if marker in text), "")


def _check_text(sample: Sample) -> None:
    """Raises `TypeError` where a text is not a string, `ValueError` where it contains an unpaired surrogate."""
    for text in _texts(sample):
        if not isinstance(text, str):
            raise TypeError(f"a text is expected, got {type(text).__name__}")
        if not text.isascii():
            text.encode()
