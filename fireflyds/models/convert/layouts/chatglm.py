"""ChatGLM2 and 3, and the first files of GLM-4, as GLM (arXiv 2406.12793), which has the same blocks."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.errors import UserError
from fireflyds.models.convert.fields import common, is_computed, refuse, renamed, rotary, split

_NAMES = {
    "transformer.embedding.word_embeddings.": "model.embed_tokens.", "transformer.encoder.layers.": "model.layers.",
    "transformer.encoder.final_layernorm.": "model.norm.", "transformer.output_layer.": "lm_head.",
    ".self_attention.dense.": ".self_attn.o_proj.", ".mlp.dense_h_to_4h.": ".mlp.gate_up_proj.",
    ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
}  # fmt: skip
# What GLM's blocks are; another value is another model.
_REQUIRED = {
    "rmsnorm": True, "post_layer_norm": True, "apply_residual_connection_post_layernorm": False,
    "add_bias_linear": False, "original_rope": True,
}  # fmt: skip
TEMPLATES = ("chatglm2", "chatglm3")


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """GLM's `config.json`.

    Raises:
        UserError: a variant that GLM's blocks cannot express, or a `rope_ratio` of unknown meaning.
    """
    for key, value in _REQUIRED.items():
        if source.get(key, value) != value:
            raise refuse(source, key, f"GLM has {value}")
    heads, multi_query = source["num_attention_heads"], source.get("multi_query_attention")
    numbers = {
        "vocab_size": source["padded_vocab_size"], "intermediate_size": source["ffn_hidden_size"],
        "num_hidden_layers": source["num_layers"], "head_dim": source["kv_channels"],
        "num_key_value_heads": source["multi_query_group_num"] if multi_query else heads,
        "rms_norm_eps": source["layernorm_epsilon"], "max_position_embeddings": source["seq_length"],
        "attention_bias": bool(source.get("add_qkv_bias")) or bool(source.get("add_bias_linear")),
        "tie_word_embeddings": False, "hidden_act": "silu",
    }  # fmt: skip
    rope = _rotary(source, folder)
    rope["rope_parameters"]["partial_rotary_factor"] = 0.5
    named = {"architectures": ["GlmForCausalLM"], "model_type": "glm"}
    return common(source, **numbers, **rope) | named


def _rotary(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`rope_parameters`. `rope_ratio` divides the positions in ChatGLM2 and multiplies the base in ChatGLM3 and GLM-4;
    no other field of their configurations differs, so the code beside the weights is searched, and never run."""
    ratio = source.get("rope_ratio", 1)
    if ratio == 1:
        return rotary(10_000)
    code = "".join(file.read_text("utf-8") for file in folder.glob("modeling_chatglm*.py"))
    if re.search(r"/\s*self\.rope_ratio", code):
        return rotary(10_000, {"rope_type": "linear", "factor": float(ratio)})
    if re.search(r"\*\s*self\.rope_ratio", code):
        return rotary(10_000 * ratio)
    raise UserError(
        f"its config.json has rope_ratio={ratio}, which divides the positions in ChatGLM2 and multiplies the base in "
        "ChatGLM3, and no modeling_chatglm.py beside it tells which",
        key="model",
        value=folder,
        remedy="Put the maker's modeling_chatglm.py there; it is searched, not run",
    )


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Splits `query_key_value`: all queries, then keys and values of every group."""
    if is_computed(name):
        return {}
    name = renamed(name, _NAMES)
    if ".self_attention.query_key_value." in name:
        prefix, _, kind = name.partition(".self_attention.query_key_value.")
        width, heads = source["kv_channels"], source["num_attention_heads"]
        groups = source["multi_query_group_num"] if source.get("multi_query_attention") else heads
        rows = {"q": heads * width, "k": groups * width, "v": groups * width}
        return split(tensor, {f"{prefix}.self_attn.{part}_proj": n for part, n in rows.items()}, f".{kind}")
    return {name: tensor}
