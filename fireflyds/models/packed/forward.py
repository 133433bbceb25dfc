"""The packed forward pass of a loaded model: packed attention, fused kernels, and the fused loss at the head."""

import functools
import importlib
import inspect
import math
import types
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from fireflyds_kernels import dispatch
from fireflyds_kernels.requirements import DispatchKey
from torch import Tensor, nn
from transformers import AttentionInterface

from fireflyds.config import HardwareConfig, Precision
from fireflyds.errors import UserError
from fireflyds.models.architecture import falcon_alibi_width, head_dim, is_stateful_mixer
from fireflyds.models.baichuan import NormHead
from fireflyds.models.load import exact_attention, family_of
from fireflyds.models.packed import fused_modules
from fireflyds.models.packed.boundaries import PackedContext, SequenceBoundaries
from fireflyds.models.packed.head import HeadFunction, HeadInputs, loss_sum
from fireflyds.models.packed.routing import watch_routing
from fireflyds.models.precision import DTYPES
from fireflyds.models.split_embeddings import FusedLossHead, SplitLMHead

ATTENTION = "fireflyds"
# Configuration keys of what models do to their logits: factors, and divisors.
_LOGIT_FACTORS = ("logit_scale", "lm_head_multiplier")
_LOGIT_DIVISORS = ("logits_scaling",)
# Classes of transformers' activations `silu` and `swish`.
_SILU = ("SiLU", "SiLUActivation")
_OTHER_MODEL = "Give another model, or packing=false"


def _attention(  # noqa: PLR0913  (the signature is that of transformers' AttentionInterface)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    boundaries: SequenceBoundaries | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Packed attention as a function of transformers' `AttentionInterface`: `[1, H, T, D]` in, `[1, T, H, D]` out."""
    if dropout:
        raise UserError(
            f"{type(module).__name__} uses dropout={dropout}, which packed attention does not support",
            key="model",
            remedy=_OTHER_MODEL,
        )
    packing: PackedContext = module.packing  # type: ignore[assignment]
    # Layers that do not pass on keyword arguments have no boundaries among them.
    batch = packing.boundaries if boundaries is None else boundaries
    if _is_chunked(module):
        batch = batch.in_chunks(module.config.attention_chunk_size)  # type: ignore[union-attr, arg-type]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extras = {"softcap": kwargs.get("softcap") or 0.0, "sinks": kwargs.get("s_aux")}
    extras["alibi_slopes"] = kwargs.get("alibi_slopes")
    return batch.attention(q, k, v, scale=scaling, window=sliding_window, causal=causal, **extras)[None], None


def _is_chunked(module: nn.Module) -> bool:
    """True for a layer whose tokens see those of their own chunk of the document alone (Llama 4)."""
    kinds: list[str] = getattr(module.config, "layer_types", None) or []
    return bool(kinds) and kinds[module.layer_idx] == "chunked_attention"  # type: ignore[index]


# The boundaries replace the attention mask. Without a function in AttentionMaskInterface transformers builds no mask;
# with one that returns None it would first search the position ids for packed documents, which waits for the device.
AttentionInterface.register(ATTENTION, _attention)


def fuse(model: Any, *, packed: bool = True) -> Any:
    """Binds the packed forward pass to this instance and returns it; the class and other instances are unchanged.

    Afterwards `model(input_ids, labels, position_ids, cu_seqlens, max_seqlen)` returns the sum of the token losses, or
    with `compute` the result of that function of `packed/head.py`. Families with a `fused` table also run their norms,
    rotary embeddings, gated MLPs and attention on `fireflyds_kernels`; any other model that uses transformers'
    `AttentionInterface` runs its attention and its loss on them.

    `packed=False`: transformers' own forward pass runs on one document after the other; only the loss is ours.

    Raises:
        UserError: a model whose attention or head cannot be replaced.
    """
    config = model.config.get_text_config()
    context = PackedContext(packed=packed)
    for module in model.modules():
        module.packing = context
    if packed:
        _bind_packed_modules(model)
        config._attn_implementation = ATTENTION
    else:
        config._attn_implementation = exact_attention(config).get("attn_implementation", config._attn_implementation)
    _bind_loss(model)
    context.routing = watch_routing(model)
    model.forward = types.MethodType(_forward, model)
    return model


def _bind_loss(model: Any) -> None:
    """Makes the head compute the loss.

    Raises:
        UserError: a head that the fused loss does not support.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    head = model.get_output_embeddings()
    if type(head) in (nn.Linear, NormHead):
        head.normalized = isinstance(head, NormHead)
        head.__class__ = FusedLossHead
    elif not isinstance(head, FusedLossHead | SplitLMHead):
        raise UserError(
            f"the head of {name} is a {type(head).__name__}, not a Linear: the fused loss does not support it",
            key="model",
            remedy=_OTHER_MODEL,
        )
    head.scale, head.softcap = _logit_transform(config)
    if head.bias is not None and (head.scale, head.softcap) != (1, 0):
        raise UserError(
            f"the head of {name} has a bias and its logits a factor or a soft cap; the fused loss does not have both",
            key="model",
            value=config.model_type,
            remedy=_OTHER_MODEL,
        )


def _bind_packed_modules(model: Any) -> None:
    """Replaces the forward pass of modules, in the instance.

    Raises:
        UserError: a model whose attention cannot be replaced.
    """
    table = family_of(model.config).fused
    _check_supported(model, table)
    for module in model.modules():
        function = table.get(type(module).__name__)
        if hasattr(module, "lora_A") and getattr(getattr(module.base_layer, "weight", None), "quant_state", None):
            function = "four_bit_lora"
        if is_stateful_mixer(module):
            function = "by_document"
        if getattr(module, "rope_type", None) == "longrope":
            function = "long_rotary"
        if getattr(module, "rope_type", None) == "dynamic" and not module.config.rope_parameters.get("alpha"):
            function = "dynamic_rotary"
        if function and not (function == "gated_mlp" and type(module.act_fn).__name__ not in _SILU):
            module.forward = types.MethodType(getattr(fused_modules, function), module)


def _logit_transform(hf_config: Any) -> tuple[float, float]:
    """The factor of a model's logits, and their soft cap (0 for none)."""
    values = {name: getattr(hf_config, name, None) for name in (*_LOGIT_FACTORS, *_LOGIT_DIVISORS)}
    scale = math.prod(float(values[name] or 1) for name in _LOGIT_FACTORS)
    scale /= math.prod(float(values[name] or 1) for name in _LOGIT_DIVISORS)
    return scale, float(getattr(hf_config, "final_logit_softcapping", None) or 0)


def attention_dispatch_key(hf_config: Any, device: torch.device, dtype: torch.dtype) -> DispatchKey:
    """Returns the dispatch key of packed attention for a model, derived from its configuration."""
    hf_config = hf_config.get_text_config()
    alibi = hf_config.model_type == "bloom" or bool(getattr(hf_config, "alibi", False))
    in_keys = falcon_alibi_width(hf_config)
    window = bool(getattr(hf_config, "sliding_window", None))
    softcap = bool(getattr(hf_config, "attn_logit_softcapping", None))
    sinks = _has_sinks(type(hf_config))  # type: ignore[arg-type]
    capability = dispatch.capability_of(device)
    width = head_dim(hf_config) + in_keys
    return DispatchKey(device.type, capability, dtype, width, window, alibi and not in_keys, softcap, sinks)


@functools.cache
def _has_sinks(config_class: Any) -> bool:
    """True where layers of this architecture hand sinks to their attention function."""
    try:
        modeling = importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))
    except ModuleNotFoundError:
        return False
    modules = [value for value in vars(modeling).values() if inspect.isclass(value) and issubclass(value, nn.Module)]
    return any("sinks" in inspect.unwrap(cls.forward).__code__.co_names for cls in modules)


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
    name, config = type(model).__name__, model.config.get_text_config()
    replaces_attention = any("attention" in function for function in table.values())
    if not (replaces_attention or _uses_attention_interface(model) or _has_no_attention(model)):
        raise UserError(
            f"{name} does not use transformers' AttentionInterface, and no family of fireflyds replaces its attention",
            key="model",
            value=config.model_type,
            remedy="Give packing=false, which runs every document by itself",
        )
    dropout = getattr(config, "attention_dropout", 0.0)
    if dropout:
        raise UserError(
            f"its config.json has attention_dropout={dropout}, but packed attention has no dropout",
            key="model",
            remedy="Set it to 0",
        )


def _has_no_attention(model: Any) -> bool:
    """True for a pure state-space model, whose mixers run on one document after the other."""
    modules = list(model.get_decoder().modules())
    has_attention = any("attention" in type(module).__name__.lower() for module in modules)
    return any(map(is_stateful_mixer, modules)) and not has_attention


def _uses_attention_interface(model: Any) -> bool:
    """True where a class of the model asks transformers' `AttentionInterface` for its attention function."""
    forwards = (inspect.unwrap(cls.forward) for cls in {type(module) for module in model.get_decoder().modules()})
    return any("ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names for forward in forwards)


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
    decoder = model.get_decoder()
    if decoder.get_output_embeddings() is not None:  # Llama 4's has the head too
        decoder = decoder.model
    records = packing.routing is not None and model.training
    with packing.routing.recorded() if records else nullcontext():  # type: ignore[union-attr]
        if not packing.packed:
            parts = (input_ids[:, first:last] for first, last in pairwise(cu_seqlens.tolist()) if last > first)
            hidden = [decoder(input_ids=part, use_cache=False).last_hidden_state for part in parts]
            return torch.cat(hidden, dim=1)
        # BLOOM ignores `position_ids` and `boundaries`, which are not parameters of its decoder.
        outputs = decoder(input_ids=input_ids, position_ids=position_ids, boundaries=packing.batch, use_cache=False)
    return outputs.last_hidden_state
