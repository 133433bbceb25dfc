"""Reference models that keep the names of LLaMA's modules: Baichuan, InternLM 1 and 3, MiniCPM, XVERSE, Yi. Each layout
has a tiny `config.json`, random weights under the maker's names, and logits."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from original_parts import (
    Config,
    Layout,
    Names,
    Rotation,
    Shapes,
    Weights,
    alibi_slopes,
    attention,
    common_config,
    decoder,
    head_sizes,
    inverse_frequencies,
    layer_shapes,
    random_weights,
    rms_norm,
    rotate_halves,
)
from torch import Tensor

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")


@dataclass(frozen=True)
class Traits:
    """What sets one of these layouts apart and its config.json does not say."""

    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    packed: bool = False  # W_pack holds the rows of q, k and v one below the other
    alibi: bool = False  # else rotary, by halves
    unit_head: bool = False  # rows of lm_head are divided by their lengths (NormHead, arXiv:2309.10305)
    buffers: bool = False  # the files carry rotary_emb.inv_freq
    tied: bool = False


def _theta(config: Config) -> float:
    return float(config.get("rope_theta", config.get("rotary", {}).get("base", 10000.0)))


def _llama_like_weights(config: Config, generator: torch.Generator, traits: Traits) -> Weights:
    heads, kv_heads, dim = head_sizes(config)
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    layers = [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]
    bias: bool = config.get("bias", False)  # InternLM 1 leaves the feed-forward without
    qkv_bias, mlp_bias = config.get("qkv_bias", bias), bias and "qkv_bias" in config
    rows = dict(zip(QKV, (heads * dim, kv_heads * dim, kv_heads * dim), strict=True))
    rows = {"self_attn.W_pack": 3 * hidden} if traits.packed else rows
    linears = {name: (size, hidden, qkv_bias) for name, size in rows.items()}
    linears |= {"self_attn.o_proj": (hidden, heads * dim, bias), "mlp.down_proj": (hidden, inner, mlp_bias)}
    linears |= dict.fromkeys(GATE_UP, (inner, hidden, mlp_bias))
    shapes: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not traits.tied:
        shapes["lm_head.weight"] = (vocab, hidden)
    weights = random_weights(shapes | layer_shapes(layers, traits.norms, linears), generator)
    frequencies = inverse_frequencies(dim, _theta(config)).float()
    return weights | {f"{layer}.self_attn.rotary_emb.inv_freq": frequencies for layer in layers if traits.buffers}


def _llama_like_logits(config: Config, weights: Weights, ids: Tensor, traits: Traits) -> Tensor:
    """Decoder-only logits; scale_emb, scale_depth and dim_model_base are MiniCPM's (arXiv:2404.06395)."""
    heads, _, dim = head_sizes(config)
    eps, hidden, count = config["rms_norm_eps"], config["hidden_size"], config["num_hidden_layers"]
    qkv = ("self_attn.W_pack",) if traits.packed else QKV
    names = Names(traits.norms, qkv, "self_attn.o_proj", GATE_UP, "mlp.down_proj")
    rotate: Rotation = partial(rotate_halves, frequencies=inverse_frequencies(dim, _theta(config)))
    attend = partial(attention, dim=dim, rotate=rotate)
    if traits.alibi:
        attend = partial(attention, dim=dim, rotate=lambda t: t, slopes=alibi_slopes(heads))
    scale = config["scale_depth"] / math.sqrt(count) if "scale_depth" in config else 1.0
    x = weights["model.embed_tokens.weight"][ids] * config.get("scale_emb", 1)
    x = decoder(x, weights, [f"model.layers.{i}" for i in range(count)], names, attend, eps, scale=scale)
    shrink: float = hidden / config.get("dim_model_base", hidden)
    x = rms_norm(x, weights["model.norm.weight"], eps) / shrink
    head = weights["model.embed_tokens.weight" if traits.tied else "lm_head.weight"]
    head = head / head.square().sum(-1, keepdim=True).sqrt() if traits.unit_head else head
    return x @ head.T


def baichuan_7b_config(vocab_size: int = 131) -> Config:
    """Baichuan-7B (note the spelling BaiChuan); the published vocab_size is 64000."""
    return common_config("BaiChuanForCausalLM", "baichuan", max_position_embeddings=4096, vocab_size=vocab_size)


def baichuan_13b_config(vocab_size: int = 131) -> Config:
    """Baichuan-13B: 6 heads, so that slopes beyond a power of two count; the published vocab_size is 64000."""
    sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_hidden_layers": 2, "vocab_size": vocab_size}
    return common_config(
        "BaichuanForCausalLM", "baichuan", model_max_length=4096, gradient_checkpointing=False, **sizes
    )


def baichuan2_7b_config(vocab_size: int = 137) -> Config:
    """Baichuan2-7B; the published vocab_size, 125696, is what tells generation 2 from 1."""
    more = {"max_position_embeddings": 4096, "model_max_length": 4096, "tokenizer_class": "BaichuanTokenizer"}
    return common_config("BaichuanForCausalLM", "baichuan", vocab_size=vocab_size, z_loss_weight=0, **more)


def baichuan2_13b_config(vocab_size: int = 137) -> Config:
    """Baichuan2-13B; the published vocab_size, 125696, is what tells generation 2 from 1."""
    return baichuan_13b_config(vocab_size) | {"tokenizer_class": "BaichuanTokenizer", "z_loss_weight": 0}


def internlm_config() -> Config:
    """InternLM-7B with the `rotary` key of its later configs; first configs lack it (base 10000)."""
    more = {"bias": True, "rotary": {"base": 10000, "type": "dynamic"}, "max_position_embeddings": 2048}
    return common_config("InternLMForCausalLM", "internlm", pad_token_id=2, **more)


def internlm_20b_config() -> Config:
    """InternLM-20B: no bias; the base differs from the default here so that a converter must read it."""
    more = {"bias": False, "rotary": {"base": 25000, "type": "dynamic"}, "max_position_embeddings": 4096}
    return common_config("InternLMForCausalLM", "internlm", pad_token_id=2, num_hidden_layers=2, **more)


def internlm3_config(biased: bool = False) -> Config:
    """InternLM3-8B; both bias keys are false in the published file. head_dim here is not hidden_size / heads."""
    more: Config = {
        "qkv_bias": biased,
        "bias": biased,
        "head_dim": 24,
        "num_key_value_heads": 2,
        "rope_theta": 50000000,
    }
    more |= {"rope_scaling": {"factor": 6.0, "rope_type": "dynamic"}, "max_position_embeddings": 32768}
    return common_config("InternLM3ForCausalLM", "internlm3", pad_token_id=2, rms_norm_eps=1e-5, **more)


def minicpm_config() -> Config:
    """MiniCPM-1B (GQA); MiniCPM-2B has as many key/value heads as heads."""
    more = {"scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 24, "num_key_value_heads": 2, "rope_scaling": None}
    more |= {"max_position_embeddings": 4096, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    return common_config("MiniCPMForCausalLM", "minicpm", **more)


def xverse_config() -> Config:
    """XVERSE-7B/13B/65B (dense)."""
    return common_config(
        "XverseForCausalLM",
        "xverse",
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=1,
        max_position_embeddings=8192,
        max_tokenizer_truncation=6144,
    )


def yi_old_config() -> Config:
    """Yi-6B/34B as first published (November 2023), before the tensors took Llama's names."""
    more = {"num_key_value_heads": 2, "rope_theta": 5000000.0, "max_position_embeddings": 4096}
    return common_config("YiForCausalLM", "Yi", rms_norm_eps=1e-5, **more)


def _llama_like(config: Callable[..., Config], **traits: Any) -> Layout:
    chosen = Traits(**traits)
    return Layout(config, partial(_llama_like_weights, traits=chosen), partial(_llama_like_logits, traits=chosen))


LLAMAS: dict[str, Layout] = {
    "baichuan_7b": _llama_like(baichuan_7b_config, packed=True, buffers=True),
    "baichuan_13b": _llama_like(baichuan_13b_config, packed=True, alibi=True),
    "baichuan2_7b": _llama_like(baichuan2_7b_config, packed=True, unit_head=True),
    "baichuan2_13b": _llama_like(baichuan2_13b_config, packed=True, alibi=True, unit_head=True),
    "internlm": _llama_like(internlm_config, buffers=True),
    "internlm_20b": _llama_like(internlm_20b_config),
    "internlm3": _llama_like(internlm3_config),
    "minicpm": _llama_like(minicpm_config, tied=True),
    "xverse": _llama_like(xverse_config, buffers=True),
    "yi_old": _llama_like(yi_old_config, norms=("ln1", "ln2")),
}
