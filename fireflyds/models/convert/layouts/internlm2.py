"""InternLM2 and 2.5 as LLaMA: one product per group of heads (arXiv 2403.17297), and names of its own."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import is_computed, llama, rotary

_NAMES = {
    "model.tok_embeddings.": "model.embed_tokens.", "output.": "lm_head.", ".attention.wo.": ".self_attn.o_proj.",
    ".feed_forward.w1.": ".mlp.gate_proj.", ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.", ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}  # fmt: skip
TEMPLATES = ("internlm2",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA's `config.json`."""
    rope = rotary(source.get("rope_theta", 10_000), source.get("rope_scaling"))
    return llama(source, attention_bias=bool(source.get("bias", True)), **rope)


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Splits `wqkv`: every group has its query heads, then its key head and its value head."""
    if is_computed(name):
        return {}
    if ".attention.wqkv." in name:
        prefix, _, kind = name.partition(".attention.wqkv.")
        heads, groups = source["num_attention_heads"], source["num_key_value_heads"]
        parts = tensor.unflatten(0, (groups, heads // groups + 2, source["hidden_size"] // heads))
        q, k, v = parts[:, :-2].flatten(0, 2), parts[:, -2].flatten(0, 1), parts[:, -1].flatten(0, 1)
        return {f"{prefix}.self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", (q, k, v), strict=True)}
    for theirs, ours in _NAMES.items():
        if (theirs.startswith(".") and theirs in name) or name.startswith(theirs):
            return {name.replace(theirs, ours): tensor}
    return {name: tensor}
