"""Architectures without a written family, as tiny random models of transformers' own classes."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

LENGTHS = [5, 1, 70, 33, 90]
SMALL = {
    "vocab_size": 128, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None, "initializer_range": 0.1,
}  # fmt: skip
ONE_OF_EACH = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10} | {
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 12, "linear_value_head_dim": 12}
MAMBA = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 6, "long_factor": [1.7] * 6,
    "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0,
}  # fmt: skip
# By the name of the case: model type, and what differs from SMALL.
FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("gemma2", ONE_OF_EACH | {"head_dim": 12, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", ONE_OF_EACH | {"head_dim": 12, "query_pre_attn_scalar": 12}),
    "phi3 longrope": (
        "phi3", NO_DROPOUT | {"rope_parameters": LONG, "original_max_position_embeddings": 64, "sliding_window": None}
    ),
    "gpt2": ("gpt2", NO_DROPOUT | {"n_embd": 48, "n_head": 4, "n_layer": 2, "n_positions": 256}),
    "granite": ("granite", {"embedding_multiplier": 9.0, "logits_scaling": 5.0, "residual_multiplier": 0.3}),
    "cohere2": ("cohere2", ONE_OF_EACH | {"head_dim": 12, "logit_scale": 0.3}),
    "nemotron": ("nemotron", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "qwen3_moe": ("qwen3_moe", EXPERTS | {"head_dim": 12, "decoder_sparse_step": 1}),
    "deepseek_v3": ("deepseek_v3", EXPERTS | LATENT | {"routed_scaling_factor": 1.5}),
    "gpt_oss": ("gpt_oss", EXPERTS | ONE_OF_EACH | {"head_dim": 12}),
    "llama4": (
        "llama4_text",
        EXPERTS | {"head_dim": 12, "attention_chunk_size": 24, "layer_types": ["chunked_attention", "full_attention"]}
        | {"interleave_moe_layer_step": 1, "no_rope_layers": [1, 0], "intermediate_size_mlp": 80},
    ),
    "qwen3_5": ("qwen3_5_text", DELTA | {"head_dim": 12, "layer_types": ["linear_attention", "full_attention"]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"], "block_ff_dim": 80}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {"head_dim": 12, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 500.0, "factor": 1.0}},
    ),
}  # fmt: skip
SLOW: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma": ("gemma", {"head_dim": 12}),
    "phi": ("phi", NO_DROPOUT | {"num_key_value_heads": 4, "partial_rotary_factor": 0.5}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "opt": ("opt", {"ffn_dim": 80, "word_embed_proj_dim": 48, "dropout": 0.0}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "partial_rotary_factor": 0.5}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", ONE_OF_EACH),
    "olmoe": ("olmoe", EXPERTS),
    "glm": ("glm", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"head_dim": 12, "partial_rotary_factor": 0.5}),
    "glm4_moe": ("glm4_moe", EXPERTS | {"head_dim": 12, "partial_rotary_factor": 0.5, "use_qk_norm": True}),
    "glm4_moe_lite": ("glm4_moe_lite", EXPERTS | LATENT),
    "granitemoe": ("granitemoe", EXPERTS | {"logits_scaling": 5.0, "intermediate_size": 24}),
    "deepseek_v2": ("deepseek_v2", EXPERTS | LATENT | {"topk_method": "group_limited_greedy"}),
    "minicpm3": ("minicpm3", LATENT | {"scale_emb": 9, "scale_depth": 1.3, "dim_model_base": 24}),
    "cohere": ("cohere", {"logit_scale": 0.2}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "ernie4_5": ("ernie4_5", {"head_dim": 12}),
    "ernie4_5_moe": ("ernie4_5_moe", EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}),
    "hunyuan_moe": ("hunyuan_v1_moe", EXPERTS | {"head_dim": 12, "moe_topk": 2}),
    "seed_oss": ("seed_oss", {"head_dim": 12, "residual_dropout": 0.0, "attention_dropout": 0.0}),
    "exaone4": ("exaone4", ONE_OF_EACH),
    "qwen2_moe": ("qwen2_moe", EXPERTS | {"decoder_sparse_step": 1}),
    "mixtral": ("mixtral", EXPERTS | {"sliding_window": None}),
    "minimax_m2": ("minimax_m2", EXPERTS | {"head_dim": 12, "rotary_dim": 8}),
    "qwen3_next": (
        "qwen3_next", EXPERTS | DELTA | {"head_dim": 12, "layer_types": ["linear_attention", "full_attention"]}
    ),
    "bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "falcon_h1": ("falcon_h1", MAMBA | {"head_dim": 12, "mamba_d_ssm": 96, "lm_head_multiplier": 0.5}),
    "mamba2": ("mamba2", {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2}),
    "gemma3n": (
        "gemma3n_text",
        {"head_dim": 12, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 20, "laurel_rank": 8}
        | {"vocab_size_per_layer_input": 128, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0]},
    ),
    "gemma4": (  # heads of another size in some layers
        "gemma4_text",
        ONE_OF_EACH | {"head_dim": 12, "global_head_dim": 24, "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": 128},
    ),
    "helium": ("helium", {"head_dim": 12}),
    "apertus": ("apertus", {}),
    "arcee": ("arcee", {}),
    "ministral3": ("ministral3", {"head_dim": 12}),
    "starcoder2": ("starcoder2", {"residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 20}),
}  # fmt: skip


def model_of(model_type: str, changes: dict[str, Any], seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **SMALL | changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():  # norms begin at one and biases at zero: every part must count
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return model
