"""Firefly's chat format: `<s>u1</s>a1</s>u2</s>a2</s>`, no role words; a system message precedes the first turn."""

from collections.abc import Sequence

from fireflyds.data.templates import turns
from fireflyds.types import BOS, EOS, Message, Segment

STOP = EOS

JINJA = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}{{ '\\n' }}"
    "{% else %}{{ message['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def render(messages: Sequence[Message]) -> list[Segment]:
    system, pairs = turns(messages)
    segments = [Segment(BOS, special=True)]
    for user, assistant in pairs:
        segments += [
            Segment(f"{system}\n{user}" if system else user),
            Segment(EOS, special=True),
            Segment(assistant, learn=True),
            Segment(STOP, special=True, learn=True),
        ]
        system = ""
    return segments
