"""Finds the answers in a dialogue that a Jinja chat template without `{% generation %}` has rendered.

The header of an answer is what the template appends as a generation prompt. An answer ends with the special tokens that
stand behind it where it is the last turn.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from fireflyds.types import BOS, EOS, Message, Sample

Range = tuple[int, int]
# Renders the first messages of a sample, with a generation prompt or without one, for an answer with thoughts or
# not (None: what is usual).
Render = Callable[[Sequence[Message], Sample, bool, bool | None], str]
THINK_END = "</think>"
_UNUSUAL = "\ue000"


def has_thoughts(message: Message) -> bool:
    """True where a message has thoughts of its own or in its text."""
    return bool(message.reasoning) or THINK_END in message.content


def thought_of(message: Message) -> str:
    """Returns the thoughts of a message, without tags; empty where it has none."""
    return message.reasoning.strip() or message.content.rpartition(THINK_END)[0].rpartition("<think>")[2].strip()


class AnswerFinder:
    """Finds answers in the renderings of one template. Headers are cached: they depend on little of the dialogue."""

    def __init__(self, render: Render, special: Sequence[str]) -> None:
        self._render = render
        tokens = "|".join(map(re.escape, sorted((*special, BOS, EOS), key=len, reverse=True)))
        self._token = re.compile(tokens)
        self._trailing = re.compile(rf"(?:(?:{tokens})\s*)+$")
        self._headers: dict[tuple[str, bool, bool], tuple[str, str]] = {}

    def ranges(self, sample: Sample, text: str) -> list[Range]:
        """Returns the range of every answer in the rendered dialogue, with its end token.

        Raises:
            ValueError: an answer does not stand where the template's own generation prompt would put it.
        """
        indices = [index for index, message in enumerate(sample.messages) if message.role == "assistant"]
        headers, position = [], 0
        for index in indices:
            begin, start = self._header_range(sample, text, index, position)
            headers.append((begin, start))
            position = start
        bounds = [*(begin for begin, _ in headers[1:]), len(text)]
        return [
            (start, self._end(sample, text, index, start, bound))
            for index, (_, start), bound in zip(indices, headers, bounds, strict=True)
        ]

    def _header_range(self, sample: Sample, text: str, index: int, position: int) -> Range:
        base, whole = self._header(sample, index)
        if not base:
            return self._difference(sample, text, index)
        begin = text.find(base, position)
        if begin < 0:
            raise ValueError(f"the chat template does not put its generation prompt before turn {index + 1}")
        return begin, begin + len(whole if text.startswith(whole, begin) else base)

    def _header(self, sample: Sample, index: int) -> tuple[str, str]:
        """What every answer begins with, and the whole generation prompt before this one (which may open a thought)."""
        before, thinks = sample.messages[:index], has_thoughts(sample.messages[index])
        key = (before[-1].role if before else "", bool(sample.tools), thinks)
        if key not in self._headers:
            other, whole = self._prompt(before, sample, None), self._prompt(before, sample, thinks)
            answer = replace(sample.messages[index], content=_UNUSUAL, reasoning="", tool_calls=())
            history = self._render((*before, answer, Message("user", "1")), sample, False, None)
            at = history.rfind(shared := self._shared(other, whole), 0, history.find(_UNUSUAL))
            shared = self._shared(shared, history[at:]) if at >= 0 else shared
            while shared and shared not in history:  # the prompt opens what earlier answers do not have
                shared = shared[: self._cut_back(shared, len(shared) - 1)]
            self._headers[key] = (shared, whole)
        return self._headers[key]

    def _prompt(self, before: Sequence[Message], sample: Sample, thinks: bool | None) -> str:
        """The generation prompt behind the messages before an answer."""
        plain = self._render(before, sample, False, thinks) if before else ""
        prompt = self._render(before, sample, True, thinks)
        return prompt[len(self._shared(plain, prompt)) :]

    def _shared(self, one: str, other: str) -> str:
        """The common beginning, up to a special token or the end of a line where it is not one of the two."""
        shared = _shared_beginning([one, other])
        return shared if shared in (one, other) else shared[: self._cut_back(one, len(shared))]

    def _cut_back(self, text: str, length: int) -> int:
        """The end of the last special token or line in the first `length` characters of the text."""
        ends = [match.end() for match in self._token.finditer(text) if match.end() <= length]
        return max([*ends, text.rfind("\n", 0, length) + 1, 0])

    def _difference(self, sample: Sample, text: str, index: int) -> Range:
        """Where the text changes with the answer, for a template that appends no generation prompt."""
        changed = replace(sample.messages[index], content=_UNUSUAL, reasoning="", tool_calls=())
        messages = [*sample.messages[:index], changed, *sample.messages[index + 1 :]]
        start = len(_shared_beginning([self._render(messages, sample, False, None), text]))
        return start, start

    def _end(self, sample: Sample, text: str, index: int, start: int, bound: int) -> int:
        """The end of an answer: behind its end tokens, or behind its text where it has none."""
        message = sample.messages[index]
        alone = self._render(sample.messages[: index + 1], sample, False, None)
        trailing = self._trailing.search(alone)
        stops = self._token.findall(trailing.group()) if trailing else []
        if message.tool_calls:  # those before the last one may close the call
            stops = stops[-1:]
        behind = self._end_of_text(message, alone, text[start:bound])
        if behind < 0:
            raise ValueError(f"the chat template does not render turn {index + 1} where its answer stands")
        behind += start
        if not stops:  # the token that begins the next turn ends an answer (GLM)
            end = self._end_of_calls(alone, text, index, sample, start) if message.tool_calls else behind
            following = self._token.match(text, end)
            return following.end() if following else end
        end = text.find(stops[0], behind, bound)
        if end < 0:  # the token is another where a turn follows (gpt-oss)
            return behind if not message.tool_calls else len(text[:bound].rstrip())
        for stop in stops:
            at = end + len(text[end:]) - len(text[end:].lstrip())
            if not text.startswith(stop, at):
                break
            end = at + len(stop)
        return end

    def _end_of_text(self, message: Message, alone: str, answer: str) -> int:
        """The end of the message's text in the rendered answer and what follows; -1 where it is not there."""
        content = message.content.rpartition(THINK_END)[2].strip()
        if not content:
            return 0
        # With the special token before it, as it stands in the rendering of the answer as the last turn, if it does.
        at = max(alone.rfind(content), 0)
        before = max((match.start() for match in self._token.finditer(alone, 0, at)), default=at)
        position = answer.find(alone[before : at + len(content)])
        if before < at and position >= 0:
            return position + at - before + len(content)
        position = self._token.sub(lambda match: "\0" * len(match.group()), answer).find(content)
        return position + len(content) if position >= 0 else -1

    def _end_of_calls(self, alone: str, text: str, index: int, sample: Sample, start: int) -> int:
        """The end of an answer with tool calls but without an end token: it is rendered as it is as the last turn."""
        base, _ = self._header(sample, index)
        answer = alone[alone.rfind(base) + len(base) :] if base else ""
        if not answer or not text.startswith(answer, text.rfind(base, 0, start) + len(base)):
            raise ValueError(f"the chat template renders the tool calls of turn {index + 1} otherwise in the middle")
        return text.rfind(base, 0, start) + len(base) + len(answer)


def _shared_beginning(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)
    return first[: next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
