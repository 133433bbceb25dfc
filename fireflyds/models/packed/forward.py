"""The packed forward pass of a loaded model: packed attention, fused kernels, and the fused loss at the head."""

import types
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from fireflyds_kernels import dispatch
from fireflyds_kernels.requirements import DispatchKey
from torch import Tensor, nn
from transformers import AttentionInterface

from fireflyds import registry
from fireflyds.config import HardwareConfig, Precision
from fireflyds.errors import UserError
from fireflyds.models.architecture import head_dim
from fireflyds.models.packed import fused_modules
from fireflyds.models.packed.boundaries import PackedContext, SequenceBoundaries
from fireflyds.models.packed.head import HeadFunction, HeadInputs, loss_sum
from fireflyds.models.precision import DTYPES
from fireflyds.models.split_embeddings import FusedLossHead, SplitLMHead

ATTENTION = "fireflyds"
# Configuration keys of transformations after the head, with their neutral values; the fused loss does not apply them.
_LOGIT_TRANSFORMS = {"final_logit_softcapping": None, "logit_scale": None, "logits_scaling": 1, "lm_head_multiplier": 1}
_OTHER_MODEL = "Give another model: fireflyds trains packed rows only"


def _attention(  # noqa: PLR0913  (the signature is that of transformers' AttentionInterface)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: SequenceBoundaries,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Packed attention as a function of transformers' `AttentionInterface`: `[1, H, T, D]` in, `[1, T, H, D]` out."""
    unsupported = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None] + ["dropout"] * bool(dropout)
    if unsupported:
        raise UserError(
            f"{type(module).__name__} uses {', '.join(unsupported)}, which packed attention does not support",
            key="model",
            remedy=_OTHER_MODEL,
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return boundaries.attention(q, k, v, scale=scaling, window=sliding_window, causal=causal)[None], None


# The boundaries replace the attention mask. Without a function in AttentionMaskInterface transformers builds no mask;
# with one that returns None it would first search the position ids for packed documents, which waits for the device.
AttentionInterface.register(ATTENTION, _attention)


def fuse(model: Any) -> Any:
    """Binds the packed forward pass to this instance and returns it; the class and other instances are unchanged.

    Afterwards `model(input_ids, labels, position_ids, cu_seqlens, max_seqlen)` returns the sum of the token losses, or
    with `compute` the result of that function of `packed/head.py`. Families with a `fused` table also run their norms,
    rotary embeddings, gated MLPs and attention on `fireflyds_kernels`; any other model that uses transformers'
    `AttentionInterface` runs its attention and its loss on them.

    Raises:
        UserError: a model whose attention or head cannot be replaced.
    """
    name, config = type(model).__name__, model.config
    families = registry.names("fireflyds.models.families")
    table = (
        registry.load("fireflyds.models.families", config.model_type).FAMILY.fused
        if config.model_type in families
        else {}
    )
    _check_supported(model, table)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear:
        head.__class__ = FusedLossHead
    elif not isinstance(head, FusedLossHead | SplitLMHead):
        raise UserError(
            f"the head of {name} is a {type(head).__name__}, not a Linear: the fused loss does not support it",
            key="model",
            remedy=_OTHER_MODEL,
        )
    config._attn_implementation = ATTENTION
    packing = PackedContext()
    for module in model.modules():
        module.packing = packing
        function = table.get(type(module).__name__)
        if hasattr(module, "lora_A") and getattr(getattr(module.base_layer, "weight", None), "quant_state", None):
            function = "four_bit_lora"
        if getattr(module, "rope_type", None) == "dynamic":
            function = "dynamic_rotary"
        if function and not (function == "gated_mlp" and config.hidden_act not in ("silu", "swish")):
            module.forward = types.MethodType(getattr(fused_modules, function), module)
    model.forward = types.MethodType(_forward, model)
    return model


def attention_dispatch_key(hf_config: Any, device: torch.device, dtype: torch.dtype) -> DispatchKey:
    """Returns the dispatch key of packed attention for a model, derived from its configuration."""
    alibi = hf_config.model_type == "bloom" or bool(getattr(hf_config, "alibi", False))
    window = bool(getattr(hf_config, "sliding_window", None))
    return DispatchKey(device.type, dispatch.capability_of(device), dtype, head_dim(hf_config), window, alibi)


def attention_override(config: HardwareConfig, hf_config: Any, precision: Precision) -> AbstractContextManager[None]:
    """Returns a context manager that forces the implementation of packed attention set by `hardware.attention`.

    Raises:
        UserError: an unknown implementation, or one that cannot run here; checked before any weights are loaded.
    """
    if config.attention == "auto":
        return nullcontext()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    refusals = dispatch.refusals("packed_attention", attention_dispatch_key(hf_config, device, DTYPES[precision]))
    available = ", ".join(["auto", *(name for name, reason in refusals.items() if reason is None)])
    if config.attention not in refusals:
        raise UserError(
            "no such implementation", key="hardware.attention", value=config.attention, remedy=f"Available: {available}"
        )
    if reason := refusals[config.attention]:
        raise UserError(
            f"cannot run here ({reason})",
            key="hardware.attention",
            value=config.attention,
            remedy=f"Available: {available}",
        )
    return dispatch.force(packed_attention=config.attention)


def _check_supported(model: Any, table: Any) -> None:
    """Raises `UserError` for models that the packed forward pass would compute incorrectly."""
    name, config = type(model).__name__, model.config
    replaces_attention = any("attention" in function for function in table.values())
    if not replaces_attention and not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"{name} does not use transformers' AttentionInterface, and no family of fireflyds replaces its attention",
            key="model",
            remedy=f"Families: {', '.join(registry.names('fireflyds.models.families'))}",
        )
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise UserError(
            f"its config.json has attention_dropout={dropout}, but packed attention has no dropout",
            key="model",
            remedy="Set it to 0",
        )
    other_types = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other_types or any(isinstance(module, nn.Conv1d) for module in model.modules()):
        raise UserError(
            f"{name} has layers other than full or sliding-window attention "
            f"({', '.join(other_types) or 'convolutions'}), which would mix packed documents",
            key="model",
            remedy=_OTHER_MODEL,
        )
    if any(getattr(module, "rope_type", None) == "longrope" for module in model.modules()):
        raise UserError(
            f"{name} has rope_type=longrope, whose frequencies depend on the longest document of a row",
            key="model",
            remedy=_OTHER_MODEL,
        )
    for key, neutral in _LOGIT_TRANSFORMS.items():
        if getattr(config, key, None) not in (None, neutral):
            raise UserError(
                f"{name} transforms its logits ({key}={getattr(config, key)}), which the fused loss does not apply",
                key="model",
                remedy=_OTHER_MODEL,
            )


def _forward(
    self: Any,
    input_ids: Tensor,
    labels: Tensor,
    position_ids: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    num_labels: int | None = None,
    compute: HeadFunction = loss_sum,
) -> Any:
    hidden = hidden_states(self, input_ids, position_ids, cu_seqlens, max_seqlen)
    return compute(self.get_output_embeddings(), hidden[0], HeadInputs(labels[0], num_labels, cu_seqlens))


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Returns the last hidden states `[1, T, d]` of a fused model."""
    packing: PackedContext = model.packing
    packing.batch = SequenceBoundaries(cu_seqlens, max_seqlen)
    packing.recomputing = getattr(model, "is_gradient_checkpointing", False)
    # BLOOM ignores `position_ids` and `boundaries`, which are not parameters of its decoder.
    outputs = model.get_decoder()(
        input_ids=input_ids, position_ids=position_ids, boundaries=packing.batch, use_cache=False
    )
    return outputs.last_hidden_state
