"""Qwen2 and Qwen2.5: LLaMA with biases on q, k and v."""

from fireflyds.types import Family

FAMILY = Family(
    model_type="qwen2",
    linear_layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    fused={
        "Qwen2DecoderLayer": "pre_norm_layer",
        "Qwen2Attention": "rotary_attention",
        "Qwen2MLP": "gated_mlp",
        "Qwen2RMSNorm": "norm",
    },
)
