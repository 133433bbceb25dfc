"""Trained weights as files: written, read back, and verified."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fireflyds.checkpoint.trainable_weights import TrainableWeights
from fireflyds.errors import UserError
from fireflyds.fs import read_json

METADATA = "trainable.json"


_PEFT = "base_model.model."


_ADAPTERS, _WEIGHTS = "adapter_model.safetensors", "weights.safetensors"


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a tied matrix's two names the first: a file holds a tensor once, and `restore` knows both."""
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kept.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(kept.values())


def save_trainable_weights(trainable: TrainableWeights, folder: Path) -> None:
    """Write a directory that stands alone."""
    folder.mkdir(parents=True, exist_ok=True)
    if trainable.adapters:
        named = {f"{_PEFT}{name}": tensor.contiguous() for name, tensor in trainable.adapters.items()}
        save_file(named, folder / _ADAPTERS, {"format": "pt"})
        settings = json.dumps(trainable.adapter_config, indent=2, default=_plain_json)
        (folder / "adapter_config.json").write_text(settings, encoding="utf-8")
    if trainable.weights:
        whole = {name: tensor.contiguous() for name, tensor in _without_aliases(trainable.weights).items()}
        save_file(whole, folder / _WEIGHTS, {"format": "pt"})
    save_metadata(trainable, folder)


def save_metadata(trainable: TrainableWeights, folder: Path) -> None:
    """Write what is known of the tensors, without them."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {"first_rows": trainable.first_rows, "adapter_config": trainable.adapter_config}
    text = json.dumps(trainable.metadata | known, indent=2, default=_plain_json)
    (folder / METADATA).write_text(text, encoding="utf-8")


def _plain_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def load_metadata(folder: Path) -> TrainableWeights:
    """What `save_metadata` wrote.

    Raises:
        UserError: there is none.
    """
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: no {METADATA} there, so it holds nothing trained. Give a whole checkpoint")
    metadata = read_json(folder / METADATA)
    first_rows, adapter_config = metadata.pop("first_rows"), metadata.pop("adapter_config")
    return TrainableWeights(first_rows=first_rows, adapter_config=adapter_config, metadata=metadata)


def load_trainable_weights(folder: Path) -> TrainableWeights:
    """Read a directory that `save_trainable_weights` wrote.

    Raises:
        UserError: it is none.
    """
    trainable = load_metadata(folder)
    if (folder / _ADAPTERS).is_file():
        adapters = load_file(folder / _ADAPTERS)
        trainable.adapters = {name.removeprefix(_PEFT): tensor for name, tensor in adapters.items()}
    if (folder / _WEIGHTS).is_file():
        trainable.weights = load_file(folder / _WEIGHTS)
    return trainable


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a directory that stands alone, one at a time."""
    for file in (_ADAPTERS, _WEIGHTS):
        if (folder / file).is_file():
            with safe_open(folder / file, "pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    yield key.removeprefix(_PEFT), stored.get_tensor(key)


def verify_saved_weights(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]], *, updated: bool
) -> None:
    """Look at what was read back from `folder`: every trained tensor is there, of its shape, and something was learnt.

    `updated` says that at least one step changed the weights: then adapters that still add nothing are an error.

    Raises:
        UserError: it is not so.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    zeros = set()
    for name, tensor in tensors:
        shapes[name] = tuple(tensor.shape)
        if tensor.dim() > 1 and not tensor.any():
            zeros.add(name)
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} of {len(expected)} trained tensors were not saved whole, {wrong[0]} among them "
            f"({shapes.get(wrong[0], 'missing')}, trained {expected[wrong[0]]}). The checkpoint before is whole; look at the disk"
        )
    starts_at_zero = {name for name in expected if ".lora_B" in name}
    bad = zeros - starts_at_zero
    if bad or (updated and starts_at_zero and starts_at_zero <= zeros):
        name = min(bad or starts_at_zero)
        raise UserError(
            f"{folder}: {name} was saved as zeros only, so training did not reach it. The checkpoint before is whole; "
            "look at optim.lr and at what tuning.* trains"
        )
