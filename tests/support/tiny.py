"""Models of a few thousand parameters, documents, and their loss one by one as transformers has it."""

from itertools import accumulate

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

IGNORE_INDEX = -100


def tiny(model_type: str, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings | changes))


def documents(lengths=(7, 1, 12, 3), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 50, (length,), generator=generator) for length in lengths]


def packed(docs):
    lengths = [len(ids) for ids in docs]
    return {
        "input_ids": torch.cat(docs)[None],
        "labels": torch.cat([torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])]) for ids in docs])[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }


def loss_one_by_one(model, docs):
    return sum(
        nn.functional.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="sum")
        for ids in docs
        if len(ids) > 1
    )
