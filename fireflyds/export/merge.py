"""The plain model that computes what a tuned one does: adapters merged, rows joined, quantised weights unpacked."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.models.split_embeddings import SplitEmbedding, SplitLMHead
from fireflyds.models.tuning import ADAPTER, adapted_direction, float_weight, is_quantised
from fireflyds.tokenizer.shards import Entry

# Parts of an adapted layer, of a quantised weight's description, of a split matrix.
_PARTS = (".base_layer.", ".lora_", ".weight.absmax", ".weight.quant", ".weight.nested", ".SCB", ".weight_format")


def merged_entries(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Entry]:
    """Every weight of the plain model, made when its turn comes to be written: of a model of any size one matrix at a time is
    merged. `dtype`: of what is written; None: float32 where something was merged, else the model's own.

    Merging happens in float32: a merge into 4 bit would lose what was learnt.
    """
    entries: dict[str, Entry] = {}

    def add(name: str, shape: torch.Size | list[int], own: torch.dtype, make: Callable[[], Tensor]) -> None:
        target = own if dtype is None or not own.is_floating_point else dtype
        entries[name] = Entry([*shape], target, partial(_made, make, target))

    for name, tensor in model.state_dict().items():
        if _is_plain(name):
            add(name, tensor.shape, tensor.dtype, partial(_itself, tensor))
    for name, module in model.named_modules():
        if isinstance(module, SplitEmbedding | SplitLMHead):
            for part in ("frozen", "trainable"):
                del entries[f"{name}.{part}"]
            rows = len(module.frozen) + len(module.trainable)
            add(f"{name}.weight", [rows, module.frozen.shape[1]], torch.float32, partial(_joined_rows, module))
        elif hasattr(module, "lora_A"):
            out_features, in_features = module.out_features, module.in_features
            add(f"{name}.weight", [out_features, in_features], torch.float32, partial(_adapted_weight, module))
            if module.base_layer.bias is not None:
                bias = module.base_layer.bias
                add(f"{name}.bias", bias.shape, bias.dtype, partial(_itself, bias))
        elif is_quantised(getattr(module, "weight", None)) and _is_plain(f"{name}.weight"):
            shape = [module.out_features, module.in_features]
            add(f"{name}.weight", shape, torch.float32, partial(float_weight, module))
    return entries


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """All of `merged_entries` at once, for small models."""
    return {name: entry.make() for name, entry in merged_entries(model).items()}


@torch.no_grad()
def _made(make: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return make().detach().to("cpu", dtype)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _joined_rows(module: SplitEmbedding | SplitLMHead) -> Tensor:
    return torch.cat([module.frozen.float(), module.trainable.float()])


def _adapted_weight(layer: Any) -> Tensor:
    """W + scaling · B A; under DoRA (arXiv 2402.09353) its rows are given the learnt magnitudes."""
    weight = adapted_direction(layer)
    if ADAPTER in getattr(layer, "lora_magnitude_vector", {}):
        magnitude = layer.lora_magnitude_vector[ADAPTER].weight.float()
        weight = weight * (magnitude / torch.linalg.norm(weight, dim=1))[:, None]
    return weight


def _is_plain(name: str) -> bool:
    return not any(part in name for part in _PARTS)
