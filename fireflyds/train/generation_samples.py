"""Greedy generations for a fixed list of prompts during training, computed by full packed forward passes.

There is no KV cache: the passes are those of training, so they work for every fused model and every ZeRO stage. All
ranks run every pass, each with its own prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from fireflyds.data.chat_template import find_template
from fireflyds.data.encode import encode_segments, stop_id
from fireflyds.errors import UserError
from fireflyds.models.packed.head import next_token_logits
from fireflyds.types import Encoder, Message, PackedBatch, Sample


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Tokenized prompts, and the token ids that end a generation."""

    texts: Sequence[str]
    ids: Sequence[list[int]]
    stops: frozenset[int]


def encode_prompts(encoder: Encoder, template: str | None, texts: Sequence[str], room: int | None) -> EncodedPrompts:
    """Encodes prompts like the training data: with BOS where documents begin with it, or in the store's chat template.

    Raises:
        UserError: a prompt leaves no room for a single new token.
    """
    stops = {encoder.eos_id}
    if template is None:
        bos = [encoder.bos_id] if encoder.adds_bos and encoder.bos_id is not None else []
        ids = [bos + encoder.encode(text) for text in texts]
    else:
        chat = find_template(encoder, template)
        stops |= {stop_id(encoder, chat)}
        try:
            prompts = [chat.prompt(Sample(messages=(Message("user", text),))) for text in texts]
            ids = [encode_segments(encoder, prompt).input_ids.tolist() for prompt in prompts]
        except ValueError as error:
            raise UserError(
                str(error),
                key="validation.prompts",
                value=list(texts),
                remedy=f"Change the prompts, which template={template} renders as questions, or leave them out",
            ) from error
    for text, tokens in zip(texts, ids, strict=True):
        if room is not None and len(tokens) >= room:
            raise UserError(
                f"{text[:40]!r} has {len(tokens)} tokens, the model takes {room}",
                key="validation.prompts",
                remedy="Shorten it",
            )
    return EncodedPrompts(texts, ids, frozenset(stop for stop in stops if stop is not None))


@torch.no_grad()
def greedy_generate(
    model: Any, prompts: EncodedPrompts, max_new_tokens: int, room: int | None, device: torch.device
) -> list[list[int]]:
    """Returns the new tokens of every prompt, without the token that ends it; the same on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    indices = range(rank, len(prompts.ids), world_size)
    generated: dict[int, list[int]] = {index: [] for index in indices}
    active = list(indices)
    for _ in range(max_new_tokens):
        unfinished = torch.tensor(len(active), device=device)
        dist.all_reduce(unfinished)
        if not unfinished:
            break
        # The passes are collective: a rank without unfinished prompts runs them on a row whose result is not used.
        rows = [[*prompts.ids[index], *generated[index]] for index in active] or [list(prompts.ids[0])]
        inputs = PackedBatch.from_documents(rows, learned=False).model_inputs(device)
        next_tokens = model(**inputs, compute=next_token_logits).argmax(-1).tolist()
        for index, token in zip(list(active), next_tokens, strict=False):
            if token not in prompts.stops:
                generated[index].append(token)
            if token in prompts.stops or len(prompts.ids[index]) + len(generated[index]) == room:
                active.remove(index)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, generated)
    all_generated = {index: tokens for rank_results in gathered for index, tokens in rank_results.items()}
    return [all_generated[index] for index in range(len(prompts.ids))]
