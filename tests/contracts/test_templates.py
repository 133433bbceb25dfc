"""Every chat template keeps the contract of its folder: our rendering is its Jinja's, and the stop is learnt."""

import jinja2
import pytest

from fireflyds import registry
from fireflyds.types import BOS, EOS, Message

TEMPLATES = "fireflyds.data.templates"
TALK = (
    Message("user", "你好"), Message("assistant", "你好！"), Message("user", "1+1=?"), Message("assistant", "2"),
)  # fmt: skip
SYSTEM = (Message("system", "你是助手。"), *TALK)


def _text(name: str, messages: tuple[Message, ...]) -> str:
    segments = registry.find(TEMPLATES, name).render(messages)
    return "".join(segment.text for segment in segments).replace(BOS, "<s>").replace(EOS, "</s>")


def _jinja(name: str, messages: tuple[Message, ...], *, prompt: bool) -> str:
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        registry.find(TEMPLATES, name).JINJA
    )
    rows = [{"role": message.role, "content": message.content} for message in messages]
    return template.render(messages=rows, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt)


@pytest.mark.parametrize("messages", [TALK, SYSTEM, TALK[:2]])
@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_jinja_renders_the_same_text(name: str, messages: tuple[Message, ...]) -> None:
    assert _text(name, messages) == _jinja(name, messages, prompt=False)


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_generation_prompt_is_the_beginning_of_the_full_dialogue(name: str) -> None:
    prompt = _jinja(name, SYSTEM[:-1], prompt=True)
    whole = _text(name, SYSTEM)
    assert whole.startswith(prompt)
    assert whole[len(prompt) :].lstrip(" ").startswith("2")


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_every_answer_and_its_stop_are_learnt_and_nothing_else(name: str) -> None:
    template = registry.find(TEMPLATES, name)
    learnt = [segment.text.strip(" ") for segment in template.render(SYSTEM) if segment.learn]
    assert learnt == ["你好！", template.STOP, "2", template.STOP]


@pytest.mark.parametrize("messages", [TALK[1:], TALK[:1], (TALK[0], TALK[0]), (), (Message("user", ""), TALK[1])])
@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_broken_order_of_roles_is_refused(name: str, messages: tuple[Message, ...]) -> None:
    with pytest.raises(ValueError, match="roles|empty"):
        registry.find(TEMPLATES, name).render(messages)
