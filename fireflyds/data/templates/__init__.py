"""Chat templates. One file is one template: `render(messages)`, `STOP`, `JINJA`."""

from collections.abc import Iterator, Sequence

from fireflyds.types import Message


def turns(messages: Sequence[Message]) -> tuple[str, Iterator[tuple[str, str]]]:
    """The system message (or nothing) and the (user, assistant) pairs of a dialogue.

    Raises:
        ValueError: the roles do not alternate user, assistant, … after at most one system message.
    """
    system = messages[0].content if messages and messages[0].role == "system" else ""
    rest = list(messages[1:] if system else messages)
    expected = ["user", "assistant"] * (len(rest) // 2)
    if not rest or [message.role for message in rest] != expected:
        found = " ".join(message.role for message in messages)
        raise ValueError(f"roles must be [system] user assistant user assistant …, got: {found}")
    if any(not isinstance(message.content, str) or not message.content for message in messages):
        raise ValueError("a turn is empty")
    return system, ((rest[i].content, rest[i + 1].content) for i in range(0, len(rest), 2))
