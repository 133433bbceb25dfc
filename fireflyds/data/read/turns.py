"""Turns of a dialogue as they stand in data: names of roles, contents, history, and which answers carry loss."""

import json
from collections.abc import Sequence
from typing import Any

from fireflyds.types import Message

# By the name in lower case; "tool" is the result of a tool. A turn of `function_call` is a call of the assistant.
ROLES = {
    **dict.fromkeys(("system", "developer", "系统"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "用户", "问"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "model", "bot", "ai", "chatbot", "yayi", "助手", "答"), "assistant"
    ),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "function_call": "assistant",
}
# Keys of a turn with the thoughts before an answer.
_REASONING = ("reasoning_content", "reasoning", "thinking", "thought")
# Keys of a turn that say whether it carries loss: 1 or true, 0 or false.
LOSS_KEYS = ("weight", "train", "loss", "loss_mask")
_LOSS_KEYS = frozenset(LOSS_KEYS)
_EXTRAS = frozenset((*_REASONING, "tool_calls", "tool_call_id"))
TURN_KEYS = ("role", "from", "content", "value", *LOSS_KEYS, *_REASONING, "tool_calls", "tool_call_id")


TOOL_KEYS = frozenset({"tools", *(f"tools[].{key}" for key in "type function name description parameters".split())})


def turn_keys(*names: str) -> frozenset[str]:
    """The keys that `read_turns` reads of the list `name`, such as `messages[].role`, and the list itself."""
    return frozenset({*names, *(f"{name}[].{key}" for name in names for key in TURN_KEYS)})


def read_turns(value: Any, loss_mask: Any = None) -> list[Message]:
    """The messages of a list of turns, each `role`/`content` or `from`/`value`.

    Args:
        value: the list.
        loss_mask: 1 or 0 for every turn, where the record has such a list.

    Raises:
        ValueError: names the turn, counted from 1, and what is wrong with it.
    """
    turns = _require_list(value, "turns")
    mask = [None] * len(turns) if loss_mask is None else _require_list(loss_mask, "loss_mask")
    if len(mask) != len(turns):
        raise ValueError(f"loss_mask has {len(mask)} values for {len(turns)} turns")
    messages = [
        _read_turn(turn, number, learn) for number, (turn, learn) in enumerate(zip(turns, mask, strict=True), 1)
    ]
    require_answer(messages)
    return messages


def require_answer(messages: Sequence[Message]) -> None:
    """Raises `ValueError` where no turn of the assistant carries loss."""
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise ValueError("no turn of the assistant")
    if not any(message.learn for message in answers):
        raise ValueError("no turn of the assistant carries loss (weight, train or loss_mask)")


def label_keys(record: dict[str, Any]) -> frozenset[str]:
    """The keys of the record that say whether its answer is a wanted one, as booleans (KTO; LLaMA-Factory)."""
    return frozenset(key for key in ("label", "kto_tag") if isinstance(record.get(key), bool))


def read_label(record: dict[str, Any]) -> bool | None:
    """Whether the record's answer is a wanted one, as `label` or `kto_tag` says; None where neither is there."""
    values = [record[key] for key in sorted(label_keys(record))]
    return all(values) if values else None


def read_history(value: Any) -> list[Message]:
    """The messages of earlier turns: pairs of strings, or turns with roles.

    Raises:
        ValueError: names the item, counted from 1, that is neither.
    """
    messages: list[Message] = []
    items = _require_list(value or [], "history")
    for number, item in enumerate(items, 1):
        if isinstance(item, dict):
            messages.append(_read_turn(item, number, None))
        elif isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(text, str) for text in item):
            messages += [Message("user", item[0]), Message("assistant", item[1])]
        else:
            raise ValueError(
                f"history: item {number} is {json.dumps(item, ensure_ascii=False)[:60]}, not a pair of strings or a "
                "turn with role and content"
            )
    return messages


def read_system(record: dict[str, Any], messages: Sequence[Message] = ()) -> list[Message]:
    """The system message of the record's `system`, if it has one.

    Raises:
        ValueError: `messages` begin with another system message.
    """
    if not record.get("system"):
        return []
    if messages and messages[0].role == "system":
        if messages[0].content == record["system"]:
            return []
        raise ValueError("system stands in the record and in turn 1, with different texts")
    return [Message("system", record["system"])]


def _require_list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{name}: a list is expected, got {type(value).__name__}")
    return value


def _read_turn(turn: Any, number: int, learn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"turn {number} is a {type(turn).__name__}, not an object with role and content")
    name = turn.get("role", turn.get("from"))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        role = _role(turn, number)
    content = turn.get("content", turn.get("value"))
    if name == "function_call" or not _EXTRAS.isdisjoint(turn):
        return _read_extras(turn, number, role, learn)
    if not isinstance(content, str):
        content = _content(turn, f"turn {number} ({role})")
    return Message(role, content, learn=_learns(turn, number, learn))


def _learns(turn: dict[str, Any], number: int, learn: Any) -> bool:
    """True where neither the keys of the turn nor `learn`, of the record, say that the turn carries no loss."""
    if learn is None and _LOSS_KEYS.isdisjoint(turn):
        return True
    given = [turn[key] for key in LOSS_KEYS if turn.get(key) is not None] + ([] if learn is None else [learn])
    if any(value not in (0, 1) for value in given):
        raise ValueError(f"turn {number}: weight {given[0]!r} is neither 0 nor 1")
    return all(given)


def _read_extras(turn: dict[str, Any], number: int, role: str, learn: Any) -> Message:
    """A turn with thoughts or tool calls, or the answer of a tool."""
    name = f"turn {number} ({role})"
    calls, content = turn.get("tool_calls") or [], turn.get("content", turn.get("value"))
    if turn.get("role", turn.get("from")) == "function_call":
        calls, content = content, None
    calls = read_json(calls, f"{name}: its call")
    calls = [_tool_call(call, name) for call in (calls if isinstance(calls, list) else [calls])]
    thoughts = [turn[key] for key in _REASONING if turn.get(key)]
    if any(not isinstance(thought, str) for thought in thoughts) or len(set(thoughts)) > 1:
        raise ValueError(f"{name} has reasoning that is not one text")
    if role != "assistant" and (calls or thoughts):
        raise ValueError(f"{name} has {'tool_calls' if calls else 'reasoning'}, which only the assistant has")
    if not isinstance(content, str):
        content = "" if content is None and calls else _content(turn, name)
    learns = _learns(turn, number, learn)
    reasoning = thoughts[0] if thoughts else ""
    return Message(role, content, learns, reasoning, tuple(calls), str(turn.get("tool_call_id") or ""))


def read_json(value: Any, name: str) -> Any:
    """The value of a key that data sets hold as JSON or as a string of JSON; `ValueError` where the string is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is a string, but not JSON: {error}") from error


def _tool_call(call: Any, name: str) -> dict[str, Any]:
    """A call as chat templates expect it: `{"type": "function", "function": {"name", "arguments"}}`, the arguments as
    an object."""
    function = _function(call, f"{name} has a tool call")
    arguments = read_json(function.get("arguments") or {}, f"{name}: arguments")
    ids = {"id": call["id"]} if call.get("id") else {}
    return {**ids, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _function(item: Any, name: str) -> dict[str, Any]:
    function = item.get("function", item) if isinstance(item, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{name} without the name of a function")
    return function


def read_tools(record: dict[str, Any]) -> tuple[Any, ...]:
    """The tools of a record, a list or a string of JSON; empty where there are none.

    Raises:
        ValueError: they are not objects with the name of a function.
    """
    tools = _require_list(read_json(record.get("tools") or [], "tools"), "tools")
    return tuple({"type": "function", "function": _function(tool, "tools has an item")} for tool in tools)


def _role(turn: dict[str, Any], number: int) -> str:
    """The role of a turn whose name of it is not one of `ROLES` as it stands."""
    name = next((turn[key] for key in ("role", "from") if turn.get(key) is not None), None)
    if name is None:
        raise ValueError(f"turn {number} has neither role nor from; its keys: {_keys(turn)}")
    role = ROLES.get(str(name).strip().lower())
    if role is None:
        raise ValueError(f"turn {number}: role {str(name)!r} is not known. Known: {', '.join(ROLES)}")
    return role


def _keys(turn: dict[str, Any]) -> str:
    return ", ".join(str(key) for key, value in turn.items() if value is not None) or "none"


def _content(turn: dict[str, Any], name: str) -> str:
    """The text of a turn's content: a string, or a list of text parts."""
    content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
    if isinstance(content, str):
        return content
    if content is None:
        raise ValueError(f"{name} has no text; its keys: {_keys(turn)}")
    if not isinstance(content, list):
        raise ValueError(f"{name} has no text, but {type(content).__name__}")
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{name} has a part of type {kind!r}; only text can be trained")
        texts.append(text)
    return "".join(texts)
