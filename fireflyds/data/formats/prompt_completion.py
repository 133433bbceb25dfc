"""Prompt and completion (OpenAI's older layout; also `prompt`/`response`, `query`/`response` with `history` of ChatGLM
and ms-swift, `input`/`target`), each a text, or turns (TRL)."""

from typing import Any

from fireflyds.data.read.turns import label_keys, read_history, read_label, read_system, read_turns, turn_keys
from fireflyds.types import Message, Sample

EXAMPLE = {"prompt": "中国的首都是哪里？", "completion": "北京。"}
PAIRS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("query", "response"),
    ("input", "target"),
    ("question", "answer"),
)


_ANSWERS = frozenset(pair[1] for pair in PAIRS)
_OTHERS = frozenset(("instruction", "messages", "conversations"))


def matches(record: dict[str, Any]) -> bool:
    """True where the record has the two fields of one of `PAIRS`, and no `instruction`."""
    if _ANSWERS.isdisjoint(record) or not _OTHERS.isdisjoint(record):
        return False
    return any(pair[0] in record and pair[1] in record for pair in PAIRS)


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record: those of one pair, `system` and `history`."""
    prompt, completion = _pair(record)
    history = turn_keys("history") if isinstance(record[prompt], str) else frozenset()
    return turn_keys(prompt, completion) | history | {"system"} | label_keys(record)


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record: system message, history, and the question with its answer.

    Raises:
        ValueError: one of the two fields is empty, `history` is neither pairs of strings nor turns.
    """
    prompt, completion = (record[key] for key in _pair(record))
    if not prompt or not completion:
        raise ValueError("prompt and completion must not be empty")
    if isinstance(prompt, list):
        answer = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
        messages = read_turns([*prompt, *answer])
    else:
        history = read_history(record.get("history"))
        messages = [*history, Message("user", prompt), Message("assistant", completion)]
    return Sample(messages=(*read_system(record, messages), *messages), label=read_label(record))


def _pair(record: dict[str, Any]) -> tuple[str, str]:
    return next(pair for pair in PAIRS if set(pair) <= record.keys())
