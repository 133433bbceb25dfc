"""Preference pairs: a prompt or dialogue with the answers `chosen` and `rejected`, each a text, a turn or turns (TRL;
LLaMA-Factory). The chosen answer is read; the rejected one is counted as not read."""

from typing import Any

from fireflyds.data.read.turns import TURN_KEYS, read_history, read_system, read_turns, turn_keys
from fireflyds.types import Message, Sample

EXAMPLE = {"prompt": "一加一等于几？", "chosen": "二。", "rejected": "三。"}
DIALOGUES = ("conversations", "messages", "prompt")
_QUESTION = ("prompt", "query", "question", "instruction", "input")
PASSES_OVER = frozenset({"rejected"})


def matches(record: dict[str, Any]) -> bool:
    """True where the record has the two answers of a pair."""
    return "chosen" in record and "rejected" in record


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    dialogue = _dialogue(record)
    prompt = turn_keys(dialogue) if dialogue else turn_keys("history") | {*_QUESTION}
    return prompt | turn_keys("chosen") | {"system", *(f"chosen.{key}" for key in TURN_KEYS)}


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record with its chosen answer.

    Raises:
        ValueError: the prompt or the chosen answer is missing, or is not text with known roles.
    """
    chosen = record["chosen"]
    answer = {"role": "assistant", "content": chosen} if isinstance(chosen, str) else chosen
    turns = [answer] if isinstance(answer, dict) else answer
    dialogue = _dialogue(record)
    if dialogue:
        messages = read_turns([*record[dialogue], *turns])
    else:
        messages = [*read_history(record.get("history")), *_question(record), *read_turns(turns)]
    return Sample(messages=(*read_system(record, messages), *messages))


def _dialogue(record: dict[str, Any]) -> str | None:
    """The first key with the turns before the answer, or None."""
    return next((key for key in DIALOGUES if isinstance(record.get(key), list)), None)


def _question(record: dict[str, Any]) -> list[Message]:
    text = "\n".join(record[key] for key in _QUESTION if record.get(key))
    return [Message("user", text)] if text else []
