"""Baichuan and Baichuan 2 as models of transformers, under their makers' names of weights and keys of `config.json`.

They differ from LLaMA in three things (arXiv 2309.10305): one product `W_pack` computes queries, keys and values;
models without `max_position_embeddings` (13B) have ALiBi instead of rotary positions; the rows of Baichuan 2's head are
divided by their norms.
"""

import functools
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama import modeling_llama as llama
from transformers.models.llama.configuration_llama import LlamaConfig

from fireflyds.errors import UserError

# Rows of the two generations' vocabularies.
_ROWS_1, _ROWS_2 = 64_000, 125_696


@strict
class BaichuanConfig(LlamaConfig):
    """`config.json` of Baichuan. `normalized_head`: the rows of the head are divided by their norms; unset: by the
    number of rows before any expansion, which differs between the two generations."""

    model_type = "baichuan"
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    normalized_head: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        rows = min(kwargs.get("base_vocab_sizes") or [self.vocab_size])
        if self.normalized_head is None and rows in (_ROWS_1, _ROWS_2):
            self.normalized_head = rows == _ROWS_2

    @property
    def alibi(self) -> bool:
        """True for ALiBi instead of rotary positions."""
        return self.max_position_embeddings is None

    def has_normalized_head(self) -> bool:
        """True where the rows of the head are divided by their norms.

        Raises:
            UserError: neither `normalized_head` nor the number of rows tells.
        """
        if self.normalized_head is None:
            raise UserError(
                f"has {self.vocab_size:,} rows, neither the {_ROWS_1:,} of Baichuan nor the {_ROWS_2:,} of Baichuan 2",
                key="model",
                value=self.model_type,
                remedy="Add normalized_head to config.json: true for Baichuan 2, else false",
            )
        return self.normalized_head

    @property
    def other_readers_normalize(self) -> bool:
        """True where other programs divide the rows of the head too; they know Baichuan 2 by its number of rows."""
        return self.vocab_size == _ROWS_2


class NormHead(nn.Linear):
    """Head whose rows are divided by their Euclidean norms."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns logits `[..., V]`."""
        return nn.functional.linear(hidden, nn.functional.normalize(self.weight))


class BaichuanAttention(nn.Module):
    """Attention with one product for queries, keys and values, and rotary positions or ALiBi."""

    is_causal = True

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads, self.head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        self.num_key_value_groups, self.scaling = 1, self.head_dim**-0.5
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the output `[B, T, d]`, and the attention weights where the implementation has them."""
        packed = self.W_pack(hidden_states).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = (states.transpose(1, 2) for states in packed.unbind(2))
        if position_embeddings is not None:
            q, k = llama.apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if self.config.alibi:
            kwargs["alibi_slopes"] = slopes = alibi_slopes(self.num_heads, q.device)
            if attention_mask is not None:
                attention_mask = attention_mask + _alibi(slopes, q.shape[2], k.shape[2]).to(q.dtype)
        attend = llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, llama.eager_attention_forward
        )
        out, weights = attend(self, q, k, v, attention_mask, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.o_proj(out.flatten(2)), weights


@functools.cache
def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """ALiBi slopes, float32 `[H]`: a geometric sequence (arXiv 2108.12409).

    Where `num_heads` is not a power of two, every second slope of the next power of two fills up the rest.
    """
    power = 1 << (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes, device=device)


def _alibi(slopes: Tensor, queries: int, keys: int) -> Tensor:
    """The bias `[H, queries, keys]`: minus the slope for every token between; the last query is at the last key."""
    positions = torch.arange(keys, device=slopes.device)
    return slopes[:, None, None] * (positions[None] - positions[keys - queries :, None])


class _NoRotary(nn.Module):
    def forward(self, hidden_states: Tensor, position_ids: Tensor) -> None:
        """Returns no rotary embeddings."""


class BaichuanDecoderLayer(llama.LlamaDecoderLayer):
    """LLaMA's block with Baichuan's attention."""

    def __init__(self, config: BaichuanConfig, layer_idx: int) -> None:
        super(llama.LlamaDecoderLayer, self).__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = llama.LlamaMLP(config)
        self.input_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class BaichuanPreTrainedModel(llama.LlamaPreTrainedModel):
    """What transformers has to know of the models below."""

    config: BaichuanConfig
    config_class = BaichuanConfig
    _no_split_modules: ClassVar = ["BaichuanDecoderLayer"]
    # The bias of ALiBi is added to a mask, which only the eager implementation always has.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = False
    _can_record_outputs: ClassVar = {"hidden_states": BaichuanDecoderLayer, "attentions": BaichuanAttention}


class BaichuanModel(BaichuanPreTrainedModel, llama.LlamaModel):
    """The decoder, with the forward pass of LLaMA's."""

    def __init__(self, config: BaichuanConfig) -> None:
        super(llama.LlamaModel, self).__init__(config)  # LLaMA's own would build LLaMA's layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(BaichuanDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = llama.LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = _NoRotary() if config.alibi else llama.LlamaRotaryEmbedding(config)
        self.post_init()


class BaichuanForCausalLM(BaichuanPreTrainedModel, llama.LlamaForCausalLM):
    """Decoder and head, with the forward pass of LLaMA's."""

    def __init__(self, config: BaichuanConfig) -> None:
        super(llama.LlamaForCausalLM, self).__init__(config)
        self.model = BaichuanModel(config)
        head = NormHead if config.has_normalized_head() else nn.Linear
        self.lm_head = head(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(BaichuanConfig.model_type, BaichuanConfig, exist_ok=True)
AutoModelForCausalLM.register(BaichuanConfig, BaichuanForCausalLM, exist_ok=True)
