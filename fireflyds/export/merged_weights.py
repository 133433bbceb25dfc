"""Weights of the plain model that is equivalent to a tuned one.

Adapters are merged, split embeddings joined, and quantised weights dequantised.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.models.expert_adapters import adapted_experts, is_expert_adapter, other_tensors, plain_name
from fireflyds.models.split_embeddings import SplitEmbedding, SplitLMHead
from fireflyds.models.tuning import ADAPTER, adapted_direction, float_weight, is_quantised
from fireflyds.tokenizer.shards import TensorEntry

# Substrings of state-dict names that belong to adapted layers and quantisation states, not to the plain model.
_PARTS = (".base_layer.", ".lora_", ".weight.absmax", ".weight.quant", ".weight.nested", ".SCB", ".weight_format")


def merged_entries(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, TensorEntry]:
    """Returns every weight of the plain model by name, computed lazily: matrices are merged one at a time when written.

    `dtype`: that of the written weights; None: float32 for merged, joined or dequantised weights, else unchanged.
    Merging is done in float32, as merging into 4-bit weights would round off the trained update.
    """
    entries: dict[str, TensorEntry] = {}

    def add(name: str, shape: torch.Size | list[int], source_dtype: torch.dtype, make: Callable[[], Tensor]) -> None:
        target = source_dtype if dtype is None or not source_dtype.is_floating_point else dtype
        entries[name] = TensorEntry([*shape], target, partial(_cast_to_host, make, target))

    for name, tensor in model.state_dict().items():
        if _is_plain(name):
            add(name, tensor.shape, tensor.dtype, partial(_identity, tensor))
    for name, module in model.named_modules():
        if isinstance(module, SplitEmbedding | SplitLMHead):
            for part in ("frozen", "trainable"):
                del entries[f"{name}.{part}"]
            rows = len(module.frozen) + len(module.trainable)
            add(f"{name}.weight", [rows, module.frozen.shape[1]], torch.float32, partial(_joined_rows, module))
        elif is_expert_adapter(module):
            _add_experts(entries, plain_name(f"{name}."), module, add)
        elif hasattr(module, "lora_A"):
            shape = [module.out_features, module.in_features][:: -1 if module.fan_in_fan_out else 1]
            add(f"{name}.weight", shape, torch.float32, partial(_adapted_weight, module))
            if module.base_layer.bias is not None:
                bias = module.base_layer.bias
                add(f"{name}.bias", bias.shape, bias.dtype, partial(_identity, bias))
        elif is_quantised(getattr(module, "weight", None)) and _is_plain(f"{name}.weight"):
            shape = [module.out_features, module.in_features]
            add(f"{name}.weight", shape, torch.float32, partial(float_weight, module))
    return entries


def _add_experts(entries: dict[str, TensorEntry], prefix: str, layer: Any, add: Callable[..., None]) -> None:
    """Adds the matrices of experts that one wrapper adapts, and what is beside them in their module."""
    name, shape = f"{prefix}{layer.parameter_name}", layer.get_param().shape
    add(name, shape, torch.float32, partial(adapted_experts, layer, ADAPTER))
    for other, tensor in other_tensors(layer):
        if f"{prefix}{other}" not in entries:  # a wrapper around this one may have added it with its adapters
            add(f"{prefix}{other}", tensor.shape, tensor.dtype, partial(_identity, tensor))


@torch.no_grad()
def _cast_to_host(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    """Computes a weight and casts it to `dtype` on the host."""
    return make().detach().to("cpu", dtype)


def _identity(tensor: Tensor) -> Tensor:
    return tensor


def _joined_rows(module: SplitEmbedding | SplitLMHead) -> Tensor:
    """Returns frozen and trainable rows as one matrix `[V, d]` in float32."""
    return torch.cat([module.frozen.float(), module.trainable.float()])


def _adapted_weight(layer: Any) -> Tensor:
    """Returns W + scaling · B A in float32; under DoRA (arXiv 2402.09353) with its rows scaled to the magnitudes."""
    weight = adapted_direction(layer)
    if ADAPTER in getattr(layer, "lora_magnitude_vector", {}):
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float()
        rows = weight.T if layer.fan_in_fan_out else weight
        rows.mul_((magnitude / torch.linalg.norm(rows, dim=1))[:, None])
    return weight


def _is_plain(name: str) -> bool:
    """True for a state-dict name that the plain model has too."""
    return not any(part in name for part in _PARTS)
