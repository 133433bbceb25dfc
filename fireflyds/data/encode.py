"""Encodes samples as token ids with the spans that carry loss."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fireflyds.config import LossOn, Preference
from fireflyds.data.chat_template import ChatTemplate
from fireflyds.data.learned_roles import role_spans
from fireflyds.data.rendering_checks import left_out_thoughts
from fireflyds.errors import UserError
from fireflyds.types import BOS, EOS, Encoder, Example, Message, Sample, Segment, Strip, TurnPrompt

# The roles whose turns carry loss where nothing else is said.
ASSISTANT = ("assistant",)
# Dialogues of at most as many tokens get no prompts: rows are longer.
_MIN_CONTINUED = 128


def encode_document(encoder: Encoder, text: str) -> Example:
    """Encodes a document as BOS (if the tokenizer adds one), text and EOS; every token but the first is a target."""
    return _document(encoder, text, encoder.encode(text))


def _document(encoder: Encoder, text: str, ids: list[int]) -> Example:
    if encoder.adds_bos and encoder.bos_id is not None:
        ids.insert(0, encoder.bos_id)
    if encoder.eos_id is not None:
        ids.append(encoder.eos_id)
    num_bytes = len(text) if text.isascii() else len(text.encode())
    return Example(np.array(ids, np.uint32), ((0, len(ids)),), num_bytes, is_document=True)


def encode_samples(
    encoder: Encoder,
    chat: ChatTemplate,
    samples: Sequence[Sample],
    loss_on: LossOn,
    preference: Preference,
    roles: Sequence[str] = ASSISTANT,
) -> list[Example | str]:
    """Returns the example of each sample, or why it cannot be encoded. Documents are tokenized in one batch."""
    documents = iter(encoder.encode_batch([sample.text for sample in samples if sample.text is not None]))
    encoded: list[Example | str] = []
    for sample in samples:
        if sample.text is not None:
            encoded.append(_document(encoder, sample.text, next(documents)))
            continue
        try:
            encoded.append(encode_preference(encoder, chat, sample, loss_on, preference, roles))
        except UserError:
            raise
        except ValueError as error:
            encoded.append(str(error))
    return encoded


def encode_preference(
    encoder: Encoder,
    chat: ChatTemplate,
    sample: Sample,
    loss_on: LossOn,
    preference: Preference,
    roles: Sequence[str] = ASSISTANT,
) -> Example:
    """Encodes a sample; with `pairs`, a preference pair as one example and a labelled answer with its label.

    A pair is the chosen dialogue followed by the rejected one, each with loss from where they differ.

    Raises:
        ValueError: see `encode_sample`; the two dialogues are equal, or an unwanted answer would be learned.
    """
    if preference is Preference.chosen:
        if sample.label is False:
            raise ValueError("label is false, so its answer must not be learned")
        return encode_sample(encoder, chat, sample, loss_on, roles)
    if sample.label is not None:
        return replace(encode_sample(encoder, chat, sample, loss_on), label=int(sample.label), prompts=())
    if not sample.rejected:
        raise ValueError("neither a pair whose rejected answer is text nor a labelled answer (preference=pairs)")
    shared = 0
    for one, other in zip(sample.messages, sample.rejected, strict=False):
        if (one.role, one.content) != (other.role, other.content):
            break
        shared += 1
    if shared in (len(sample.messages), len(sample.rejected)):
        raise ValueError("chosen and rejected are equal, or one is the beginning of the other")
    chosen, rejected = (
        encode_sample(encoder, chat, replace(sample, messages=_unlearned(messages, shared)))
        for messages in (sample.messages, sample.rejected)
    )
    start = len(chosen.input_ids)
    return Example(
        np.concatenate([chosen.input_ids, rejected.input_ids]),
        (*chosen.spans, *((first + start, last + start) for first, last in rejected.spans)),
        chosen.num_bytes + rejected.num_bytes,
        rejected_start=start,
        left_out_thoughts=chosen.left_out_thoughts + rejected.left_out_thoughts,
    )


def _unlearned(messages: Sequence[Message], count: int) -> tuple[Message, ...]:
    return tuple(replace(message, learn=message.learn and index >= count) for index, message in enumerate(messages))


def encode_segments(encoder: Encoder, segments: Sequence[Segment]) -> Example:
    """Encodes segments one by one, so that a prompt has the same ids in training and in inference.

    White space beside a special token with `lstrip` or `rstrip` is left out, as transformers does, but never that of
    an answer.

    Raises:
        ValueError: the tokenizer has no such special token.
    """
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    num_bytes = 0
    continues = False
    for segment in _stripped(encoder, segments):
        start = len(ids)
        if segment.special:
            ids.append(_special_id(encoder, segment.text))
        else:
            ids += encoder.encode(segment.text, continues=continues)
            num_bytes += len(segment.text.encode())
        continues = not (segment.special and encoder.prefix_after_special)
        if segment.learn and spans and spans[-1][1] == start:
            spans[-1] = (spans[-1][0], len(ids))
        elif segment.learn:
            spans.append((start, len(ids)))
    return Example(np.asarray(ids, np.uint32), tuple(spans), num_bytes)


def _stripped(encoder: Encoder, segments: Sequence[Segment]) -> Iterator[Segment]:
    """Yields the segments without the white space that special tokens beside them remove."""
    strips = [encoder.strip_of(segment.text) if segment.special else Strip() for segment in segments]
    for index, segment in enumerate(segments):
        text = segment.text
        if not (segment.special or segment.separate):
            text = text.lstrip() if index and strips[index - 1].right else text
            text = text.rstrip() if any(strip.left for strip in strips[index + 1 : index + 2]) else text
        if text:
            yield replace(segment, text=text)


def _token_id(encoder: Encoder, token: str) -> int | None:
    return {BOS: encoder.bos_id, EOS: encoder.eos_id}.get(token, encoder.token_id(token))


def _special_id(encoder: Encoder, token: str) -> int:
    index = _token_id(encoder, token)
    if index is None:
        name = {BOS: "BOS", EOS: "EOS"}.get(token, token)
        raise ValueError(f"the tokenizer has no special token {name}, which the template needs")
    return index


def sample_dialogues(encoder: Encoder, chat: ChatTemplate) -> list[tuple[str, list[int]]]:
    """Returns two dialogues as text in the chat template, with their ids, to compare tokenizers by. None if the
    tokenizer lacks a token of the template: such dialogues are rejected where they are prepared."""
    turns = [Message("user", "你好 world"), Message("assistant", "您好！ fine."), Message("user", "二")]
    dialogues = []
    for messages in ([Message("system", "你是助手。"), *turns, Message("assistant", "2")], turns[:2]):
        try:
            segments = chat.render(Sample(messages=tuple(messages)))
        except ValueError:
            continue
        names = {BOS: encoder.bos_id, EOS: encoder.eos_id}
        if any(segment.special and _token_id(encoder, segment.text) is None for segment in segments):
            return []
        text = "".join(
            encoder.token(names[segment.text] or 0) if segment.text in names else segment.text for segment in segments
        )
        dialogues.append((text, encode_segments(encoder, segments).input_ids.tolist()))
    return dialogues


def _merged(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)


def stop_id(encoder: Encoder, chat: ChatTemplate) -> int | None:
    """Returns the token that ends an answer: the last one that carries loss; None where that is no special token, or
    where the template takes no dialogue of two plain turns."""
    try:
        segments = chat.render(Sample(messages=(Message("user", "1"), Message("assistant", "2"))))
    except ValueError:
        return None
    learned = [segment for segment in segments if segment.learn]
    return _token_id(encoder, learned[-1].text) if learned and learned[-1].special else None


def turn_prompt(input_ids: np.ndarray, first: int, prompt: np.ndarray) -> TurnPrompt:
    """Expresses the prompt of the answer that begins at token `first` by the dialogue's own tokens, which hold the
    system message at the beginning and the question right before the answer: little is left to store."""
    size = min(len(prompt), len(input_ids))
    different = np.flatnonzero(prompt[:size] != input_ids[:size])
    head = int(different[0]) if len(different) else size
    size = min(len(prompt) - head, first)
    different = np.flatnonzero(prompt[len(prompt) - size :] != input_ids[first - size : first])
    tail = size - 1 - int(different[-1]) if len(different) else size
    return TurnPrompt(head, prompt[head : len(prompt) - tail], tail)


def encode_sample(
    encoder: Encoder,
    chat: ChatTemplate,
    sample: Sample,
    loss_on: LossOn = LossOn.answers,
    roles: Sequence[str] = ASSISTANT,
) -> Example:
    """Encodes a document, or a dialogue rendered with a chat template. `roles`: those whose turns carry loss.

    Raises:
        ValueError: the dialogue does not fit the template, or the tokenizer lacks one of its special tokens.
    """
    if sample.text is not None:
        return encode_document(encoder, sample.text)
    segments = chat.render(sample)
    example = replace(encode_segments(encoder, segments), left_out_thoughts=left_out_thoughts(sample, segments))
    if loss_on is LossOn.last_answer and not sample.messages[-1].learn:
        raise ValueError("loss_on=last_answer, but the last answer has weight 0")
    if tuple(roles) != ASSISTANT:
        others = role_spans(chat, sample, roles, lambda parts: encode_segments(encoder, parts).input_ids)
        return replace(example, spans=_merged([*others, *(example.spans if ASSISTANT[0] in roles else ())]))
    if loss_on is not LossOn.all and len(example.input_ids) > _MIN_CONTINUED:
        prompts = [encode_segments(encoder, prompt).input_ids for prompt in chat.prompts(sample)]
        if len(prompts) == len(example.spans):
            pairs = zip(prompts, example.spans, strict=True)
            example = replace(
                example, prompts=tuple(turn_prompt(example.input_ids, span[0], ids) for ids, span in pairs)
            )
    if loss_on is LossOn.last_answer:
        return replace(example, spans=example.spans[-1:], prompts=example.prompts[-1:])
    if loss_on is LossOn.all:
        if not all(message.learn for message in sample.messages):
            raise ValueError("loss_on=all learns every turn, but a turn has weight 0; use loss_on=answers")
        # One span per turn, so that a long dialogue is split after complete turns.
        ends = [*(end for _, end in example.spans[:-1]), len(example.input_ids)]
        return replace(example, spans=tuple(pairwise([0, *ends])))
    return example
