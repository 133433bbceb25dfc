"""A document: `text` (or `content`), or `paragraphs` with an optional `title`."""

from typing import Any

from fireflyds.types import Sample

EXAMPLE = {"text": "白日依山尽，黄河入海流。"}


def matches(record: dict[str, Any]) -> bool:
    text = record.get("text", record.get("content"))
    rendered = isinstance(text, str) and text.startswith(("<s>Human:", "<s>System:"))  # FlagAlpha's
    return (isinstance(text, str) and not rendered) or isinstance(record.get("paragraphs"), list)


def read(record: dict[str, Any]) -> Sample:
    text = record.get("text", record.get("content"))
    if text is None:
        text = "\n".join([*filter(None, [record.get("title")]), *record["paragraphs"]])
    if not isinstance(text, str) or not text.strip():
        raise ValueError("the text is empty")
    return Sample(text=text)
