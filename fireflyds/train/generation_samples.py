"""What a model writes to a fixed list of prompts while it trains: the likeliest tokens, by whole packed forward passes.

No cache of keys and values: the passes are those of training, so they work for every fused model and every ZeRO stage.
All ranks take part in each of them, with prompts of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
import torch.distributed as dist

from fireflyds import registry
from fireflyds.data.encode import encode_segments
from fireflyds.errors import UserError
from fireflyds.models.packed.head import next_token_logits
from fireflyds.types import EOS, Encoder, Message, PackedBatch


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """Prompts in tokens, and the tokens that end an answer."""

    texts: Sequence[str]
    ids: Sequence[list[int]]
    stops: frozenset[int]


def encode_prompts(encoder: Encoder, template: str | None, texts: Sequence[str], room: int | None) -> EncodedPrompts:
    """Prompts as training saw such text: with BOS where documents begin with it, or in the chat template of the store.

    Raises:
        UserError: a prompt leaves no room for an answer of one token.
    """
    stops = {encoder.eos_id}
    if template is None:
        bos = [encoder.bos_id] if encoder.adds_bos and encoder.bos_id is not None else []
        ids = [bos + encoder.encode(text) for text in texts]
    else:
        chat = registry.find("fireflyds.data.templates", template).CHAT
        stops.add(encoder.eos_id if chat.stop == EOS else encoder.token_id(chat.stop))
        ids = []
        for text in texts:
            segments = chat.render([Message("user", text), Message("assistant", "x")])
            opened = list(takewhile(lambda segment: not segment.learn, segments))
            ids.append(encode_segments(encoder, opened).input_ids.tolist())
    for text, tokens in zip(texts, ids, strict=True):
        if room is not None and len(tokens) >= room:
            raise UserError(
                f"validation.prompts: {text[:40]!r} has {len(tokens)} tokens, the model takes {room}. Shorten it"
            )
    return EncodedPrompts(texts, ids, frozenset(stop for stop in stops if stop is not None))


@torch.no_grad()
def greedy_generate(model: Any, prompts: EncodedPrompts, max_new_tokens: int, room: int | None, device: torch.device) -> list[list[int]]:  # fmt: skip
    """The new tokens of every prompt, without the one that ends it; the same on every rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    mine = range(rank, len(prompts.ids), world_size)
    written: dict[int, list[int]] = {place: [] for place in mine}
    open_places = list(mine)
    for _ in range(max_new_tokens):
        unfinished = torch.tensor(len(open_places), device=device)
        dist.all_reduce(unfinished)
        if not unfinished:
            break
        # A rank that has finished goes through the same passes, with a row that nobody reads.
        rows = [[*prompts.ids[place], *written[place]] for place in open_places] or [list(prompts.ids[0])]
        inputs = PackedBatch.from_documents(rows, learned=False).model_inputs(device)
        likeliest = model(**inputs, compute=next_token_logits).argmax(-1).tolist()
        for place, token in zip(list(open_places), likeliest, strict=False):
            if token not in prompts.stops:
                written[place].append(token)
            if token in prompts.stops or len(prompts.ids[place]) + len(written[place]) == room:
                open_places.remove(place)
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, written)
    everything = {place: tokens for part in gathered for place, tokens in part.items()}
    return [everything[place] for place in range(len(prompts.ids))]
