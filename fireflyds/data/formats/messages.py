"""OpenAI messages: `messages` of `role`/`content`, with an optional `system`; `loss_mask` of the turns."""

from typing import Any

from fireflyds.data.read.turns import (
    TOOL_KEYS,
    label_keys,
    read_label,
    read_system,
    read_tools,
    read_turns,
    turn_keys,
)
from fireflyds.types import Sample

EXAMPLE = {
    "messages": [
        {"role": "system", "content": "你是一个助手。"},
        {"role": "user", "content": "你好"},
        {"role": "assistant", "content": "你好！"},
    ]
}
_READS = turn_keys("messages") | {"system", "loss_mask"} | TOOL_KEYS


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a list in `messages`."""
    return isinstance(record.get("messages"), list) and "chosen" not in record


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    return _READS | label_keys(record) if "label" in record or "kto_tag" in record else _READS


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record.

    Raises:
        ValueError: a turn is not one of text with a known role, no answer carries loss.
    """
    messages = read_turns(record["messages"], record.get("loss_mask"))
    whole = (*read_system(record, messages), *messages)
    return Sample(messages=whole, tools=read_tools(record), label=read_label(record))
