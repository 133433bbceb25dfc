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
from fireflyds.models.baichuan import BaichuanConfig
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
    notes: tuple[str, ...] = ()
    """What was left out or not said by the checkpoint."""


def convert_checkpoint(folder: Path) -> Converted:
    """Recognises a checkpoint and returns what it becomes.

    Raises:
        UserError: nothing is to be converted, the layout is not known, or a tensor is missing, unknown or of another
            shape than the architecture's.
    """
    if (folder / meta_llama.PARAMS).is_file():
        config, entries = meta_llama.read(folder)
        note = (
            f"max_position_embeddings={config['max_position_embeddings']} is that of the release which rope_theta and "
            f"norm_eps belong to; {meta_llama.PARAMS} does not say it"
        )
        return _checked(folder, Converted(config, entries, "Meta's files", meta_llama.TEMPLATES, (note,)))
    if not (folder / "config.json").is_file():
        raise UserError(
            f"neither config.json nor {meta_llama.PARAMS} is there",
            key="model",
            value=folder,
            remedy="Give the folder of a model",
        )
    source = read_json(folder / "config.json")
    tensors = {name: tensor for _, read in weight_readers(folder) for name, tensor in read()}
    entries = {name: TensorEntry([*t.shape], t.dtype, partial(_as_is, t)) for name, t in tensors.items()}
    name = str(source.get("model_type", "")).lower()
    if settings := source.get("quantization_config") or source.get("compression_config"):
        dtype = getattr(torch, source.get("dtype") or source.get("torch_dtype") or "bfloat16")
        entries = dequantized(folder, settings, tensors, dtype)
        # Baichuan's own layout is trained as it is.
        if name not in registry.names(LAYOUTS) or name == BaichuanConfig.model_type:
            config = {key: value for key, value in source.items() if key not in _OF_FILES}
            return Converted(config, entries, str(settings.get("quant_method", "quantised")))
    if name not in registry.names(LAYOUTS):
        raise UserError(
            f"model_type={source.get('model_type')} is not converted, and its weights are not quantised",
            key="model",
            value=folder,
            remedy=f"Train it as it is, if transformers knows it; known layouts: {', '.join(registry.names(LAYOUTS))}",
        )
    layout = registry.load(LAYOUTS, name)
    config = layout.config(source, folder)
    converted, left_out = _entries(layout, source, entries)
    notes = (f"left out, because it is computed or tied: {', '.join(sorted(left_out))}",) if left_out else ()
    return _checked(folder, Converted(config, converted, name, layout.TEMPLATES, notes))


def _entries(
    layout: ModuleType, source: dict[str, Any], entries: dict[str, TensorEntry]
) -> tuple[dict[str, TensorEntry], set[str]]:
    """The weights that tensors become, and the last parts of the names of those that become none."""
    converted, left_out = {}, set()
    for name, entry in entries.items():
        parts = layout.convert(source, name, torch.empty(entry.shape, dtype=entry.dtype, device="meta"))
        for target, part in parts.items():
            make = partial(_part, layout, source, name, entry, target)
            converted[target] = TensorEntry([*part.shape], part.dtype, make)
        if not parts:
            left_out.add(".".join(name.split(".")[-2:]))
    return converted, left_out


def _part(layout: ModuleType, source: dict[str, Any], name: str, entry: TensorEntry, target: str) -> Tensor:
    part: Tensor = layout.convert(source, name, entry.make())[target]
    return part


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


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
