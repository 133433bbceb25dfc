"""Weights in the names and shapes that the files of an architecture have, where its model holds them otherwise, and
tensors of the base's files that its text model does not have."""

import re
from collections.abc import Iterator, Set
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from fireflyds.models.file_names import FileNames
from fireflyds.tokenizer.shards import TensorEntry
from fireflyds.tokenizer.weight_files import weight_readers

# What older files carry of buffers, which every reader computes.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|attention\.(masked_)?bias|rope\.freqs)$")


def as_in_files(model: Any, entries: dict[str, TensorEntry], base_names: Set[str]) -> dict[str, TensorEntry]:
    """Returns the weights as files of the architecture have them, such as every expert by itself.

    Files that hold them as the model does keep that layout.

    Args:
        model: the model without weights.
        entries: its weights, under the names of its parameters.
        base_names: names of the tensors in the base's files; empty without a base.
    """
    layouts = {name: _converted(model, {name: _meta(entry)}) for name, entry in entries.items()}
    renamed = {name for layout in layouts.values() for name in layout}
    if len(base_names & entries.keys()) >= len(base_names & renamed) and base_names:
        return entries
    result: dict[str, TensorEntry] = {}
    for name, layout in layouts.items():
        read = _Parts(model, name, entries[name])
        for part, tensor in layout.items():
            result[part] = TensorEntry([*tensor.shape], entries[name].dtype, partial(read.take, part))
    return result


def tensors_left_out(model: Any, base: Path) -> dict[str, TensorEntry]:
    """Returns what the base's files have beside the weights of `model`: towers for images or sound, layers that predict
    several tokens. They are copied as they are."""
    names = FileNames(model)
    return {
        name: TensorEntry([*tensor.shape], tensor.dtype, partial(_as_is, tensor))
        for name, tensor in _tensors(base)
        if names.read_into(name)[0] is None and not _BUFFERS.search(name)
    }


def names_in_files(base: Path) -> set[str]:
    """Returns the names of all tensors in a model's files."""
    return {name for name, _ in _tensors(base)}


class _Parts:
    """The tensors that one weight becomes in files: computed with the first that is written, dropped with the last."""

    def __init__(self, model: Any, name: str, entry: TensorEntry) -> None:
        self._model, self._name, self._entry = model, name, entry
        self._parts: dict[str, Tensor] = {}

    def take(self, part: str) -> Tensor:
        if part not in self._parts:
            self._parts = _converted(self._model, {self._name: self._entry.make()})
        return self._parts.pop(part)


def _converted(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = revert_weight_conversion(model, weights)
    return converted


def _meta(entry: TensorEntry) -> Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype, device="meta")


def _tensors(base: Path) -> Iterator[tuple[str, Tensor]]:
    for _, read in weight_readers(base):
        yield from read()


def _as_is(tensor: Tensor) -> Tensor:
    return tensor
