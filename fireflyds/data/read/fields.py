"""Keys of a record: their names, which of them a layout must not leave unread, and their nested names."""

import json
from collections.abc import Set
from typing import Any

# Column names of tables made by hand.
NAMES = {
    "指令": "instruction",
    "输入": "input",
    "输出": "output",
    "系统": "system",
    "系统提示": "system",
    "历史": "history",
    "提示": "prompt",
    "提问": "question",
    "问题": "question",
    "问": "question",
    "回答": "answer",
    "答案": "answer",
    "答": "answer",
    "回复": "response",
    "文本": "text",
    "正文": "text",
    "内容": "content",
    "标题": "title",
    "中文": "zh",
    "英文": "en",
}
_ENGLISH = frozenset(
    "instruction input output system history prompt completion question answer query response text content title "
    "messages conversations conversation".split()
)
# Keys of lists of turns.
_TURNS = frozenset(("messages", "conversations", "conversation", "history"))
_EMPTY: tuple[Any, ...] = (None, "", [], {})
# Keys that carry words of the dialogue or decide whether it is learned: a row is rejected where one is not read.
DECISIVE = frozenset(
    "history system context input tools functions tool_calls function_call reasoning_content reasoning thinking "
    "thought weight train loss loss_mask label kto_tag chosen rejected image images video videos audio audios".split()
)

_KNOWN = _ENGLISH | DECISIVE


def normalize_keys(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null, by the names that the layouts know, with lists of turns that tables hold as JSON.

    Raises:
        ValueError: a key that holds turns has a string that is not JSON.
    """
    present = {key: value for key, value in fields.items() if value is not None}
    for key in [key for key in present if isinstance(key, str) and key not in _KNOWN]:
        name = NAMES.get(key) or (key.lower() if key.lower() in _KNOWN else key)
        if name not in present:
            present[name] = present.pop(key)
    for key in _TURNS & present.keys():
        if isinstance(present[key], str) and present[key].strip():
            try:
                present[key] = json.loads(present[key])
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{key} is a string, but not JSON: {error}") from error
    return present


def without_empty(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields without empty strings, lists and objects, which tables of several layouts hold instead of nulls."""
    return {key: value for key, value in fields.items() if value not in _EMPTY}


def unread_keys(fields: dict[str, Any], reads: Set[str]) -> list[str]:
    """The keys that are not in `reads`, and those of the objects in the keys that are; empty values do not count."""
    unread = [key for key, value in fields.items() if key not in reads and value not in _EMPTY]
    for key, value in fields.items():
        if key not in reads or not isinstance(value, dict | list):
            continue
        items = [value] if isinstance(value, dict) else [item for item in value if isinstance(item, dict)]
        prefix = f"{key}." if isinstance(value, dict) else f"{key}[]."
        names = [name for name in set().union(*items) if f"{prefix}{name}" not in reads]
        unread += sorted(prefix + str(name) for name in names if any(item.get(name) not in _EMPTY for item in items))
    return unread


def is_decisive(key: str) -> bool:
    """True for a key, also a nested one, that must not be left unread."""
    name = key.rpartition(".")[2]
    return NAMES.get(name, name).lower() in DECISIVE
