"""A checkpoint in its maker's layout, or a quantised one, becomes a directory that transformers reads without remote
code: recognised, converted tensor by tensor, compared by name and shape with the architecture, written."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from fireflyds import registry
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.models.convert import meta_llama
from fireflyds.models.convert.dequantize import dequantized
from fireflyds.models.load import bare_model
from fireflyds.tokenizer.shards import TensorEntry
from fireflyds.tokenizer.weight_files import weight_readers

LAYOUTS = "fireflyds.models.convert.layouts"
# Kept of `config.json` of a quantised model but for what describes its files.
_OF_FILES = ("quantization_config", "auto_map", "compression_config")


@dataclass(frozen=True, slots=True)
class Converted:
    """What a checkpoint becomes: `config.json` and weights, which are computed when they are written."""

    config: dict[str, Any]
    entries: dict[str, TensorEntry]
    kind: str
    """The layout or method of quantisation that was recognised."""
    templates: tuple[str, ...] = ()
    """Chat templates of the layout's chat models, whose own are code."""


def convert_checkpoint(folder: Path) -> Converted:
    """Recognises a checkpoint and returns what it becomes.

    Raises:
        UserError: nothing is to be converted, the layout is not known, or a tensor is missing, unknown or of another
            shape than the architecture's.
    """
    if (folder / meta_llama.PARAMS).is_file():
        converted = Converted(*meta_llama.read(folder), "Meta's files", meta_llama.TEMPLATES)
        return _checked(folder, converted)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"neither config.json nor {meta_llama.PARAMS} is there",
            key="model",
            value=folder,
            remedy="Give the folder of a model",
        )
    source = read_json(folder / "config.json")
    tensors = {name: tensor for _, read in weight_readers(folder) for name, tensor in read()}
    if settings := source.get("quantization_config") or source.get("compression_config"):
        dtype = getattr(torch, source.get("dtype") or source.get("torch_dtype") or "bfloat16")
        config = {key: value for key, value in source.items() if key not in _OF_FILES}
        kind = str(settings.get("quant_method", "quantised"))
        return Converted(config, dequantized(folder, settings, tensors, dtype), kind)
    name = str(source.get("model_type", "")).lower()
    if name not in registry.names(LAYOUTS):
        raise UserError(
            f"model_type={source.get('model_type')} is not converted, and its weights are not quantised",
            key="model",
            value=folder,
            remedy=f"Train it as it is, if transformers knows it; known layouts: {', '.join(registry.names(LAYOUTS))}",
        )
    layout = registry.load(LAYOUTS, name)
    config = layout.config(source, folder)
    return _checked(folder, Converted(config, _entries(layout, source, tensors), name, layout.TEMPLATES))


def _entries(layout: ModuleType, source: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, TensorEntry]:
    entries = {}
    for name, tensor in tensors.items():
        for target, part in layout.convert(source, name, tensor.to("meta")).items():
            entries[target] = TensorEntry(
                [*part.shape], part.dtype, partial(_part, layout, source, name, tensor, target)
            )
    return entries


def _part(layout: ModuleType, source: dict[str, Any], name: str, tensor: Tensor, target: str) -> Tensor:
    part: Tensor = layout.convert(source, name, tensor)[target]
    return part


def _checked(folder: Path, converted: Converted) -> Converted:
    settings = dict(converted.config)
    model = bare_model(AutoConfig.for_model(settings.pop("model_type"), **settings))
    expected = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        expected.pop(name)
    for name in [*converted.entries, *expected]:
        ours = converted.entries[name].shape if name in converted.entries else "missing"
        if ours != expected.get(name, "unknown"):
            raise UserError(
                f"{name} is {ours}, and {type(model).__name__} has {expected.get(name, 'no such weight')}",
                key="model",
                value=folder,
                remedy="Get the files again; a variant of this layout may not be known",
            )
    return converted
