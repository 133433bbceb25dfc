"""What a run learnt, saved and loaded through one door: adapters in PEFT's format, every other tensor by its plain name.

adapter_config.json, adapter_model.safetensors     what PeftModel.from_pretrained reads, where there are adapters
weights.safetensors                                other trained tensors; of a split matrix its new rows alone
trained.json                                       hashes of base and tokenizer, vocabulary size, where new rows begin
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fireflyds.errors import UserError
from fireflyds.models.tuning import ADAPTER, is_quantised
from fireflyds.models.vocabulary import RowEmbedding, RowHead

_PEFT = "base_model.model."
_ADAPTERS, _WEIGHTS, _ABOUT = "adapter_model.safetensors", "weights.safetensors", "trained.json"


@dataclass(slots=True)
class Trained:
    """Tensors by plain names. `first_rows`: where those that are the new rows of a matrix begin."""

    adapters: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    first_rows: dict[str, int] = field(default_factory=dict)
    adapter_config: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def over(self, earlier: "Trained") -> "Trained":
        """These tensors, and of an earlier stage those that this one did not train."""
        weights, rows = dict(earlier.weights), dict(earlier.first_rows)
        for name, tensor in self.weights.items():
            # New rows of a matrix whose old ones an earlier stage trained.
            kept = self.first_rows.get(name, 0) - rows.get(name, 0) if name in weights else 0
            weights[name] = torch.cat([weights[name][:kept], tensor]) if kept > 0 else tensor
            rows[name] = (
                min(rows.get(name, 0), self.first_rows.get(name, 0)) if kept > 0 else self.first_rows.get(name, 0)
            )
        return Trained(
            earlier.adapters | self.adapters, weights, {name: first for name, first in rows.items() if first},
            self.adapter_config or earlier.adapter_config, self.about,
        )  # fmt: skip


def plain_name(name: str) -> str:
    """`...embed_tokens.new` is rows of `...embed_tokens.weight`; `lora_A.default.weight` is PEFT's `lora_A.weight`."""
    if name.endswith(".new"):
        return f"{name.removesuffix('.new')}.weight"
    if "lora_magnitude_vector" in name:
        return name.removesuffix(f".{ADAPTER}.weight")
    return name.replace(f".{ADAPTER}.", ".").replace(".base_layer.", ".")


def is_adapter(name: str) -> bool:
    return ".lora_" in name


def trainable_shapes(model: nn.Module, *, by_plain_name: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every parameter that trains, sharded or not."""
    return {
        plain_name(name) if by_plain_name else name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def collect(model: Any, live: Mapping[str, Tensor], adapter_config: Any, about: dict[str, Any]) -> Trained:
    """Sort tensors, given by the names of the model's own parameters."""
    found = Trained(about=about)
    for name, tensor in live.items():
        plain = plain_name(name)
        (found.adapters if is_adapter(plain) else found.weights)[plain] = tensor
        if name.endswith(".new"):
            found.first_rows[plain] = model.get_submodule(name.removesuffix(".new")).first  # type: ignore[assignment]
    if adapter_config is not None:
        found.adapter_config = adapter_config.to_dict() | {
            "target_modules": sorted(adapter_config.target_modules),
            "base_model_name_or_path": model.config._name_or_path,
            "inference_mode": True,
        }
    return found


def rows_alone(model: nn.Module, about: dict[str, Any]) -> Trained:
    """Where the new rows of split matrices begin, without any tensor."""
    split = [(name, module) for name, module in model.named_modules() if isinstance(module, RowEmbedding | RowHead)]
    return Trained(first_rows={f"{name}.weight": module.first for name, module in split}, about=about)


def _without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a tied matrix's two names the first: a file holds a tensor once, and `restore` knows both."""
    kept: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kept.setdefault(tensor.data_ptr(), (name, tensor))
    return dict(kept.values())


def save(trained: Trained, folder: Path) -> None:
    """Write the directory."""
    folder.mkdir(parents=True, exist_ok=True)
    if trained.adapters:
        named = {f"{_PEFT}{name}": tensor.contiguous() for name, tensor in trained.adapters.items()}
        save_file(named, folder / _ADAPTERS, {"format": "pt"})
        settings = json.dumps(trained.adapter_config, indent=2, default=_plain_json)
        (folder / "adapter_config.json").write_text(settings, encoding="utf-8")
    if trained.weights:
        whole = {name: tensor.contiguous() for name, tensor in _without_aliases(trained.weights).items()}
        save_file(whole, folder / _WEIGHTS, {"format": "pt"})
    about = trained.about | {"first_rows": trained.first_rows}
    (folder / _ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")


def _plain_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else getattr(value, "value", str(value))


def load(folder: Path) -> Trained:
    """Read a directory that `save` wrote.

    Raises:
        UserError: it is none.
    """
    if not (folder / _ABOUT).is_file():
        raise UserError(f"{folder}: no {_ABOUT} there, so it holds nothing trained. Give a whole checkpoint")
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    found = Trained(first_rows=about.pop("first_rows"), about=about)
    if (folder / _ADAPTERS).is_file():
        found.adapters = {name.removeprefix(_PEFT): tensor for name, tensor in load_file(folder / _ADAPTERS).items()}
        found.adapter_config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if (folder / _WEIGHTS).is_file():
        found.weights = load_file(folder / _WEIGHTS)
    return found


def verify(folder: Path, expected: Mapping[str, tuple[int, ...]], *, updated: bool) -> None:
    """Read back what was saved: every trained tensor is there, of its shape, and something was learnt.

    `updated` says that at least one step changed the weights: then adapters that still add nothing are an error.

    Raises:
        UserError: it is not so.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    empty = []
    for file in (_ADAPTERS, _WEIGHTS):
        if not (folder / file).is_file():
            continue
        with safe_open(folder / file, "pt") as stored:
            for key in stored.keys():  # noqa: SIM118
                tensor, name = stored.get_tensor(key), key.removeprefix(_PEFT)
                shapes[name] = tuple(tensor.shape)
                if tensor.dim() > 1 and not tensor.any():
                    empty.append(name)
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} of {len(expected)} trained tensors were not saved whole, {wrong[0]} among them "
            f"({shapes.get(wrong[0], 'missing')}, trained {expected[wrong[0]]}). The checkpoint before is whole; look at the disk"
        )
    starts_at_zero = {name for name in expected if ".lora_B" in name}
    bad = set(empty) - starts_at_zero
    if bad or (updated and starts_at_zero and starts_at_zero <= set(empty)):
        name = min(bad or starts_at_zero)
        raise UserError(
            f"{folder}: {name} was saved as zeros only, so training did not reach it. The checkpoint before is whole; "
            "look at optim.lr and at what tuning.* trains"
        )


def restore(model: Any, trained: Trained, source: Path | str, *, must_cover: bool) -> None:
    """Put what was learnt into a model in whose place adapters and split matrices are already.

    `must_cover`: everything that trains in the model must be there.

    Raises:
        UserError: another base, other adapters, a tensor that fits nothing here, or one that is missing.
    """
    places = {plain_name(name): parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in trainable_shapes(model) if name not in trained.adapters.keys() | trained.weights.keys()]
    if must_cover and missing:
        raise UserError(
            f"{source}: lacks {len(missing)} trained tensors, {missing[0]} among them. The checkpoint is not of this run; give the run it "
            "is of, or another step"
        )
    buffers = {name for name, _ in model.named_buffers()}
    matrices = {
        f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, RowEmbedding | RowHead)
    }
    with torch.no_grad():
        for name, tensor in (trained.adapters | trained.weights).items():
            if name in matrices:
                _restore_rows(matrices[name], name, tensor, trained.first_rows.get(name, 0), source)
            elif name in buffers:
                continue
            elif name not in places:
                raise UserError(
                    f"{source}: {name} has no place in this model; the run was tuned in another way. Export it with "
                    "launch/export.py and give the export as model="
                )
            else:
                _copy(places[name], name, tensor, trained.first_rows.get(name, 0), source)


def _copy(parameter: Tensor, name: str, tensor: Tensor, first: int, source: Path | str) -> None:
    if is_quantised(parameter):
        raise UserError(
            f"{source}: {name} was trained there and is quantised here. Export that run with launch/export.py and give "
            "the export as model="
        )
    place = parameter[first:] if first else parameter
    if place.shape != tensor.shape:
        raise UserError(
            f"{source}: {name} is {[*tensor.shape]}, the model has {[*place.shape]}. Its base changed since, or its "
            "adapters differ: give the base and the tuning of that run"
        )
    place.copy_(tensor)


def _restore_rows(matrix: Any, name: str, tensor: Tensor, first: int, source: Path | str) -> None:
    """A whole matrix, or its rows from `first` on, into old and new rows."""
    rows = len(matrix.old) + len(matrix.new)
    if first + len(tensor) != rows:
        raise UserError(
            f"{source}: {name} ends at row {first + len(tensor)}, the model's at {rows}. Its base changed since: "
            "give the base of that run"
        )
    split = max(matrix.first - first, 0)
    matrix.old[first : first + split].copy_(tensor[:split])
    matrix.new[max(first - matrix.first, 0) :].copy_(tensor[split:])
