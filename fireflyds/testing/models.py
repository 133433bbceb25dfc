"""Models of a few thousand parameters, and the loss of documents one by one as transformers computes it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fireflyds.types import PackedBatch

VOCAB_SIZE = 50


def tiny_model(model_type: str, **changes: Any) -> Any:
    """Returns a two-layer model of `model_type` with random weights (seed 0).

    `changes` are set in its configuration.
    """
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | changes))


def save_tiny_llama(folder: Path, **changes: Any) -> Path:
    """Saves a LLaMA of 60 tokens as a Hugging Face directory; `base_vocab_size=40` makes its last 20 rows new ones."""
    torch.manual_seed(0)
    settings = {"tie_word_embeddings": False, "vocab_size": 60, "hidden_size": 64, "intermediate_size": 128} | changes
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **settings)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def random_documents(lengths: Sequence[int] = (7, 1, 12, 3), seed: int = 1) -> list[Tensor]:
    """Returns documents of random token ids, `[length]` each, from 3 to `VOCAB_SIZE` - 1."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in lengths]


def packed_inputs(documents: Sequence[Tensor]) -> dict[str, Any]:
    """Returns the inputs of the packed model for one row of `documents` in which every token has a label."""
    batch = PackedBatch.from_documents([ids.tolist() for ids in documents])
    inputs = batch.model_inputs(torch.device("cpu"))
    del inputs["num_labels"]  # optional
    return inputs


def loss_of_documents(model: Any, documents: Sequence[Tensor]) -> Tensor:
    """Returns the summed cross-entropy of the documents, each computed by itself, without packing."""
    losses = [
        nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        for ids in documents
        if len(ids) > 1
    ]
    return torch.stack(losses).sum()
