"""Checks of dialogues before and after a chat template renders them: orders of roles, and parts that it leaves out."""

import re
from collections.abc import Sequence

from fireflyds.data.answer_ranges import THINK_END, has_thoughts, thought_of
from fireflyds.types import Message, Sample, Segment

_ORDER = "roles must be [system] user assistant [tool assistant] user assistant …"


def check_order(messages: Sequence[Message]) -> None:
    """Raises `ValueError` where the turns are not `[system] user assistant [tool assistant] user …`."""
    previous = "system"
    allowed = {"system": ("user",), "user": ("assistant",), "assistant": ("user",), "tool": ("tool", "assistant")}
    for number, message in enumerate(messages, 1):
        expected = allowed[previous] if number > 1 or message.role != "system" else ("system",)
        if message.role not in expected and not (previous == "assistant" and message.role == "tool"):
            raise ValueError(f"{_ORDER}: turn {number} is {message.role}, not {' or '.join(expected)}")
        if not message.content and not message.tool_calls and message.role != "tool":
            raise ValueError(f"a turn is empty: turn {number} ({message.role})")
        previous = message.role
    if not messages or previous != "assistant":
        raise ValueError(f"{_ORDER}: turn {len(messages)} has no answer" if messages else f"{_ORDER}: there is no turn")


def require_complete(sample: Sample, text: str) -> None:
    """Raises `ValueError` where the rendering lacks a turn, a tool or the last thought."""
    answers = [message for message in sample.messages if message.role == "assistant"]
    for number, message in enumerate(sample.messages, 1):
        if message.content.rpartition(THINK_END)[2].strip() not in text:
            raise ValueError(f"the chat template leaves out turn {number} ({message.role})")
        calls = [call.get("function", call).get("name", "") for call in message.tool_calls]
        if missing := [name for name in calls if name not in text]:
            raise ValueError(f"the chat template leaves out the tool call {missing[0]} of turn {number}")
    for tool in sample.tools:
        if str(tool.get("function", tool).get("name", "")) not in text:
            raise ValueError("the chat template does not render tools")
    if answers and answers[-1].reasoning.strip() not in text:
        raise ValueError("the chat template does not render reasoning_content")


def left_out_thoughts(sample: Sample, segments: Sequence[Segment]) -> int:
    """Returns the number of earlier answers whose thoughts the template leaves out, as the models' makers do."""
    thoughts = [
        thought_of(message) for message in sample.messages if message.role == "assistant" and has_thoughts(message)
    ]
    text = "".join(segment.text for segment in segments) if thoughts else ""
    return sum(bool(thought) and thought not in text for thought in thoughts)


def end_of_thought(answer: str, message: Message) -> int:
    """Returns the length of the thought at the beginning of a rendered answer, with its closing tag; 0 without one."""
    content = message.content.rpartition(THINK_END)[2].strip()
    thought = thought_of(message)
    at = answer.find(thought) if thought else -1
    if at < 0:
        return 0
    behind = answer.find(content, at + len(thought)) if content else -1
    closing = re.compile(rf"\s*{THINK_END}\s*").match(answer, at + len(thought))
    return behind if behind >= 0 else closing.end() if closing else at + len(thought)
