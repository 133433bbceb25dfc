"""The first Qwen as Qwen2 (arXiv 2309.16609): one product for queries, keys and values, with a bias."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import common, is_computed, refuse, renamed, rotary, split

_NAMES = {
    "transformer.wte.": "model.embed_tokens.", "transformer.ln_f.": "model.norm.", "transformer.h.": "model.layers.",
    ".attn.c_proj.": ".self_attn.o_proj.", ".ln_1.": ".input_layernorm.", ".ln_2.": ".post_attention_layernorm.",
    ".mlp.w2.": ".mlp.gate_proj.", ".mlp.w1.": ".mlp.up_proj.", ".mlp.c_proj.": ".mlp.down_proj.",
}  # fmt: skip
TEMPLATES = ("qwen",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Qwen2's `config.json`. Beyond `seq_length` tokens Qwen scales queries by a logarithm and grows the rotary base;
    neither is written, and documents are kept to `seq_length`.

    Raises:
        UserError: biases or a part of the rotary embeddings that Qwen2 does not have.
    """
    if not source.get("no_bias", True):
        raise refuse(source, "no_bias", "Qwen2 has biases in queries, keys and values alone")
    if source.get("rotary_pct", 1.0) != 1.0:
        raise refuse(source, "rotary_pct", "Qwen2 rotates whole heads")
    if source.get("kv_channels", 128) * source["num_attention_heads"] != source["hidden_size"]:
        raise refuse(source, "kv_channels", "Qwen2's heads are hidden_size / num_attention_heads wide")
    numbers = {
        "intermediate_size": source["intermediate_size"] // 2, "rms_norm_eps": source["layer_norm_epsilon"],
        "max_position_embeddings": source["seq_length"], "num_key_value_heads": source["num_attention_heads"],
        "bos_token_id": None, "tie_word_embeddings": bool(source.get("tie_word_embeddings")),
    }  # fmt: skip
    named = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu"}
    return common(source, **numbers, **rotary(source.get("rotary_emb_base", 10_000))) | named


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Splits `c_attn`. The product `w2` is the gate."""
    if is_computed(name):
        return {}
    name = renamed(name, _NAMES)
    if ".attn.c_attn." in name:
        prefix, _, kind = name.partition(".attn.c_attn.")
        rows = source["hidden_size"]
        return split(tensor, {f"{prefix}.self_attn.{part}_proj": rows for part in "qkv"}, f".{kind}")
    return {name: tensor}
