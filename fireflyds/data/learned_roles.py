"""Finds the turns of other roles than the assistant's in a rendered dialogue, where they are learned too."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fireflyds.data.chat_template import ChatTemplate
from fireflyds.types import Sample, Segment

Span = tuple[int, int]
# A character that stands in no template and in no text that people write (private use area);
# `answer_ranges` uses another.
_MARK = "\ue001"


def role_spans(
    chat: ChatTemplate,
    sample: Sample,
    roles: Sequence[str],
    encode: Callable[[Sequence[Segment]], np.ndarray],
) -> list[Span]:
    """Returns the spans of the tokens of every turn with one of `roles`, with the special tokens right behind it.

    The dialogue is rendered once more with another text in the place of the turn: what differs is the turn. A token
    that holds the beginning or the end of a turn and what stands beside it belongs to the span.

    Raises:
        ValueError: the template changes other parts of the dialogue with the text of the turn.
    """
    segments = chat.render(sample)
    text, input_ids = _text(segments), encode(segments)
    spans = []
    for number, message in enumerate(sample.messages):
        if message.role not in roles or not message.learn or not message.content:
            continue
        start, end = _range(chat, sample, number, text)
        end = _end_of_special(segments, end)
        first = _shared(input_ids, encode(_before(segments, start)))
        behind = encode(_behind(segments, end))
        spans.append((first, len(input_ids) - _shared(input_ids[first:][::-1], behind[::-1])))
    return spans


def _range(chat: ChatTemplate, sample: Sample, number: int, text: str) -> Span:
    """The range of the turn's text among the characters of the rendered dialogue."""
    messages = list(sample.messages)
    messages[number] = replace(messages[number], content=_MARK)
    marked = _text(chat.render(replace(sample, messages=tuple(messages))))
    start = marked.find(_MARK)
    end = len(text) - (len(marked) - start - 1)
    if marked.count(_MARK) != 1 or end <= start or marked != f"{text[:start]}{_MARK}{text[end:]}":
        raise ValueError(f"learn_roles: the chat template does not render turn {number + 1} in one place by itself")
    return start, end


def _text(segments: Sequence[Segment]) -> str:
    return "".join(segment.text for segment in segments)


def _end_of_special(segments: Sequence[Segment], end: int) -> int:
    """Moves the end of a turn behind the special tokens that follow it at once: they end the turn."""
    position = 0
    for segment in segments:
        if position == end and segment.special:
            end += len(segment.text)
        position += len(segment.text)
    return end


def _before(segments: Sequence[Segment], position: int) -> list[Segment]:
    """The segments of the first `position` characters."""
    kept: list[Segment] = []
    for segment in segments:
        if position <= 0:
            break
        kept.append(replace(segment, text=segment.text[:position]))
        position -= len(segment.text)
    return kept


def _behind(segments: Sequence[Segment], position: int) -> list[Segment]:
    """The segments without their first `position` characters."""
    kept: list[Segment] = []
    for segment in segments:
        if position < len(segment.text):
            kept.append(replace(segment, text=segment.text[max(0, position) :]))
        position -= len(segment.text)
    return kept


def _shared(one: np.ndarray, other: np.ndarray) -> int:
    """The number of equal elements at the beginning of both."""
    size = min(len(one), len(other))
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if len(different) else size
