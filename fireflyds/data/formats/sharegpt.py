"""ShareGPT: `conversations` of `from`/`value` (FastChat); the `chosen` answer of a preference pair (LLaMA-Factory)."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]}

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a list in `conversations`, without turns of the YaYi layout."""
    turns = record.get("conversations")
    # The YaYi layout has the same fields, but its own name for the assistant.
    return isinstance(turns, list) and not any(isinstance(t, dict) and t.get("from") == "yayi" for t in turns)


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record, with the `chosen` answer where the last turn is the user's.

    Raises:
        ValueError: the assistant has no turn.
    """
    turns = list(record["conversations"])
    if record.get("chosen") and turns and ROLES[turns[-1]["from"]] == "user":
        turns.append(record["chosen"])
    has_system = bool(turns) and ROLES[turns[0]["from"]] == "system"
    messages = [Message("system", record["system"])] if record.get("system") and not has_system else []
    messages += [Message(ROLES[turn["from"]], turn["value"]) for turn in turns]
    if not any(message.role == "assistant" for message in messages):
        raise ValueError("no turn of the assistant")
    return Sample(messages=tuple(messages))
