"""Forward passes of single modules on our kernels, by the names that the families' tables use.

Each takes what the module of transformers takes and reads that module's own parts, so it becomes the `forward` of one
instance and nothing else. A module's parameters are used by the module itself, never by its neighbour: ZeRO-3 gathers
them when the module is called.
"""

import functools
import math
from typing import Any

import torch
from fireflyds_kernels import qlora_linear, rms_norm, rope, swiglu
from torch import Tensor, nn

from fireflyds.models.packed.boundaries import SequenceBoundaries


def norm(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMS norm; with a residual, the norm of the sum and the sum."""
    if residual is None:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)
    return rms_norm(hidden_states, self.weight, self.variance_epsilon, residual)


def gated_mlp(self: Any, x: Tensor) -> Tensor:
    """down(silu(gate(x)) · up(x))."""
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def rotary_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    boundaries: SequenceBoundaries,
    **_: Any,
) -> tuple[Tensor, None]:
    """LLaMA's attention over `[1, T, d]`, with Qwen's window of a layer and Qwen3's norms of heads where it has them."""
    return _rotary(self, hidden_states, position_embeddings, boundaries, getattr(self, "sliding_window", None))


def mistral_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    boundaries: SequenceBoundaries,
    **_: Any,
) -> tuple[Tensor, None]:
    """LLaMA's attention with one window for all layers."""
    return _rotary(self, hidden_states, position_embeddings, boundaries, self.config.sliding_window)


def _rotary(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    boundaries: SequenceBoundaries,
    window: int | None,
) -> tuple[Tensor, None]:
    heads = (hidden_states.shape[1], -1, self.head_dim)
    q, k, v = (projection(hidden_states)[0].view(heads) for projection in (self.q_proj, self.k_proj, self.v_proj))
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    q, k = rope(q, k, *(table[0] for table in position_embeddings))
    out = boundaries.attention(q, k, v, scale=self.scaling, window=window)
    return self.o_proj(out.flatten(1)[None]), None


@torch.no_grad()
def dynamic_rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[1, T, R]` under dynamic NTK scaling, each document by its own length.

    base · (factor · n / most − factor + 1)^(R / (R − 2)) for a document of n tokens beyond the model's `most` positions,
    as transformers has it for a single sequence; nothing waits for the device.
    """
    lengths = self.packing.boundaries.cu_seqlens.diff()
    per_token = lengths.repeat_interleave(lengths, output_size=position_ids.shape[1]).float()
    most, dim = self.config.max_position_embeddings, 2 * self.inv_freq.shape[0]
    rules = self.config.rope_parameters
    stretch = rules["factor"] * per_token.clamp(min=most) / most - (rules["factor"] - 1)
    base = rules["rope_theta"] * stretch ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=x.device).float() / dim
    angles = (position_ids[0].float() / base[:, None].pow(exponents).T).T.repeat(1, 2)[None]
    return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def pre_norm_layer(self: Any, hidden_states: Tensor, **rest: Any) -> Tensor:
    """Attention and feed-forward, each behind its norm; the sum in the middle is taken by the second norm."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **rest)
    # Under autocast the residual stream may be wider than what attention gives.
    normed, total = self.post_attention_layernorm(attended.to(hidden_states.dtype), hidden_states)
    return total + self.mlp(normed)


@functools.cache
def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """Slopes of ALiBi, `[H]`: a geometric series, for other than powers of two filled up with every second of the next
    (arXiv 2108.12409)."""
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, device=device)


def bloom_attention(self: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    tokens = hidden_states.shape[1]
    q, k, v = self.query_key_value(hidden_states)[0].view(tokens, self.num_heads, 3, self.head_dim).unbind(2)
    slopes = alibi_slopes(self.num_heads, q.device)
    out = self.packing.boundaries.attention(q, k, v, scale=self.inv_norm_factor, alibi_slopes=slopes)
    dropped = nn.functional.dropout(self.dense(out.flatten(1)[None]), self.hidden_dropout, self.training)
    return residual + dropped, None


def falcon_attention(
    self: Any, hidden_states: Tensor, alibi: Tensor | None, *_: Any, position_embeddings: Any = None, **__: Any
) -> tuple[Tensor, None]:
    tokens, fused = hidden_states.shape[1], self.query_key_value(hidden_states)[0]
    if self.new_decoder_architecture:
        groups = fused.view(tokens, self.num_kv_heads, -1, self.head_dim)
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
    elif self.multi_query:
        heads = fused.view(tokens, self.num_heads + 2, self.head_dim)
        q, k, v = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    else:
        q, k, v = fused.view(tokens, self.num_heads, 3, self.head_dim).unbind(2)
    slopes = None
    if alibi is None:
        q, k = rope(q, k, *(table[0] for table in position_embeddings))
    else:
        # Falcon scales the bias together with the scores.
        slopes = alibi_slopes(self.num_heads, q.device) * self.inv_norm_factor
    out = self.packing.boundaries.attention(q, k, v, scale=self.inv_norm_factor, alibi_slopes=slopes)
    return self.dense(out.flatten(1)[None]), None


def four_bit_lora(self: Any, x: Tensor, *rest: Any, **options: Any) -> Tensor:
    """PEFT's adapter on a 4-bit layer, where it is the plain case; PEFT's own forward pass for any other, and under ZeRO-3."""
    base, names = self.base_layer, self.active_adapters
    plain = (
        len(names) == 1 and names[0] in self.lora_A and not (self.merged or self.disable_adapters or rest or options)
    )
    plain = plain and names[0] not in self.lora_variant and self.lora_B[names[0]].bias is None
    # ZeRO-3 gathers the adapter's weights only for the modules that hold them.
    if not plain or hasattr(self.lora_A[names[0]].weight, "ds_id"):
        return type(self).forward(self, x, *rest, **options)
    name, drop = names[0], self.lora_dropout[names[0]]
    return qlora_linear(
        x, base.weight, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], base.bias,
        dropout=getattr(drop, "p", 0.0) if drop.training else 0.0,
        keep_weight=self.packing.recomputing and self.training,
    )  # fmt: skip
