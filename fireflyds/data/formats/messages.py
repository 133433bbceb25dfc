"""OpenAI messages: `messages` of `role`/`content`."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {
    "messages": [
        {"role": "system", "content": "你是一个助手。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"},
    ]
}

ROLES = ("system", "user", "assistant")


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a list in `messages`."""
    return isinstance(record.get("messages"), list)


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record.

    Raises:
        ValueError: a role is unknown, or the assistant has no message.
    """
    messages = tuple(Message(turn["role"], turn["content"]) for turn in record["messages"])
    for message in messages:
        if message.role not in ROLES:
            raise ValueError(f"role {message.role!r} is not one of {', '.join(ROLES)}")
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no message of the assistant")
    return Sample(messages=messages)
