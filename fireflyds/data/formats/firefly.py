"""Firefly: `conversation` of `human`/`assistant` pairs, with an optional `system`. XTuner: `input`/`output` pairs."""

from typing import Any

from fireflyds.data.read.turns import read_system
from fireflyds.types import Message, Sample

EXAMPLE = {"conversation_id": 1, "category": "chat", "conversation": [{"human": "你好", "assistant": "你好！"}]}
PAIRS = (("human", "assistant"), ("input", "output"))


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a list in `conversation`."""
    return isinstance(record.get("conversation"), list)


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record: in its pairs those of one of `PAIRS`."""
    pairs = {_pair(turn) or () for turn in record["conversation"]}
    keys = {"system", *(key for pair in pairs for key in pair)} if len(pairs) == 1 else {"system"}
    return frozenset({"conversation", "system", *(f"conversation[].{key}" for key in keys)})


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record.

    Raises:
        ValueError: it has no pair, or one without its two texts.
    """
    messages: list[Message] = []
    for number, turn in enumerate(record["conversation"], 1):
        pair = _pair(turn)
        if pair is None:
            raise ValueError(f"pair {number} of conversation has not the keys human and assistant")
        if turn.get("system"):
            if messages:
                raise ValueError(f"pair {number} of conversation has a system message; only the first may")
            messages += read_system(turn)
        messages += [Message("user", turn[pair[0]]), Message("assistant", turn[pair[1]])]
    if not messages:
        raise ValueError("the conversation is empty")
    return Sample(messages=(*read_system(record, messages), *messages))


def _pair(turn: Any) -> tuple[str, str] | None:
    return next((pair for pair in PAIRS if isinstance(turn, dict) and set(pair) <= turn.keys()), None)
