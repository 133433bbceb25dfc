"""YaYi 2: a `system` text and `conversations` of `from`: `human`/`yayi`."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {
    "system": "你是雅意。",
    "conversations": [{"from": "human", "value": "你好"}, {"from": "yayi", "value": "你好！"}],
}

ROLES = {"human": "user", "yayi": "assistant", "system": "system"}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has turns of `yayi` in `conversations`."""
    turns = record.get("conversations")
    return isinstance(turns, list) and any(isinstance(turn, dict) and turn.get("from") == "yayi" for turn in turns)


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record."""
    messages = [Message("system", record["system"])] if record.get("system") else []
    messages += [Message(ROLES[turn["from"]], turn["value"]) for turn in record["conversations"]]
    return Sample(messages=tuple(messages))
