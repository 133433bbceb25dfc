"""Alpaca: `instruction`, `input`, `output`; earlier turns as pairs in `history` (Stanford Alpaca; LLaMA-Factory)."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {
    "instruction": "翻译成英文",
    "input": "早上好",
    "output": "Good morning",
    "system": "你是翻译。",
    "history": [["你好", "你好！"]],
}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has this layout, and `instruction` is not a rendered BiLLa prompt."""
    instruction = record.get("instruction")
    rendered = isinstance(instruction, str) and instruction.startswith("Human: ")  # the BiLLa layout
    return "instruction" in record and "output" in record and not rendered


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record: system message, history, and the last pair.

    Raises:
        ValueError: `instruction` or `output` is empty.
    """
    user = "\n".join(filter(None, [record["instruction"], record.get("input")]))
    if not user or not record["output"]:
        raise ValueError("instruction and output must not be empty")
    messages = [Message("system", record["system"])] if record.get("system") else []
    for question, answer in record.get("history") or []:
        messages += [Message("user", question), Message("assistant", answer)]
    return Sample(messages=(*messages, Message("user", user), Message("assistant", record["output"])))
