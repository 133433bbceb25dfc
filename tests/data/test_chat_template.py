"""A tokenizer's own Jinja gives the text that transformers gives, and the loss where a template with marks has it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from bases import byte_level_base

from fireflyds import registry
from fireflyds.data.chat_template import OWN, JinjaChat, find_template, template_key
from fireflyds.data.encode import encode_sample, stop_id
from fireflyds.data.rendering_checks import left_out_thoughts
from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.types import BOS, EOS, Message, Sample, Segment

TEMPLATES = "fireflyds.data.templates"
WITH_THOUGHTS = ("qwen3", "deepseek_r1", "gpt_oss")
WITH_TOOLS = ("qwen3", "llama3_1")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
PLAIN = Sample(
    messages=(
        Message("system", "S"),
        Message("user", "q"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "b"),
    )
)
THOUGHTS = Sample(
    messages=(
        Message("user", "q"),
        Message("assistant", "a", reasoning="想一"),
        Message("user", "r"),
        Message("assistant", "b", reasoning="想二"),
    )
)
TOOLS = Sample(
    messages=(
        Message("user", "q"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "晴", tool_call_id="abcdefghi"),
        Message("assistant", "a"),
        Message("user", "r"),
        Message("assistant", "b"),
    ),
    tools=(TOOL,),
)
QWEN3_TOOLS = (
    "<|im_start|>system\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
    "provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    + json.dumps(TOOL)
    + "\n</tools>\n\nFor each "
    "function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n"
    '{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call><|im_end|>⟧\n'
    "<|im_start|>user\n<tool_response>\n晴\n</tool_response><|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n"
    "<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n⟦b<|im_end|>⟧\n"
)


def marked(segments: list[Segment]) -> str:
    """The text with what carries loss in brackets."""
    text = "".join(f"⟦{segment.text}⟧" if segment.learn else segment.text for segment in segments)
    return text.replace("⟧⟦", "").replace(BOS, "<s>").replace(EOS, "</s>")


def test_qwen3_renders_tools_and_their_answers_as_its_makers_do() -> None:
    assert marked(registry.load(TEMPLATES, "qwen3").CHAT.render(TOOLS)) == QWEN3_TOOLS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "qwen3",
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n<|im_start|>user\nr<|im_end|>\n"
            "<|im_start|>assistant\n⟦<think>\n想二\n</think>\n\nb<|im_end|>⟧\n",
        ),
        (
            "deepseek_r1",
            "<s><｜User｜>q<｜Assistant｜>⟦a</s>⟧<｜User｜>r<｜Assistant｜><think>\n⟦想二\n</think>\n\nb</s>⟧",
        ),
        (
            "gpt_oss",
            "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: "
            "2024-06\nCurrent date: 2025-01-01\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. "
            "Channel must be included for every message.<|end|><|start|>user<|message|>q<|end|><|start|>assistant"
            "⟦<|channel|>final<|message|>a⟧<|end|><|start|>user<|message|>r<|end|><|start|>assistant"
            "⟦<|channel|>analysis<|message|>想二<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>⟧",
        ),
    ],
)
def test_thoughts_of_the_last_answer_are_rendered_and_learned(name: str, expected: str) -> None:
    chat = registry.load(TEMPLATES, name).CHAT
    segments = chat.render(THOUGHTS)
    assert marked(segments) == expected
    assert left_out_thoughts(THOUGHTS, segments) == 1
    inline = [
        replace(message, content=f"<think>\n{message.reasoning}\n</think>\n\n{message.content}", reasoning="")
        if message.reasoning
        else message
        for message in THOUGHTS.messages
    ]
    if name == "qwen3":
        assert marked(chat.render(Sample(messages=tuple(inline)))) == expected


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1", "gpt_oss"])
def test_thoughts_may_stand_without_loss(name: str) -> None:
    chat = registry.load(TEMPLATES, name).CHAT
    learned = [segment for segment in replace(chat, learn_reasoning=False).render(THOUGHTS) if segment.learn]
    text = "".join(segment.text for segment in learned)
    assert "想二" not in text
    assert text.endswith("b" + chat.stop)
    whole = "".join(segment.text for segment in chat.render(THOUGHTS))
    assert "".join(s.text for s in replace(chat, learn_reasoning=False).render(THOUGHTS)) == whole


def test_a_thought_before_a_tool_call_may_stand_without_loss() -> None:
    turns = (TOOLS.messages[0], replace(TOOLS.messages[1], reasoning="想一"), *TOOLS.messages[2:4])
    chat = replace(registry.load(TEMPLATES, "qwen3").CHAT, learn_reasoning=False)
    assert "assistant\n<think>\n想一\n</think>\n\n⟦<tool_call>" in marked(chat.render(replace(TOOLS, messages=turns)))


@pytest.mark.parametrize("sample", [PLAIN, replace(PLAIN, messages=PLAIN.messages[:3]), THOUGHTS, TOOLS])
@pytest.mark.parametrize("name", registry.names(TEMPLATES))
def test_answers_are_found_in_a_template_without_marks(name: str, sample: Sample) -> None:
    """Every built-in template, rendered as if it were a tokenizer's own, carries loss where it says itself."""
    chat = registry.load(TEMPLATES, name).CHAT
    if sample in (THOUGHTS, TOOLS) and name not in (WITH_THOUGHTS if sample == THOUGHTS else WITH_TOOLS):
        with pytest.raises(ValueError, match=r"does not render|no tools"):
            chat.render(sample)
        return
    expected = chat.render(sample)
    own = JinjaChat(chat.jinja, chat.special).render(sample)
    text = "".join(segment.text for segment in own)
    assert text == "".join(segment.text for segment in expected)
    learned, expected_learned = (
        re.sub(r"\s", "", "¦".join(segment.text for segment in segments if segment.learn))
        for segments in (own, expected)
    )
    # GLM's end token is that of the next turn, which `glm4` leaves to the end token of the tokenizer.
    assert learned.replace("¦", "") == expected_learned.replace("¦", "")


def test_a_template_that_leaves_out_a_part_is_named() -> None:
    chatml = registry.load(TEMPLATES, "chatml").CHAT
    own = JinjaChat(chatml.jinja, chatml.special)
    with pytest.raises(ValueError, match="does not render reasoning_content"):
        own.render(THOUGHTS)
    with pytest.raises(ValueError, match="leaves out the tool call weather of turn 2"):
        own.render(TOOLS)
    with pytest.raises(ValueError, match=r"turn 1 \(user\) spells the special token <\|im_end\|>"):
        own.render(Sample(messages=(Message("user", "x<|im_end|>"), Message("assistant", "y"))))
    refusing = JinjaChat("{{ raise_exception('no system') }}")
    with pytest.raises(ValueError, match="the chat template refuses the dialogue: no system"):
        refusing.render(PLAIN)
    with pytest.raises(ValueError, match="refuses the dialogue: access to attribute '__class__'"):
        JinjaChat("{{ messages.__class__.__mro__ }}").render(PLAIN)


@pytest.fixture
def chat_base(tmp_path: Path) -> Path:
    """A byte-level tokenizer with Qwen3's template as its own."""
    folder = byte_level_base(tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for number, token in enumerate(("<|im_start|>", "<|im_end|>")):
        document["added_tokens"].append(flags | {"id": 420 + number, "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(registry.load(TEMPLATES, "qwen3").CHAT.jinja, encoding="utf-8")
    return folder


@pytest.mark.parametrize("sample", [PLAIN, THOUGHTS, TOOLS])
def test_ids_equal_those_of_apply_chat_template(chat_base: Path, sample: Sample) -> None:
    from transformers import AutoTokenizer

    encoder = load_encoder(chat_base)
    rows = []
    for message in sample.messages:
        row = {"role": message.role, "content": message.content}
        row |= {"reasoning_content": message.reasoning} if message.reasoning else {}
        rows.append(row | ({"tool_calls": list(message.tool_calls)} if message.tool_calls else {}))
    expected = AutoTokenizer.from_pretrained(chat_base).apply_chat_template(
        rows, tools=list(sample.tools) or None, tokenize=True, return_dict=True
    )
    example = encode_sample(encoder, find_template(encoder, OWN), sample)
    assert example.input_ids.tolist() == expected["input_ids"]
    assert stop_id(encoder, find_template(encoder, OWN)) == encoder.token_id("<|im_end|>")


def test_the_own_template_is_the_default_and_part_of_the_provenance(chat_base: Path, encoder) -> None:
    base = load_encoder(chat_base)
    assert find_template(base, "auto") == find_template(base, OWN)
    assert find_template(encoder, "auto") == registry.load(TEMPLATES, "firefly").CHAT
    with pytest.raises(UserError, match="the tokenizer has no chat template of its own"):
        find_template(encoder, OWN)
    before = template_key(base, "auto")
    (chat_base / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert template_key(load_encoder(chat_base), "auto") != before


def test_a_long_dialogue_goes_on_with_the_prompt_of_its_turn(chat_base: Path) -> None:
    base = load_encoder(chat_base)
    chat = find_template(base, OWN)
    first, second = chat.prompts(PLAIN)
    assert first == []
    alone = Sample(messages=(PLAIN.messages[0], *PLAIN.messages[3:]))
    text = "".join(segment.text for segment in chat.render(alone))
    assert "".join(segment.text for segment in second) == text[: text.index("b<|im_end|>")]
    assert "".join(segment.text for segment in chat.prompt(Sample(messages=(Message("user", "q"),)))).endswith(
        "assistant\n"
    )


def test_results_of_tools_can_be_learned_in_an_own_template(chat_base: Path) -> None:
    base = load_encoder(chat_base)
    chat = find_template(base, OWN)
    example = encode_sample(base, chat, TOOLS, roles=("tool", "user"))
    assert example.input_ids.tolist() == encode_sample(base, chat, TOOLS).input_ids.tolist()
    learned = [base.decode(example.input_ids[start:end].tolist()) for start, end in example.spans]
    wanted = [message.content for message in TOOLS.messages if message.role in ("tool", "user")]
    assert len(learned) == len(wanted)
    for text, content in zip(learned, wanted, strict=True):
        assert text.startswith(content)
        assert text.removeprefix(content) in ("", "<|im_end|>")
