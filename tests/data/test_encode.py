"""Ids and learned spans."""

import functools

import pytest

from fireflyds.data.encode import encode_all, encode_document, encode_sample
from fireflyds.tokenizer.encoder import SentencePieceEncoder, load_encoder
from fireflyds.types import Message, Sample

TALK = Sample(
    messages=(
        Message("user", "the ships"),
        Message("assistant", "two ships"),
        Message("user", "when"),
        Message("assistant", "never"),
    )
)


def test_documents_have_bos_and_eos_once(encoder: SentencePieceEncoder) -> None:
    ids = encode_document(encoder, "the old bridge").input_ids.tolist()
    assert ids[0] == encoder.bos_id
    assert ids[-1] == encoder.eos_id
    assert ids[1:-1] == encoder.encode("the old bridge")


@pytest.mark.parametrize("template", ["firefly", "llama2", "vicuna"])
def test_learned_spans_are_the_answers_and_their_end(encoder: SentencePieceEncoder, template: str) -> None:
    example = encode_sample(encoder, template, TALK)
    learnt = [example.input_ids[start:end].tolist() for start, end in example.spans]
    assert [ids[-1] for ids in learnt] == [encoder.eos_id, encoder.eos_id]
    assert [encoder.decode(ids[:-1]).strip() for ids in learnt] == ["two ships", "never"]


def test_a_prompt_has_the_same_ids_in_training_and_in_use(encoder: SentencePieceEncoder) -> None:
    whole = encode_sample(encoder, "firefly", TALK).input_ids.tolist()
    prompt = [encoder.bos_id, *encoder.encode("the ships"), encoder.eos_id]
    assert whole[: len(prompt)] == prompt


def test_a_template_whose_special_token_is_missing_says_which(encoder: SentencePieceEncoder, base_tokenizer) -> None:
    load = functools.partial(load_encoder, base_tokenizer)
    assert list(encode_all(load, "chatml", iter([TALK]), 1)) == [
        "the tokenizer has no special token <|im_start|>, which the template needs"
    ]


def test_workers_give_the_same_examples_in_the_same_order(base_tokenizer) -> None:
    samples = [Sample(text=f"ship number {number} near the bridge") for number in range(700)]
    load = functools.partial(load_encoder, base_tokenizer)
    one, two = (list(encode_all(load, "firefly", iter(samples), workers)) for workers in (1, 2))
    assert [e.input_ids.tolist() for e in one] == [e.input_ids.tolist() for e in two]
    assert len(one) == 700
