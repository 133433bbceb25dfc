"""Parts of the reference forward passes of models published with code of their own: plain tensor arithmetic, in the
weights' number format, from the published equations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Config = dict[str, Any]
Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Rotation = Callable[[Tensor], Tensor]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square layer norm (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4)."""
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    """x W^T, plus b where the checkpoint holds a bias of that name."""
    product = x @ weights[f"{name}.weight"].T
    return product + weights[f"{name}.bias"] if f"{name}.bias" in weights else product


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up (Shazeer 2020, arXiv:2002.05202, section 2)."""
    return gate * torch.sigmoid(gate) * up


def inverse_frequencies(dim: int, base: float) -> Tensor:
    """theta_i = base^(-2i/dim) (Su et al. 2021, RoFormer, arXiv:2104.09864, section 3.2.2)."""
    return base ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def rotate_halves(x: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE of [.., length, dim] with pair i = entries (i, i + dim/2), the GPT-NeoX order."""
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def rotate_pairs(x: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE of [.., length, dim] with pair i = entries (2i, 2i + 1), the order of RoFormer eq. 34 and of Meta."""
    angles = torch.arange(x.shape[-2], dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1).flatten(-2)


def alibi_slopes(heads: int) -> list[float]:
    """ALiBi slopes (Press et al. 2022, arXiv:2108.12409, section 3; the authors' rule where heads is no power of 2)."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]


def attention(q: Tensor, k: Tensor, v: Tensor, dim: int, rotate: Rotation, slopes: list[float] | None = None) -> Tensor:
    """Causal softmax(q k^T / sqrt(dim) + ALiBi) v on [batch, length, heads * dim]; query heads share k, v by groups."""
    q, k, v = (t.reshape(*t.shape[:2], -1, dim).transpose(1, 2) for t in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    q, k, v = rotate(q), rotate(k).repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(dim)
    steps = torch.arange(q.shape[-2])
    distance = steps[:, None] - steps
    if slopes is not None:
        scores = scores - torch.tensor(slopes, dtype=q.dtype)[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)


def random_weights(shapes: Shapes, generator: torch.Generator) -> Weights:
    """Biases around 0, norm weights around 1, matrices scaled by their inputs; every entry is random."""
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 0.3 * noise if name.endswith("bias") else 1 + 0.2 * noise
        else:
            weights[name] = 1.2 * noise / math.sqrt(shape[-1])
    return weights


def layer_shapes(layers: list[str], norms: tuple[str, ...], linears: dict[str, tuple[int, int, bool]]) -> Shapes:
    """Shapes for every layer prefix, given the norms and each linear map's (outputs, inputs, has a bias)."""
    hidden = next(iter(linears.values()))[1]  # the first map reads the residual stream
    shapes: Shapes = {f"{layer}.{name}.weight": (hidden,) for layer in layers for name in norms}
    for layer in layers:
        for name, (outputs, inputs, biased) in linears.items():
            shapes[f"{layer}.{name}.weight"] = (outputs, inputs)
            if biased:
                shapes[f"{layer}.{name}.bias"] = (outputs,)
    return shapes


@dataclass(frozen=True)
class Names:
    """What the parts of one layer are called: a fused map is a single name, split by the layout's own functions."""

    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    gate_up: tuple[str, ...]
    down: str


def decoder(
    x: Tensor,
    weights: Weights,
    layers: list[str],
    names: Names,
    attend: Callable[..., Tensor],
    eps: float,
    split: Callable[[Tensor], Sequence[Tensor]] | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Pre-norm layers with SwiGLU (LLaMA, arXiv:2302.13971, section 2.2); `scale` multiplies what each half adds."""
    for layer in layers:
        y = rms_norm(x, weights[f"{layer}.{names.norms[0]}.weight"], eps)
        qkv = tuple(linear(y, weights, f"{layer}.{name}") for name in names.qkv)
        mixed = attend(*(split(qkv[0]) if split else qkv[0].chunk(3, -1) if len(qkv) == 1 else qkv))
        x = x + scale * linear(mixed, weights, f"{layer}.{names.out}")
        y = rms_norm(x, weights[f"{layer}.{names.norms[1]}.weight"], eps)
        gate_up = tuple(linear(y, weights, f"{layer}.{name}") for name in names.gate_up)
        inner = swiglu(*(gate_up[0].chunk(2, -1) if len(gate_up) == 1 else gate_up))
        x = x + scale * linear(inner, weights, f"{layer}.{names.down}")
    return x


def common_config(architecture: str, model_type: str, **more: Any) -> Config:
    """Keys that the config.json of all these layouts share; `more` adds to and overrides them."""
    config = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu", "hidden_size": 64}
    config |= {"intermediate_size": 152, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 131}
    config |= {"rms_norm_eps": 1e-6, "initializer_range": 0.02, "use_cache": True, "tie_word_embeddings": False}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "torch_dtype": "bfloat16"}
    return config | more


def head_sizes(config: Config) -> tuple[int, int, int]:
    """Query heads, key/value heads and head size."""
    heads = int(config["num_attention_heads"])
    dim = int(config.get("head_dim", config["hidden_size"] // heads))
    return heads, int(config.get("num_key_value_heads", heads)), dim


META = Names(
    norms=("attention_norm", "ffn_norm"),
    qkv=("attention.wq", "attention.wk", "attention.wv"),
    out="attention.wo",
    gate_up=("feed_forward.w1", "feed_forward.w3"),
    down="feed_forward.w2",
)


class Layout(NamedTuple):
    """The three functions of one layout."""

    config: Callable[..., Config]
    weights: Callable[[Config, torch.Generator], Weights]
    logits: Callable[[Config, Weights, Tensor], Tensor]
