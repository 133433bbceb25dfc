"""Forward functions of single modules, built on `fireflyds_kernels`; the `fused` tables of the families name them.

Each has the signature of the transformers module that it replaces and uses that module's attributes; it is bound as the
`forward` of one instance, and the class is unchanged. A module's parameters are used only within its own call, because
ZeRO-3 gathers them when the module is called.
"""

from itertools import pairwise
from typing import Any

import torch
from fireflyds_kernels import qlora_linear, rms_norm, rope, swiglu
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from fireflyds.models.architecture import falcon_alibi_width
from fireflyds.models.baichuan import alibi_slopes
from fireflyds.models.packed.boundaries import SequenceBoundaries


def norm(self: Any, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm; with a residual, returns the norm of the sum, and the sum."""
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
    """LLaMA's attention over `[1, T, d]`, with the layer's sliding window (Qwen) and q and k norms (Qwen3), if any."""
    return _rope_attention(self, hidden_states, position_embeddings, boundaries, getattr(self, "sliding_window", None))


def mistral_attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    boundaries: SequenceBoundaries,
    **_: Any,
) -> tuple[Tensor, None]:
    """LLaMA's attention with the sliding window of the model's configuration in every layer."""
    return _rope_attention(self, hidden_states, position_embeddings, boundaries, self.config.sliding_window)


def _rope_attention(
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
    """Returns cos and sin `[1, T, R]` under dynamic NTK scaling, computed per document from its length.

    The base is base · (factor · n / M − factor + 1)^(R / (R − 2)) for a document of n > M tokens, M the
    `max_position_embeddings` of the model, as in transformers for a single sequence. No host-device synchronisation.
    """
    lengths = self.packing.boundaries.cu_seqlens.diff()
    per_token = lengths.repeat_interleave(lengths, output_size=position_ids.shape[1]).float()
    max_positions, dim = self.config.max_position_embeddings, 2 * self.inv_freq.shape[0]
    parameters = self.config.rope_parameters
    ntk_scale = parameters["factor"] * per_token.clamp(min=max_positions) / max_positions - (parameters["factor"] - 1)
    base = parameters["rope_theta"] * ntk_scale ** (dim / (dim - 2))
    exponents = torch.arange(0, dim, 2, device=x.device).float() / dim
    angles = (position_ids[0].float() / base[:, None].pow(exponents).T).T.repeat(1, 2)[None]
    return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


@torch.no_grad()
def long_rotary(self: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin `[1, T, R]` under LongRoPE (arXiv 2402.13753): the long frequencies in documents that exceed
    the original positions, the short ones in the others, as in transformers for a single sequence."""
    original = self.config.rope_parameters["original_max_position_embeddings"]
    lengths = self.packing.boundaries.cu_seqlens.diff()
    per_token = lengths.repeat_interleave(lengths, output_size=position_ids.shape[1])
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](self.config, x.device, seq_len=original + 1)
    frequencies = torch.where((per_token > original)[:, None], long, self.original_inv_freq.to(x.device))
    angles = (position_ids[0].float()[:, None] * frequencies).repeat(1, 2)[None]
    return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def by_document(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A mixer with a state or a convolution over `[1, T, d]`, on one document after the other: nothing is carried from
    one to the next. The host reads the boundaries."""
    bounds = self.packing.boundaries.cu_seqlens.tolist()
    parts = [hidden_states[:, first:last] for first, last in pairwise(bounds) if last > first]
    return torch.cat([type(self).forward(self, part, *args, **kwargs) for part in parts], dim=1)


def pre_norm_layer(self: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    """Pre-norm decoder layer; the residual addition after attention is fused into the second norm."""
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
    # Under autocast the residual stream may have a wider dtype than the output of attention.
    normed, total = self.post_attention_layernorm(attended.to(hidden_states.dtype), hidden_states)
    return total + self.mlp(normed)


def bloom_attention(self: Any, hidden_states: Tensor, residual: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """BLOOM's attention over `[1, T, d]` with ALiBi, plus the residual."""
    tokens = hidden_states.shape[1]
    q, k, v = self.query_key_value(hidden_states)[0].view(tokens, self.num_heads, 3, self.head_dim).unbind(2)
    slopes = alibi_slopes(self.num_heads, q.device)
    out = self.packing.boundaries.attention(q, k, v, scale=self.inv_norm_factor, alibi_slopes=slopes)
    dropped = nn.functional.dropout(self.dense(out.flatten(1)[None]), self.hidden_dropout, self.training)
    return residual + dropped, None


def falcon_attention(
    self: Any, hidden_states: Tensor, alibi: Tensor | None, *_: Any, position_embeddings: Any = None, **__: Any
) -> tuple[Tensor, None]:
    """Falcon's attention over `[1, T, d]`: multi-head, multi-query or grouped, with ALiBi or rotary positions."""
    tokens, fused = hidden_states.shape[1], self.query_key_value(hidden_states)[0]
    if self.new_decoder_architecture:
        groups = fused.view(tokens, self.num_kv_heads, -1, self.head_dim)
        q, k, v = groups[:, :, :-2].flatten(1, 2), groups[:, :, -2], groups[:, :, -1]
    elif self.multi_query:
        heads = fused.view(tokens, self.num_heads + 2, self.head_dim)
        q, k, v = heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    else:
        q, k, v = fused.view(tokens, self.num_heads, 3, self.head_dim).unbind(2)
    if alibi is None:
        q, k = rope(q, k, *(table[0] for table in position_embeddings))
    else:
        q, k, v = _with_falcon_alibi(q, k, v, self.packing.boundaries, falcon_alibi_width(self.config))
    out = self.packing.boundaries.attention(q, k, v, scale=self.inv_norm_factor)
    return self.dense(out.flatten(1)[None]), None


def _with_falcon_alibi(
    q: Tensor, k: Tensor, v: Tensor, boundaries: SequenceBoundaries, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys whose products contain Falcon's ALiBi, which is scaled together with them.

    Transformers rounds slope times position to bfloat16, 8 bits, so the bias is not the slope times the distance. Among
    the keys of one query it depends on the key alone, and becomes one more element of it.
    """
    heads = q.shape[1]
    slopes = alibi_slopes(heads, q.device).bfloat16()
    bias = (slopes * boundaries.positions(len(q))[:, None]).to(q.dtype)[..., None]
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    ones, bias = (nn.functional.pad(x, (0, width - 1)) for x in (torch.ones_like(bias), bias))
    return torch.cat([q, ones], -1), torch.cat([k, bias], -1), v


def four_bit_lora(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """LoRA on a 4-bit layer with the `qlora_linear` kernel: one active, unmerged adapter without bias or variant.

    Any other case, and ZeRO-3, uses PEFT's own forward pass.
    """
    base, names = self.base_layer, self.active_adapters
    supported = (
        len(names) == 1 and names[0] in self.lora_A and not (self.merged or self.disable_adapters or args or kwargs)
    )
    supported = supported and names[0] not in self.lora_variant and self.lora_B[names[0]].bias is None
    # ZeRO-3 gathers the adapter's weights only for calls of the modules that own them.
    if not supported or hasattr(self.lora_A[names[0]].weight, "ds_id"):
        return type(self).forward(self, x, *args, **kwargs)
    name, dropout = names[0], self.lora_dropout[names[0]]
    return qlora_linear(
        x,
        base.weight,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.scaling[name],
        base.bias,
        dropout=getattr(dropout, "p", 0.0) if dropout.training else 0.0,
        keep_weight=self.packing.recomputing and self.training,
    )
