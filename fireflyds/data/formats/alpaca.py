"""Alpaca: `instruction`, `input`, `output`; earlier turns in `history` (Stanford Alpaca; LLaMA-Factory). Dolly:
`instruction`, `context`, `response`."""

from typing import Any

from fireflyds.data.read.turns import read_history, read_system, turn_keys
from fireflyds.types import Message, Sample

EXAMPLE = {
    "instruction": "翻译成英文",
    "input": "早上好",
    "output": "Good morning",
    "system": "你是翻译。",
    "history": [["你好", "你好！"]],
}
_READS = turn_keys("history") | {"instruction", "input", "context", "system"}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has this layout, and `instruction` is not a rendered BiLLa prompt."""
    instruction = record.get("instruction")
    rendered = isinstance(instruction, str) and instruction.startswith("Human: ")  # the BiLLa layout
    return "instruction" in record and ("output" in record) != ("response" in record) and not rendered


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    return _READS | {"output" if "output" in record else "response"}


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record: system message, history, and the last pair.

    Raises:
        ValueError: `instruction` or `output` is empty, or `history` is neither pairs of strings nor turns.
    """
    parts = [record.get(key) for key in ("instruction", "input", "context")]
    user = "\n".join(part for part in parts if part not in (None, ""))
    answer = record.get("output", record.get("response"))
    if not user or not answer:
        raise ValueError("instruction and output must not be empty")
    history = read_history(record.get("history"))
    messages = [*read_system(record, history), *history]
    return Sample(messages=(*messages, Message("user", user), Message("assistant", answer)))
