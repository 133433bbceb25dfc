"""Mistral: LLaMA with a sliding window where its configuration has one."""

from fireflyds.types import Family

FAMILY = Family(
    model_type="mistral",
    linear_layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    fused={
        "MistralDecoderLayer": "pre_norm_layer",
        "MistralAttention": "mistral_attention",
        "MistralMLP": "gated_mlp",
        "MistralRMSNorm": "norm",
    },
)
