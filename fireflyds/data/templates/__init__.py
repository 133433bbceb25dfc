"""Chat templates, one per file. Its `CHAT` defines both the rendering in training and the equivalent Jinja template.

In the strings of a `Chat`, `{}` is replaced by the message, `{system}` by the rendered `system` (empty without a system
message) and `{round}` by the number of the turn, counted from 1. `BOS` and `EOS` are replaced by the tokens of the
tokenizer; `special` lists the other strings that are single tokens of the tokenizer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from fireflyds.data.rendering_checks import end_of_thought
from fireflyds.types import BOS, EOS, Message, Sample, Segment

_ORDER = "roles must be [system] user assistant user assistant …"


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """Format of a dialogue. Only the answers and the stop strings after them carry loss."""

    user: str
    """Format of a user turn."""
    opening: str = ""
    """Text before an answer, in training and in the generation prompt."""
    answer: str = "{}"
    stop: str = EOS
    after: str = ""
    """Text after `stop`, without loss."""
    begin: str = ""
    system: str = "{}\n"
    """Format of the system message, placed before the first turn, or at `{system}` in the first user turn."""
    default_system: str = ""
    special: tuple[str, ...] = ()
    learn_reasoning: bool = True
    context_turns: int = 0

    def render(self, sample: Sample) -> list[Segment]:
        """Renders a dialogue as segments.

        Raises:
            ValueError: the roles do not alternate, a turn is empty, or there are tools or separate thoughts.
        """
        _require_plain(sample)
        system, pairs = turns(sample.messages)
        segments: list[Segment] = []
        for number, (user, assistant) in enumerate(pairs, 1):
            segments += self._prompt(system, user, number) if number == 1 else self._next_prompt(user, number)
            segments += self._answer(assistant)
        return _joined([*segments, *self._cut(self.after, learn=False)])

    def prompt(self, sample: Sample) -> list[Segment]:
        """Renders a dialogue that ends with the turn of a user, up to where the answer begins."""
        segments = self.render(Sample(messages=(*sample.messages, Message("assistant", "x"))))
        return segments[: next(index for index, segment in enumerate(segments) if segment.learn)]

    def prompts(self, sample: Sample) -> list[list[Segment]]:
        """Renders, for every answer that carries loss, what stands before it where the dialogue begins at its turn:
        nothing for the first turn, where that stands in the dialogue itself.

        Raises:
            ValueError: the roles do not alternate, or a turn is empty.
        """
        system, pairs_of_turns = turns(sample.messages)
        pairs, prompts = list(pairs_of_turns), []
        for number, (_, assistant) in enumerate(pairs, 1):
            if assistant.learn:
                first = max(1, number - self.context_turns)
                prompts.append(self._beginning(system, pairs[first - 1 : number], first) if number > 1 else [])
        return prompts

    def _beginning(self, system: str, pairs: Sequence[tuple[str, Message]], number: int) -> list[Segment]:
        """The segments before the last answer of the turns from `number` on, where the dialogue begins there."""
        segments = self._prompt(system, pairs[0][0], number)
        for index, (user, _) in enumerate(pairs[1:], 1):
            segments += self._answer(replace(pairs[index - 1][1], learn=False))
            segments += self._next_prompt(user, number + index)
        return [*_joined(segments), *self._thought(pairs[-1][1])]

    def _answer(self, assistant: Message) -> list[Segment]:
        """The segments of an answer with its stop."""
        before, _, behind = self.answer.partition("{}")
        thought = self._thought(assistant)
        text = (before + assistant.content + behind).removeprefix("".join(part.text for part in thought))
        stop = (replace(part, separate=True) for part in self._cut(self.stop, learn=assistant.learn))
        return [*thought, Segment(text, learn=assistant.learn, separate=True), *stop]

    def _thought(self, assistant: Message) -> list[Segment]:
        """The beginning of an answer that carries no loss."""
        answer = "".join((self.answer.partition("{}")[0], assistant.content))
        thought = 0 if self.learn_reasoning else end_of_thought(answer, assistant)
        return [Segment(answer[:thought], separate=True)] if thought else []

    def _prompt(self, system: str, user: str, number: int) -> list[Segment]:
        """The segments of turn `number` before its answer where it is the first of the dialogue."""
        system_text = system or self.default_system
        head = list(self._filled(self.system, system_text)) if system_text else []
        before, system_here, rest = self.user.replace("{round}", str(number)).partition("{system}")
        segments = list(self._cut(self.begin, learn=False))
        segments += [*self._cut(before, learn=False), *head] if system_here else head
        segments += self._filled(rest if system_here else before, user)
        return [*segments, *self._cut(self.opening, learn=False)]

    def _next_prompt(self, user: str, number: int) -> list[Segment]:
        """The segments between two answers."""
        before, system_here, rest = self.user.replace("{round}", str(number)).partition("{system}")
        segments = list(self._cut(self.after, learn=False))
        segments += self._cut(before, learn=False) if system_here else []
        segments += self._filled(rest if system_here else before, user)
        return [*segments, *self._cut(self.opening, learn=False)]

    def _filled(self, text: str, message: str) -> Iterator[Segment]:
        """Yields the segments of a template string with a message inserted. Only the template string is searched for
        special tokens, never the message."""
        before, _, behind = text.partition("{}")
        yield from self._cut(before, learn=False)
        yield Segment(message)
        yield from self._cut(behind, learn=False)

    @property
    def jinja(self) -> str:
        """The equivalent Jinja template for `tokenizer.apply_chat_template`."""
        system, content = "system", "message['content']"
        head = f"({self._expression(self.system, system)} if system else '')"
        variables = {"{system}": f"({head} if loop.first else '')", "{round}": "(loop.index0 // 2 + 1)|string"}
        lead = self._expression(self.begin, content) + ("" if "{system}" in self.user else f" + {head}")
        answer = self._expression(self.opening + self.answer + self.stop + self.after, content)
        user = self._expression(self.user, content, variables)
        return (
            f"{{% set system = {_quoted(self.default_system)} %}}{{% set turns = messages %}}"
            "{% if messages and messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
            f"{{% set turns = messages[1:] %}}{{% endif %}}{{{{ {lead} }}}}"
            f"{{% for message in turns %}}{{% if message['role'] == 'user' %}}{{{{ {user} }}}}"
            f"{{% else %}}{{{{ {answer} }}}}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {self._expression(self.opening, content)} }}}}{{% endif %}}"
        )

    def _expression(self, text: str, content: str, variables: dict[str, str] | None = None) -> str:
        """Converts a template string to a Jinja expression."""
        names = {"{}": content, BOS: "bos_token", EOS: "eos_token"} | (variables or {})
        parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text)
        return " + ".join(names.get(part, _quoted(part)) for part in parts if part) or "''"

    def _cut(self, text: str, *, learn: bool) -> Iterator[Segment]:
        for part in re.split("(" + "|".join(map(re.escape, (BOS, EOS, *self.special))) + ")", text):
            if part:
                yield Segment(part, learn=learn, special=part in (BOS, EOS, *self.special))


def _require_plain(sample: Sample) -> None:
    """Raises `ValueError` for what only a template with tools and reasoning renders."""
    parts = {
        "tools": any((sample.tools, *(message.tool_calls or message.role == "tool" for message in sample.messages))),
        "reasoning_content": any(message.reasoning for message in sample.messages),
    }
    for name, present in parts.items():
        if present:
            raise ValueError(f"the template does not render {name}; template=tokenizer or qwen3 may")


def turns(messages: Sequence[Message]) -> tuple[str, Iterator[tuple[str, Message]]]:
    """Returns the system message (or an empty string) and the pairs of a user's text and its answer.

    Raises:
        ValueError: the roles do not alternate user, assistant, … after at most one system message.
    """
    begins = bool(messages) and messages[0].role == "system"
    system = messages[0].content if begins else ""
    turns = list(messages[1:] if begins else messages)
    for index, message in enumerate(turns):
        number, expected = index + 1 + begins, ("user", "assistant")[index % 2]
        if message.role != expected:
            roles = " ".join(message.role for message in messages)
            raise ValueError(f"{_ORDER}: turn {number} is {message.role}, not {expected}; got: {roles}")
        if not isinstance(message.content, str) or not message.content:
            raise ValueError(f"a turn is empty: turn {number} ({message.role})")
    if not turns or len(turns) % 2:
        raise ValueError(f"{_ORDER}: turn {len(messages)} has no answer" if turns else f"{_ORDER}: there is no turn")
    return system, ((turns[i].content, turns[i + 1]) for i in range(0, len(turns), 2))


def _joined(segments: Sequence[Segment]) -> list[Segment]:
    """Merges adjacent text segments without loss, so that they are encoded as one text."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if not segment.text:
            continue
        if last and not (last.special or last.separate or segment.special or segment.separate):
            joined[-1] = Segment(last.text + segment.text)
        else:
            joined.append(segment)
    return joined


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
