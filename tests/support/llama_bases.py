"""A saved LLaMA of 60 tokens, for tests that load, tune and train one."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def make_base(folder: Path, **changes) -> Path:
    """A Hugging Face directory; `base_vocab_size=40` makes its last 20 rows new ones."""
    torch.manual_seed(0)
    settings = {"tie_word_embeddings": False, "vocab_size": 60, "hidden_size": 64, "intermediate_size": 128} | changes
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, **settings)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
