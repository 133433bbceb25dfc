"""Sizes of an architecture that are derived from its Hugging Face configuration."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

# Layers that multiply by a matrix: GPT-2's is stored transposed, `[inputs, outputs]`.
LINEAR = (nn.Linear, Conv1D)
# Linear layers whose weights their model reads and clamps itself (Gemma 3n): neither adapted nor quantised.
READ_DIRECTLY = ("prediction_coefs", "correction_coefs")
# Execution order of the modules of a block; equal numbers are independent of each other. Norms precede their consumers.
_ORDER = {
    "input_layernorm": 0, "ln_attn": 0, "ln_mlp": 0,
    "q_proj": 1, "k_proj": 1, "v_proj": 1, "q_norm": 1, "k_norm": 1, "query_key_value": 1,
    "o_proj": 3, "dense": 3, "post_attention_layernorm": 4,
    "gate_proj": 5, "up_proj": 5, "dense_h_to_4h": 5, "down_proj": 6, "dense_4h_to_h": 6,
}  # fmt: skip
# Overrides for parallel blocks (Falcon), whose feed-forward layer has the same input as attention.
_PARALLEL = {"dense_h_to_4h": 1, "dense_4h_to_h": 3}


def is_stateful_mixer(module: nn.Module) -> bool:
    """True for a layer that mixes tokens by a convolution or a state: linear attention, Mamba, short convolutions."""
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def linear_size(module: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    return (module.nx, module.nf) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def layer_configs(hf_config: Any) -> list[Any]:
    """The configuration of every layer where layers differ in their sizes (Gemma 4), else the configuration itself."""
    return list(hf_config.per_layer_config) if getattr(hf_config, "is_heterogeneous", False) else [hf_config]


def head_dim(hf_config: Any) -> int:
    """Width of one attention head: `head_dim` of the configuration, else hidden size / number of heads; that of the
    widest layer."""
    layers = layer_configs(hf_config)
    return max(int(getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads) for c in layers)


def key_value_heads(hf_config: Any) -> int:
    """Number of key-value heads: one in Falcon's multi-query layout, and that of the queries where none is given; that
    of the layer with most."""
    return max(map(_key_value_heads, layer_configs(hf_config)))


def _key_value_heads(hf_config: Any) -> int:
    if getattr(hf_config, "multi_query", False) and not getattr(hf_config, "new_decoder_architecture", False):
        return 1
    num_heads = getattr(hf_config, "num_key_value_heads", None) or getattr(hf_config, "num_kv_heads", None)
    return int(num_heads or hf_config.num_attention_heads)


def experts_used(hf_config: Any) -> tuple[int, int] | None:
    """How many experts a token is sent to, and how many there are; None for a model without experts."""
    used = ("num_experts_per_tok", "moe_k", "moe_topk")
    total = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    values = [next(filter(None, (getattr(hf_config, name, None) for name in names)), None) for names in (used, total)]
    return None if None in values else (_first(values[0]), _first(values[1]))


def expert_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The matrices of experts with their names: transformers holds those of all experts of a layer as one parameter of
    three dimensions, the first of which counts them."""
    config = getattr(model, "config", None)
    used = experts_used(config and config.get_text_config())
    named = model.named_parameters()
    return [] if used is None else [(n, p) for n, p in named if p.dim() == 3 and p.shape[0] == used[1]]


def _first(value: Any) -> int:
    """A number, or that of the first layer."""
    return int(value[0] if isinstance(value, list | tuple) else value)


def attention_windows(hf_config: Any) -> list[int | None]:
    """The sliding window of every layer; None where attention covers whole documents."""
    window = getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window] * int(hf_config.num_hidden_layers)


def falcon_alibi_width(hf_config: Any) -> int:
    """Elements of queries and keys that hold Falcon's ALiBi: one, and zeros, for kernels that take multiples of eight;
    0 for other models."""
    return 8 if hf_config.model_type == "falcon" and getattr(hf_config, "alibi", False) else 0


def is_parallel(hf_config: Any) -> bool:
    """True where the feed-forward layer has the same input as attention (Falcon)."""
    return bool(getattr(hf_config, "parallel_attn", False) or getattr(hf_config, "new_decoder_architecture", False))


def block_order(hf_config: Any) -> dict[str, int]:
    """Execution order of a block's modules by name, according to their input: 1 the attention input, 3 the attention
    output, 5 the feed-forward input, 6 the feed-forward activations. In parallel blocks attention and feed-forward
    layers have the same numbers."""
    return _ORDER | (_PARALLEL if is_parallel(hf_config) else {})
