"""MiniCPM (1B and 2B, arXiv 2404.06395) as Granite, which has the same three factors under other names."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import common, is_computed, refuse, rotary

TEMPLATES = ("minicpm",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Granite's `config.json`: embeddings times `scale_emb`, branches times `scale_depth` / √layers, logits divided by
    `hidden_size` / `dim_model_base`.

    Raises:
        UserError: a mixture of experts.
    """
    if source.get("num_experts"):
        raise refuse(source, "num_experts", "a mixture of experts has another architecture")
    head_dim = source["hidden_size"] // source["num_attention_heads"]
    factors = {
        "embedding_multiplier": float(source["scale_emb"]),
        "residual_multiplier": source["scale_depth"] / math.sqrt(source["num_hidden_layers"]),
        "logits_scaling": source["hidden_size"] / source["dim_model_base"],
        "attention_multiplier": head_dim**-0.5,
        "tie_word_embeddings": bool(source.get("tie_word_embeddings", True)),
    }
    rope = rotary(source.get("rope_theta", 10_000), source.get("rope_scaling"))
    named = {"architectures": ["GraniteForCausalLM"], "model_type": "granite"}
    return common(source, **factors, **rope) | named


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The names are Granite's; a head that is its embeddings is left out."""
    tied = source.get("tie_word_embeddings", True) and name == "lm_head.weight"
    return {} if is_computed(name) or tied else {name: tensor}
