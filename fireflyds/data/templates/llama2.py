"""LLaMA-2 chat as Meta defines it: BOS before every turn, the system message inside the first `[INST]`."""

from collections.abc import Sequence

from fireflyds.data.templates import turns
from fireflyds.types import BOS, EOS, Message, Segment

STOP = EOS

JINJA = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}"
    "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)


def render(messages: Sequence[Message]) -> list[Segment]:
    system, pairs = turns(messages)
    segments = []
    head = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system else ""
    for user, assistant in pairs:
        segments += [
            Segment(BOS, special=True),
            Segment(f"[INST] {head}{user} [/INST]"),
            Segment(f" {assistant} ", learn=True),
            Segment(STOP, special=True, learn=True),
        ]
        head = ""
    return segments
