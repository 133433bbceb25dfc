"""Chat templates in Jinja: a tokenizer's own, and those of recent models, with tools and reasoning.

A template is rendered as transformers renders it, in its sandbox. What an answer is stands in the template itself
(`{% generation %}`), or follows from its generation prompt and from what ends its last turn (`answer_ranges`).
"""

import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from fireflyds import registry
from fireflyds.data.answer_ranges import AnswerFinder
from fireflyds.data.rendering_checks import check_order, end_of_thought, require_complete
from fireflyds.errors import UserError
from fireflyds.types import BOS, EOS, Encoder, Message, Sample, Segment

TEMPLATES = "fireflyds.data.templates"
OWN = "tokenizer"
AUTO = "auto"
DATE = datetime.date(2025, 1, 1)
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")


class ChatTemplate(Protocol):
    """What data, samples and the export need of a chat template."""

    @property
    def jinja(self) -> str:
        """The template for `tokenizer.apply_chat_template`."""

    def render(self, sample: Sample) -> list[Segment]:
        """Renders a dialogue as segments. Raises `ValueError` where the template cannot."""

    def prompts(self, sample: Sample) -> list[list[Segment]]:
        """Renders, for every answer that carries loss, what stands before it where the dialogue begins at its turn:
        nothing for the first, where that stands in the dialogue itself."""

    def prompt(self, sample: Sample) -> list[Segment]:
        """Renders a dialogue that ends with the turn of a user, up to where the answer begins."""


def find_template(encoder: Encoder, name: str, *, learn_reasoning: bool = True, context_turns: int = 0) -> ChatTemplate:
    """Returns the chat template `name`: `tokenizer` is the own one of the encoder's directory.

    `learn_reasoning=False`: the thoughts at the beginning of answers carry no loss. `context_turns`: the number of
    turns that a dialogue repeats, without loss, where it goes on in another row.

    Raises:
        UserError: there is no such template, or the tokenizer has none.
    """
    name = resolve(encoder, name)
    if name != OWN:
        entry = registry.find(TEMPLATES, name, "template").CHAT
        chat: ChatTemplate = replace(entry, learn_reasoning=learn_reasoning, context_turns=context_turns)
        return chat
    if encoder.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template of its own",
            key="template",
            value=OWN,
            remedy=f"Give one of {', '.join(registry.names(TEMPLATES))}",
        )
    names = {"bos_token": encoder.bos_id, "eos_token": encoder.eos_id}
    defined = frozenset(key for key, index in names.items() if index is not None)
    return JinjaChat(
        encoder.chat_template,
        encoder.special_tokens(),
        defined,
        learn_reasoning=learn_reasoning,
        context_turns=context_turns,
    )


def resolve(encoder: Encoder, name: str) -> str:
    """Returns the name of a template, where `auto` is the tokenizer's own if it has one, else Firefly's."""
    if name != AUTO:
        return name
    return OWN if encoder.chat_template is not None else "firefly"


def template_key(encoder: Encoder, name: str) -> str:
    """Returns what the encoding of dialogues depends on: the name, and the text of a template that is not built in."""
    name = resolve(encoder, name)
    if name != OWN:
        return name
    return f"{OWN} {hashlib.sha256((encoder.chat_template or '').encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class JinjaChat:
    """A chat template in Jinja. `special`: strings that are single tokens; `defined`: the token names it may use.

    A template that writes the current date gets `DATE`: a row must give the same tokens on every day.
    """

    source: str
    special: tuple[str, ...] = ()
    defined: frozenset[str] = frozenset(("bos_token", "eos_token"))
    learn_reasoning: bool = True
    context_turns: int = 0
    stop: str = EOS
    """The token that ends an answer; it stands in `source`, too."""

    @property
    def jinja(self) -> str:
        """The template without `{% generation %}`, which only transformers knows."""
        return _GENERATION.sub("", self.source)

    def render(self, sample: Sample) -> list[Segment]:
        """Renders a dialogue as segments: an answer with its end token carries loss where its message does.

        Raises:
            ValueError: the template refuses the dialogue or leaves a part of it out, a message spells a special token,
                or the template renders a turn otherwise as soon as another follows.
        """
        check_order(sample.messages)
        self._check_texts(sample)
        text, blocks = self._rendered(sample)
        require_complete(sample, text)
        answers = self._answers(sample, text, blocks)
        return list(self._segments(text, answers))

    def prompts(self, sample: Sample) -> list[list[Segment]]:
        """See `ChatTemplate`."""
        messages, rendered = sample.messages, []
        system = messages[:1] if messages and messages[0].role == "system" else ()
        for index, message in enumerate(messages):
            if message.role != "assistant" or not message.learn:
                continue
            users = [number for number in range(index) if messages[number].role == "user"] or [index]
            start = users[max(0, len(users) - 1 - self.context_turns)]
            is_first = len(users) == 1
            beginning = replace(sample, messages=(*system, *messages[start : index + 1]))
            rendered.append([] if is_first else self._before(beginning))
        return rendered

    def prompt(self, sample: Sample) -> list[Segment]:
        """See `ChatTemplate`."""
        self._check_texts(sample)
        return list(self._segments(self.text(sample.messages, sample, prompt=True), []))

    def _before(self, sample: Sample) -> list[Segment]:
        """The segments before the last answer, with its thoughts where they carry no loss."""
        text, blocks = self._rendered(sample)
        start, end, message = self._answers(sample, text, blocks)[-1]
        thought = 0 if self.learn_reasoning else end_of_thought(text[start:end], message)
        return [*self._segments(text[:start], []), *self._cut(text[start : start + thought], separate=True)]

    def _check_texts(self, sample: Sample) -> None:
        for number, message in enumerate(sample.messages, 1):
            text = message.content + message.reasoning
            if token := next((token for token in self.special if token in text), None):
                raise ValueError(f"turn {number} ({message.role}) spells the special token {token}")

    def _rendered(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """The dialogue as text, with the ranges of `{% generation %}`."""
        if not _GENERATION.search(self.source):
            return self.text(sample.messages, sample), []
        text, blocks = self._call(sample.messages, sample, return_assistant_tokens_mask=True)
        return text[0], [(start, end) for start, end in blocks[0]]

    def text(self, messages: Sequence[Message], sample: Sample, *, prompt: bool = False, **variables: Any) -> str:
        """Returns messages rendered as text, with a generation prompt or without one."""
        text, _ = self._call(messages, sample, add_generation_prompt=prompt, **variables)
        return str(text[0])

    def _call(self, messages: Sequence[Message], sample: Sample, **variables: Any) -> Any:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        tokens = {name: value for name, value in (("bos_token", BOS), ("eos_token", EOS)) if name in self.defined}
        variables |= tokens | {"chat_template": self.source, "strftime_now": DATE.strftime}
        rows = [_as_dict(message) for message in messages]
        try:
            try:
                return render_jinja_template([rows], tools=list(sample.tools) or None, **variables)
            except TypeError:  # older templates take the arguments of a call as a string
                rows = [_with_string_arguments(row) for row in rows]
                return render_jinja_template([rows], tools=list(sample.tools) or None, **variables)
        except (jinja2.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses the dialogue: {error}") from error

    def _answers(self, sample: Sample, text: str, blocks: list[tuple[int, int]]) -> list[tuple[int, int, Message]]:
        """The range of every answer in the text, with its end token."""
        indices = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
        if blocks:
            if len(blocks) != len(indices):
                raise ValueError(f"the chat template marks {len(blocks)} answers of {len(indices)}")
            return [(*block, sample.messages[index]) for block, index in zip(blocks, indices, strict=True)]
        found = _finder(self).ranges(sample, text)
        return [(start, end, sample.messages[index]) for (start, end), index in zip(found, indices, strict=True)]

    def _segments(self, text: str, answers: Sequence[tuple[int, int, Message]]) -> Iterator[Segment]:
        """Cuts the text at special tokens and at the bounds of answers."""
        position = 0
        for start, end, message in answers:
            yield from self._cut(text[position:start])
            thought = 0 if self.learn_reasoning else end_of_thought(text[start:end], message)
            yield from self._cut(text[start : start + thought], separate=True)
            yield from self._cut(text[start + thought : end], learn=message.learn, separate=True)
            position = end
        yield from self._cut(text[position:])

    def _cut(self, text: str, *, learn: bool = False, separate: bool = False) -> Iterator[Segment]:
        tokens = (BOS, EOS, *sorted(self.special, key=len, reverse=True))
        for part in re.split("(" + "|".join(map(re.escape, tokens)) + ")", text):
            if part:
                yield Segment(part, learn=learn, special=part in tokens, separate=separate)


@functools.lru_cache(maxsize=8)
def _finder(chat: JinjaChat) -> AnswerFinder:
    return AnswerFinder(
        lambda messages, sample, prompt, thinks: chat.text(
            messages, sample, prompt=prompt, **({} if thinks is None else {"enable_thinking": thinks})
        ),
        chat.special,
    )


def _as_dict(message: Message) -> dict[str, Any]:
    """A message with the keys that templates know; reasoning has several names."""
    row: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        row |= dict.fromkeys(("reasoning_content", "reasoning", "thinking"), message.reasoning)
    if message.tool_calls:
        row["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id:
        row["tool_call_id"] = message.tool_call_id
    return row


def _with_string_arguments(row: dict[str, Any]) -> dict[str, Any]:
    calls = [
        call
        | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in row.get("tool_calls", [])
    ]
    return row | ({"tool_calls": calls} if calls else {})
