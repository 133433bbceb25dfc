"""Vicuna 1.1: `USER: … ASSISTANT: …</s>` after an optional system line (FastChat)."""

from collections.abc import Sequence

from fireflyds.data.templates import turns
from fireflyds.types import BOS, EOS, Message, Segment

STOP = EOS

JINJA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + ' ASSISTANT:' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def render(messages: Sequence[Message]) -> list[Segment]:
    system, pairs = turns(messages)
    segments = [Segment(BOS, special=True)]
    head = f"{system} " if system else ""
    for user, assistant in pairs:
        segments += [
            Segment(f"{head}USER: {user} ASSISTANT:"),
            Segment(f" {assistant}", learn=True),
            Segment(STOP, special=True, learn=True),
        ]
        head = ""
    return segments
