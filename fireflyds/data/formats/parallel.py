"""Parallel text: one sentence in two languages (`en`/`zh`, a `translation` of both, or a table of two columns without
names), as one document."""

import unicodedata
from typing import Any

from fireflyds.types import Sample

EXAMPLE = {"en": "Good morning.", "zh": "早上好。"}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has both sides of a sentence pair."""
    return _sides(record) is not None


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    return frozenset({"en", "zh", "column_1", "column_2", "translation", "translation.en", "translation.zh"})


def read(record: dict[str, Any]) -> Sample:
    """Returns both sentences as one document, in an order that depends on their lengths.

    Raises:
        ValueError: a side is missing or empty, or both columns of a table without names are of one script.
    """
    sides = _sides(record)
    if sides and "column_1" in record and _same_script(*sides):
        cells = ", ".join(side[:30] for side in sides)
        raise ValueError(
            f"a table without known column names, and both columns are of one script, so it is no parallel text: "
            f"{cells}. "
            "Name the columns in the first line, such as question,answer or instruction,input,output"
        )
    if sides is None or not (sides[0].strip() and sides[1].strip()):
        raise ValueError("one side of the pair is missing or empty")
    # Both directions are trained: the order depends on the text lengths only, so it is the same in every run.
    first, second = sides if (len(sides[0]) + len(sides[1])) % 2 else sides[::-1]
    return Sample(text=f"{first}\n{second}")


def _same_script(first: str, second: str) -> bool:
    """True where both texts have letters, and none of a script that the other lacks; Latin letters do not count: names
    stand in them in every language. The script is the first word of a letter's Unicode name, such as CJK."""
    scripts = [
        {unicodedata.name(letter, "").split(" ")[0] for letter in set(text) if letter.isalpha()}
        for text in (first, second)
    ]
    latin = {"LATIN", "FULLWIDTH"}
    return bool(scripts[0] and scripts[1]) and scripts[0] - latin == scripts[1] - latin


def _sides(record: dict[str, Any]) -> tuple[str, str] | None:
    pair = record.get("translation", record)
    for first, second in (("en", "zh"), ("column_1", "column_2")):
        if isinstance(pair, dict) and isinstance(pair.get(first), str) and isinstance(pair.get(second), str):
            return (pair[first], pair[second]) if first == "en" or len(pair) == 2 else None
    return None
