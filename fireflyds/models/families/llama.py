"""LLaMA: the architecture of LLaMA-1/2/3, Chinese-LLaMA, Yi, Atom, Linly, converted InternLM-1 (with biases), etc."""

from fireflyds.types import Family

FAMILY = Family(
    model_type="llama",
    linear_layers=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    fused={
        "LlamaDecoderLayer": "pre_norm_layer",
        "LlamaAttention": "rotary_attention",
        "LlamaMLP": "gated_mlp",
        "LlamaRMSNorm": "norm",
    },
)
