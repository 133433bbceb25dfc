"""Trained weights of a checkpoint: writing their metadata, reading them for export, and initialising a later run with
them (`init_from`)."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds import app
from fireflyds.checkpoint import trainable_files, trainable_weights
from fireflyds.checkpoint.restore import find_checkpoint
from fireflyds.checkpoint.shard_files import ShardReader
from fireflyds.checkpoint.trainable_weights import TrainableWeights
from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.fs import Output, atomic_dir
from fireflyds.models.tuning import reset_dora_magnitudes
from fireflyds.runs import layout
from fireflyds.runs.find import find_run
from fireflyds.runs.fingerprint import read_inputs

TRAINABLE = "trainable"
"""Folder in a checkpoint with the metadata of the trained tensors; the tensors are in the shards."""


@dataclass(frozen=True, slots=True)
class TrainableWeightsWriter:
    """Completes a checkpoint: writes the metadata of the trained weights and verifies the shards."""

    model: Any
    config: TrainConfig
    adapter_config: Any
    metadata: dict[str, Any]
    """Hashes of base and tokenizer, vocabulary size."""

    def write(self, folder: Path, step: int, skipped: int) -> None:
        """On rank 0: write into the staging folder of a checkpoint.

        Raises:
            UserError: the saved tensors are not those that were trained.
        """
        shards = ShardReader(folder)
        shards.require_complete(trainable_weights.trainable_shapes(self.model, by_base_name=False))
        metadata = self.metadata | {"step": step}
        described = trainable_weights.describe_trainable_weights(self.model, self.adapter_config, metadata)
        trainable_files.save_metadata(described, folder / TRAINABLE)
        if self.config.tuning.method is not TuningMethod.full:
            tensors = ((trainable_weights.base_name(name), tensor) for name, tensor in shards.weights())
            trainable_files.verify_saved_weights(
                folder, tensors, trainable_weights.trainable_shapes(self.model), updated=step > skipped
            )


def read_trainable_weights(folder: Path) -> TrainableWeights:
    """The trained weights of a checkpoint, in float32. Tensors are read from its shards on access."""
    shards = ShardReader(folder)
    readers = {name: partial(_read_weight, shards, name) for name in shards.shapes}
    return trainable_weights.with_tensors(trainable_files.load_metadata(folder / TRAINABLE), readers)


def _read_weight(shards: ShardReader, name: str) -> Tensor:
    return shards.weight(name).float()


def restore_weights(model: Any, run_dir: Path, folder: Path | None = None) -> None:
    """Load into a new model the weights that its run took from `init_from`, then those of the checkpoint `folder`."""
    if (run_dir / layout.START).is_dir():
        start = trainable_files.load_trainable_weights(run_dir / layout.START)
        trainable_weights.load_into_model(model, start, run_dir / layout.START, must_cover=False)
        reset_dora_magnitudes(model, except_names=start.adapters)
    if folder is not None:
        trainable_weights.load_into_model(model, read_trainable_weights(folder), folder, must_cover=True)


def copy_initial_weights(config: TrainConfig, identity: dict[str, Any]) -> None:
    """On rank 0: copy the trained weights of the run `init_from` into this run's folder, unless they are there already.

    Raises:
        UserError: no such run, no checkpoint of it, another base or tokenizer, or different adapters.
    """
    start = Path(config.run_dir) / layout.START
    if not config.init_from or start.is_dir():
        return
    earlier_dir = find_run(config.runs, "init_from", config.init_from)
    newest = find_checkpoint(earlier_dir, None)
    earlier = app.from_yaml(earlier_dir / layout.CONFIG, TrainConfig)
    recorded = read_inputs(earlier_dir)
    for key, remedy in (
        ("base", f"Give model={earlier.model.path or 'as there'}, or export that run and give model=<its export>"),
        ("tokenizer", f"Give model.tokenizer={earlier.model.tokenizer_path}"),
        ("vocab_size", f"Give model={earlier.model.path or 'as there'}"),
    ):
        if recorded.get(key) != identity[key]:
            raise UserError(
                f"that run's {key} is {_short(recorded.get(key))}, this one's {_short(identity[key])}",
                key="init_from",
                value=config.init_from,
                remedy=remedy,
            )
    weights = read_trainable_weights(newest)
    if (earlier_dir / layout.START).is_dir():
        weights = weights.over(trainable_files.load_trainable_weights(earlier_dir / layout.START))
    _check_adapters(config, earlier, weights)
    weights.metadata = identity | {"run": config.init_from, "checkpoint": newest.name}
    with atomic_dir(start, Output("start of a run", key="run")) as staging:
        trainable_files.save_trainable_weights(weights, staging)


def _short(value: Any) -> str:
    return str(value)[:12]


def _check_adapters(config: TrainConfig, earlier: TrainConfig, weights: TrainableWeights) -> None:
    """Raises `UserError` unless adapters keep their settings: another scale would change the effect of the weights."""
    if not weights.adapters:
        return
    before, now = earlier.tuning, config.tuning
    for key in ("r", "alpha", "use_rslora", "use_dora", "target_modules", "experts"):
        if not now.has_adapters or getattr(before, key) != getattr(now, key):
            value = getattr(now, key) if now.has_adapters else f"none, tuning={now.method.name}"
            raise UserError(
                f"that run has adapters with {key}={getattr(before, key)}, this one {value}",
                key="init_from",
                value=config.init_from,
                remedy=f"Use the same, or merge them: python launch/export.py run={config.init_from}, then "
                f"model={earlier.run_dir}/{layout.EXPORT}",
            )
