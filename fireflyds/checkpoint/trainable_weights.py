"""Trained weights of a run: adapters by PEFT's names, all other tensors by their names in the base model.

A checkpoint holds the tensors only in its shards, and their metadata in `trainable/trainable.json`. A self-contained
directory (the initial weights of a run, an exported adapter) holds

adapter_config.json, adapter_model.safetensors     the files that PeftModel.from_pretrained reads, if there are adapters
weights.safetensors                                other trained tensors; of a split matrix only its new rows
trainable.json                                     hashes of base and tokenizer, vocabulary size, first new rows
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.errors import UserError
from fireflyds.models.deferred import copy_rows
from fireflyds.models.expert_adapters import plain_name
from fireflyds.models.split_embeddings import SplitEmbedding, SplitLMHead
from fireflyds.models.tuning import ADAPTER, is_quantised


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each read on access, so that only one at a time is in memory."""

    def __init__(self, readers: dict[str, Callable[[], Tensor]]) -> None:
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(slots=True)
class TrainableWeights:
    """Tensors by their names in the base model.

    `first_rows`: for tensors with only the new rows of a matrix, the index of the first one in the full matrix.
    """

    adapters: Mapping[str, Tensor] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    first_rows: dict[str, int] = field(default_factory=dict)
    adapter_config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Iterates over names and tensors: first the adapters, then the other trained weights."""
        return chain(self.adapters.items(), self.weights.items())

    def names(self) -> set[str]:
        """Names of all tensors, adapters and other trained weights."""
        return {*self.adapters, *self.weights}

    def over(self, earlier: "TrainableWeights") -> "TrainableWeights":
        """The union of these tensors and those of an earlier stage; these replace earlier ones of the same name."""
        weights, rows = dict(earlier.weights), dict(earlier.first_rows)
        for name, tensor in self.weights.items():
            # New rows of a matrix whose old rows an earlier stage trained.
            num_old_rows = self.first_rows.get(name, 0) - rows.get(name, 0) if name in weights else 0
            weights[name] = torch.cat([weights[name][:num_old_rows], tensor]) if num_old_rows > 0 else tensor
            first = self.first_rows.get(name, 0)
            rows[name] = min(rows.get(name, 0), first) if num_old_rows > 0 else first
        return TrainableWeights(
            adapters={**earlier.adapters, **self.adapters},
            weights=weights,
            first_rows={name: first for name, first in rows.items() if first},
            adapter_config=self.adapter_config or earlier.adapter_config,
            metadata=self.metadata,
        )


def base_name(name: str) -> str:
    """The name of a parameter in the base model or, for adapters, in PEFT's files.

    `...embed_tokens.trainable` holds rows of `...embed_tokens.weight`; `lora_A.default.weight` is `lora_A.weight` in
    PEFT's files.
    """
    if name.endswith(".trainable"):
        return f"{name.removesuffix('.trainable')}.weight"
    if "lora_magnitude_vector" in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    if is_adapter(name):
        # PEFT's files name nested adapters, of the matrices of experts, by their nesting.
        return name.replace(f".{ADAPTER}.", ".")
    return plain_name(name)


def is_adapter(name: str) -> bool:
    """True for the name of a LoRA parameter."""
    return ".lora_" in name


def trainable_shapes(model: nn.Module, *, by_base_name: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and full shape of every trainable parameter; under ZeRO-3 too, where parameters are sharded."""
    return {
        base_name(name) if by_base_name else name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def describe_trainable_weights(model: Any, adapter_config: Any, metadata: dict[str, Any]) -> TrainableWeights:
    """Metadata without tensors: the first new rows of split matrices, and PEFT's configuration of the adapters."""
    split = [
        (name, module) for name, module in model.named_modules() if isinstance(module, SplitEmbedding | SplitLMHead)
    ]
    described = TrainableWeights(
        first_rows={f"{name}.weight": module.first for name, module in split}, metadata=metadata
    )
    if adapter_config is not None:
        described.adapter_config = adapter_config.to_dict() | {
            "target_modules": sorted(adapter_config.target_modules),
            "base_model_name_or_path": model.config._name_or_path,
            "inference_mode": True,
        }
    return described


def with_tensors(described: TrainableWeights, readers: Mapping[str, Callable[[], Tensor]]) -> TrainableWeights:
    """Add tensors to `described` and return it. `readers`: by the names of the model's parameters, called on access."""
    named = {base_name(name): read for name, read in readers.items()}
    described.adapters = LazyTensors({name: read for name, read in named.items() if is_adapter(name)})
    described.weights = LazyTensors({name: read for name, read in named.items() if not is_adapter(name)})
    described.first_rows = {name: first for name, first in described.first_rows.items() if name in described.weights}
    return described


def load_into_model(model: Any, trainable: TrainableWeights, source: Path | str, *, must_cover: bool) -> None:
    """Copy trained weights into a model that already has adapters and split matrices.

    `must_cover`: every trainable parameter of the model must be in `trainable`.

    Raises:
        UserError: another base, other adapters, a tensor without a matching parameter, or a missing tensor.
    """
    parameters = {base_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in trainable_shapes(model) if name not in trainable.names()]
    if must_cover and missing:
        raise UserError(
            f"lacks {len(missing)} trained tensors, such as {missing[0]}",
            key=source,
            remedy="The checkpoint belongs to another run; give that run, or another step",
        )
    buffers = {name for name, _ in model.named_buffers()}
    matrices = {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, SplitEmbedding | SplitLMHead)
    }
    with torch.no_grad():
        for name, tensor in trainable.items():
            if name in matrices:
                _load_split_rows(matrices[name], name, tensor, trainable.first_rows.get(name, 0), source)
            elif name in buffers:
                continue
            elif name not in parameters:
                raise UserError(
                    f"{name} has no matching parameter in this model; that run used another tuning.*",
                    key=source,
                    remedy="Export it with launch/export.py and give the export as model=",
                )
            else:
                _load_parameter(parameters[name], name, tensor, trainable.first_rows.get(name, 0), source)


def _load_parameter(parameter: Tensor, name: str, tensor: Tensor, first: int, source: Path | str) -> None:
    if is_quantised(parameter):
        raise UserError(
            f"{name} was trained in that run and is quantised here",
            key=source,
            remedy="Export that run with launch/export.py and give the export as model=",
        )
    target = parameter[first:] if first else parameter
    if target.shape != tensor.shape:
        raise UserError(
            f"{name} is {[*tensor.shape]}, the model has {[*target.shape]}",
            key=source,
            remedy="Its base changed since, or its adapters differ: give the base and the tuning of that run",
        )
    copy_rows(parameter, first, tensor)


def _load_split_rows(matrix: Any, name: str, tensor: Tensor, first: int, source: Path | str) -> None:
    """Copies a full matrix, or its rows from `first` on, into the frozen and trainable rows of `matrix`."""
    rows = len(matrix.frozen) + len(matrix.trainable)
    if first + len(tensor) != rows:
        raise UserError(
            f"{name} ends at row {first + len(tensor)}, the model's at {rows}",
            key=source,
            remedy="Its base changed since: give the base of that run",
        )
    split = max(matrix.first - first, 0)
    if split:
        copy_rows(matrix.frozen, first, tensor[:split])
    copy_rows(matrix.trainable, max(first - matrix.first, 0), tensor[split:])
