"""Files of trained weights: writing, reading and verification."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from fireflyds.checkpoint.trainable_weights import TrainableWeights
from fireflyds.errors import UserError
from fireflyds.fs import read_json

METADATA = "trainable.json"
_PEFT = "base_model.model."
_ADAPTERS, _WEIGHTS = "adapter_model.safetensors", "weights.safetensors"


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drops the second name of a tied matrix: a file holds a tensor once, and loading assigns both names."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        unique.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(unique.values())


def save_trainable_weights(trainable: TrainableWeights, folder: Path) -> None:
    """Write a self-contained directory: adapters in PEFT's format, other weights, and metadata."""
    folder.mkdir(parents=True, exist_ok=True)
    if trainable.adapters:
        adapters = {f"{_PEFT}{name}": tensor.contiguous() for name, tensor in trainable.adapters.items()}
        save_file(adapters, folder / _ADAPTERS, {"format": "pt"})
        settings = json.dumps(trainable.adapter_config, indent=2, default=_plain_json)
        (folder / "adapter_config.json").write_text(settings, encoding="utf-8")
    if trainable.weights:
        weights = {name: tensor.contiguous() for name, tensor in _without_aliases(trainable.weights).items()}
        save_file(weights, folder / _WEIGHTS, {"format": "pt"})
    save_metadata(trainable, folder)


def save_metadata(trainable: TrainableWeights, folder: Path) -> None:
    """Write the metadata of the tensors, without the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"first_rows": trainable.first_rows, "adapter_config": trainable.adapter_config}
    text = json.dumps(trainable.metadata | fields, indent=2, default=_plain_json)
    (folder / METADATA).write_text(text, encoding="utf-8")


def _plain_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def load_metadata(folder: Path) -> TrainableWeights:
    """Read the metadata that `save_metadata` wrote, without tensors.

    Raises:
        UserError: the file is missing.
    """
    if not (folder / METADATA).is_file():
        raise UserError(
            f"has no {METADATA}, so it holds no trained weights", key=folder, remedy="Give a complete checkpoint"
        )
    metadata = read_json(folder / METADATA)
    first_rows, adapter_config = metadata.pop("first_rows"), metadata.pop("adapter_config")
    return TrainableWeights(first_rows=first_rows, adapter_config=adapter_config, metadata=metadata)


def load_trainable_weights(folder: Path) -> TrainableWeights:
    """Read a directory that `save_trainable_weights` wrote.

    Raises:
        UserError: `folder` is not such a directory.
    """
    trainable = load_metadata(folder)
    if (folder / _ADAPTERS).is_file():
        adapters = load_file(folder / _ADAPTERS)
        trainable.adapters = {name.removeprefix(_PEFT): tensor for name, tensor in adapters.items()}
    if (folder / _WEIGHTS).is_file():
        trainable.weights = load_file(folder / _WEIGHTS)
    return trainable


def verify_saved_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]], *, updated: bool
) -> None:
    """Verify `tensors`, read back from `folder`: every expected tensor is present, has its shape, and is not all zeros.

    `updated`: at least one step changed the weights; then it is an error if all LoRA B matrices are still zero.

    Raises:
        UserError: the verification failed.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    zeros = set()
    for name, tensor in tensors:
        shapes[name] = tuple(tensor.shape)
        if tensor.dim() > 1 and not tensor.any():
            zeros.add(name)
    mismatched = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if mismatched:
        raise UserError(
            f"{len(mismatched)} of {len(expected)} trained tensors were not saved whole, such as {mismatched[0]} "
            f"({shapes.get(mismatched[0], 'missing')}, trained {expected[mismatched[0]]})",
            key=folder,
            remedy="The previous checkpoint is intact; check the disk",
        )
    starts_at_zero = {name for name in expected if ".lora_B" in name}
    unexpected_zeros = zeros - starts_at_zero
    if unexpected_zeros or (updated and starts_at_zero and starts_at_zero <= zeros):
        name = min(unexpected_zeros or starts_at_zero)
        raise UserError(
            f"{name} was saved as zeros only, so training did not reach it",
            key=folder,
            remedy="The previous checkpoint is intact; check optim.lr and which parameters tuning.* trains",
        )
