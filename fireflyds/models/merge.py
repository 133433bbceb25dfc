"""The plain model that computes what a tuned one does: adapters merged, rows joined, quantised weights unpacked."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.models.tuning import ADAPTER, float_weight, is_quantised
from fireflyds.models.vocabulary import RowEmbedding, RowHead

# Parts of an adapted layer, of a quantised weight's description, of a split matrix.
_PARTS = (".base_layer.", ".lora_", ".weight.absmax", ".weight.quant", ".weight.nested", ".SCB", ".weight_format")


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every weight of the plain model, on the host, one matrix at a time.

    Merging happens in float32: a merge into 4 bit would lose what was learnt.
    """
    merged = {name: tensor.cpu() for name, tensor in model.state_dict().items() if _is_plain(name)}
    for name, module in model.named_modules():
        if isinstance(module, RowEmbedding | RowHead):
            for part in ("old", "new"):
                merged.pop(f"{name}.{part}")
            merged[f"{name}.weight"] = torch.cat([module.old.cpu().float(), module.new.cpu().float()])
        elif hasattr(module, "lora_A"):
            merged[f"{name}.weight"] = _adapted_weight(module).cpu()
            if module.base_layer.bias is not None:
                merged[f"{name}.bias"] = module.base_layer.bias.cpu()
        elif is_quantised(getattr(module, "weight", None)) and _is_plain(f"{name}.weight"):
            merged[f"{name}.weight"] = float_weight(module).cpu()
    return merged


def _directed_weight(layer: Any) -> Tensor:
    a, b = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    return float_weight(layer.base_layer) + layer.scaling[ADAPTER] * (b @ a)


def _adapted_weight(layer: Any) -> Tensor:
    """W + scaling · B A; under DoRA (arXiv 2402.09353) its rows are given the learnt magnitudes."""
    weight = _directed_weight(layer)
    if ADAPTER in getattr(layer, "lora_magnitude_vector", {}):
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float()
        weight = weight * (magnitude / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


@torch.no_grad()
def set_magnitudes(model: nn.Module, but: Container[str]) -> None:
    """Give DoRA's magnitudes the norms of the weights they stand on, where these came after the adapters.

    `but`: magnitudes, by plain names, that were learnt.
    """
    for name, module in model.named_modules():
        if ADAPTER in getattr(module, "lora_magnitude_vector", {}) and f"{name}.lora_magnitude_vector" not in but:
            weight = _directed_weight(module)
            module.lora_magnitude_vector[ADAPTER].weight.copy_(torch.linalg.norm(weight, dim=1))


def _is_plain(name: str) -> bool:
    return not any(part in name for part in _PARTS)
