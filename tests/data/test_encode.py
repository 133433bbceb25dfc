"""Token ids and the spans with a loss."""

from dataclasses import replace
from itertools import pairwise

import pytest

from fireflyds import registry
from fireflyds.config import LossOn
from fireflyds.data.chat_template import find_template
from fireflyds.data.encode import encode_document, encode_sample
from fireflyds.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from fireflyds.types import Example, Message, Sample

DIALOGUE = Sample(
    messages=(
        Message("user", "the ships"),
        Message("assistant", "two ships"),
        Message("user", "when"),
        Message("assistant", "never"),
    )
)


def encoded(encoder: SentencePieceEncoder, template: str, sample: Sample, loss_on: LossOn = LossOn.answers) -> Example:
    return encode_sample(encoder, find_template(encoder, template), sample, loss_on)


def test_documents_have_bos_and_eos_once(encoder: SentencePieceEncoder) -> None:
    ids = encode_document(encoder, "the old bridge").input_ids.tolist()
    assert ids[0] == encoder.bos_id
    assert ids[-1] == encoder.eos_id
    assert ids[1:-1] == encoder.encode("the old bridge")


@pytest.mark.parametrize("template", ["firefly", "llama2", "vicuna"])
def test_learned_spans_are_the_answers_and_their_end(encoder: SentencePieceEncoder, template: str) -> None:
    example = encoded(encoder, template, DIALOGUE)
    learned_ids = [example.input_ids[start:end].tolist() for start, end in example.spans]
    assert [answer_ids[-1] for answer_ids in learned_ids] == [encoder.eos_id, encoder.eos_id]
    assert [encoder.decode(answer_ids[:-1]).strip() for answer_ids in learned_ids] == ["two ships", "never"]


def test_a_prompt_has_the_same_ids_in_training_and_in_inference(encoder: SentencePieceEncoder) -> None:
    sample_ids = encoded(encoder, "firefly", DIALOGUE).input_ids.tolist()
    prompt = [encoder.bos_id, *encoder.encode("the ships"), encoder.eos_id]
    assert sample_ids[: len(prompt)] == prompt


def test_a_special_token_that_the_tokenizer_lacks_is_named(encoder: SentencePieceEncoder) -> None:
    with pytest.raises(
        ValueError, match=r"the tokenizer has no special token <\|im_start\|>, which the template needs"
    ):
        encoded(encoder, "chatml", DIALOGUE)


def test_loss_can_be_on_the_last_answer_or_on_all_tokens(encoder: SentencePieceEncoder) -> None:
    answers = encoded(encoder, "firefly", DIALOGUE)
    last = encoded(encoder, "firefly", DIALOGUE, LossOn.last_answer)
    all_tokens = encoded(encoder, "firefly", DIALOGUE, LossOn.all)
    assert last.spans == answers.spans[1:]
    assert all_tokens.spans == ((0, answers.spans[0][1]), (answers.spans[0][1], len(answers.input_ids)))
    assert not all_tokens.is_document


def test_bos_and_eos_are_never_doubled(encoder: SentencePieceEncoder) -> None:
    for name in registry.names("fireflyds.data.templates"):
        chat = registry.load("fireflyds.data.templates", name).CHAT
        if chat.special:  # tokens this tokenizer does not have
            continue
        ids = encoded(encoder, name, DIALOGUE).input_ids.tolist()
        for special in (encoder.bos_id, encoder.eos_id):
            assert not any(a == b == special for a, b in pairwise(ids)), name


def expanded(example: Example, number: int) -> list[int]:
    """The prompt of a span, which is stored by the dialogue's own tokens."""
    prompt, first, ids = example.prompts[number], example.spans[number][0], example.input_ids
    return [*ids[: prompt.head], *prompt.middle, *ids[first - prompt.tail : first]]


@pytest.mark.parametrize("template", ["firefly", "vicuna", "llama2", "belle"])
@pytest.mark.parametrize("system", [(), (Message("system", "Be brief."),)])
def test_a_dialogue_that_goes_on_has_the_ids_of_one_that_begins_there(
    encoder: SentencePieceEncoder, template: str, system: tuple[Message, ...]
) -> None:
    turns = tuple(
        Message(role, text)
        for question, answer in (
            ("the old bridge" * 9, "is long"),
            (" why", "\n\nbecause\n" * 9),
            ("青岭镇" * 9, "在北边。"),
        )
        for role, text in (("user", question), ("assistant", answer))
    )
    example = encoded(encoder, template, Sample(messages=(*system, *turns)))
    assert len(example.prompts) == len(example.spans) == 3
    assert expanded(example, 0) == []
    for number in (1, 2):
        begins_there = encoded(encoder, template, Sample(messages=(*system, *turns[2 * number :])))
        start = example.spans[number][0]
        assert [*expanded(example, number), *example.input_ids[start:]] == begins_there.input_ids.tolist()
        assert len(example.prompts[number].middle) < 8
    last = encoded(encoder, template, Sample(messages=(*system, *turns)), LossOn.last_answer)
    assert expanded(last, 0) == expanded(example, 2)
    assert encoded(encoder, template, Sample(messages=(*system, *turns)), LossOn.all).prompts == ()


@pytest.mark.parametrize("template", ["alpaca", "atom", "billa", "xverse", "firefly"])
def test_an_answer_without_loss_has_the_ids_of_one_with_loss(encoder: SentencePieceEncoder, template: str) -> None:
    messages = [*DIALOGUE.messages]
    messages[1] = replace(messages[1], learn=False)
    unlearned, learned = (encoded(encoder, template, Sample(messages=tuple(m))) for m in (messages, DIALOGUE.messages))
    assert unlearned.input_ids.tolist() == learned.input_ids.tolist()
    assert unlearned.spans == learned.spans[1:]
    messages[1], messages[3] = DIALOGUE.messages[1], replace(messages[3], learn=False)
    with pytest.raises(ValueError, match="the last answer has weight 0"):
        encoded(encoder, template, Sample(messages=tuple(messages)), LossOn.last_answer)


@pytest.mark.parametrize("template", ["firefly", "llama2", "vicuna"])
@pytest.mark.parametrize("roles", [("user",), ("assistant", "user"), ("system",)])
def test_turns_of_other_roles_are_learned_without_another_id(
    encoder: SentencePieceEncoder, template: str, roles: tuple[str, ...]
) -> None:
    chat = find_template(encoder, template)
    # In Llama 2 the system message stands inside of the user's first turn.
    sample = Sample(messages=(Message("system", "a small house"), *DIALOGUE.messages))
    example = encode_sample(encoder, chat, sample, roles=roles)
    answers = encode_sample(encoder, chat, sample)
    assert example.input_ids.tolist() == answers.input_ids.tolist()
    learned = "".join(encoder.decode(example.input_ids[start:end].tolist()) for start, end in example.spans)
    for message in sample.messages:
        assert (message.content in learned) == (message.role in roles), (message, learned)
    if "assistant" in roles:
        assert all(any(a <= start and end <= b for a, b in example.spans) for start, end in answers.spans)


def test_a_turn_of_another_role_without_weight_is_not_learned(encoder: SentencePieceEncoder) -> None:
    messages = (replace(DIALOGUE.messages[0], learn=False), *DIALOGUE.messages[1:])
    example = encode_sample(encoder, find_template(encoder, "firefly"), Sample(messages=messages), roles=("user",))
    assert [encoder.decode(example.input_ids[start : end - 1].tolist()).strip() for start, end in example.spans] == [
        "when"
    ]
