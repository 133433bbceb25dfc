"""Reference models with names of their own: InternLM2, the first Qwen, ChatGLM2 and 3, and Meta's LLaMA. Each layout
has a tiny configuration, random weights under the maker's names, and logits."""

import math
from functools import partial

import torch
from original_parts import (
    META,
    Config,
    Layout,
    Names,
    Shapes,
    Weights,
    attention,
    common_config,
    decoder,
    head_sizes,
    inverse_frequencies,
    layer_shapes,
    linear,
    random_weights,
    rms_norm,
    rotate_halves,
    rotate_pairs,
)
from torch import Tensor


def internlm2_config(biased: bool = False) -> Config:
    """InternLM2-7B; `bias` (wqkv and wo) is false in the published files."""
    more: Config = {"bias": biased, "num_key_value_heads": 2, "rope_theta": 1000000, "max_position_embeddings": 32768}
    more |= {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "attn_implementation": "eager"}
    return common_config("InternLM2ForCausalLM", "internlm2", pad_token_id=2, rms_norm_eps=1e-5, **more)


def internlm2_weights(config: Config, generator: torch.Generator) -> Weights:
    heads, kv_heads, dim = head_sizes(config)
    hidden, inner, vocab, bias = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size", "bias"))
    linears = {"attention.wqkv": ((heads + 2 * kv_heads) * dim, hidden, bias), "attention.wo": (hidden, hidden, bias)}
    linears |= {"feed_forward.w1": (inner, hidden, False), "feed_forward.w3": (inner, hidden, False)}
    linears["feed_forward.w2"] = (hidden, inner, False)
    shapes: Shapes = {"model.tok_embeddings.weight": (vocab, hidden), "output.weight": (vocab, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    return random_weights(shapes | layer_shapes(layers, META.norms, linears), generator)


def internlm2_logits(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    """InternLM2 report (arXiv:2403.17297): per group, wqkv holds its query heads, then its key, then its value."""
    heads, kv_heads, dim = head_sizes(config)
    names = Names(META.norms, ("attention.wqkv",), META.out, META.gate_up, META.down)
    rotate = partial(rotate_halves, frequencies=inverse_frequencies(dim, config["rope_theta"]))

    def split(packed: Tensor) -> tuple[Tensor, ...]:
        groups = packed.reshape(*packed.shape[:2], kv_heads, heads // kv_heads + 2, dim)
        return tuple(part.flatten(2) for part in (groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]))

    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    attend = partial(attention, dim=dim, rotate=rotate)
    x = weights["model.tok_embeddings.weight"][ids]
    x = decoder(x, weights, layers, names, attend, config["rms_norm_eps"], split)
    return linear(rms_norm(x, weights["model.norm.weight"], config["rms_norm_eps"]), weights, "output")


# --- Qwen (first generation) ---


def qwen1_config() -> Config:
    """Qwen-7B; intermediate_size counts both halves of the gated MLP."""
    config = common_config("QWenLMHeadModel", "qwen", intermediate_size=304, layer_norm_epsilon=1e-6, kv_channels=16)
    for key in ("rms_norm_eps", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype"):
        del config[key]
    config |= {"max_position_embeddings": 32768, "seq_length": 8192, "no_bias": True, "rotary_emb_base": 20000}
    config |= {"rotary_pct": 1.0, "use_dynamic_ntk": True, "use_logn_attn": True, "scale_attn_weights": True}
    return config | {"tokenizer_class": "QWenTokenizer", "use_flash_attn": "auto", "attn_dropout_prob": 0.0}


def qwen1_weights(config: Config, generator: torch.Generator) -> Weights:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    width = config["kv_channels"] * config["num_attention_heads"]
    linears = {"attn.c_attn": (3 * width, hidden, True), "attn.c_proj": (hidden, width, False)}
    linears |= {"mlp.w1": (inner, hidden, False), "mlp.w2": (inner, hidden, False)}
    linears["mlp.c_proj"] = (hidden, inner, False)
    shapes: Shapes = {"transformer.wte.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden)}
    shapes["transformer.ln_f.weight"] = (hidden,)
    layers = [f"transformer.h.{i}" for i in range(config["num_hidden_layers"])]
    return random_weights(shapes | layer_shapes(layers, ("ln_1", "ln_2"), linears), generator)


def qwen1_logits(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    """Qwen report (arXiv:2309.16609, 2.3); w2 gates w1. Log-n attention and NTK, beyond seq_length, are left out."""
    if ids.shape[1] > config["seq_length"]:
        raise ValueError("log-n attention and dynamic NTK are not part of this reference")
    dim, eps = config["kv_channels"], config["layer_norm_epsilon"]
    names = Names(("ln_1", "ln_2"), ("attn.c_attn",), "attn.c_proj", ("mlp.w2", "mlp.w1"), "mlp.c_proj")
    rotate = partial(rotate_halves, frequencies=inverse_frequencies(dim, config["rotary_emb_base"]))
    layers = [f"transformer.h.{i}" for i in range(config["num_hidden_layers"])]
    attend = partial(attention, dim=dim, rotate=rotate)
    x = decoder(weights["transformer.wte.weight"][ids], weights, layers, names, attend, eps)
    return linear(rms_norm(x, weights["transformer.ln_f.weight"], eps), weights, "lm_head")


# --- ChatGLM2, ChatGLM3 and GLM-4-9B as first published ---


def _chatglm_config(name: str, seq_length: int, rope_ratio: float | None) -> Config:
    config: Config = {"_name_or_path": f"THUDM/{name}", "model_type": "chatglm", "architectures": ["ChatGLMModel"]}
    config |= {"add_bias_linear": False, "add_qkv_bias": True, "apply_query_key_layer_scaling": True}
    config |= {"apply_residual_connection_post_layernorm": False, "attention_softmax_in_fp32": True}
    config |= {"fp32_residual_connection": False, "rmsnorm": True, "post_layer_norm": True, "original_rope": True}
    config |= {"hidden_size": 64, "ffn_hidden_size": 152, "kv_channels": 16, "num_attention_heads": 4, "num_layers": 3}
    config |= {"multi_query_attention": True, "multi_query_group_num": 2, "layernorm_epsilon": 1e-5}
    config |= {"padded_vocab_size": 131, "seq_length": seq_length, "tie_word_embeddings": False}
    config |= {"eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "float16"}
    return config if rope_ratio is None else config | {"rope_ratio": rope_ratio}


def chatglm2_config(rope_ratio: float | None = None) -> Config:
    """ChatGLM2-6B, or with a rope_ratio ChatGLM2-6B-32K."""
    return _chatglm_config("chatglm2-6b" if rope_ratio is None else "chatglm2-6b-32k", 32768, rope_ratio)


def chatglm3_config(rope_ratio: float | None = None) -> Config:
    """ChatGLM3-6B, or with a rope_ratio ChatGLM3-6B-32K."""
    long = rope_ratio is not None
    return _chatglm_config("chatglm3-6b-32k" if long else "chatglm3-6b", 32768 if long else 8192, rope_ratio)


def chatglm_weights(config: Config, generator: torch.Generator) -> Weights:
    hidden, inner, dim = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    width, vocab = config["num_attention_heads"] * dim, config["padded_vocab_size"]
    rows = width + 2 * config["multi_query_group_num"] * dim
    linears = {"self_attention.query_key_value": (rows, hidden, config["add_qkv_bias"])}
    linears |= {"self_attention.dense": (hidden, width, False), "mlp.dense_h_to_4h": (2 * inner, hidden, False)}
    linears["mlp.dense_4h_to_h"] = (hidden, inner, False)
    shapes: Shapes = {"transformer.embedding.word_embeddings.weight": (vocab, hidden)}
    shapes |= {"transformer.output_layer.weight": (vocab, hidden)}
    shapes |= {"transformer.encoder.final_layernorm.weight": (hidden,)}
    layers = [f"transformer.encoder.layers.{i}" for i in range(config["num_layers"])]
    norms = ("input_layernorm", "post_attention_layernorm")
    weights = random_weights(shapes | layer_shapes(layers, norms, linears), generator)
    return weights | {"transformer.rotary_pos_emb.inv_freq": inverse_frequencies(dim // 2, 10000.0).float()}


def _chatglm_logits(config: Config, weights: Weights, ids: Tensor, frequencies: Tensor) -> Tensor:
    """ChatGLM2-6B's modeling code: the first half of each head turns in adjacent pairs, the other half stays."""
    dim, eps = config["kv_channels"], config["layernorm_epsilon"]
    widths = [dim * config[k] for k in ("num_attention_heads", "multi_query_group_num", "multi_query_group_num")]

    def rotate(x: Tensor) -> Tensor:
        return torch.cat((rotate_pairs(x[..., : dim // 2], frequencies), x[..., dim // 2 :]), -1)

    norms = ("input_layernorm", "post_attention_layernorm")
    qkv, gate_up = ("self_attention.query_key_value",), ("mlp.dense_h_to_4h",)
    names = Names(norms, qkv, "self_attention.dense", gate_up, "mlp.dense_4h_to_h")
    layers = [f"transformer.encoder.layers.{i}" for i in range(config["num_layers"])]
    attend = partial(attention, dim=dim, rotate=rotate)
    x = weights["transformer.embedding.word_embeddings.weight"][ids]
    x = decoder(x, weights, layers, names, attend, eps, partial(torch.split, split_size_or_sections=widths, dim=-1))
    x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], eps)
    return linear(x, weights, "transformer.output_layer")


def chatglm2_logits(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    """rope_ratio divides positions: position interpolation (Chen et al. 2023, arXiv:2306.15595)."""
    frequencies = inverse_frequencies(config["kv_channels"] // 2, 10000.0) / config.get("rope_ratio", 1)
    return _chatglm_logits(config, weights, ids, frequencies)


def chatglm3_logits(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    """rope_ratio multiplies the rotary base (modeling code of ChatGLM3-6B-32K, LongAlign and GLM-4-9B)."""
    frequencies = inverse_frequencies(config["kv_channels"] // 2, 10000.0 * config.get("rope_ratio", 1))
    return _chatglm_logits(config, weights, ids, frequencies)


# --- Meta's own checkpoints of Llama 1, 2 and 3 ---


def meta_llama_config(version: str = "1") -> Config:
    """params.json of Llama "1", "2" (with GQA, as 70B), "3" and "3.1"; 1 and 2 leave vocab_size to the tokenizer."""
    params: Config = {"dim": 64, "multiple_of": 24, "n_heads": 4, "n_layers": 3, "norm_eps": 1e-5, "vocab_size": -1}
    if version == "1":
        return params | {"norm_eps": 1e-6}
    params |= {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3}
    if version == "2":
        return params
    params |= {"vocab_size": 132, "rope_theta": 500000.0}
    return params | {"use_scaled_rope": True} if version == "3.1" else params


def meta_llama_hidden(params: Config) -> int:
    """Rows of w1: 2/3 of 4 dim, times the multiplier, rounded up to a multiple (meta-llama/llama, llama/model.py)."""
    hidden = int(params.get("ffn_dim_multiplier", 1) * int(8 * params["dim"] / 3))
    multiple = int(params["multiple_of"])
    return -(-hidden // multiple) * multiple


def meta_llama_weights(params: Config, generator: torch.Generator, vocab_size: int = 132) -> Weights:
    dim, inner, vocab = params["dim"], meta_llama_hidden(params), max(params["vocab_size"], vocab_size)
    kv_rows = params.get("n_kv_heads", params["n_heads"]) * (dim // params["n_heads"])
    linears = {name: (rows, dim, False) for name, rows in zip(META.qkv, (dim, kv_rows, kv_rows), strict=True)}
    linears |= {META.out: (dim, dim, False), META.down: (dim, inner, False)}
    linears |= dict.fromkeys(META.gate_up, (inner, dim, False))
    shapes: Shapes = {"tok_embeddings.weight": (vocab, dim), "norm.weight": (dim,), "output.weight": (vocab, dim)}
    layers = [f"layers.{i}" for i in range(params["n_layers"])]
    weights = random_weights(shapes | layer_shapes(layers, META.norms, linears), generator)
    if "rope_theta" not in params:
        weights["rope.freqs"] = inverse_frequencies(dim // params["n_heads"], 10000.0).float()
    return weights


def meta_llama_shards(params: Config, weights: Weights, count: int) -> list[Weights]:
    """The files consolidated.00.pth ..: columns of wo and w2 are split, rows of the rest; vectors are in every file.

    tok_embeddings is split by columns in Llama 1 and 2, by rows (the vocabulary) in Llama 3, told here by rope_theta.
    """
    by_columns = [META.out, META.down] + ([] if "rope_theta" in params else ["tok_embeddings"])
    shards: list[Weights] = [{} for _ in range(count)]
    for name, weight in weights.items():
        dimension = int(name.removesuffix(".weight").endswith(tuple(by_columns)))
        parts = [weight] * count if weight.ndim == 1 else weight.chunk(count, dimension)
        for shard, part in zip(shards, parts, strict=True):
            shard[name] = part.clone()
    return shards


def scaled_frequencies(frequencies: Tensor) -> Tensor:
    """Llama 3.1's use_scaled_rope (meta-llama/llama-models, models/llama3): fast ones stay, slow ones are 8 x slower.

    Between the wavelengths 8192 / 4 and 8192 / 1 the two are blended linearly in 8192 / wavelength.
    """
    turns = 8192 * frequencies / (2 * math.pi)  # periods within the 8192 positions of Llama 3
    blend = ((turns - 1) / (4 - 1)).clamp(0, 1)
    return blend * frequencies + (1 - blend) * frequencies / 8


def meta_llama_logits(params: Config, weights: Weights, ids: Tensor) -> Tensor:
    """meta-llama/llama and meta-llama/llama-models: rotary embedding of adjacent pairs, grouped key/value heads."""
    dim, eps = params["dim"] // params["n_heads"], params["norm_eps"]
    frequencies = inverse_frequencies(dim, params.get("rope_theta", 10000.0))
    frequencies = scaled_frequencies(frequencies) if params.get("use_scaled_rope") else frequencies
    attend = partial(attention, dim=dim, rotate=partial(rotate_pairs, frequencies=frequencies))
    layers = [f"layers.{i}" for i in range(params["n_layers"])]
    x = decoder(weights["tok_embeddings.weight"][ids], weights, layers, META, attend, eps)
    return linear(rms_norm(x, weights["norm.weight"], eps), weights, "output")


OTHERS: dict[str, Layout] = {
    "internlm2": Layout(internlm2_config, internlm2_weights, internlm2_logits),
    "qwen1": Layout(qwen1_config, qwen1_weights, qwen1_logits),
    "chatglm2": Layout(chatglm2_config, chatglm_weights, chatglm2_logits),
    "chatglm3": Layout(chatglm3_config, chatglm_weights, chatglm3_logits),
    "meta_llama": Layout(meta_llama_config, meta_llama_weights, meta_llama_logits),
}
