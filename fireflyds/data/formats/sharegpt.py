"""ShareGPT: `conversations` of `from`/`value` (FastChat; YaYi 2) or of `role`/`content`, with an optional `system`."""

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

EXAMPLE = {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！"}]}
_READS = turn_keys("conversations") | {"system", "loss_mask"} | TOOL_KEYS


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a list in `conversations`, and no preference pair."""
    return isinstance(record.get("conversations"), list) and "chosen" not in record


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    return _READS | label_keys(record) if "label" in record or "kto_tag" in record else _READS


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record.

    Raises:
        ValueError: a turn is not one of text with a known role, no answer carries loss.
    """
    messages = read_turns(record["conversations"], record.get("loss_mask"))
    whole = (*read_system(record, messages), *messages)
    return Sample(messages=whole, tools=read_tools(record), label=read_label(record))
