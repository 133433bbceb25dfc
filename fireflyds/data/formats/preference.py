"""Preference pairs: a prompt or dialogue with the answers `chosen` and `rejected`, each a text, a turn or turns (TRL;
LLaMA-Factory). With `preference=chosen` the rejected answer is counted as not read."""

from typing import Any

from fireflyds.data.read.turns import ROLES, TURN_KEYS, read_history, read_system, read_turns, turn_keys
from fireflyds.types import Message, Sample

EXAMPLE = {"prompt": "一加一等于几？", "chosen": "二。", "rejected": "三。"}
DIALOGUES = ("conversations", "messages", "prompt")
_QUESTION = ("prompt", "query", "question", "instruction")
PASSES_OVER = frozenset({"rejected"})


def matches(record: dict[str, Any]) -> bool:
    """True where the record has the two answers of a pair."""
    return "chosen" in record and "rejected" in record


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    dialogue = _dialogue(record)
    prompt = turn_keys(dialogue) if dialogue else turn_keys("history") | _question_keys(record)
    if isinstance(record["chosen"], list) and _is_whole(record["chosen"]):
        prompt = turn_keys(*(key for key in DIALOGUES if isinstance(record.get(key), list))) | {"prompt"}
    return prompt | turn_keys("chosen") | {"system", *(f"chosen.{key}" for key in TURN_KEYS)}


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record with its chosen answer, and with its rejected one where that can be read.

    Raises:
        ValueError: the prompt or the chosen answer is missing, is not text with known roles, or `chosen` is a whole
            dialogue that does not begin with the prompt.
    """
    chosen = _with_answer(record, "chosen")
    try:
        rejected = tuple(_with_answer(record, "rejected"))
    except (ValueError, TypeError, AttributeError):
        rejected = ()
    return Sample(messages=tuple(chosen), rejected=rejected)


def _with_answer(record: dict[str, Any], key: str) -> list[Message]:
    """The dialogue with the answer that `key` holds."""
    given = record[key]
    answer = {"role": "assistant", "content": given} if isinstance(given, str) else given
    turns = [answer] if isinstance(answer, dict) else answer
    dialogue = _dialogue(record)
    if isinstance(turns, list) and _is_whole(turns):
        messages = _whole_dialogue(record, turns, key)
    elif dialogue:
        messages = read_turns([*record[dialogue], *turns])
    else:
        messages = [*read_history(record.get("history")), *_question(record), *read_turns(turns)]
    return [*read_system(record, messages), *messages]


def _is_whole(turns: list[Any]) -> bool:
    """True where the turns of `chosen` hold the user's too, so that they are the whole dialogue (UltraFeedback)."""
    names = (turn.get("role", turn.get("from")) for turn in turns if isinstance(turn, dict))
    return any(isinstance(name, str) and ROLES.get(name.strip().lower()) == "user" for name in names)


def _whole_dialogue(record: dict[str, Any], turns: list[Any], name: str) -> list[Message]:
    for key in DIALOGUES:
        given = record.get(key)
        if isinstance(given, list) and given != turns[: len(given)]:
            raise ValueError(f"{name} is a dialogue that does not begin with the turns of {key}")
    messages = read_turns(turns)
    prompt = record.get("prompt")
    questions = [message.content.strip() for message in messages if message.role == "user"]
    if isinstance(prompt, str) and prompt.strip() not in questions:
        raise ValueError(f"{name} is a dialogue without the text of prompt")
    return messages


def _dialogue(record: dict[str, Any]) -> str | None:
    """The first key with the turns before the answer, or None."""
    return next((key for key in DIALOGUES if isinstance(record.get(key), list)), None)


def _question_keys(record: dict[str, Any]) -> set[str]:
    """The key of the question, and `input` beside `instruction`."""
    key = next((key for key in _QUESTION if record.get(key)), "")
    return {key, "input"} if key == "instruction" else {key}


def _question(record: dict[str, Any]) -> list[Message]:
    keys = _question_keys(record)
    text = "\n".join(
        record[key] for key in ("instruction", *sorted(keys - {"instruction"})) if key in keys and record.get(key)
    )
    return [Message("user", text)] if text else []
