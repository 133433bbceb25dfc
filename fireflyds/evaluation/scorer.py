"""Likelihoods of token sequences under a model directory, many sequences in one packed forward pass."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fireflyds.config import EvaluateConfig, Precision, PromptStyle
from fireflyds.errors import UserError
from fireflyds.models.load import config_of, load_for_inference
from fireflyds.models.packed import head
from fireflyds.models.packed.derived_check import require_equivalence
from fireflyds.models.packed.forward import fuse
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.types import Encoder, PackedBatch


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """A model under evaluation."""

    model: Any
    encoder: Encoder
    chat_tokenizer: Any
    """The transformers tokenizer whose chat template wraps questions; None: they are given plain."""
    max_tokens: int

    @property
    def device(self) -> torch.device:
        """Device of the input embeddings."""
        return self.model.get_input_embeddings().weight.device

    @property
    def prefix(self) -> list[int]:
        """What text begins with: BOS where documents begin with it in training; without it, the first token of a text
        is not predicted."""
        return [self.encoder.bos_id] if self.encoder.adds_bos and self.encoder.bos_id is not None else []

    @property
    def max_length(self) -> int:
        """Longest input in tokens: `max_tokens`, or the model's number of positions if that is smaller."""
        text_config = self.model.config.get_text_config()
        return min(self.max_tokens, getattr(text_config, "max_position_embeddings", None) or self.max_tokens)

    def prompt_ids(self, question: str) -> list[int]:
        """A question, in the model's chat template when it is a chat model."""
        if self.chat_tokenizer is None:
            return self.prefix + self.encoder.encode(question)
        message = [{"role": "user", "content": question}]
        ids = self.chat_tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        return list(ids)


def load_evaluated_model(config: EvaluateConfig) -> EvaluatedModel:
    """Load a Hugging Face directory.

    Raises:
        UserError: no model there, or `prompt=chat` without a chat template.
    """
    from transformers import AutoTokenizer

    folder = Path(config.model)
    settings, log = config_of("model", config.model), partial(print, file=sys.stderr)
    require_equivalence(settings, Precision.fp32, log, packed=config.packing)
    encoder = load_encoder(folder)
    model = load_for_inference(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    has_template = tokenizer.chat_template is not None
    if config.prompt is PromptStyle.chat and not has_template:
        raise UserError(f"{folder} has no chat template", key="prompt", value="chat", remedy="Use prompt=plain")
    wants_chat = has_template and config.prompt is not PromptStyle.plain
    return EvaluatedModel(
        fuse(model, packed=config.packing), encoder, tokenizer if wants_chat else None, config.max_tokens
    )


def token_losses(model: EvaluatedModel, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """For each sequence of n ids, the n - 1 losses (nats) of its tokens after the first, given those before."""
    losses: list[np.ndarray] = []
    at = 0
    while at < len(sequences):
        end, tokens = at, 0
        while end < len(sequences) and (end == at or tokens + len(sequences[end]) <= model.max_tokens):
            tokens += len(sequences[end])
            end += 1
        losses += _packed_losses(model, sequences[at:end])
        at = end
    return losses


@torch.no_grad()
def _packed_losses(model: EvaluatedModel, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    lengths = [len(sequence) for sequence in sequences]
    inputs = PackedBatch.from_documents(sequences).model_inputs(model.device)
    losses = model.model(**inputs, compute=head.token_losses)
    # One copy from the device for the whole batch.
    return [part[:-1].numpy() for part in losses.cpu().split(lengths)]


def continuation_losses(model: EvaluatedModel, prompt: list[int], continuations: Sequence[list[int]]) -> list[float]:
    """The loss (nats) of each continuation after the prompt, which is cut on the left where too long."""
    longest = max(map(len, continuations))
    room = model.max_length - longest
    if room < 1:
        raise UserError(
            f"a choice of {longest} tokens does not fit into {model.max_length} tokens, the smaller of max_tokens and "
            "the model's positions",
            key="max_tokens",
            value=model.max_tokens,
            remedy="Raise it where the model has more positions, or leave the choice out",
        )
    context = prompt if len(prompt) <= room else (model.prefix + prompt[-(room - len(model.prefix)) :])[-room:]
    losses = token_losses(model, [context + continuation for continuation in continuations])
    return [float(loss[max(len(context) - 1, 0) :].sum()) for loss in losses]
