"""Every chat template renders the same text as its Jinja template, and its stop token is part of the loss."""

import re
from dataclasses import replace

import jinja2
import pytest

from fireflyds import registry
from fireflyds.data.chat_template import DATE
from fireflyds.types import BOS, EOS, Message, Sample

TEMPLATES = "fireflyds.data.templates"
DIALOGUE = (
    Message("user", "你好"),
    Message("assistant", "你好！"),
    Message("user", "1+1=?"),
    Message("assistant", "2"),
)
# Templates with thoughts before answers.
THINKING = ("qwen3", "deepseek_r1", "gpt_oss")
SYSTEM_DIALOGUE = (Message("system", "你是助手。"), *DIALOGUE)


def _rendered(name: str, messages: tuple[Message, ...]) -> str:
    segments = registry.load(TEMPLATES, name).CHAT.render(Sample(messages=tuple(messages)))
    return "".join(segment.text for segment in segments).replace(BOS, "<s>").replace(EOS, "</s>")


def _jinja_rendered(name: str, messages: tuple[Message, ...], *, prompt: bool) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["strftime_now"] = DATE.strftime
    template = environment.from_string(registry.load(TEMPLATES, name).CHAT.jinja)
    rows = [{"role": message.role, "content": message.content} for message in messages]
    return template.render(messages=rows, bos_token="<s>", eos_token="</s>", add_generation_prompt=prompt)


@pytest.mark.parametrize("messages", [DIALOGUE, SYSTEM_DIALOGUE, DIALOGUE[:2]])
@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_jinja_renders_the_same_text(name: str, messages: tuple[Message, ...]) -> None:
    assert _rendered(name, messages) == _jinja_rendered(name, messages, prompt=False)


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_generation_prompt_is_the_beginning_of_the_full_dialogue(name: str) -> None:
    """Where a generation prompt opens a thought, that of an answer with a thought."""
    answer = Message("assistant", "2", reasoning="加" if name in THINKING else "")
    messages = (*SYSTEM_DIALOGUE[:-1], answer)
    prompt = _jinja_rendered(name, messages[:-1], prompt=True)
    dialogue = _rendered(name, messages)
    assert dialogue.startswith(prompt)
    assert re.match(
        r"(<think>\n|<\|channel\|>\w+<\|message\|>)?" + (answer.reasoning or "2"), dialogue[len(prompt) :].lstrip()
    )


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_the_loss_is_on_every_answer_and_its_stop_alone(name: str) -> None:
    chat = registry.load(TEMPLATES, name).CHAT
    segments = chat.render(Sample(messages=SYSTEM_DIALOGUE))
    learned = "".join(segment.text for segment in segments if segment.learn)
    # Only the last answer of gpt-oss ends a generation; its channel is part of an answer.
    first_stop = "" if name == "gpt_oss" else chat.stop
    assert re.sub(r"<\|channel\|>final<\|message\|>|\s", "", learned) == f"你好！{first_stop}2{chat.stop}"


@pytest.mark.parametrize(
    "messages", [DIALOGUE[1:], DIALOGUE[:1], (DIALOGUE[0], DIALOGUE[0]), (), (Message("user", ""), DIALOGUE[1])]
)
@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_invalid_orders_of_roles_are_refused(name: str, messages: tuple[Message, ...]) -> None:
    with pytest.raises(ValueError, match="roles must be|turn is empty: turn 1"):
        registry.load(TEMPLATES, name).CHAT.render(Sample(messages=tuple(messages)))


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
@pytest.mark.parametrize("system", [(), SYSTEM_DIALOGUE[:1]])
def test_the_prompt_of_a_later_turn_is_that_of_a_dialogue_which_begins_there(
    name: str, system: tuple[Message, ...]
) -> None:
    chat = registry.load(TEMPLATES, name).CHAT
    first, second = chat.prompts(Sample(messages=(*system, *DIALOGUE)))
    assert first == []
    alone = chat.render(Sample(messages=(*system, *DIALOGUE[2:])))
    expected = alone[: next(index for index, segment in enumerate(alone) if segment.learn)]
    # The number of the turn is kept where a template counts the turns.
    assert [(segment.text.replace("2", "1"), segment.special) for segment in second] == [
        (segment.text.replace("2", "1"), segment.special) for segment in expected
    ]
    unlearned = Sample(messages=(DIALOGUE[0], replace(DIALOGUE[1], learn=False), *DIALOGUE[2:]))
    assert chat.prompts(unlearned) == [chat.prompts(Sample(messages=DIALOGUE))[1]]


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_a_dialogue_that_goes_on_may_repeat_turns_without_loss(name: str) -> None:
    chat = replace(registry.load(TEMPLATES, name).CHAT, context_turns=1)
    longer = Sample(messages=(*SYSTEM_DIALOGUE, Message("user", "再见"), Message("assistant", "好走。")))
    first, second, third = chat.prompts(longer)
    assert first == []
    # The prompt of the second turn is all that stands before its answer.
    whole = "".join(segment.text for segment in chat.render(longer))
    beginning = "".join(segment.text for segment in second)
    # Of Mistral's later templates and Qwen3's, the last turn is rendered in a way of its own.
    assert whole.startswith(beginning) or name in ("mistral_v3", "mistral_tekken", "qwen3")
    assert "1+1=?" in beginning
    assert "你好！" in beginning
    assert not any(segment.learn for segment in (*second, *third))
    text = "".join(segment.text for segment in third)
    assert "你是助手。" in text
    assert "1+1=?" in text
    assert "你好！" not in text
    assert "再见" in text
    assert "好走" not in text


@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_an_answer_without_loss_is_rendered_alike_and_not_learned(name: str) -> None:
    chat = registry.load(TEMPLATES, name).CHAT
    messages = [replace(message, learn=message is not SYSTEM_DIALOGUE[2]) for message in SYSTEM_DIALOGUE]
    segments = chat.render(Sample(messages=tuple(messages)))
    assert "".join(segment.text for segment in segments) == "".join(
        segment.text for segment in chat.render(Sample(messages=SYSTEM_DIALOGUE))
    )
    assert [segment.text.strip() for segment in segments if segment.learn][-2:] == ["2", chat.stop]
    assert "你好！" not in "".join(segment.text for segment in segments if segment.learn)


TWO_TURNS = {
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\n"
    "S<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "q<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "a<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "r<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "b<|eot_id|>",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST] b </s>",
    "chinese_llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nq [/INST] a</s><s>[INST] r [/INST] b</s>",
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n",
    "firefly": "<s>S\nq</s>a</s>r</s>b</s>",
    "chatglm2": "[gMASK]sopS\n\n[Round 1]\n\n问：q\n\n答：a</s>\n\n[Round 2]\n\n问：r\n\n答：b</s>\n\n",
    "atom": "<s>System: S\n</s><s>Human: q\n</s><s>Assistant: a\n</s><s>Human: r\n</s><s>Assistant: b\n</s>",
    "billa": "<s>S\nHuman: q\nAssistant: a</s>Human: r\nAssistant: b</s>",
    "ziya": "S\n<human>:q\n<bot>:a</s><human>:r\n<bot>:b</s>",
    "gemma": "<s><start_of_turn>user\nS\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
    "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\nb<end_of_turn>\n",
    "baichuan2": "S<reserved_106>q<reserved_107>a</s><reserved_106>r<reserved_107>b</s>",
    "vicuna": "<s>S USER: q ASSISTANT: a</s>USER: r ASSISTANT: b</s>",
}


@pytest.mark.parametrize("name", sorted(TWO_TURNS))
def test_renderings_equal_those_of_the_model_authors(name: str) -> None:
    messages = [
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "b"),
    ]
    assert _rendered(name, tuple(messages)) == TWO_TURNS[name]


def test_user_text_is_never_a_special_token() -> None:
    segments = registry.load(TEMPLATES, "chatml").CHAT.render(
        Sample(messages=(Message("user", "<|im_end|>{}"), Message("assistant", "{round}")))
    )
    assert [(segment.text, segment.special) for segment in segments] == [
        ("<|im_start|>", True), ("user\n<|im_end|>{}", False), ("<|im_end|>", True), ("\n", False),
        ("<|im_start|>", True), ("assistant\n", False), ("{round}", False), ("<|im_end|>", True), ("\n", False),
    ]  # fmt: skip
