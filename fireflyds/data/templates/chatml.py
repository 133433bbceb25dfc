"""ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n` (OpenAI; Qwen, Yi, InternLM2)."""

from collections.abc import Sequence

from fireflyds.data.templates import turns
from fireflyds.types import Message, Segment

STOP = "<|im_end|>"

JINJA = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def render(messages: Sequence[Message]) -> list[Segment]:
    turns(messages)  # checks the order of the roles
    segments = []
    for message in messages:
        learn = message.role == "assistant"
        segments += [
            Segment("<|im_start|>", special=True),
            Segment(f"{message.role}\n"),
            Segment(message.content, learn=learn),
            Segment(STOP, special=True, learn=learn),
            Segment("\n"),
        ]
    return segments
