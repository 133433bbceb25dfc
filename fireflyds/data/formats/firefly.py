"""Firefly: `conversation` of `human`/`assistant` pairs, with an optional `system`."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {"conversation_id": 1, "category": "chat", "conversation": [{"human": "你好", "assistant": "你好！"}]}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a list in `conversation`."""
    return isinstance(record.get("conversation"), list)


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record.

    Raises:
        ValueError: it has no message.
    """
    messages = [Message("system", record["system"])] if record.get("system") else []
    for turn in record["conversation"]:
        messages += [Message("user", turn["human"]), Message("assistant", turn["assistant"])]
    if not messages:
        raise ValueError("the conversation is empty")
    return Sample(messages=tuple(messages))
