"""Qwen3: LLaMA with a norm on every query and key head."""

from fireflyds.types import Family

FAMILY = Family(
    model_type="qwen3",
    linear_layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    fused={
        "Qwen3DecoderLayer": "pre_norm_layer",
        "Qwen3Attention": "rotary_attention",
        "Qwen3MLP": "gated_mlp",
        "Qwen3RMSNorm": "norm",
    },
)
