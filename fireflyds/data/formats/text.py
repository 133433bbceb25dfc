"""A document: `text` or `content`, or `paragraphs` with optional `title`, also by chapter (chinese-poetry's books)."""

from collections.abc import Iterator
from typing import Any

from fireflyds.types import Sample

EXAMPLE = {"text": "白日依山尽，黄河入海流。"}
_CHAPTER = frozenset(f"content[].{key}" for key in ("title", "chapter", "paragraphs", "content"))
# Classes of documents and the like: decisions about dialogues only.
PASSES_OVER = frozenset({"label", "weight", "input", "context", "images", "image"})
_RENDERED = ("<s>Human:", "<s>System:")  # a dialogue of the layout flagalpha


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a text, or the lines of a poem or book."""
    text = record.get("text", record.get("content"))
    return (
        (isinstance(text, str) and not text.startswith(_RENDERED))
        or isinstance(record.get("paragraphs"), list)
        or bool(isinstance(record.get("content"), list) and record["content"])
    )


def holds_text_only(record: dict[str, Any]) -> bool:
    """True for a row that is one text under `text` and nothing else: every line of a `.txt` file."""
    text = record.get("text") if len(record) == 1 else None
    return isinstance(text, str) and bool(text) and not text.isspace() and not text.startswith(_RENDERED)


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record: `text` before `content`; titles of books and poems only."""
    name = "text" if "text" in record else "content"
    if isinstance(record.get(name), str):
        return frozenset({name})
    return frozenset({"content", "paragraphs", "title" if record.get("title") else "chapter"}) | _CHAPTER


def read(record: dict[str, Any]) -> Sample:
    """Returns the text of the record as a document.

    Raises:
        ValueError: it is empty.
    """
    text = record.get("text", record.get("content"))
    if not isinstance(text, str):
        text = "\n".join(_lines(record))
    if not text.strip():
        raise ValueError("the text is empty")
    return Sample(text=text)


def _lines(record: dict[str, Any]) -> Iterator[str]:
    """Titles and paragraphs of a poem, or of all chapters of a book, in order."""
    paragraphs, chapters = record.get("paragraphs"), record.get("content")
    if not isinstance(paragraphs, list) and not (isinstance(chapters, list) and chapters):
        return
    yield from filter(None, [record.get("title") or record.get("chapter")])
    for name, items in (("paragraphs", paragraphs), ("content", chapters)):
        for item in items if isinstance(items, list) else []:
            if isinstance(item, dict) and name == "content":
                yield from _lines(item)
            elif isinstance(item, str):
                yield item
            else:
                raise ValueError(f"{name} holds a {type(item).__name__}, not text")
