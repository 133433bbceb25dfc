"""Prompt and completion (OpenAI's older layout; also `prompt`/`response`, `input`/`target`)."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {"prompt": "中国的首都是哪里？", "completion": "北京。"}

PAIRS = (("prompt", "completion"), ("prompt", "response"), ("input", "target"), ("question", "answer"))


def matches(record: dict[str, Any]) -> bool:
    """True where the record has the two fields of one of `PAIRS`, and no `instruction`."""
    return "instruction" not in record and any(set(pair) <= record.keys() for pair in PAIRS)


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record: one question and its answer, after the system message if there is one.

    Raises:
        ValueError: one of the two fields is empty.
    """
    prompt, completion = next(pair for pair in PAIRS if set(pair) <= record.keys())
    if not record[prompt] or not record[completion]:
        raise ValueError(f"{prompt} and {completion} must not be empty")
    system = [Message("system", record["system"])] if record.get("system") else []
    return Sample(messages=(*system, Message("user", record[prompt]), Message("assistant", record[completion])))
